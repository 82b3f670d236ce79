"""Content of the report: terms, units, conventions, curves, slices, colours."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.evaluation import Ledger, score_case, shown_cases, write_results
from liverseg_dist.evaluation.curves import LOSS, MAX_POINTS, load_training, read_curves
from liverseg_dist.evaluation.notes import list_edge_notes, list_resolution_notes
from liverseg_dist.evaluation.report.html_report import render_report
from liverseg_dist.evaluation.report.overlays import render_case
from liverseg_dist.evaluation.report.picture_files import save_pictures
from liverseg_dist.evaluation.report.tensorboard import collect_headline_figures
from liverseg_dist.evaluation.slice_data import HU_OF_CODE, check_slices, pack_slices, unpack_volume
from liverseg_dist.evaluation.summary import aggregate_scores
from liverseg_dist.files import natural_key
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.pages import OVERLAY, hex_colour, load_theme, structure_colours
from liverseg_dist.pages.palette import LESION_RGB, ORGAN_RGB, SURFACE_RGB
from liverseg_dist.volume import Grid, Volume
from tests.evaluation.masks import SHAPE, labels


def case_of(
    seed: int, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0), name: str = ""
) -> dict:
    return score_case(name or f"case_{seed}", labels(seed + 1), labels(seed), spacing_mm)


def text_of(page: str) -> str:
    """Visible text, without scripts, styles and attributes."""
    body = re.sub(r"<(script|style)>.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"<[^>]*>", " ", body)


def test_terms_are_consistent() -> None:
    cases = [case_of(seed) for seed in range(3)]
    text = text_of(render_report(aggregate_scores(cases), cases))
    assert not re.search(r"\bfound\b", text)
    for term in ("detected (IoU", "touched (any overlap)", "missed", "false positive"):
        assert term in text.replace("&gt;", ">")
    tags = collect_headline_figures(aggregate_scores(cases))
    assert "evaluation/lesions/recall_touched" in tags
    assert not [tag for tag in tags if "iou" in tag]


def test_burden_is_in_per_cent_everywhere() -> None:
    cases = [case_of(seed) for seed in range(3)]
    summary = aggregate_scores(cases)
    page = render_report(summary, cases)
    percent = f"{100 * summary['burden']['rmse']:.2f} %"
    assert page.count(percent) >= 2  # tile and table
    assert f'<div class="figure">{percent}</div>' in page
    assert (
        collect_headline_figures(summary)["evaluation/burden_rmse_pct"]
        == 100 * summary["burden"]["rmse"]
    )


@pytest.mark.parametrize(
    ("spacing_mm", "expected"),
    [
        ((3.0, 3.0, 3.0), "longer than 2 mm"),
        ((5.0, 1.5, 1.5), "every voxel side is longer than 1 mm"),
        ((5.0, 0.7, 0.7), "along an axis"),
        ((1.0, 0.7, 0.7), None),
    ],
)
def test_tolerances_below_the_voxel_size_are_explained(
    spacing_mm: tuple[float, float, float], expected: str | None
) -> None:
    case = case_of(1, spacing_mm)
    notes = list_resolution_notes([case])
    assert [expected in note for note in notes] == [True] * (expected is not None)
    if expected == "longer than 2 mm":
        assert case["liver"]["nsd_1mm"] == case["liver"]["nsd_2mm"]
        assert expected in render_report(aggregate_scores([case]), [case])


def test_the_edge_convention_is_stated_where_it_matters() -> None:
    truth = np.zeros((12, 32, 32), dtype=np.uint8)
    truth[4:, 4:28, 4:28] = 1
    prediction = truth.copy()
    prediction[-1] = 0
    cut = score_case("cut", prediction, truth, (3.0, 3.0, 3.0))
    (note,) = list_edge_notes([cut])
    assert "closed: 3.0 mm" in note or "3.0 mm closed" in note
    figures = render_report(aggregate_scores([cut]), [cut]).split('<section id="definitions">')[0]
    assert "<td>MSSD closed at the edge, mm</td>" in figures
    whole = score_case("whole", np.pad(prediction, 1), np.pad(truth, 1), (3.0, 3.0, 3.0))
    assert list_edge_notes([whole]) == []
    old = {**cut, "liver": {k: v for k, v in cut["liver"].items() if "closed" not in k}}
    assert aggregate_scores([old])["liver"]["mssd_closed_mm"] is None  # a ledger from before


def test_header_names_what_was_evaluated() -> None:
    case = case_of(1)
    details = {
        "title": "run: evaluation on the test cases of Task03", "run": "run", "data_set": "Task03",
        "part": "test", "fold": 0, "postprocessing": "largest_component=true",
    }  # fmt: skip
    page = render_report(
        aggregate_scores([case]) | {"details": details}, [case], environment={"date": "2026-11-30"}
    )
    assert "<title>run: evaluation on the test cases of Task03</title>" in page
    header = page[: page.index("</header>")]
    for value in ("Task03", "test", "0", "1", "2026-11-30", "largest_component=true"):
        assert f"<dd>{value}</dd>" in header


def test_curves_are_read_from_the_metrics_of_the_run(tmp_path: Path) -> None:
    rows = [
        {"step": step, "train/loss": 1 / step, "train/learning_rate": 1e-3}
        for step in range(1, 2001)
    ]
    rows += [
        {"step": 1000 * k, "validation/dice_liver": 0.4 * k, "validation/dice_tumour": 0.1 * k}
        for k in (1, 2)
    ]
    lines = [json.dumps(row) for row in rows] + ["{broken", '{"step": 3, "train/loss": NaN}', "[]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curves = read_curves(tmp_path)
    assert len(curves[LOSS]) <= MAX_POINTS
    assert curves[LOSS][0] == [1, 1.0]
    assert curves[LOSS][-1] == [2000, 1 / 2000]
    case = case_of(1)
    ledger = Ledger(tmp_path / "out" / "ledger", {"weights": "a"})
    write_results(tmp_path / "out", [case], {}, {}, ledger, training={"run": curves})
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Training loss", "Validation Dice", "Learning rate"):
        assert f'aria-label="{title} over training steps"' in page
    assert load_training(tmp_path / "out") == {"run": curves}
    assert read_curves(tmp_path / "none") == {}


def test_packed_slices_hold_every_voxel_and_soft_tissue_to_1_hu() -> None:
    image = np.random.default_rng(0).integers(-1100, 1500, SHAPE).astype(np.int16)
    prediction, truth = labels(1), labels(2)
    packed = pack_slices(prediction, truth, image, (2.0, 1.0, 1.0))
    assert check_slices(packed)
    shape = tuple(packed["shape"])
    assert shape == SHAPE
    codes = unpack_volume(packed["labels"], shape)
    np.testing.assert_array_equal(codes % 3, truth)
    np.testing.assert_array_equal(codes // 3, prediction)
    hu = HU_OF_CODE[unpack_volume(packed["ct"], shape)]
    soft = (image > -120) & (image < 278)
    assert np.abs(hu[soft] - image[soft]).max() <= 1
    assert np.abs(hu - np.clip(image, -1024, 1400)).max() <= 20


def test_a_wide_scan_keeps_all_axial_slices() -> None:
    mask = np.zeros((5, 400, 600), dtype=np.uint8)
    mask[2, 100:300, 100:500] = 1
    packed = pack_slices(mask, mask, mask.astype(np.int16), (5.0, 0.5, 0.5))
    assert packed["shape"] == [5, 192, 288]
    assert packed["stored_of"] == [5, 400, 600]
    extent = [n * mm for n, mm in zip(packed["shape"], packed["spacing_mm"], strict=True)]
    assert extent == pytest.approx([25.0, 200.0, 300.0], rel=1e-5)


def test_slices_without_a_mask_are_stored() -> None:
    mask = np.zeros((40, 30, 30), dtype=np.uint8)
    mask[18:22, 12:18, 12:18] = 1
    volume = Volume(mask, Grid(mask.shape, np.diag([1.0, 1.0, 1.0, 1.0])))
    pictures = render_case(volume, volume, volume)
    assert pictures is not None
    assert sorted(pictures["slices"]["shape"]) == [30, 30, 40]
    assert pictures["first_slice"] == [0, 0, 0]


def test_large_cases_are_in_files_next_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_cases, "MAX_INLINE_BYTES", 10)
    case = case_of(1, name="a%/'<b>")
    grid = Grid(SHAPE, np.eye(4))
    save_pictures(
        tmp_path / "pictures", case["case_id"], Volume(labels(2), grid), Volume(labels(1), grid)
    )
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "of_before.js").write_text("")
    write_results(tmp_path, [case])
    (file,) = (tmp_path / "slices").iterdir()
    text = file.read_text()
    assert text.startswith("liversegSlices(")
    assert "<" not in text
    page = (tmp_path / "report.html").read_text()
    assert (
        'data-file="slices/a%2525' in page
    )  # %25 in the file's name, quoted once more in the address
    assert "data:image/jpeg;base64," in page
    assert "data-pictures" not in re.sub(r"<script>.*</script>", "", page, flags=re.S)


def test_colours_are_one_palette() -> None:
    theme = load_theme()
    assert f"--organ: {hex_colour(ORGAN_RGB)};" in theme
    assert f"--lesion: {hex_colour(LESION_RGB)};" in theme
    assert list(structure_colours(LITS_SCHEME).values()) == [ORGAN_RGB, LESION_RGB]
    assert OVERLAY["true_positive"][:3] == SURFACE_RGB["touched"]
    assert OVERLAY["false_negative"][:3] == SURFACE_RGB["missed"]
    assert "prefers-color-scheme: dark" in theme


# Severe colour-vision deficiency in linear RGB (Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    ),
    "deuteranopia": np.array(
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    ),
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_are_distinct_for_colour_blind_readers(deficiency: str) -> None:
    def seen(colour: tuple[int, ...]) -> np.ndarray:
        linear = (np.array(colour[:3]) / 255) ** 2.2
        return 255 * np.clip(DEFICIENCIES[deficiency] @ linear, 0, 1) ** (1 / 2.2)

    errors = [SURFACE_RGB[kind] for kind in ("touched", "missed", "false")]
    for group in (errors, [ORGAN_RGB, LESION_RGB]):
        shown = [seen(colour) for colour in group]
        for i, one in enumerate(shown):
            for other in shown[:i]:
                assert np.linalg.norm(one - other) > 60


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["liver_10", "liver_2", "liver_1", "b", "liver_²", "liver_02"]
    assert sorted(names, key=natural_key) == [
        "b",
        "liver_1",
        "liver_02",
        "liver_2",
        "liver_10",
        "liver_²",
    ]

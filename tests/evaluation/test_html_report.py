"""The report: complete, self-contained, escaped, and usable in a browser."""

import html.parser
import json
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from liverseg_dist.data.audit.audit_summary import summarize_audit
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation import Ledger, load_results, score_case, write_results
from liverseg_dist.evaluation.report.html_report import render_report
from liverseg_dist.evaluation.report.overlays import draw_overlay, draw_plane, make_scene
from liverseg_dist.evaluation.report.picture_files import load_pictures, save_pictures
from liverseg_dist.evaluation.report.tensorboard import write_tensorboard
from liverseg_dist.evaluation.results import rewrite_results
from liverseg_dist.evaluation.shown_cases import select_shown_cases
from liverseg_dist.evaluation.summary import aggregate_scores
from liverseg_dist.volume import Grid, Volume
from tests.evaluation.masks import SHAPE, labels

EVIL = '<script>alert("1")</script>'
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


AUDIT = summarize_audit(
    {
        "liver_1": {"status": "kept", "findings": [], "stored_as": ["liver_1"]},
        "liver_2": {
            "status": "repaired",
            "findings": [{"severity": "warning", "code": "spacing", "message": EVIL}] * 2,
            "stored_as": ["liver_2"],
        },
        "liver_3": {
            "status": "quarantined",
            "findings": [
                {"severity": "info", "code": "slab", "message": "all 67 slices"},
                {"severity": "error", "code": "corrupt", "message": "the file ends early"},
            ],
        },
    }
)


def volume(voxels: np.ndarray, orientation: str = "RAS") -> Volume:
    affine = np.diag([0.9, 0.7, 2.5, 1.0])
    return Volume(voxels, Grid(voxels.shape, affine)).reoriented(orientation)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation of 12 cases, one of them with a name made of markup, and one failure."""
    folder = tmp_path_factory.mktemp("evaluation")
    ledger = Ledger(folder / "ledger", {"weights": "abc"})
    names = [f"case_{i:02}" for i in range(10)] + [EVIL, "'\"><img src=x>"]
    for seed, name in enumerate(names):
        prediction, truth = labels(seed + seed % 3), labels(seed)
        ledger.write(name, score_case(name, prediction, truth, (2.5, 0.7, 0.9)))
        ct = (
            volume(np.random.default_rng(seed).normal(40, 60, SHAPE).astype(np.int16))
            if seed % 2
            else None
        )
        save_pictures(folder / "pictures", name, volume(prediction), volume(truth), ct)
    failures = {"case_&_lost": "<b>no file</b>"}
    details = {
        "title": EVIL,
        "commit": "abc123",
        "settings": {"inference": {"overlap": 0.5}},
        "audit": AUDIT,
    }
    environment = {"date": "2026-11-30", "device": EVIL, "commit": "fed321"}
    steps = [[step, 1 / (1 + step)] for step in range(0, 50, 5)]
    training = {
        EVIL: {"train/loss": steps, "train/learning_rate": steps, "validation/dice_liver": steps}
    }
    write_results(
        folder, ledger.read_all(), failures, details, ledger, environment, training=training
    )
    return folder


class Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(page)
    return parser.found


def test_names_and_reasons_are_escaped(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    tags = [tag for tag, _ in elements(page)]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "&lt;script&gt;alert" in page
    assert "&lt;b&gt;no file&lt;/b&gt;" in page


def test_page_needs_no_network(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for tag, attributes in elements(page):
        assert tag not in {"link", "iframe", "object", "base"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"https?://", page)
    assert "default-src 'none'" in page


def test_every_case_has_a_row_and_the_worst_have_pictures(folder: Path) -> None:
    results = load_results(folder)
    page = (folder / "report.html").read_text()
    assert page.count('<td class="name"') == 12
    shown = select_shown_cases(results.cases)
    assert [rank for rank, _ in shown] == ["worst"] * 8 + ["best"] * 2
    mean_dice = [(case["liver"]["dice"] + case["tumour"]["dice"]) / 2 for _, case in shown]
    assert mean_dice[:8] == sorted(mean_dice[:8])
    assert page.count('<canvas class="surface"') == 10
    assert page.count('data-pictures="{') == 10


def test_headline_figures_are_those_of_the_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    page = (folder / "report.html").read_text()
    assert f'<div class="figure">{summary["liver"]["dice_per_case"]:.3f}</div>' in page
    assert f'<div class="figure">{summary["tumour"]["dice_global"]:.3f}</div>' in page


def test_settings_hardware_and_audit_are_listed(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "<dt>inference.overlap</dt><dd>0.5</dd>" in page
    assert "<dt>commit</dt><dd>fed321</dd>" in page
    assert "<dt>liver_3</dt><dd>quarantined: the file ends early</dd>" in page
    assert {status: count for status, count in AUDIT["counts"].items() if count} == dict.fromkeys(
        ("kept", "repaired", "quarantined"), 1
    )
    assert [(f["code"], f["scans"]) for f in AUDIT["findings"]] == [
        ("corrupt", 1),
        ("spacing", 1),
        ("slab", 1),
    ]
    assert (
        "fed321" not in (folder / "summary.json").read_text()
    )  # which is the same on every machine


def test_few_cases_include_best_ones() -> None:
    cases = [score_case(f"c{i}", labels(i), labels(i + i % 4), (1.0, 1.0, 1.0)) for i in range(4)]
    for count, ranks in ((1, "w"), (2, "wb"), (3, "wwb"), (4, "wwbb")):
        shown = select_shown_cases(cases[:count])
        assert "".join(rank[0] for rank, _ in shown) == ranks
        assert len({case["case_id"] for _, case in shown}) == count


def test_tensorboard_shows_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    results = load_results(folder)
    for _ in range(2):  # replaced, not appended to
        board = write_tensorboard(
            tmp_path, results.summary, results.cases, folder / "pictures", step=7
        )
    events = EventAccumulator(str(board), size_guidance={"images": 0}).Reload()
    shown = [case["case_id"] for _, case in select_shown_cases(results.cases)]
    assert sorted(tag.split("/", 2)[2] for tag in events.Tags()["images"]) == sorted(shown)
    tag = next(tag for tag in events.Tags()["images"] if tag.endswith("case_01"))
    (image,) = events.Images(tag)
    with (
        Image.open(folder / "pictures" / "case_01.png") as saved,
        Image.open(BytesIO(image.encoded_image_string)) as logged,
    ):
        assert image.step == 7
        assert np.array_equal(np.asarray(saved.convert("RGB")), np.asarray(logged.convert("RGB")))
    (dice,) = events.Scalars("evaluation/tumour/dice_global")
    assert dice.value == pytest.approx(results.summary["tumour"]["dice_global"], rel=1e-6)


def test_results_written_again_are_identical(folder: Path) -> None:
    names = ("summary.json", "cases.csv", "lesions.csv", "report.html")
    before = {name: (folder / name).read_bytes() for name in names}
    rewrite_results(load_results(folder))
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_results_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    case_id = load_results(copy).cases[0]["case_id"]
    Ledger(copy / "ledger", {"weights": "other"}).write(case_id, {"case_id": case_id})
    with pytest.raises(UserError, match="no entry for"):
        load_results(copy)


@pytest.mark.parametrize("content", ["", "{}", '{"ledger": null}', "[1]"])
def test_damaged_summary_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("case_ids", [1.5]),
        ("case_ids", "ab"),
        ("case_ids", ["a", "a"]),
        ("failed", ["a"]),
        ("details", 3),
    ],
)
def test_summary_with_wrong_types_is_reported(
    folder: Path, tmp_path: Path, place: str, value: object
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    summary = json.loads((copy / "summary.json").read_text())
    (summary["ledger"] if place == "case_ids" else summary)[place] = value
    (copy / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="damaged"):
        load_results(copy)


def test_missing_summary_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no summary\.json"):
        load_results(tmp_path)


def test_results_are_found_through_their_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "evaluation")
    assert load_results(tmp_path / "run").name == "run"


def test_report_of_empty_cases_is_rendered() -> None:
    nothing = np.zeros(SHAPE, dtype=np.uint8)
    case = score_case("empty", nothing, nothing, (1.0, 1.0, 1.0))
    page = render_report(aggregate_scores([case]), [case])
    assert page.count('<td class="name"') == 1
    assert render_report(aggregate_scores([]), []).count('<td class="name"') == 0


def test_cells_are_not_formulas(folder: Path, tmp_path: Path) -> None:
    case = score_case("=1+2", labels(0), labels(1), (1.0, 1.0, 1.0))
    write_results(tmp_path, [case])
    assert (tmp_path / "cases.csv").read_text().splitlines()[1].startswith("'=1+2,liver,done,")


def test_cases_csv_has_a_row_for_each_case_and_structure(folder: Path) -> None:
    rows = (folder / "cases.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 12 + 1
    assert rows[-1].startswith("case_&_lost,,failed,")


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SPL", "AIR"])
def test_pictures_do_not_depend_on_how_a_file_is_stored(orientation: str) -> None:
    reference = make_scene(volume(labels(1)), volume(labels(2)))
    turned = make_scene(volume(labels(1), orientation), volume(labels(2), orientation))
    assert reference is not None
    assert turned is not None
    for plane in ("axial", "coronal", "sagittal"):
        np.testing.assert_array_equal(draw_plane(reference, plane, 3), draw_plane(turned, plane, 3))


def test_pictures_are_upright() -> None:
    """A mark at the patient's right, front and head is at the left and top of the pictures."""
    truth = np.zeros((40, 40, 40), dtype=np.uint8)
    truth[4:36, 4:36, 4:36] = 1
    prediction = truth.copy()
    prediction[30:34, 30:34, 30:34] = 2  # RAS: x to the right, y to the front, z to the head
    affine = np.eye(4)
    scene = make_scene(
        Volume(prediction, Grid((40, 40, 40), affine)), Volume(truth, Grid((40, 40, 40), affine))
    )
    assert scene is not None
    z, y, x = (int(v) for v in np.argwhere(scene.prediction == 2).mean(axis=0))
    for plane, index in (("axial", z), ("coronal", y), ("sagittal", x)):
        picture = draw_plane(scene, plane, index).astype(int)
        false = np.argwhere((picture[..., 0] > picture[..., 2] + 60) & (picture[..., 1] < 100))
        middle = np.array(picture.shape[:2]) / 2
        assert (false.mean(axis=0) < middle).all()


def test_overlay_of_a_slice() -> None:
    truth, prediction = labels(1)[8], labels(2)[8]
    picture = draw_overlay(np.full(truth.shape, 40, dtype=np.int16), truth, prediction)
    assert picture.shape == (*truth.shape, 3)
    assert picture.dtype == np.uint8
    untouched = (truth == 0) & (prediction == 0)
    assert (picture[::-1, ::-1][untouched] == 127).all()  # 40 HU in the middle of the window


def test_a_tampered_picture_file_is_not_shown(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    file = tmp_path / "pictures" / "case_01.json"
    assert load_pictures(tmp_path / "pictures", "case_01") is not None
    pictures = json.loads(file.read_text())
    pictures["slices"]["labels"] = "x');background:url(http://example.com/"
    file.write_text(json.dumps(pictures))
    assert load_pictures(tmp_path / "pictures", "case_01") is None


def test_contact_sheet_is_a_png(folder: Path) -> None:
    with Image.open(folder / "pictures" / "case_01.png") as image:
        assert image.width > image.height > 50


PROBE = """<script>
const finish = () => {
  const article = document.querySelector("article.case");
  const figure = document.querySelector("figure.plane");
  const slider = figure.querySelector("input"), canvas = figure.querySelector("canvas");
  const viewer = viewers[0];
  const pixels = () => {
    viewer.draw();
    return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).join();
  };
  const at = (slice) => {
    slider.value = slice; slider.dispatchEvent(new Event("input"));
    return [pixels(), figure.querySelector("output").textContent];
  };
  const frames = [at(0), at(Math.floor(slider.max / 2)), at(Number(slider.max))];
  at(Math.floor(slider.max / 2));
  const toggle = document.getElementById("overlay");
  const shown = pixels();
  toggle.click();
  const hidden = pixels() !== shown;
  toggle.click();
  const key = (name) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  const before = viewer.index;
  key("ArrowDown");
  const turned = viewer.index - before;
  key("+");
  const zoomed = viewer.zoom;
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -1, cancelable: true }));
  const wheeled = viewer.zoom;
  const centre = viewer.centre[1];
  key("ArrowRight");
  const panned = viewer.centre[1] !== centre;
  key("0");
  const reset = viewer.zoom;
  const counts = viewers.map((each) => [Number(each.slider.max) + 1, each.volume.shape[each.plane]]);
  const heading = document.querySelector("#cases-table th[data-key='1']");
  heading.click();
  const column = [...document.querySelectorAll("#cases-table tbody tr")].map((row) => Number(row.cells[1].textContent));
  heading.click();
  const first = Number(document.querySelector("#cases-table tbody tr").cells[1].textContent);
  const search = document.getElementById("search");
  search.value = "case_03"; search.dispatchEvent(new Event("input"));
  const left = [...document.querySelectorAll("#cases-table tbody tr")].filter((row) => !row.hidden).length;
  const surface = document.querySelector("canvas.surface");
  const seen = surface.getContext("2d").getImageData(0, 0, surface.width, surface.height).data;
  const painted = seen.filter((value, i) => i % 4 === 0 && value > 40).length;
  const unnamed = [...document.querySelectorAll("button, input, select, canvas")].filter((each) =>
    !each.getAttribute("aria-label") && !each.closest("label") && !each.textContent.trim()).length;
  document.body.setAttribute("data-probe", JSON.stringify({
    frames: frames.map(([all, number]) => [all.length + ":" + hash(all), number]),
    hidden, turned, zoomed, wheeled, panned, reset, counts, column, first, left, painted, unnamed,
    errors: window.problems, wide: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    windows: windows() }));
};
const hash = (text) => {
  let h = 0;
  for (let i = 0; i < text.length; i++) h = (31 * h + text.charCodeAt(i)) | 0;
  return h;
};
const windows = () => {
  const viewer = viewers.find((each) => each.volume.ct);
  if (!viewer) return [];
  return [...document.querySelectorAll("[data-preset]")].map((button) => {
    button.click();
    viewer.draw();
    const { width, height } = viewer.canvas;
    const data = viewer.canvas.getContext("2d").getImageData(0, 0, width, height).data;
    return hash(Array.from(data).join());
  });
};
const wait = () => {
  const states = [...document.querySelectorAll("article.case")].map((article) => article.dataset.state);
  if (states.length && states.every(Boolean)) finish(); else setTimeout(wait, 50);
};
window.addEventListener("load", wait);
</script>"""
WATCH = "<script>window.problems = []; window.onerror = (message) => { window.problems.push(message); };</script>"


def probed(page: str, folder: Path, width: int = 1280, dark: bool = False) -> dict[str, Any]:
    """What the probe finds in the page, opened in headless Chromium; fails on any message on the console."""
    assert CHROMIUM is not None
    page = page.replace("<style>", f"{WATCH}<style>", 1).replace("</body>", f"{PROBE}</body>")
    (folder / "probed.html").write_text(page)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    run = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
         "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", f"file://{folder / 'probed.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (probe,) = [
        attributes["data-probe"]
        for tag, attributes in elements(run.stdout)
        if "data-probe" in attributes
    ]
    found: dict[str, Any] = json.loads(probe or "")
    assert found["errors"] == []
    lines = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert [
        line for line in lines if "willReadFrequently" not in line
    ] == []  # that one is the probe's own
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_all_slices_windows_and_tables_work(folder: Path, tmp_path: Path) -> None:
    page = (folder / "report.html").read_text()
    light = probed(page, tmp_path)
    check_probe(light)
    assert len(light["windows"]) == 3
    dark = probed(page, tmp_path, width=500, dark=True)
    check_probe(dark)
    assert dark["wide"] <= 500  # only tables scroll, within their panels
    assert brightness(light["ground"]) > 200 > 60 > brightness(dark["ground"])
    assert brightness(light["ink"]) < 60 < 200 < brightness(dark["ink"])


def brightness(colour: str) -> float:
    red, green, blue = (float(part) for part in re.findall(r"[\d.]+", colour)[:3])
    return (red + green + blue) / 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_report_of_five_hundred_cases_works_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """The pictures do not grow with the cases, and the page stays usable."""
    known = load_results(folder).cases
    cases = [
        known[i % 10] | {"case_id": f"{known[i % 10]['case_id']}{'' if i < 10 else f'_{i}'}"}
        for i in range(500)
    ]
    page = render_report(aggregate_scores(cases), cases, folder / "pictures")
    small = (folder / "report.html").read_text()
    assert page.count('<td class="name"') == 500
    assert len(page) < len(small) + 500 * 8_000
    check_probe(probed(page, tmp_path))


def check_probe(found: dict[str, Any]) -> None:
    for which in (0, 1):
        assert len({frame[which] for frame in found["frames"]}) == 3
    assert all(reachable == stored for reachable, stored in found["counts"])
    assert len(set(found["windows"])) == len(
        found["windows"]
    )  # each preset shows other grey values
    assert found["hidden"]
    assert found["turned"] == 1
    assert found["wheeled"] > found["zoomed"] > found["reset"] == 1
    assert found["panned"]
    assert found["unnamed"] == 0
    assert found["column"] == sorted(found["column"])
    assert found["first"] == max(found["column"])
    assert found["left"] >= 1
    assert found["painted"] > 1000
    assert found["wide"] <= 1280

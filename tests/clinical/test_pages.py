"""Clinical pages: one palette with the reports, a cohort of thousands, texts that a reader needs."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import liverseg_dist.clinical
from liverseg_dist.clinical.charts import DATE_WIDTH, date_positions, draw_volumes
from liverseg_dist.clinical.cohort_page import render_cohort, summarise_patient
from liverseg_dist.clinical.follow_page import describe_partners, format_doubling
from liverseg_dist.clinical.page import render_page
from liverseg_dist.clinical.registration import identity_registration
from liverseg_dist.clinical.scan_checks import describe_poor_fit
from liverseg_dist.commands.follow_segmentation import name_scans
from liverseg_dist.pages import load_theme
from tests.clinical.patients import BASELINE

PACKAGE = Path(liverseg_dist.clinical.__file__).parent


def test_colours_are_those_of_all_pages() -> None:
    for file in (*PACKAGE.glob("*.py"), *PACKAGE.glob("templates/*")):
        colours = re.findall(r"#[0-9a-fA-F]{6}\b|#[0-9a-fA-F]{3}\b", file.read_text("utf-8"))
        assert colours == [], file
    known = set(re.findall(r"--([a-z-]+):", load_theme()))
    css = (PACKAGE / "templates" / "clinical.css").read_text("utf-8")
    # These are set in the templates or the script; the rest are the theme's.
    own = {"tint", "row", "line-width", "line-opacity"}
    assert set(re.findall(r"var\(--([a-z-]+)", css)) - own <= known
    page = render_page("cohort.html.j2", **_empty_cohort())
    assert load_theme() in page


def _empty_cohort() -> dict:
    return {
        "title": "", "rows": [], "failures": {}, "categories": [], "volumetric": [], "colour_class": str,
        "waterfall": "", "spider": "", "script": "",
    }  # fmt: skip


def make_rows(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        sums = [50.0, *np.round(rng.uniform(0, 120, 3), 2).tolist()]
        category = ("CR", "PR", "SD", "PD")[number % 4]
        content = {
            "scans": ["a", "b", "c", "d"],
            "days": [0, 60, 120, 180],
            "total": {"change": 0.1},
            "lesions": [{}] * 3,
            "response": {
                "sums_mm": sums,
                "recist": category,
                "volumetric": "SD",
                "best": {"recist": category, "date": 1},
                "dates": [{"new_lesions": [4] if number % 10 == 0 else []}] * 3,
            },
        }
        rows.append(summarise_patient(f"P{number}", content, f"patients/P{number}/follow.html"))
    return rows


def test_a_cohort_of_two_thousand() -> None:
    page = render_cohort("Cohort", make_rows(2000), {"P9": "P9: damaged"})
    assert len(page) < 2 << 20
    assert page.count("<rect data-row=") == page.count("<polyline data-row=") == 2000
    assert page.count('href="patients/') == 2000
    cards = re.findall(r'<div class="name">([^<]*)</div>', page)
    assert cards == ["CR", "PR", "SD", "PD"]
    assert page.count('data-new="1"') == 200
    # Worst first; the bars fill the width whatever their number.
    bars = [float(x) for x in re.findall(r'<rect data-row="\d+" class="\w+" x="([\d.]+)"', page)]
    assert bars == sorted(bars)
    assert bars[-1] == pytest.approx(752, abs=1)
    tops = [float(y) for y in re.findall(r'<rect [^>]*y="([\d.]+)"', page)]
    assert tops == sorted(tops)


def test_labels_of_dates_do_not_overlap_and_curves_have_numbers() -> None:
    lesions = [{"id": n, "volume_ml": [2.0, 1.0, 1.0, 0.5, 0.5 + n / 100]} for n in range(1, 6)]
    content = {
        "days": [0, 97, 144, 232, 303],
        "scans": ["a"] * 5,
        "total": {"volume_ml": [10.0, 5.0, 5.0, 2.5, 2.6]},
        "lesions": lesions,
    }
    labels = ["2024-01-01", "2024-04-07", "2024-05-24", "2024-08-20", "2024-10-30"]
    chart = draw_volumes(content, labels)
    positions = dict(zip(labels, date_positions(content), strict=True))
    shown = [label for label in labels if f">{label}<" in chart]
    assert {shown[0], shown[-1]} == {labels[0], labels[-1]}
    middles = [positions[label] for label in shown[1:-1]]
    ends = [positions[shown[0]] + DATE_WIDTH / 2, *middles, positions[shown[-1]] - DATE_WIDTH / 2]
    assert all(np.diff(ends) >= DATE_WIDTH)
    names = re.findall(r'class="curve-name" x="[\d.]+" y="([\d.]+)"[^>]*>(\d)<', chart)
    assert sorted(name for _, name in names) == ["1", "2", "3", "4", "5"]
    heights = sorted(float(y) for y, _ in names)
    assert all(np.diff(heights) >= 15)


def test_texts_of_lesions() -> None:
    one = {"id": 1, "status": "merged", "merged_into": None, "split_from": None}
    other = {"id": 3, "status": "merged", "merged_into": 1, "split_from": None}
    assert describe_partners(one, [one, other]) == " with 3"
    assert describe_partners(other, [one, other]) == " into 1"
    whole = {"id": 2, "status": "split", "merged_into": None, "split_from": None}
    piece = {"id": 5, "status": "split", "merged_into": None, "split_from": 2}
    assert describe_partners(whole, [whole, piece]) == ": also 5"
    assert describe_partners(piece, [whole, piece]) == " from 2"
    growth = {"doubling_days": -80.0, "is_significant": True, "doubling_interval": (-44.0, -498.0)}
    assert format_doubling(growth) == "halves in 80 d (44–498)"
    assert format_doubling({**growth, "is_significant": False}) == "halves in 80 d *"


def test_a_registration_that_fits_poorly_is_reported() -> None:
    good = identity_registration(BASELINE)
    assert describe_poor_fit(good, "june", "liver") == []
    for change, text in (
        ({"dice": 0.8}, "Dice 0.80"),
        ({"surface_p95_mm": 12.0}, "12.0 mm"),
        ({"folding": 0.01}, "folds in 1.00 %"),
    ):
        poor = replace(good, quality=replace(good.quality, **change))
        (line,) = describe_poor_fit(poor, "june", "liver")
        assert "june" in line
        assert text in line


def test_scans_of_one_name_get_names_of_their_own(tmp_path: Path) -> None:
    march, june = tmp_path / "march" / "ct.nii.gz", tmp_path / "june" / "CT.nii.gz"
    assert name_scans([march, june], ["scan_1", "scan_2"]) == {
        march: "ct_scan_1",
        june: "CT_scan_2",
    }
    assert name_scans([march, tmp_path / "other.nii.gz"], ["scan_1", "scan_2"]) is None

"""Select the cases that the report shows in pictures, and place their slices.

Slices are part of the page, or files next to it where they would make the page too large. A page
that was opened from a disk may not fetch a file, but it may run a script. Such slices are therefore
written as `slices/CASE.js`, which the page loads when the case becomes visible.
"""

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from liverseg_dist.evaluation.case_scores import list_scored
from liverseg_dist.evaluation.ledger import encode_file_name
from liverseg_dist.evaluation.report.picture_files import load_pictures
from liverseg_dist.files import write_text

NUM_WORST = 8
NUM_BEST = 2
SLICES = "slices"
"""Folder next to the report."""
MAX_INLINE_BYTES = 8 << 20
"""Largest size of the slices within the page, all cases together."""
STILL_WIDTH_PX = 900
Case = dict[str, Any]


def worst_first_key(case: Case) -> tuple[float, float, str]:
    """Sort key, worst first: mean Dice of the structures, then HD95 of the first structure."""
    scored = list_scored(case)
    mean_dice = sum(case[name]["dice"] for name in scored) / len(scored)
    return mean_dice, -(case[scored[0]]["hd95_mm"] or 0.0), case["case_id"]


def select_shown_cases(
    cases: Sequence[Case], worst: int = NUM_WORST, best: int = NUM_BEST
) -> list[tuple[str, Case]]:
    """Select the worst and the best cases; cases without any true structure are left out.

    Returns:
        Pairs of `worst` or `best` and the case; the worst case and the best case come first in
        their group. No case is listed twice.
    """
    with_truth = []
    for case in cases:
        if any(case[name]["truth_voxels"] > 0 for name in list_scored(case)):
            with_truth.append(case)
    ranked = sorted(with_truth, key=worst_first_key)
    # With few cases, half of them may be the worst, so that some best ones remain.
    worst = min(worst, max(len(ranked) - best, (len(ranked) + 1) // 2))
    chosen = [("worst", case) for case in ranked[:worst]]
    rest = ranked[worst:]
    return chosen + [("best", case) for case in rest[::-1][:best]]


def collect_pictures(
    cases: Sequence[Case], pictures: Path | None, report_folder: Path | None
) -> list[dict[str, Any]]:
    """The shown cases with their pictures.

    Args:
        cases: All scored cases.
        pictures: Folder of `save_pictures`, if there is one.
        report_folder: Folder of the report, in which `slices/` is replaced; None puts all slices
            into the page.

    Returns:
        For each case `rank`, `case`, `name`, and either `pictures` (JSON text) or `file` (URL) with
        `still` (data URI).
    """
    if report_folder is not None:
        shutil.rmtree(report_folder / SLICES, ignore_errors=True)
    # The worst cases come first, so they are the ones whose slices are in the page.
    shown: list[dict[str, Any]] = []
    bytes_left = MAX_INLINE_BYTES
    for rank, case in select_shown_cases(cases):
        found = load_pictures(pictures, case["case_id"])
        if found is None or pictures is None:
            continue
        name = encode_file_name(case["case_id"])
        item = {"rank": rank, "case": case, "name": name, "pictures": "", "file": "", "still": ""}
        item["is_ct"] = found["slices"]["is_ct"]
        content = json.dumps(found, separators=(",", ":"))
        if report_folder is None or len(content) <= bytes_left:
            bytes_left -= len(content)
            item["pictures"] = content
        else:
            write_slices_file(report_folder / SLICES, name, content)
            item["file"] = f"{SLICES}/{quote(name)}.js"
            item["still"] = _encode_still(pictures / f"{name}.png")
        shown.append(item)
    return shown


def write_slices_file(folder: Path, name: str, content: str) -> None:
    """Write `folder/name.js`, a call with data only: JSON that `load_pictures` has checked."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.js", f"liversegSlices({json.dumps(name)}, {content});\n")


def _encode_still(file: Path) -> str:
    """The still picture of a case as a small JPEG, shown until the slices are loaded."""
    try:
        with Image.open(file) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError):
        return ""
    if small.width > STILL_WIDTH_PX:
        small = small.resize((STILL_WIDTH_PX, round(small.height * STILL_WIDTH_PX / small.width)))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"

"""Which cases the report shows in pictures, and where their slices go: into the page, or into files beside it.

Browsers do not let a page that was opened from a disk fetch a file, but they run a script from it. Slices that would
make the page too large are therefore written as `slices/CASE.js`, which the page loads when the case comes into view.
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

from liverseg_dist.evaluation.ledger import file_name
from liverseg_dist.evaluation.report.overlays import load_pictures
from liverseg_dist.files import write_text

NUM_WORST = 8
NUM_BEST = 2
SLICES = "slices"
"""Folder beside the report."""
MAX_INLINE_BYTES = 8 << 20
"""Slices within the page at most, all cases together."""
STILL_WIDTH_PX = 900
Case = dict[str, Any]


def worst_first_key(case: Case) -> tuple[float, float, str]:
    """Sort key, worst first: mean Dice of the two structures, then HD95 of the liver."""
    mean_dice = (case["liver"]["dice"] + case["tumour"]["dice"]) / 2
    return mean_dice, -(case["liver"]["hd95_mm"] or 0.0), case["case_id"]


def cases_to_show(
    cases: Sequence[Case], worst: int = NUM_WORST, best: int = NUM_BEST
) -> list[tuple[str, Case]]:
    """The worst and the best cases with `worst` or `best`; each once, cases without any mask left out."""
    ranked = sorted(
        (case for case in cases if case["liver"]["truth_voxels"] > 0), key=worst_first_key
    )
    worst = min(
        worst, max(len(ranked) - best, (len(ranked) + 1) // 2)
    )  # of few cases, too, some are the best
    chosen = [("worst", case) for case in ranked[:worst]]
    rest = ranked[worst:]
    return chosen + [("best", case) for case in rest[::-1][:best]]


def collect_pictures(
    cases: Sequence[Case], pictures: Path | None, beside: Path | None
) -> list[dict[str, Any]]:
    """The shown cases with their pictures.

    Args:
        cases: All scored cases.
        pictures: Folder of `save_pictures`, if there is one.
        beside: Folder of the report, in which `slices/` is written anew; None puts everything into the page.

    Returns:
        For each case `rank`, `case`, `name`, and `pictures` (JSON text) or `file` (URL) with `still` (data URI).
    """
    if beside is not None:
        shutil.rmtree(beside / SLICES, ignore_errors=True)
    shown: list[dict[str, Any]] = []
    room = MAX_INLINE_BYTES
    for rank, case in cases_to_show(cases):
        found = load_pictures(pictures, case["case_id"])
        if found is None or pictures is None:
            continue
        name = file_name(case["case_id"])
        item = {"rank": rank, "case": case, "name": name, "pictures": "", "file": "", "still": ""}
        content = json.dumps(found, separators=(",", ":"))
        if beside is None or len(content) <= room:
            room -= len(content)
            item["pictures"] = content
        else:
            write_slices_file(beside / SLICES, name, content)
            item["file"] = f"{SLICES}/{quote(name)}.js"
            item["still"] = _still(pictures / f"{name}.png")
        shown.append(item)
    return shown


def write_slices_file(folder: Path, name: str, content: str) -> None:
    """Write `folder/name.js`, a call with data only: `content` is JSON that `load_pictures` checked."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.js", f"liversegSlices({json.dumps(name)}, {content});\n")


def _still(file: Path) -> str:
    """The case's still picture as a small JPEG, to be seen until the slices are loaded; empty where there is none."""
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

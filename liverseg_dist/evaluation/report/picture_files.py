"""The files of a case's pictures: one JSON for the report's viewer, one PNG for slides and
TensorBoard. Both are written atomically; what is read becomes part of a web page and is checked."""

import json
import re
from pathlib import Path
from typing import Any

from liverseg_dist.evaluation.ledger import encode_file_name
from liverseg_dist.evaluation.report.display_labels import MAX_CLASSES
from liverseg_dist.evaluation.report.overlays import (
    SCHEMA,
    make_scene,
    render_case,
    render_contact_sheet,
)
from liverseg_dist.evaluation.slice_data import check_slices
from liverseg_dist.files import write_bytes, write_json
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.volume import Volume

_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def save_pictures(
    folder: Path,
    case_id: str,
    prediction: Volume,
    truth: Volume,
    image: Volume | None = None,
    labels: LabelScheme = LITS_SCHEME,
    *,
    is_ct: bool = True,
) -> None:
    """Write `folder/<case>.json` and `.png`; remove them where both masks are empty."""
    scene = make_scene(prediction, truth, image, labels=labels, is_ct=is_ct)
    stem = folder / encode_file_name(case_id)
    if scene is None:
        for suffix in (".json", ".png"):
            Path(f"{stem}{suffix}").unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(f"{stem}.png"), render_contact_sheet(scene))
    pictures = render_case(prediction, truth, image, labels, is_ct=is_ct)
    write_json(Path(f"{stem}.json"), pictures)


def load_pictures(folder: Path | None, case_id: str) -> dict[str, Any] | None:
    """Read the pictures of a case; None where it has none or the file is damaged."""
    if folder is None:
        return None
    try:
        pictures = json.loads(
            (folder / f"{encode_file_name(case_id)}.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError, RecursionError):
        return None
    return pictures if _is_valid(pictures) else None


def _is_valid(pictures: object) -> bool:
    """Whether a value is a result of `render_case`.

    It becomes part of a web page, so nothing else may pass.
    """
    try:
        surface = pictures["surface"]  # type: ignore[index]
        numbers = [*pictures["first_slice"], *pictures["start"], surface["count"]]  # type: ignore[index]
        for first, stop in pictures["focus"]:  # type: ignore[index]
            numbers += [first, stop]
        return (
            pictures["schema"] == SCHEMA  # type: ignore[index]
            and len(numbers) == 13
            and all(type(number) is int and number >= 0 for number in numbers)
            and isinstance(surface["spacing"], float)
            and _BASE64.fullmatch(surface["data"]) is not None
            and check_slices(pictures["slices"])  # type: ignore[index]
            and _are_valid_codes(pictures)  # type: ignore[arg-type]
        )
    except (TypeError, KeyError, ValueError):
        return False


def _are_valid_codes(pictures: dict[str, Any]) -> bool:
    groups = [pictures["compared"], *pictures["outlines"]]
    codes = [pictures["codes"], *(code for group in groups for code in group)]
    is_small = all(type(code) is int and 0 <= code <= MAX_CLASSES for code in codes)
    return is_small and isinstance(pictures["has_lesions"], bool)

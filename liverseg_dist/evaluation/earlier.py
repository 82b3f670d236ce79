"""Keep earlier results when other weights or settings are evaluated into the same folder.

A folder such as RUN/evaluation holds one evaluation, tied to weights and settings by the
fingerprint of its ledger. An evaluation with another fingerprint (post-processing was chosen since,
the run was extended, other `inference.*` settings) first moves the earlier one to
`earlier/XXXXXXXX` in the same folder, named by the first digits of its fingerprint. That folder is
a complete evaluation: `liverseg report` and `liverseg compare` read it.
"""

import json
import os
import shutil
from pathlib import Path

from liverseg_dist.evaluation.curves import TRAINING
from liverseg_dist.evaluation.results import ENVIRONMENT, LEDGER, PICTURES, SUMMARY
from liverseg_dist.evaluation.shown_cases import SLICES

EARLIER = "earlier"
NAME_DIGITS = 8
MOVED = (
    LEDGER,
    PICTURES,
    SLICES,
    "tensorboard",
    "masks",
    "cases.csv",
    "lesions.csv",
    ENVIRONMENT,
    TRAINING,
)
"""Files and folders of an evaluation besides its pages (report*.html) and its summary."""


def move_earlier_results(folder: Path, fingerprint: str) -> Path | None:
    """Move a finished evaluation with another fingerprint out of `folder`. Call it on one process.

    Args:
        folder: Folder of the evaluation.
        fingerprint: Of the ledger of the evaluation that is about to start.

    Returns:
        The new folder of the earlier results, or None where there were none to move.
    """
    earlier = _read_fingerprint(folder / SUMMARY)
    if earlier in ("", fingerprint):
        return None
    target = folder / EARLIER / _make_folder_name(earlier)
    target.mkdir(parents=True, exist_ok=True)
    pages = sorted(path.name for path in folder.glob("report*.html"))
    # The summary goes last: after an interruption the next call finds it and moves the rest to the
    # same place.
    for name in (*MOVED, *pages, SUMMARY):
        _replace_entry(folder / name, target / name)
    return target


def _read_fingerprint(summary: Path) -> str:
    """The fingerprint in a summary; empty where there is no readable summary."""
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
        return str(content["ledger"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _make_folder_name(fingerprint: str) -> str:
    # The summary may be damaged or edited: its text must not lead to a folder outside `earlier`.
    kept = "".join(c for c in fingerprint if c.isascii() and c.isalnum())
    return kept[:NAME_DIGITS] or "unnamed"


def _replace_entry(source: Path, target: Path) -> None:
    """Move a file or folder; it replaces an older one of the same evaluation."""
    if not source.exists():
        return
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)

"""Results of an earlier evaluation are moved aside, not overwritten, when other weights or settings are evaluated.

A folder such as RUN/evaluation holds one evaluation, tied to weights and settings by the fingerprint of its ledger. An
evaluation with another fingerprint (post-processing was chosen since, the run was extended, other `inference.*`
settings) moves it to `earlier/XXXXXXXX` in the same folder, named by the first digits of its fingerprint. What lies
there is a complete evaluation: `liverseg report` and `liverseg compare` read it.
"""

import json
import os
import shutil
from pathlib import Path

from liverseg_dist.evaluation.results import ENVIRONMENT, LEDGER, PICTURES, SUMMARY

EARLIER = "earlier"
NAME_DIGITS = 8
MOVED = (LEDGER, PICTURES, "tensorboard", "masks", "cases.csv", "lesions.csv", ENVIRONMENT)
"""Files and folders of an evaluation, beside its pages (report*.html) and its summary, which is moved last."""


def move_earlier_results(folder: Path, fingerprint: str) -> Path | None:
    """Move a finished evaluation with another fingerprint out of `folder`. For one process.

    Args:
        fingerprint: of the ledger of the evaluation that is about to start.

    Returns:
        Where the earlier results are now, or None where there were none to move.
    """
    found = _fingerprint_in(folder / SUMMARY)
    if found in ("", fingerprint):
        return None
    target = folder / EARLIER / _name_of(found)
    target.mkdir(parents=True, exist_ok=True)
    pages = sorted(path.name for path in folder.glob("report*.html"))
    # The summary goes last: where this is interrupted, the next call finds it and moves the rest to the same place.
    for name in (*MOVED, *pages, SUMMARY):
        _move(folder / name, target / name)
    return target


def _fingerprint_in(summary: Path) -> str:
    """The fingerprint that a summary names; empty where there is no summary that can be read."""
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
        return str(content["ledger"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _name_of(fingerprint: str) -> str:
    """A folder name; the summary may be damaged, and its text must not lead to another folder."""
    return "".join(c for c in fingerprint if c.isascii() and c.isalnum())[:NAME_DIGITS] or "unnamed"


def _move(source: Path, target: Path) -> None:
    """Move a file or folder, in place of an older one of the same evaluation."""
    if not source.exists():
        return
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)

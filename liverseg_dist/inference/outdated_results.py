"""Find results in a run's folder that were made with weights the run no longer has.

Evaluations and the choice of `liverseg postprocess` record the checksums of their weights. Both
stay in the folder when a run is extended or trained again. Used by `train` and by the commands that
apply a run.
"""

import json
from pathlib import Path

from liverseg_dist.evaluation.results import EVALUATION, SUMMARY
from liverseg_dist.files import file_sha256
from liverseg_dist.inference.load_run import (
    POSTPROCESS,
    WEIGHTS,
    WEIGHTS_COMMENT,
    LoadedRun,
)

OUTDATED_CHOICE = "was chosen for earlier weights; run `liverseg postprocess` again or delete it"


def find_outdated_results(run_dir: Path) -> list[str]:
    """One sentence for each evaluation or choice that belongs to earlier weights.

    Args:
        run_dir: a run's folder; without weights nothing is outdated.
    """
    # Reading large weights takes a while, and most folders have no results to compare.
    present = _hash_weights(run_dir)
    if not present:
        return []
    found: list[str] = []
    folder = run_dir / EVALUATION
    for summary in (folder / SUMMARY, *sorted(folder.glob(f"*/{SUMMARY}"))):
        used = _read_summary_weights(summary)
        # `best` and `last` weights differ; an evaluation may have used either.
        if used and not present.intersection(used):
            found.append(
                f"{summary.parent} holds scores of earlier weights; run `liverseg evaluate` again"
            )
    used = _read_choice_weights(run_dir / POSTPROCESS)
    if used and not present.intersection(used):
        found.append(f"{run_dir / POSTPROCESS} {OUTDATED_CHOICE}")
    return found


def has_outdated_postprocessing(loaded: LoadedRun) -> bool:
    """Whether `postprocess.yaml` was chosen for weights that neither the run nor this model has."""
    used = _read_choice_weights(loaded.path / POSTPROCESS)
    # The weights' files are hashed last: they are large.
    if not used or loaded.weights_sha256 in used:
        return False
    return not used.intersection(_hash_weights(loaded.path))


def _hash_weights(run_dir: Path) -> set[str]:
    """Checksums of the weights in the folder."""
    checksums = set()
    for name in WEIGHTS.values():
        if (run_dir / name).is_file():
            checksums.add(file_sha256(run_dir / name))
    return checksums


def _read_summary_weights(file: Path) -> set[str]:
    """Checksums of the weights that an evaluation used; empty where none are recorded."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return set(map(str, content["details"]["weights_sha256"]))
    # A damaged summary is no evidence of other weights.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _read_choice_weights(file: Path) -> set[str]:
    """Checksums in the comment that `liverseg postprocess` writes; empty where there is none."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    checksums: set[str] = set()
    for line in lines:
        if line.startswith(WEIGHTS_COMMENT):
            checksums.update(line.removeprefix(WEIGHTS_COMMENT).split())
    return checksums

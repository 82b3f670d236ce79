"""The files of a finished evaluation: `summary.json`, `cases.csv`, `lesions.csv` and `report.html`.

All of them are derived from the ledger, so they can be written again at any time. `summary.json`
lists the entries of the ledger that they contain.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.curves import TRAINING, Curves, load_training
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.report.csv_tables import write_cases_csv, write_lesions_csv
from liverseg_dist.evaluation.report.html_report import write_report
from liverseg_dist.evaluation.summary import aggregate_scores
from liverseg_dist.files import write_json

LEDGER = "ledger"
PICTURES = "pictures"
SUMMARY = "summary.json"
ENVIRONMENT = "environment.json"
"""Date, code and hardware of the results; all other files are equal on every machine."""
EVALUATION = "evaluation"
"""Folder of the evaluation in a run."""


@dataclass(frozen=True)
class Results:
    """A finished evaluation, read from its folder."""

    folder: Path
    summary: dict[str, Any]
    cases: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        return self.folder.parent.name if self.folder.name == EVALUATION else self.folder.name


def write_results(
    folder: Path,
    cases: Iterable[dict[str, Any]],
    failures: Mapping[str, str] | None = None,
    details: Mapping[str, object] | None = None,
    ledger: Ledger | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    postprocessing: Mapping[str, object] | None = None,
    training: Mapping[str, Curves] | None = None,
) -> dict[str, Any]:
    """Aggregate scored cases and write all result files into `folder`.

    Args:
        folder: Folder of the files; the pictures of cases are read from `folder/pictures`.
        cases: Scored cases.
        failures: Cases without scores, and the reason.
        details: Facts about the run for the report (title, settings ...), stored in the summary.
        ledger: The ledger of the cases; without it the results cannot be loaded again.
        environment: Date, commit and hardware, stored in a file of their own. None: that file stays
            as it is.
        postprocessing: Operations applied to the masks, stored in the summary; None where there
            were none or they are unknown.
        training: Training curves by run, stored in a file of their own. None: that file stays.

    Returns:
        The summary.
    """
    ordered = sorted(cases, key=lambda case: case["case_id"])
    failed = dict(sorted((failures or {}).items()))
    source = None
    if ledger is not None:
        case_ids = [case["case_id"] for case in ordered]
        source = {"fingerprint": ledger.fingerprint, "case_ids": case_ids}
    summary = aggregate_scores(ordered)
    summary["failed"] = failed
    summary["details"] = dict(details or {})
    summary["ledger"] = source
    summary["postprocessing"] = dict(postprocessing) if postprocessing else None
    folder.mkdir(parents=True, exist_ok=True)
    # Every file is replaced as a whole: a reader never sees half of one.
    write_cases_csv(folder / "cases.csv", ordered, failed)
    write_lesions_csv(folder / "lesions.csv", ordered)
    if environment is not None:
        write_json(folder / ENVIRONMENT, dict(environment))
    if training is not None:
        write_json(folder / TRAINING, dict(training))
    write_report(
        folder, summary, ordered, folder / PICTURES, load_environment(folder), load_training(folder)
    )
    # The summary comes last: it marks the evaluation as finished.
    write_json(folder / SUMMARY, summary)
    return summary


def load_environment(folder: Path) -> dict[str, str]:
    """Date, code and hardware of the results; empty where the file is missing or damaged."""
    try:
        content = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {str(key): str(value) for key, value in content.items()}


def load_results(run: Path) -> Results:
    """Load a finished evaluation.

    Args:
        run: The folder of the evaluation, or of the run that contains it.

    Raises:
        UserError: There is no finished evaluation, or its files are damaged.
    """
    folder = next((f for f in (run, run / EVALUATION) if (f / SUMMARY).is_file()), None)
    if folder is None:
        raise UserError(
            f"{run}: holds no {SUMMARY}; finish `liverseg evaluate` or `liverseg score` there first"
        )
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        _check_summary(summary)
        case_ids = summary["ledger"]["case_ids"]
        ledger = Ledger(folder / LEDGER, str(summary["ledger"]["fingerprint"]))
        cases = [ledger.read(case_id) for case_id in case_ids]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{folder / SUMMARY}: damaged; run `liverseg evaluate` or `liverseg score` again"
        ) from None
    found = [case for case in cases if case is not None]
    if len(found) < len(cases):
        missing = [case_id for case_id, case in zip(case_ids, cases, strict=True) if case is None]
        raise UserError(
            f"{folder / LEDGER}: no entry for {', '.join(missing[:3])}; "
            "evaluate again, all other cases are reused"
        )
    return Results(folder, summary, tuple(found))


def _check_summary(summary: Any) -> None:
    """Check the types that are read later: the file may be damaged or edited.

    Raises:
        TypeError: A value has another type.
        KeyError: A key is missing.
        ValueError: A case is listed twice.
    """
    if not isinstance(summary, dict):
        raise TypeError("summary")
    for key in ("failed", "details"):
        if not isinstance(summary.get(key, {}), dict):
            raise TypeError(key)
    if not isinstance(summary.get("postprocessing") or {}, dict):
        raise TypeError("postprocessing")
    # A text is iterable too, so the type of the list is checked first.
    case_ids = summary["ledger"]["case_ids"]
    if not isinstance(case_ids, list):
        raise TypeError("case_ids")
    if not all(isinstance(case_id, str) for case_id in case_ids):
        raise TypeError("case_ids")
    if len(set(case_ids)) < len(case_ids):
        raise ValueError("case_ids")


def load_pooled(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Load the scored cases of several finished evaluations, such as folds of a cross-validation.

    Raises:
        UserError: An evaluation cannot be loaded, or two of them have a case in common.
    """
    cases: dict[str, dict[str, Any]] = {}
    run_of: dict[str, Path] = {}
    for run in runs:
        for case in load_results(run).cases:
            case_id = case["case_id"]
            if case_id in cases:
                raise UserError(
                    f"{run}: has case {case_id}, as {run_of[case_id]} has; folds share no case"
                )
            cases[case_id] = case
            run_of[case_id] = run
    return list(cases.values())


def rewrite_results(results: Results) -> dict[str, Any]:
    """Write all files of a finished evaluation again from its ledger and pictures."""
    ledger = Ledger(results.folder / LEDGER, str(results.summary["ledger"]["fingerprint"]))
    failed, details = results.summary.get("failed", {}), results.summary.get("details", {})
    postprocessing = results.summary.get("postprocessing")
    return write_results(
        results.folder, results.cases, failed, details, ledger, postprocessing=postprocessing
    )

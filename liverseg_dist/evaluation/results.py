"""The files of a finished evaluation: `summary.json`, `cases.csv`, `lesions.csv` and `report.html`.

All of them are made from the ledger, so they can be made again at any time; `summary.json` says which
of its entries count.
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
"""Date, code and hardware of the results: shown in the report, kept apart from what is equal everywhere."""
EVALUATION = "evaluation"
"""Where a run keeps its evaluation."""


@dataclass(frozen=True)
class Results:
    """A finished evaluation as read back from its folder."""

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
    postprocessing: Mapping[str, object] | None = None,
    training: Mapping[str, Curves] | None = None,
) -> dict[str, Any]:
    """Aggregate scored cases and write all result files into `folder`.

    Args:
        folder: Where the files go; pictures are taken from `folder/pictures`.
        cases: Scored cases.
        failures: Cases without scores, and the reason.
        details: What the report states about the run (title, settings ...); kept in the summary.
        ledger: Where the cases come from; without it the results cannot be loaded again.
        environment: Date, commit and hardware, kept in a file of their own; without it that file's content is used.
        training: Training curves by run, kept likewise.
        postprocessing: Operations applied to the masks; None: none, or not known. Kept in the summary.

    Returns:
        The summary.
    """
    ordered = sorted(cases, key=lambda case: case["case_id"])
    failed = dict(sorted((failures or {}).items()))
    source = (
        {"fingerprint": ledger.fingerprint, "case_ids": [case["case_id"] for case in ordered]}
        if ledger
        else None
    )
    summary = aggregate_scores(ordered) | {
        "failed": failed,
        "details": dict(details or {}),
        "ledger": source,
    }
    summary["postprocessing"] = dict(postprocessing) if postprocessing else None
    folder.mkdir(parents=True, exist_ok=True)
    write_cases_csv(folder / "cases.csv", ordered, failed)
    write_lesions_csv(folder / "lesions.csv", ordered)
    if environment is not None:
        write_json(folder / ENVIRONMENT, dict(environment))
    if training is not None:
        write_json(folder / TRAINING, dict(training))
    write_report(
        folder, summary, ordered, folder / PICTURES, load_environment(folder), load_training(folder)
    )
    write_json(folder / SUMMARY, summary)
    return summary


def load_environment(folder: Path) -> dict[str, str]:
    """What `write_results` noted of code and hardware; nothing where that is missing or damaged."""
    try:
        content = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return (
        {str(key): str(value) for key, value in content.items()}
        if isinstance(content, dict)
        else {}
    )


def load_results(run: Path) -> Results:
    """A finished evaluation, from its own folder or from its run's. Raises `UserError` where there is none."""
    folder = next((f for f in (run, run / EVALUATION) if (f / SUMMARY).is_file()), None)
    if folder is None:
        raise UserError(
            f"{run}: holds no {SUMMARY}; finish `liverseg evaluate` or `liverseg score` there first"
        )
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        fingerprint, case_ids = summary["ledger"]["fingerprint"], summary["ledger"]["case_ids"]
        ledger = Ledger(folder / LEDGER, str(fingerprint))
        if not all(isinstance(summary.get(key, {}), dict) for key in ("failed", "details")):
            raise TypeError
        if not isinstance(summary.get("postprocessing") or {}, dict):
            raise TypeError
        if not isinstance(case_ids, list) or not all(
            isinstance(case_id, str) for case_id in case_ids
        ):
            raise TypeError
        if len(set(case_ids)) < len(case_ids):
            raise ValueError
        cases = [ledger.read(case_id) for case_id in case_ids]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{folder / SUMMARY}: damaged; run `liverseg evaluate` or `liverseg score` again"
        ) from None
    known = [case for case in cases if case is not None]
    if len(known) < len(cases):
        lost = [case_id for case_id, case in zip(case_ids, cases, strict=True) if case is None]
        raise UserError(
            f"{folder / LEDGER}: no entry for {', '.join(lost[:3])}; evaluate again, the rest is reused"
        )
    return Results(folder, summary, tuple(known))


def load_pooled(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Scored cases of several finished evaluations, such as a cross-validation's folds. Raises `UserError`."""
    cases: dict[str, dict[str, Any]] = {}
    whose: dict[str, Path] = {}
    for run in runs:
        for case in load_results(run).cases:
            case_id = case["case_id"]
            if case_id in cases:
                raise UserError(
                    f"{run}: has case {case_id}, as {whose[case_id]} has; folds share no case"
                )
            cases[case_id], whose[case_id] = case, run
    return list(cases.values())


def rewrite_results(results: Results) -> dict[str, Any]:
    """Make all files of a finished evaluation again from its ledger and pictures."""
    ledger = Ledger(results.folder / LEDGER, str(results.summary["ledger"]["fingerprint"]))
    failed, details = results.summary.get("failed", {}), results.summary.get("details", {})
    postprocessing = results.summary.get("postprocessing")
    return write_results(
        results.folder, results.cases, failed, details, ledger, postprocessing=postprocessing
    )

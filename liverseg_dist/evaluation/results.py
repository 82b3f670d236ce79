"""The files of a finished evaluation: `summary.json`, `cases.csv`, `lesions.csv` and `report.html`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from liverseg_dist.evaluation.ledger import write_json
from liverseg_dist.evaluation.report import write_report
from liverseg_dist.evaluation.summary import aggregate
from liverseg_dist.evaluation.tables import write_cases_csv, write_lesions_csv

PICTURES = "pictures"
LEDGER = "ledger"


def write_results(
    folder: Path,
    cases: Iterable[dict[str, Any]],
    failures: Mapping[str, str] | None = None,
    details: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Aggregate scored cases and write all result files into `folder`; returns the summary.

    `failures` maps ids of cases without scores to the reason. `details` is what the report tells about the run
    (title, commit, settings ...) and is kept in the summary. Pictures are taken from `folder/pictures`.
    """
    ordered = sorted(cases, key=lambda case: case["case_id"])
    failed = dict(sorted((failures or {}).items()))
    summary = aggregate(ordered) | {"failed": failed, "details": dict(details or {})}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", summary)
    write_cases_csv(folder / "cases.csv", ordered, failed)
    write_lesions_csv(folder / "lesions.csv", ordered)
    write_report(folder, summary, ordered, folder / PICTURES)
    return summary

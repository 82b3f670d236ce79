"""Scores of liver and tumour masks, independent of stores, models and ranks.

`score_case` scores one case, `Ledger` stores the scores, `aggregate_scores` pools them and
`write_results` writes the result files.
"""

from liverseg_dist.evaluation.ledger import Ledger, fingerprint_of
from liverseg_dist.evaluation.metrics.calibration import CalibrationCounter
from liverseg_dist.evaluation.metrics.case import METRICS_VERSION, score_case
from liverseg_dist.evaluation.report.html_report import write_report
from liverseg_dist.evaluation.results import load_results, write_results
from liverseg_dist.evaluation.summary import aggregate_scores

__all__ = [
    "METRICS_VERSION",
    "CalibrationCounter",
    "Ledger",
    "aggregate_scores",
    "fingerprint_of",
    "load_results",
    "score_case",
    "write_report",
    "write_results",
]

"""`report.html`: one self-contained file that opens offline. First version: headline figures and the table of cases."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from liverseg_dist.evaluation.ledger import write_text


def write_report(folder: Path, summary: dict[str, Any], cases: Sequence[dict[str, Any]], pictures: Path | None) -> Path:
    """Write `folder/report.html` from a summary, the cases' scores and a folder of pictures; returns its path."""
    environment = Environment(
        loader=PackageLoader("liverseg_dist.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("report.html.j2").render(summary=summary, cases=cases)
    write_text(folder / "report.html", text)
    return folder / "report.html"

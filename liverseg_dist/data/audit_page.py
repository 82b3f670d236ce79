"""`audit.html`: every case with its picture, status and findings, so that a person sees in a minute what went in."""

import base64
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, select_autoescape


class Record(Protocol):
    case_id: str
    status: str
    findings: list[dict[str, str]]
    facts: dict[str, Any]
    slabs: dict[str, dict[str, Any]]


def audit_page(name: str, records: Sequence[Record], thumbnails: Path) -> str:
    """Self-contained HTML; everything the data says is escaped."""
    pages = Environment(loader=PackageLoader("liverseg_dist.data", "templates"), autoescape=select_autoescape(["html.j2"]))
    order = {"quarantined": 0, "excluded": 1, "repaired": 2, "unlabelled": 3, "kept": 4}
    cases = sorted(records, key=lambda r: (order.get(r.status, 0), -len(r.findings), r.case_id))
    pictures = {r.case_id: _picture(thumbnails / f"{r.case_id}.png") for r in cases if r.slabs}
    return pages.get_template("audit.html.j2").render(
        name=name, cases=cases, pictures=pictures, counts=Counter(r.status for r in cases)
    )


def _picture(file: Path) -> str:
    try:
        return base64.b64encode(file.read_bytes()).decode()
    except OSError:
        return ""

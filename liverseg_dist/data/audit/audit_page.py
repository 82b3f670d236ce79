"""`audit.html`: every scan with its picture, status and findings, so that a person sees in a minute what went in."""

import base64
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from liverseg_dist.data.store.layout import TRAIN_ONLY
from liverseg_dist.files import natural_key
from liverseg_dist.pages import PADDING_RGB, hex_colour, load_theme

STATUS_ORDER = ("quarantined", "excluded", "repaired", "imputed", "unlabelled", "kept")
"""Worst first."""
MAX_PICTURES = 500
"""Embedded, of the worst scans first: a page of 10,000 would be one that no browser opens."""


def render_audit_page(root: Mapping[str, Any], thumbnails: Mapping[str, Path]) -> str:
    """Self-contained HTML of a store's root attribute; everything the data says is escaped."""
    pages = Environment(
        loader=PackageLoader("liverseg_dist.data.audit", "templates"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    audit = sorted(
        root["audit"].items(), key=lambda entry: (_severity_key(entry[1]), natural_key(entry[0]))
    )
    parts = dict.fromkeys(root["splits"]["test"], "test")
    parts |= dict.fromkeys(root["splits"].get(TRAIN_ONLY, []), "training only")
    parts |= {
        case_id: f"fold {n}" for n, fold in enumerate(root["splits"]["folds"]) for case_id in fold
    }
    return pages.get_template("audit.html.j2").render(
        root=root,
        theme=Markup(load_theme()),  # our own file, no text from data  # nosec B704
        padding=hex_colour(PADDING_RGB),
        scans=[
            _build_scan_entry(
                name, entry, thumbnails.get(name) if place < MAX_PICTURES else None, parts
            )
            for place, (name, entry) in enumerate(audit)
        ],
        pictures=MAX_PICTURES if len(audit) > MAX_PICTURES else 0,
        counts=[
            (status, n)
            for status in STATUS_ORDER
            if (n := Counter(e["status"] for _, e in audit)[status])
        ],
        settings=[(key, value) for key, value in _flatten_settings(root["convert"])],
    )


def _severity_key(entry: Mapping[str, Any]) -> tuple[int, int]:
    status = STATUS_ORDER.index(entry["status"]) if entry["status"] in STATUS_ORDER else 0
    return status, -sum(finding["severity"] != "info" for finding in entry["findings"])


def _build_scan_entry(
    name: str, entry: Mapping[str, Any], picture: Path | None, parts: Mapping[str, str]
) -> dict[str, Any]:
    facts = entry["facts"]
    lines = []
    if "shape_zyx" in facts:
        sizes, spacing = (
            " × ".join(map(str, facts["shape_zyx"])),
            " × ".join(f"{s:.3g}" for s in facts["spacing_mm"]),
        )
        lines.append(f"{sizes} voxels (z, y, x) of {spacing} mm, {facts['orientation']}")
    if "volumes_ml" in facts:
        volumes, tumours = facts["volumes_ml"], facts.get("tumours", 0)
        said = "1 tumour" if tumours == 1 else f"{tumours} tumours"
        more = f", {said} {volumes['tumour']:.1f} ml" if tumours else ""
        lines.append(f"liver {sum(volumes.values()):.0f} ml{more}")
    placed = sorted({parts[case_id] for case_id in entry["stored_as"] if case_id in parts})
    return {
        "name": name,
        "status": entry["status"],
        "findings": entry["findings"],
        "lines": lines,
        "part": ", ".join(placed),
        "picture": _encode_picture(picture),
    }


def _encode_picture(file: Path | None) -> str:
    try:
        return "" if file is None else base64.b64encode(file.read_bytes()).decode()
    except OSError:
        return ""


def _flatten_settings(
    content: Mapping[str, Any], prefix: str = "convert."
) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            rows += _flatten_settings(value, f"{prefix}{key}.")
        else:
            text = str(value)
            rows.append(
                (
                    f"{prefix}{key}",
                    text if len(text) <= 120 else f"{text[:40]}... ({len(text):,} characters)",
                )
            )
    return rows

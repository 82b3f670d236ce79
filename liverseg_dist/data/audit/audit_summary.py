"""The audit of a store in a few lines, for whoever reads a score and asks what it was measured on."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from liverseg_dist.files import natural_key

STATUSES = ("kept", "repaired", "imputed", "unlabelled", "excluded", "quarantined")
SEVERITIES = ("error", "warning", "info")
MAX_NAMED_SCANS = 5
"""Scans that a finding names at most."""


def summarize_audit(audit: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """JSON-able: `counts` by status; `findings` by code with how many scans have it, worst and commonest first;
    `left_out`: scan -> why it was not stored. `audit` is `CaseStore.audit`."""
    counts = Counter(entry["status"] for entry in audit.values())
    scans: dict[tuple[str, str], list[str]] = {}
    messages: dict[tuple[str, str], str] = {}
    for name in sorted(audit, key=natural_key):
        for finding in audit[name]["findings"]:
            key = (finding["severity"], finding["code"])
            if not scans.get(key) or scans[key][-1] != name:
                scans.setdefault(key, []).append(name)
            messages.setdefault(key, finding["message"])
    by_name = sorted(audit.items(), key=lambda item: natural_key(item[0]))
    order = sorted(scans, key=lambda key: (_severity_index(key[0]), -len(scans[key]), key[1]))
    return {
        "counts": {
            status: counts[status] for status in (*STATUSES, *sorted(counts.keys() - set(STATUSES)))
        },
        "findings": [
            {
                "severity": key[0],
                "code": key[1],
                "scans": len(scans[key]),
                "named": scans[key][:MAX_NAMED_SCANS],
                "example": messages[key],
            }
            for key in order
        ],
        "left_out": {
            name: _describe_reason(entry) for name, entry in by_name if not entry.get("stored_as")
        },
    }


def _severity_index(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else 0


def _describe_reason(entry: Mapping[str, Any]) -> str:
    worst = sorted(entry["findings"], key=lambda finding: _severity_index(finding["severity"]))
    return f"{entry['status']}: {worst[0]['message']}" if worst else str(entry["status"])

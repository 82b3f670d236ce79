"""Summarize the audit of a store: what data a score was measured on.

`evaluate` writes the summary into `summary.json`, and the report shows it beside the scores.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from liverseg_dist.files import natural_key

STATUSES = ("kept", "repaired", "imputed", "unlabelled", "excluded", "quarantined")
SEVERITIES = ("error", "warning", "info")
MAX_NAMED_SCANS = 5
"""Scans that the summary names for each finding."""


def summarize_audit(audit: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Count statuses and findings over the scans of a store.

    Args:
        audit: `CaseStore.audit`, the audit entry of each scan.

    Returns:
        JSON-able: `counts` of scans by status; `findings` by severity and code with the number of
        scans, the most severe and most frequent first; `left_out`: scan -> why it was not stored.
    """
    names = sorted(audit, key=natural_key)
    scans: dict[tuple[str, str], list[str]] = {}
    messages: dict[tuple[str, str], str] = {}
    left_out = {}
    for name in names:
        entry = audit[name]
        for finding in entry["findings"]:
            key = (finding["severity"], finding["code"])
            affected = scans.setdefault(key, [])
            # A scan may have the same finding for its image and its label.
            if not affected or affected[-1] != name:
                affected.append(name)
            messages.setdefault(key, finding["message"])
        if not entry.get("stored_as"):
            left_out[name] = _describe_reason(entry)
    findings = []
    order = sorted(scans, key=lambda key: (_severity_index(key[0]), -len(scans[key]), key[1]))
    for severity, code in order:
        affected = scans[severity, code]
        findings.append(
            {
                "severity": severity,
                "code": code,
                "scans": len(affected),
                "named": affected[:MAX_NAMED_SCANS],
                "example": messages[severity, code],
            }
        )
    return {"counts": _count_statuses(audit), "findings": findings, "left_out": left_out}


def _count_statuses(audit: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """All known statuses in a fixed order, then those of other versions of the program."""
    counts = Counter(entry["status"] for entry in audit.values())
    unknown = sorted(counts.keys() - set(STATUSES))
    return {status: counts[status] for status in (*STATUSES, *unknown)}


def _severity_index(severity: str) -> int:
    # An unknown severity sorts first: it must not be overlooked.
    return SEVERITIES.index(severity) if severity in SEVERITIES else 0


def _describe_reason(entry: Mapping[str, Any]) -> str:
    """Status and the message of the most severe finding."""
    findings = sorted(entry["findings"], key=lambda finding: _severity_index(finding["severity"]))
    return f"{entry['status']}: {findings[0]['message']}" if findings else str(entry["status"])

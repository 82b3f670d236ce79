"""What is already scored: one JSON file a case, whole or absent, tied to what it was computed from.

An entry counts only if its fingerprint equals the ledger's (weights, settings, the version of the metric definitions)
and its inputs those of the case (hashes of its files), so changing the model, a setting or a mask recomputes what it
touches and nothing else. A file that is damaged (it carries its own checksum), or half-written by a machine that died,
counts as absent.
A case that failed has an entry with its error and is tried again by the next run.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from liverseg_dist.evaluation.metrics.case import METRICS_VERSION
from liverseg_dist.files import write_json

LONGEST_NAME = 150


class Ledger:
    """`Ledger(folder, fingerprint={"weights_sha256": ..., "settings": ...})`; any number of processes may write."""

    def __init__(
        self, folder: Path | str, fingerprint: Mapping[str, object] | str | None = None
    ) -> None:
        """`fingerprint` is what the scores depend on, or the `.fingerprint` of another ledger as it was recorded."""
        self.folder = Path(folder)
        if isinstance(fingerprint, str):
            self.fingerprint = fingerprint
        else:
            self.fingerprint = fingerprint_of(
                {"metrics_version": METRICS_VERSION, **(fingerprint or {})}
            )

    def done(self, inputs: Mapping[str, str] | None = None) -> set[str]:
        """Ids of cases that need not be scored again. `inputs` maps a case id to the fingerprint of its own files."""
        return {
            entry["case_id"]
            for entry in self._entries()
            if entry["scores"] is not None
            and (inputs is None or inputs.get(entry["case_id"]) == entry["inputs"])
        }

    def write(self, case_id: str, scores: Mapping[str, Any], inputs: str | None = None) -> None:
        """Record a scored case. Replaces what was there in one step."""
        self._write(case_id, {"scores": dict(scores), "error": None, "inputs": inputs})

    def write_failure(
        self,
        case_id: str,
        error: str,
        inputs: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that a case could not be scored, and why; `details` is JSON-able."""
        more = {} if details is None else {"details": dict(details)}
        self._write(case_id, {"scores": None, "error": error, "inputs": inputs, **more})

    def read(self, case_id: str, inputs: str | None = None) -> dict[str, Any] | None:
        """Scores of one case, or None where it has none (or, with `inputs`, has them from other files)."""
        entry = self._entry(self._file(case_id))
        if entry is None or (inputs is not None and entry["inputs"] != inputs):
            return None
        return entry["scores"]

    def read_all(self) -> list[dict[str, Any]]:
        """Scores of every scored case, sorted by case id."""
        return [entry["scores"] for entry in self._entries() if entry["scores"] is not None]

    def failures(self) -> dict[str, str]:
        """Errors of failed cases by case id."""
        return {
            entry["case_id"]: str(entry["error"])
            for entry in self._entries()
            if entry["scores"] is None
        }

    def failure_details(self) -> dict[str, dict[str, Any]]:
        """Details of failed cases by case id, where some were recorded."""
        failed = (entry for entry in self._entries() if entry["scores"] is None)
        return {
            entry["case_id"]: entry["details"]
            for entry in failed
            if isinstance(entry.get("details"), dict)
        }

    def forget(self, case_id: str) -> None:
        """Remove a case's entry, if any."""
        self._file(case_id).unlink(missing_ok=True)

    def _write(self, case_id: str, content: dict[str, Any]) -> None:
        entry = {"case_id": case_id, "fingerprint": self.fingerprint, **content}
        entry["sha256"] = fingerprint_of(entry)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(case_id), entry)

    def _file(self, case_id: str) -> Path:
        return self.folder / f"{encode_file_name(case_id)}.json"

    def _entries(self) -> list[dict[str, Any]]:
        found = [self._entry(file) for file in sorted(self.folder.glob("*.json"))]
        return sorted(
            (entry for entry in found if entry is not None), key=lambda entry: entry["case_id"]
        )

    def _entry(self, file: Path) -> dict[str, Any] | None:
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.get("fingerprint") != self.fingerprint:
            return None
        if entry.pop("sha256", None) != fingerprint_of(entry):
            return None
        case_id = entry.get("case_id")
        if not isinstance(case_id, str) or not {"scores", "error", "inputs"} <= entry.keys():
            return None
        return entry if self._file(case_id) == file else None


def fingerprint_of(content: Mapping[str, object]) -> str:
    """sha256 of a JSON-able mapping, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_file_name(case_id: str) -> str:
    """A file name for any case id: percent-encoded, and shortened with a hash where it would be too long."""
    # A name may hold bytes that are not UTF-8: Python keeps them as surrogates.
    name = quote(case_id, safe=" ()[]{}+,=@", errors="surrogatepass")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}~{hashlib.sha256(case_id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    return name or "%"

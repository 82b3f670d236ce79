"""The ledger of an evaluation: one JSON file per case with its scores and what they depend on.

An entry is valid only if its fingerprint equals the ledger's (weights, settings, version of the
metric definitions) and its inputs equal those of the case (hashes of its files). Another model,
setting or mask therefore recomputes the scores that depend on it, and no others. A file that is
damaged (each contains its own checksum) or incomplete counts as absent. A case that failed has an
entry with its error; the next run tries it again.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from liverseg_dist.evaluation.metrics.case import METRICS_VERSION
from liverseg_dist.files import write_json

MAX_NAME_LENGTH = 150


class Ledger:
    """Scores of cases in a folder: `Ledger(folder, {"weights_sha256": ..., "settings": ...})`.

    Any number of processes may write to it at the same time.
    """

    def __init__(
        self, folder: Path | str, fingerprint: Mapping[str, object] | str | None = None
    ) -> None:
        """Open a ledger.

        Args:
            folder: Folder of the entries; it need not exist.
            fingerprint: What the scores depend on, or the recorded `.fingerprint` of a ledger.
        """
        self.folder = Path(folder)
        if isinstance(fingerprint, str):
            self.fingerprint = fingerprint
        else:
            self.fingerprint = fingerprint_of(
                {"metrics_version": METRICS_VERSION, **(fingerprint or {})}
            )

    def done(self, inputs: Mapping[str, str] | None = None) -> set[str]:
        """Ids of the cases with valid scores.

        Args:
            inputs: Fingerprint of each case's files; without it the files are not compared.
        """
        case_ids = set()
        for entry in self._read_entries():
            if entry["scores"] is None:
                continue
            case_id = entry["case_id"]
            if inputs is None or inputs.get(case_id) == entry["inputs"]:
                case_ids.add(case_id)
        return case_ids

    def write(self, case_id: str, scores: Mapping[str, Any], inputs: str | None = None) -> None:
        """Record the scores of a case; replaces an earlier entry in one step."""
        self._write_entry(case_id, {"scores": dict(scores), "error": None, "inputs": inputs})

    def write_failure(
        self,
        case_id: str,
        error: str,
        inputs: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the reason why a case has no scores; `details` is JSON-able."""
        content: dict[str, Any] = {"scores": None, "error": error, "inputs": inputs}
        if details is not None:
            content["details"] = dict(details)
        self._write_entry(case_id, content)

    def read(self, case_id: str, inputs: str | None = None) -> dict[str, Any] | None:
        """Scores of one case; None where it has none (or, with `inputs`, none of these files)."""
        entry = self._read_entry(self._file_of(case_id))
        if entry is None or (inputs is not None and entry["inputs"] != inputs):
            return None
        return entry["scores"]

    def read_all(self) -> list[dict[str, Any]]:
        """Scores of all scored cases, sorted by case id."""
        return [entry["scores"] for entry in self._read_entries() if entry["scores"] is not None]

    def failures(self) -> dict[str, str]:
        """Errors of failed cases by case id."""
        return {entry["case_id"]: str(entry["error"]) for entry in self._read_failures()}

    def failure_details(self) -> dict[str, dict[str, Any]]:
        """Details of failed cases by case id; cases without details are left out."""
        details = {}
        for entry in self._read_failures():
            if isinstance(entry.get("details"), dict):
                details[entry["case_id"]] = entry["details"]
        return details

    def forget(self, case_id: str) -> None:
        """Remove the entry of a case, if there is one."""
        self._file_of(case_id).unlink(missing_ok=True)

    def _write_entry(self, case_id: str, content: dict[str, Any]) -> None:
        entry = {"case_id": case_id, "fingerprint": self.fingerprint, **content}
        # Over all other keys, so an entry that was damaged or edited is detected on reading.
        entry["sha256"] = fingerprint_of(entry)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file_of(case_id), entry)

    def _file_of(self, case_id: str) -> Path:
        return self.folder / f"{encode_file_name(case_id)}.json"

    def _read_failures(self) -> list[dict[str, Any]]:
        return [entry for entry in self._read_entries() if entry["scores"] is None]

    def _read_entries(self) -> list[dict[str, Any]]:
        """All valid entries, sorted by case id."""
        entries = []
        for file in sorted(self.folder.glob("*.json")):
            entry = self._read_entry(file)
            if entry is not None:
                entries.append(entry)
        return sorted(entries, key=lambda entry: entry["case_id"])

    def _read_entry(self, file: Path) -> dict[str, Any] | None:
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.get("fingerprint") != self.fingerprint:
            return None
        # The hash covers the entry without itself: the left side removes the key first.
        if entry.pop("sha256", None) != fingerprint_of(entry):
            return None
        case_id = entry.get("case_id")
        if not isinstance(case_id, str) or not {"scores", "error", "inputs"} <= entry.keys():
            return None
        # A file that was copied to another name is not the entry of that other case.
        return entry if self._file_of(case_id) == file else None


def fingerprint_of(content: Mapping[str, object]) -> str:
    """SHA-256 of a JSON-able mapping; the order of its keys does not matter."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_file_name(case_id: str) -> str:
    """A file name for any case id: percent-encoded; a long one is shortened and gets a hash."""
    # A case id may contain bytes that are not UTF-8: Python stores them as surrogates.
    name = quote(case_id, safe=" ()[]{}+,=@", errors="surrogatepass")
    if name.startswith("."):
        # A leading dot would hide the file.
        name = "%2E" + name[1:]
    if len(name) > MAX_NAME_LENGTH:
        # Of the whole id: two long ids can have the same beginning.
        digest = hashlib.sha256(case_id.encode("utf-8", "surrogatepass")).hexdigest()
        name = f"{name[:MAX_NAME_LENGTH]}~{digest[:16]}"
    return name or "%"

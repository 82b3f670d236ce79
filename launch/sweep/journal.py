"""`journal.jsonl`: every trial, rung and decision of a sweep, written by the driver alone.

Each line is written before it takes effect. The journal is all that a sweep needs to continue after
an interruption; Ray's own state is never read. Each line has a checksum of its content and its
position, so a damaged or missing line stops the sweep instead of changing its result.
"""

import json
import logging
import os
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.locks import open_lock, take_lock

log = logging.getLogger(__name__)

CLOSED_STATES = ("finished", "pruned", "failed", "replaced")
"""States of a trial that is not trained any further."""
STATE_AFTER = {"prune": "pruned", "end": "finished", "wait": "waiting", "replace": "replaced"}
"""Decision -> state of the trial; after any other decision it continues to run."""


@dataclass(frozen=True)
class Rung:
    """All folds of a trial at the same step. The fields are the keys of the file."""

    step: int
    score: float
    """Mean over folds."""
    spread: float
    """Sample standard deviation over folds; 0 for one fold."""
    folds: dict[str, dict[str, float]]
    """Fold -> score, Dice by structure, and the other figures (memory_gib, step_s)."""
    decision: str
    """continue, prune or end; wait, until the group is complete; replace: another trial takes its
    place."""
    seconds: float = 0.0
    """Wall time of the processes of the folds since the last rung, summed, of this attempt only."""

    @classmethod
    def from_folds(
        cls, step: int, folds: Mapping[str, dict[str, float]], decision: str, seconds: float
    ) -> "Rung":
        """Compute mean and spread from the scores of the folds."""
        scores = [folds[key]["score"] for key in sorted(folds)]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        return cls(step, statistics.fmean(scores), spread, dict(folds), decision, seconds)


@dataclass
class Trial:
    """One setting of the hyperparameters and its results."""

    number: int
    id: str
    params: dict[str, Any]
    rungs: list[Rung] = field(default_factory=list)
    state: str = "running"
    """running, waiting, or closed: finished, pruned, failed, replaced."""
    reason: str = ""
    parent: str = ""
    """The trial from whose checkpoints it continued; empty: it started from the beginning."""
    from_step: int = 0
    """The step from which it continued."""

    @property
    def score(self) -> float | None:
        return self.rungs[-1].score if self.rungs else None

    @property
    def step(self) -> int:
        """The step that all its folds have reached."""
        return self.rungs[-1].step if self.rungs else self.from_step

    def apply_decision(self, decision: str) -> None:
        """Set the decision at the last rung."""
        self.rungs[-1] = replace(self.rungs[-1], decision=decision)
        self.state = STATE_AFTER.get(decision, "running")


def find_best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the highest mean Dice; the earlier one of equal scores."""
    finished = [trial for trial in trials if trial.state == "finished"]
    return max(finished, key=lambda trial: (trial.score or 0.0, -trial.number), default=None)


class Journal:
    """The journal of one sweep, open for one driver at a time (by a lock on the folder)."""

    def __init__(self, folder: Path) -> None:
        """Open the journal, and apply what it has.

        Args:
            folder: The folder of the sweep.

        Raises:
            UserError: Another sweep uses the folder.
            RunFailed: The journal is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open_lock(folder / ".lock")
        try:
            if not take_lock(self._lock, wait=False):
                log.warning(
                    "%s: this file system has no locks: make sure that no other sweep uses this "
                    "folder; a Ray that makes no progress is not detected",
                    folder,
                )
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(
                f"{folder}: another sweep uses this folder; wait for it, or choose another run.dir"
            ) from None
        self.trials: dict[str, Trial] = {}
        self._lines = 0
        path = folder / "journal.jsonl"
        try:
            complete_bytes = self._read(path) if path.exists() else 0
            self._file = path.open("ab")
        # The lock must not stay when the journal is damaged.
        except BaseException:
            os.close(self._lock)
            raise
        # Remove the half line of a driver that was killed.
        self._file.truncate(complete_bytes)

    def _read(self, path: Path) -> int:
        """Apply all complete lines; returns their length in bytes. Raises `RunFailed`."""
        complete_bytes = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # the driver was killed while it wrote this line
            self._apply(_parse_line(line, self._lines, path))
            self._lines += 1
            complete_bytes += len(line)
        return complete_bytes

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        os.close(self._lock)

    @property
    def lines(self) -> int:
        """The number of lines so far. It grows with every event."""
        return self._lines

    @property
    def open_trials(self) -> list[Trial]:
        """The trials that are not closed."""
        return [trial for trial in self.trials.values() if trial.state not in CLOSED_STATES]

    def add_trial(self, id_: str, params: dict[str, Any]) -> Trial:
        """Write a new trial."""
        self._write({"event": "trial", "number": len(self.trials), "id": id_, "params": params})
        return self.trials[id_]

    def add_rung(self, id_: str, rung: Rung) -> None:
        """Write that all folds of a trial have reached a step."""
        self._write({"event": "rung", "id": id_, **rung.__dict__})

    def add_decisions(
        self, decisions: Mapping[str, str], children: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write the decisions about a group in one line: all of them, or none.

        Args:
            decisions: Trial id -> decision.
            children: The trials that take the place of replaced ones.
        """
        numbered: list[dict[str, Any]] = []
        for child in children:
            numbered.append({**child, "number": len(self.trials) + len(numbered)})
        self._write({"event": "decisions", "decisions": dict(decisions), "children": numbered})

    def add_failure(self, id_: str, reason: str) -> None:
        """Write that a trial has failed."""
        self._write({"event": "failed", "id": id_, "reason": reason})

    def add_retry(self, id_: str) -> None:
        """Write that a failed trial is to run again."""
        self._write({"event": "retry", "id": id_})

    def _write(self, record: dict[str, Any]) -> None:
        checksum = _compute_checksum(record, self._lines)
        self._file.write(json.dumps({**record, "check": checksum}).encode() + b"\n")
        self._file.flush()
        # On the disk before the decision takes effect.
        os.fsync(self._file.fileno())
        self._lines += 1
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        """Change the trials according to a record."""
        event = record["event"]
        if event == "decisions":
            for child in record["children"]:
                self.trials[child["id"]] = Trial(**child)
            for id_, decision in record["decisions"].items():
                self.trials[id_].apply_decision(decision)
            return
        if event == "trial":
            self.trials[record["id"]] = Trial(record["number"], record["id"], record["params"])
            return
        trial = self.trials[record["id"]]
        if event == "rung":
            values = {key: value for key, value in record.items() if key not in ("event", "id")}
            trial.rungs.append(Rung(**values))
            trial.apply_decision(record["decision"])
        elif event == "failed":
            trial.state, trial.reason = "failed", record["reason"]
        else:
            trial.state, trial.reason = "running", ""


def _compute_checksum(record: Mapping[str, Any], number: int) -> int:
    """Checksum of a record and its line number."""
    return zlib.crc32(json.dumps([number, record], sort_keys=True).encode())


def _parse_line(line: bytes, number: int, path: Path) -> dict[str, Any]:
    """The record of a line. Raises `RunFailed` if line or position are wrong."""
    try:
        record = dict(json.loads(line))
        # The checksum includes the position, so a missing line is found as well.
        if record.pop("check") != _compute_checksum(record, number):
            raise ValueError
        return record
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RunFailed(
            f"{path}: line {number + 1} is damaged or out of place; "
            "restore the file, or start in another run.dir"
        ) from None

"""`journal.jsonl`: every trial, rung and decision of a sweep, written before it takes effect, by the driver alone.

It is all that a sweep needs to go on after any interruption; nothing of Ray's own state is read again. Each line
carries a checksum of itself and its place: one that is damaged or lost stops the sweep instead of changing its outcome.
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

SETTLED = ("finished", "pruned", "failed", "replaced")
STATES = {"prune": "pruned", "end": "finished", "wait": "waiting", "replace": "replaced"}
"""A trial's state after a decision; any other decision lets it run on."""


@dataclass(frozen=True)
class Rung:
    """All folds of a trial at the same step."""

    step: int
    score: float
    """Mean over folds."""
    spread: float
    """Sample standard deviation over folds; 0 for one fold."""
    folds: dict[str, dict[str, float]]
    """Fold -> score, liver, tumour, and what else it measured (memory_gib, step_s)."""
    decision: str
    """continue, prune or end; wait, until its group is there to be compared; replace: another goes on instead."""
    seconds: float = 0.0
    """Wall time of the folds' processes up to here since the last rung, summed; of this attempt only."""

    @classmethod
    def of(
        cls, step: int, folds: Mapping[str, dict[str, float]], decision: str, seconds: float
    ) -> "Rung":
        scores = [folds[key]["score"] for key in sorted(folds)]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        return cls(step, statistics.fmean(scores), spread, dict(folds), decision, seconds)


@dataclass
class Trial:
    number: int
    id: str
    params: dict[str, Any]
    rungs: list[Rung] = field(default_factory=list)
    state: str = "running"
    """running, waiting, or settled: finished, pruned, failed, replaced."""
    reason: str = ""
    parent: str = ""
    """The trial whose checkpoints it went on from; empty: it began anew."""
    from_step: int = 0
    """The step it went on from."""

    @property
    def score(self) -> float | None:
        return self.rungs[-1].score if self.rungs else None

    @property
    def step(self) -> int:
        """Reached by all its folds."""
        return self.rungs[-1].step if self.rungs else self.from_step

    def decide(self, decision: str) -> None:
        """At the rung it reached last."""
        self.rungs[-1] = replace(self.rungs[-1], decision=decision)
        self.state = STATES.get(decision, "running")


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Highest mean Dice at the end; the earlier trial of equal ones."""
    finished = [trial for trial in trials if trial.state == "finished"]
    return max(finished, key=lambda trial: (trial.score or 0.0, -trial.number), default=None)


class Journal:
    """Opened by one driver at a time (a lock on the folder says so, where its file system has any)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open_lock(folder / ".lock")
        try:
            if not take_lock(self._lock, wait=False):
                log.warning(
                    "%s: this file system has no locks: see to it that no other sweep works here; a Ray that stands "
                    "still is not noticed",
                    folder,
                )
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(
                f"{folder}: another sweep works here; wait for it, or choose another run.dir"
            ) from None
        self.trials: dict[str, Trial] = {}
        self._lines = 0
        path = folder / "journal.jsonl"
        try:
            whole = self._read(path) if path.exists() else 0
            self._file = path.open("ab")
        except BaseException:
            os.close(self._lock)
            raise
        self._file.truncate(whole)

    def _read(self, path: Path) -> int:
        """Apply what was written; returns how many bytes of it are whole lines. Raises `RunFailed`."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # the driver was killed while writing it
            self._apply(_parse(line, self._lines, path))
            self._lines += 1
            whole += len(line)
        return whole

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        os.close(self._lock)

    @property
    def lines(self) -> int:
        """What was written so far: it grows with all that happens."""
        return self._lines

    @property
    def unsettled(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state not in SETTLED]

    def begin(self, id_: str, params: dict[str, Any]) -> Trial:
        self._write({"event": "trial", "number": len(self.trials), "id": id_, "params": params})
        return self.trials[id_]

    def rung(self, id_: str, rung: Rung) -> None:
        self._write({"event": "rung", "id": id_, **rung.__dict__})

    def decide(self, decisions: Mapping[str, str], children: Sequence[Mapping[str, Any]]) -> None:
        """What becomes of trials that wait, and who goes on instead of those replaced: all of it, or nothing."""
        born = [
            {**child, "number": len(self.trials) + place} for place, child in enumerate(children)
        ]
        self._write({"event": "decisions", "decisions": dict(decisions), "children": born})

    def fail(self, id_: str, reason: str) -> None:
        self._write({"event": "failed", "id": id_, "reason": reason})

    def retry(self, id_: str) -> None:
        """A failed trial is to run again."""
        self._write({"event": "retry", "id": id_})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(
            json.dumps({**record, "check": _check(record, self._lines)}).encode() + b"\n"
        )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines += 1
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        event = record["event"]
        if event == "decisions":
            for child in record["children"]:
                self.trials[child["id"]] = Trial(**child)
            for id_, decision in record["decisions"].items():
                self.trials[id_].decide(decision)
            return
        if event == "trial":
            self.trials[record["id"]] = Trial(record["number"], record["id"], record["params"])
            return
        trial = self.trials[record["id"]]
        if event == "rung":
            trial.rungs.append(
                Rung(**{k: v for k, v in record.items() if k not in ("event", "id")})
            )
            trial.decide(record["decision"])
        elif event == "failed":
            trial.state, trial.reason = "failed", record["reason"]
        else:
            trial.state, trial.reason = "running", ""


def _check(record: Mapping[str, Any], number: int) -> int:
    return zlib.crc32(json.dumps([number, record], sort_keys=True).encode())


def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        record = dict(json.loads(line))
        if record.pop("check") != _check(record, number):
            raise ValueError
        return record
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RunFailed(
            f"{path}: line {number + 1} is damaged or out of place; restore the file, or begin in another run.dir"
        ) from None

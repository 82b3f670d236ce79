"""Which ranks are silent, and which delay the others: pure functions of the heartbeats."""

from collections.abc import Mapping
from dataclasses import dataclass

MAX_RANKS_SHOWN = 4
ACTIVITY_ORDER = (
    "resuming",
    "waiting for data",
    "in forward",
    "in backward",
    "summing figures",
    "validating",
    "saving",
)
"""Activities of a training step in their order: the other ranks wait for the rank that is
behind."""


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank."""

    count: int
    """Number of heartbeats that the rank has sent."""
    step: int
    """Optimizer step (from 0); -1 if the work has no steps."""
    doing: str
    """Activity, one of `ACTIVITY_ORDER` or free text."""
    age_s: float
    """Seconds since this activity began."""
    host: str
    phase: int = 0
    """Number of the phase that `done` counts in; `begin_phase` increments it."""
    done: int = 0
    """Cases that the rank has finished in this phase."""


class SilenceDetector:
    """Finds ranks without heartbeats or behind the others; returns each warning once."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._last_change: dict[int, tuple[int, float]] = {}
        """Per rank: last heartbeat's number, and when it arrived."""
        self._last_warning = ""

    def find_new_warning(self, beats: Mapping[int, Heartbeat], now_s: float) -> str:
        """Return a warning about `beats`; empty if there is none, or if it was returned before."""
        silent: dict[int, str] = {}
        for rank, beat in beats.items():
            count, since_s = self._last_change.get(rank, (-1, now_s))
            if count != beat.count:
                since_s = now_s
            self._last_change[rank] = (beat.count, since_s)
            if now_s - since_s > self._patience_s:
                silent[rank] = f"has sent no heartbeat for {now_s - since_s:.0f} s"
        warning = describe_ranks(beats, silent) or find_stragglers(beats, self._patience_s)
        # The text before the duration identifies the warning.
        identity = warning.partition(" for ")[0]
        is_new = bool(warning) and identity != self._last_warning
        self._last_warning = identity
        return warning if is_new else ""


def describe_ranks(beats: Mapping[int, Heartbeat], problems: Mapping[int, str]) -> str:
    """Describe the problem of each rank with its host and last activity; the first ones only."""
    parts = []
    for rank in list(problems)[:MAX_RANKS_SHOWN]:
        beat = beats[rank]
        step = f"in step {beat.step + 1}, " if beat.step >= 0 else ""
        parts.append(
            f"rank {rank} on {beat.host} {problems[rank]}, last activity {step}{beat.doing}"
        )
    more = len(problems) - MAX_RANKS_SHOWN
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def find_stragglers(beats: Mapping[int, Heartbeat], patience_s: float) -> str:
    """Describe the ranks that the others wait for.

    A rank is a straggler if it is behind the furthest rank (in step, then in `ACTIVITY_ORDER`) and
    has not changed its activity for longer than `patience_s`, as the waiting ranks have not.

    Returns:
        A line for the user; empty if no rank delays the others.
    """
    position: dict[int, tuple[int, int]] = {}
    for rank, beat in beats.items():
        known = beat.doing in ACTIVITY_ORDER
        position[rank] = (beat.step, ACTIVITY_ORDER.index(beat.doing) if known else -1)
    furthest = max(position.values())
    behind: list[int] = []
    waiting: list[int] = []
    for rank in sorted(position):
        if beats[rank].age_s > patience_s:
            (behind if position[rank] < furthest else waiting).append(rank)
    if not behind or not waiting:
        return ""
    parts = []
    for rank in behind[:MAX_RANKS_SHOWN]:
        beat = beats[rank]
        parts.append(f"rank {rank} on {beat.host} has been {beat.doing} in step {beat.step + 1}")
    longest_s = max(beats[rank].age_s for rank in behind)
    return f"{', '.join(parts)} for {longest_s:.0f} s; the others wait for it"

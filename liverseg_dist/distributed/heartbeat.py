"""Detect which rank failed, which is lost and which delays the others.

When one rank dies, all other ranks fail with a broken connection and a long traceback about
sockets. Therefore every rank writes a heartbeat (step, activity, host) to the job's key-value store
twice a second, on a thread and a connection of its own. The rank that fails first also writes its
error there. The other ranks wait some seconds for this error and report it instead of their own; if
there is none (a killed process, a lost node, a hang), they report which ranks sent no heartbeat.
"""

import json
import logging
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from liverseg_dist.distributed.collectives import barrier
from liverseg_dist.distributed.tcp_store import store_of_attempt
from liverseg_dist.distributed.world import World

HEARTBEAT_INTERVAL_S = 0.5
SILENCE_LIMIT_S = 5.0
"""After a broken connection, a rank without a heartbeat for this long counts as lost."""
REPORT_TIMEOUT_S = 20.0
"""Time that a failing rank spends on exchanging errors with the other ranks."""
CONNECT_TIMEOUT = timedelta(seconds=30)
BEATS_PER_CHECK = 4
"""Rank 0 reads the heartbeats of all ranks once per this many of its own."""
MAX_RANKS_SHOWN = 4
KEY_PREFIX = "liverseg/"
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
CONNECTION_ERROR_RE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|closed by peer|socket"
    r"|Timed out waiting|recvValue|process group|collective",
    re.IGNORECASE,
)
_logger = logging.getLogger(__name__)


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


def is_consequence(error: BaseException) -> bool:
    """Return whether an intact rank raises `error` because another rank or the network failed."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and bool(CONNECTION_ERROR_RE.search(str(error)))


class HeartbeatMonitor:
    """Sends this rank's heartbeats while the block runs; on rank 0 it also reads all others.

    Use it as `with HeartbeatMonitor(world) as monitor:` after the process group is connected. For a
    single process it does nothing.

    Args:
        world: this process.
        timeout_s: timeout of collective calls, for code that creates a process group of its own.
        patience_s: rank 0 warns about ranks without a heartbeat, or behind the others, for this
            long.
    """

    def __init__(
        self,
        world: World,
        timeout_s: float = 1800.0,
        patience_s: float = 120.0,
    ) -> None:
        self.world, self.patience_s = world, patience_s
        self.timeout_s = timeout_s
        self._step, self._doing, self._since = 0, "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None
        self._host = socket.gethostname()
        self._silent: list[int] = []
        self.done = 0
        """Cases that this rank has finished in the present phase."""
        self.on_others: Callable[[int], None] | None = None
        """Called on rank 0, on the monitor's thread, with the number of cases that the other ranks
        have finished in this phase."""
        self._phase = 0
        self.last_step = 0
        """Last step of the run."""
        self.samples: Sequence[str] = ()
        """Samples of this rank's last micro-batch, for crash reports."""

    def __enter__(self) -> "HeartbeatMonitor":
        if self.world.is_distributed:
            host, _, port = self.world.master.rpartition(":")
            self._store = store_of_attempt(
                dist.TCPStore(host, int(port), wait_for_workers=False, timeout=CONNECT_TIMEOUT)
            )
            self._send_heartbeat(0)
            # After the barrier the keys of all ranks exist, so reading one never blocks.
            barrier()
            self._thread = threading.Thread(
                target=self._send_heartbeats, name="liverseg-heartbeat", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    @property
    def step(self) -> int:
        """Step that this rank reported last."""
        return self._step

    def report_progress(self, step: int, doing: str) -> None:
        """Set what this rank does. Cheap: the monitor's thread sends it with the next heartbeat.

        Args:
            step: optimizer step (from 0); -1 if the work has no steps.
            doing: activity, for example "in forward".
        """
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def begin_phase(self, on_others: Callable[[int], None]) -> None:
        """Count finished cases from 0 again. All ranks must call it equally often."""
        self._phase, self.done, self.on_others = self._phase + 1, 0, on_others

    def count_case(self, shared: bool = False) -> None:
        """Count a case as done.

        Args:
            shared: all ranks computed the case together. Only rank 0 counts it, because the counts
                of all ranks are added.
        """
        if self.world.is_main or not shared:
            self.done += 1

    def report_failure(
        self, error: BaseException, message: str, name_rank: bool = True
    ) -> tuple[str, bool]:
        """Agree with the other ranks on the error that ends the job. Takes some seconds.

        Args:
            error: exception that ended the work on this rank.
            message: one line for the user about it.
            name_rank: add this rank and its host to the message.

        Returns:
            The line of the rank that failed first, and whether this rank has to print it.
        """
        if self._store is None:
            return message, True
        # On a thread: with a broken network a call to the store returns only after TCP's own
        # timeout, about a quarter of an hour.
        answer: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        exchange = threading.Thread(
            target=lambda: answer.put(self._exchange_failure(error, message, name_rank)),
            name="liverseg-failure",
            daemon=True,
        )
        exchange.start()
        try:
            return answer.get(timeout=REPORT_TIMEOUT_S)
        except queue.Empty:
            line = (
                f"rank 0 on {self._master_host} does not answer; check the network between the "
                f"nodes ({_one_line(error)})"
            )
            return line, True

    @property
    def _master_host(self) -> str:
        return self.world.master.rpartition(":")[0]

    def _exchange_failure(
        self, error: BaseException, message: str, name_rank: bool
    ) -> tuple[str, bool]:
        assert self._store is not None
        rank = self.world.global_rank
        try:
            if is_consequence(error):
                reported = self._wait_for_failure_of_other_rank()
                if reported:
                    return reported, False
                reason = self._describe_missing_ranks() or "the ranks lost their connection"
                message = f"{reason} ({_one_line(error)})"
            elif name_rank:
                message = f"rank {rank} on {self._host}: {message}"
            # Atomic: the first rank that sets the key reports the failure for all.
            tag = f"{rank} "
            first = self._store.compare_set(f"{KEY_PREFIX}failed", "", tag + message).decode()
        # The store ended together with rank 0's process or node.
        except (RuntimeError, ValueError, OSError):
            return f"rank 0 on {self._master_host} is lost ({_one_line(error)})", True
        return first.partition(" ")[2], first.startswith(tag)

    def _wait_for_failure_of_other_rank(self) -> str:
        """Return the message of the rank that failed first; empty if none arrives in time."""
        assert self._store is not None
        end = time.monotonic() + SILENCE_LIMIT_S
        before = self._read_heartbeats()
        while time.monotonic() < end:
            if self._store.check([f"{KEY_PREFIX}failed"]):
                return str(self._store.get(f"{KEY_PREFIX}failed").decode().partition(" ")[2])
            time.sleep(0.2)
        after = self._read_heartbeats()
        self._silent = []
        for rank, beat in after.items():
            if beat.count == before[rank].count:
                self._silent.append(rank)
        return ""

    def _describe_missing_ranks(self) -> str:
        beats = self._read_heartbeats()
        lost = [rank for rank in self._silent if rank != self.world.global_rank]
        if not lost:
            return find_stragglers(beats, 0.0)
        line = _describe_ranks(beats, dict.fromkeys(lost, "is lost: no heartbeat"))
        more = len(lost) - MAX_RANKS_SHOWN
        return f"{line}; and {more} more" if more > 0 else line

    def _send_heartbeats(self) -> None:
        """Main function of the monitor's thread."""
        count = 0
        checks = _SilenceDetector(self.patience_s)
        # The store is closed when rank 0 ends; the next call of the main thread reports that.
        with suppress(RuntimeError, OSError, ValueError):
            while not self._ended.wait(HEARTBEAT_INTERVAL_S):
                count += 1
                self._send_heartbeat(count)
                if self.world.is_main and count % BEATS_PER_CHECK == 0:
                    beats = self._read_heartbeats()
                    self._count_cases_of_others(beats)
                    warning = checks.find_new_warning(beats, time.monotonic())
                    if warning:
                        _logger.warning(warning)

    def _count_cases_of_others(self, beats: Mapping[int, Heartbeat]) -> None:
        on_others = self.on_others
        if on_others is None:
            return
        done = 0
        for rank, beat in beats.items():
            if rank != self.world.global_rank and beat.phase == self._phase:
                done += beat.done
        on_others(done)

    def _send_heartbeat(self, count: int) -> None:
        assert self._store is not None
        age_s = round(time.monotonic() - self._since, 1)
        beat = [count, self._step, self._doing, age_s, self._host, self._phase, self.done]
        self._store.set(f"{KEY_PREFIX}alive/{self.world.global_rank}", json.dumps(beat))

    def _read_heartbeats(self) -> dict[int, Heartbeat]:
        assert self._store is not None
        keys = [f"{KEY_PREFIX}alive/{rank}" for rank in range(self.world.world_size)]
        beats = {}
        for rank, value in enumerate(self._store.multi_get(keys)):
            beats[rank] = Heartbeat(*json.loads(value))
        return beats


class _SilenceDetector:
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
        warning = _describe_ranks(beats, silent) or find_stragglers(beats, self._patience_s)
        # The text before the duration identifies the warning.
        identity = warning.partition(" for ")[0]
        is_new = bool(warning) and identity != self._last_warning
        self._last_warning = identity
        return warning if is_new else ""


def _describe_ranks(beats: Mapping[int, Heartbeat], problems: Mapping[int, str]) -> str:
    """Describe the problem of each rank with its host and last activity; the first ones only."""
    parts = []
    for rank in list(problems)[:MAX_RANKS_SHOWN]:
        beat = beats[rank]
        step = f"in step {beat.step + 1}, " if beat.step >= 0 else ""
        parts.append(
            f"rank {rank} on {beat.host} {problems[rank]}, last activity {step}{beat.doing}"
        )
    return "; ".join(parts)


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]

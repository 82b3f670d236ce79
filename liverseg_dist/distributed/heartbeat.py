"""Detect which rank failed, which is lost and which delays the others.

When one rank dies, all other ranks fail with a broken connection and a long traceback about
sockets. Therefore every rank writes a heartbeat (step, activity, host) to the job's key-value store
twice a second, on a thread and a connection of its own. The rank that fails first also writes its
error there. The other ranks wait some seconds for this error and report it instead of their own; if
there is none (a killed process, a lost node, a hang), they report which ranks sent no heartbeat.

The main thread may be blocked in native code and notice nothing, for example in an NCCL call. So
the monitor's thread looks for failures as well. Each rank watches the rank before it, and rank 0
looks for ranks that delay the others. After a failure every rank has some seconds to end by
itself; then the thread writes the stacks of all threads to `errors/`, aborts the process groups
and ends the process.
"""

import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from liverseg_dist.distributed.collectives import barrier
from liverseg_dist.distributed.connection_errors import is_consequence
from liverseg_dist.distributed.flight_recorder import write_flight_record, write_stacks
from liverseg_dist.distributed.process_groups import abort_process_groups, exit_after
from liverseg_dist.distributed.shared_failure import KEY_PREFIX, SharedFailure
from liverseg_dist.distributed.stragglers import (
    Heartbeat,
    SilenceDetector,
    describe_ranks,
    find_stragglers,
)
from liverseg_dist.distributed.tcp_store import store_of_attempt
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER
from liverseg_dist.interrupts import write_line

HEARTBEAT_INTERVAL_S = 0.5
SILENCE_LIMIT_S = 5.0
"""After a broken connection, a rank without a heartbeat for this long counts as lost."""
REPORT_TIMEOUT_S = 20.0
"""Time that a failing rank spends on exchanging errors with the other ranks."""
CONNECT_TIMEOUT = timedelta(seconds=30)
BEATS_PER_CHECK = 4
"""A rank looks for failures of others once per this many of its heartbeats."""
PEER_GRACE_S = 10.0
"""Time that the main thread of a rank has to notice the failure of another rank."""
FORCED_EXIT_S = 10.0
"""Time after it for stacks, flight record and status, before the process is ended."""
_logger = logging.getLogger(__name__)


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
        self.failure: SharedFailure | None = None
        """The failure of the job; None for a single process."""
        self._host = socket.gethostname()
        self._silent: list[int] = []
        self.done = 0
        """Cases that this rank has finished in the present phase."""
        self.on_others: Callable[[int], None] | None = None
        """Called on rank 0, on the monitor's thread, with the number of cases that the other ranks
        have finished in this phase."""
        self._phase = 0
        self.errors: Path | None = None
        """Folder for the stacks and the flight record of a rank that is ended by force."""
        self.on_error: Callable[[BaseException], object] | None = None
        """Called with an exception before the work is torn down (see `report_errors`)."""
        self.on_forced_end: Callable[[str], object] | None = None
        """Called on the monitor's thread with the reason before this process is ended."""
        self._step_limit_s: float | None = None
        self._lost_after_s = timeout_s
        self._watched = (-1, 0)
        """Number of the last heartbeat of the rank before this one, and checks since then."""
        self.wants_stop: Callable[[], bool] = lambda: False
        """Whether a stop was requested on this rank. The monitor shares it with the other ranks."""
        self.other_rank_stops = False
        """Whether a stop was requested on some rank; known some seconds later."""
        self._is_failing = False
        self._peer_failed = False
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
            self.failure = SharedFailure(self._store, self.world.global_rank, self.world.world_size)
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

    def limit_steps(self, limit_s: float | None) -> None:
        """Set for how long a rank may delay the others, or be silent, before the job fails.

        Args:
            limit_s: seconds; None: waits may be long now, and only silent ranks fail the job.
        """
        self._step_limit_s = limit_s
        if limit_s is not None:
            self._lost_after_s = limit_s

    @contextmanager
    def report_errors(self) -> Iterator[None]:
        """Report an error of the block at once, before the enclosing code is torn down."""
        try:
            yield
        except Exception as error:
            if self.on_error is not None:
                self.on_error(error)
            raise

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
        self._is_failing = True
        if self.failure is None:
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
        assert self.failure is not None
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
            return self.failure.claim(message, EXIT_FAILED if name_rank else EXIT_USER)
        # The store ended together with rank 0's process or node.
        except (RuntimeError, ValueError, OSError):
            if self.failure.known is not None:
                return self.failure.known[0], False
            return f"rank 0 on {self._master_host} is lost ({_one_line(error)})", True

    def _wait_for_failure_of_other_rank(self) -> str:
        """Return the message of the rank that failed first; empty if none arrives in time."""
        assert self.failure is not None
        end = time.monotonic() + SILENCE_LIMIT_S
        reason = self.failure.read()
        if reason is not None:
            return reason[0]
        before = self._read_heartbeats()
        while time.monotonic() < end:
            failure = self.failure.read()
            if failure is not None:
                return failure[0]
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
        return describe_ranks(beats, dict.fromkeys(lost, "is lost: no heartbeat"))

    def _send_heartbeats(self) -> None:
        """Main function of the monitor's thread."""
        count = 0
        checks = SilenceDetector(self.patience_s)
        try:
            while not self._ended.wait(HEARTBEAT_INTERVAL_S):
                count += 1
                self._send_heartbeat(count)
                if count % BEATS_PER_CHECK:
                    continue
                beats: dict[int, Heartbeat] = {}
                if self.world.is_main:
                    beats = self._read_heartbeats()
                    self._count_cases_of_others(beats)
                    warning = checks.find_new_warning(beats, time.monotonic())
                    if warning:
                        _logger.warning(warning)
                self._share_stop()
                self._check_other_ranks(beats)
        except (RuntimeError, OSError, ValueError) as error:
            # The store is closed when rank 0 ends. Its work may be done before that of this rank,
            # so this rank gets more time than after a failure that was reported.
            line = f"rank 0 on {self._master_host} is lost ({_one_line(error)})"
            is_reporter = self.world.global_rank == 1
            self._end_if_blocked(line, EXIT_FAILED, self._lost_after_s, is_reporter)

    def _share_stop(self) -> None:
        assert self._store is not None
        key = f"{KEY_PREFIX}stop"
        if not self.other_rank_stops:
            if self.wants_stop():
                self._store.set(key, "")
            self.other_rank_stops = self._store.check([key])

    def _check_other_ranks(self, beats: Mapping[int, Heartbeat]) -> None:
        """Look for a failure that the main thread of this rank may not notice.

        Args:
            beats: heartbeats of all ranks on rank 0, else empty.
        """
        assert self.failure is not None
        if self._is_failing or self._peer_failed:
            return
        reason, is_reporter = self.failure.read(), False
        if reason is None:
            problem = self._describe_lost_neighbour()
            if not problem and beats and self._step_limit_s is not None:
                problem = find_stragglers(beats, self._step_limit_s)
            if not problem:
                return
            line, is_reporter = self.failure.claim(problem, EXIT_FAILED)
            reason = line, EXIT_FAILED
        self._peer_failed = True
        if is_reporter:
            write_line(reason[0])
        # On another thread, because the heartbeats continue until the process ends.
        ending = threading.Thread(
            target=self._end_if_blocked, args=(*reason, PEER_GRACE_S, False), daemon=True
        )
        ending.start()

    def _describe_lost_neighbour(self) -> str:
        """Describe the rank before this one if it is silent; empty if it is alive.

        Each rank reads one heartbeat, so the cost is the same for any number of ranks.
        """
        assert self._store is not None
        rank = (self.world.global_rank - 1) % self.world.world_size
        beat = self._read_heartbeat(self._store.get(f"{KEY_PREFIX}alive/{rank}"))
        count, checks = self._watched
        # Own heartbeats measure the time: a job that was suspended as a whole is not silent.
        self._watched = (beat.count, checks + 1 if beat.count == count else 0)
        silent_s = self._watched[1] * BEATS_PER_CHECK * HEARTBEAT_INTERVAL_S
        if silent_s < self._lost_after_s:
            return ""
        return describe_ranks({rank: beat}, {rank: f"is lost: no heartbeat for {silent_s:.0f} s"})

    def _end_if_blocked(
        self, line: str, exit_code: int, grace_s: float, has_to_print: bool
    ) -> None:
        """End this process if its main thread does not notice within `grace_s` that the job has
        failed."""
        if self._ended.wait(grace_s) or self._is_failing:
            return
        exit_after(FORCED_EXIT_S, exit_code)
        if has_to_print:
            write_line(line)
        if self.errors is not None:
            write_stacks(self.errors, self.world.global_rank)
            write_flight_record(self.errors, self.world.global_rank)
        if self.on_forced_end is not None:
            with suppress(OSError):
                self.on_forced_end(line)
        # The main thread may get an error now and end the process itself.
        abort_process_groups()

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
            beats[rank] = self._read_heartbeat(value)
        return beats

    @staticmethod
    def _read_heartbeat(value: bytes) -> Heartbeat:
        return Heartbeat(*json.loads(value))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]

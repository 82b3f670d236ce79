"""Who failed, who is gone, who holds the others up: each rank's signs of life, in the job's own key-value store.

When one rank dies, all others die of the broken connection, each with a long traceback about sockets. Here every rank
tells twice a second where it stands, on a thread and a connection of its own. The one that fails first says so, and the
others wait a moment for its word; where there is none (killed, node lost, hung) they name who has fallen silent.
"""

import json
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from liverseg_dist.distributed.collectives import barrier
from liverseg_dist.distributed.tcp_store import store_of_attempt
from liverseg_dist.distributed.world import World

HEARTBEAT_INTERVAL_S = 0.5
SILENCE_LIMIT_S = 5.0
"""A rank without a sign of life for this long, when a connection broke, is the one that is gone."""
REPORT_TIMEOUT_S = 20.0
"""How long a failing rank tries to hear and tell why."""
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
"""What a rank does within a step, in this order; who is behind the others is the one they wait for."""
CONNECTION_ERROR_RE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|closed by peer|socket|Timed out waiting|recvValue|"
    r"process group|collective",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last told: a running number, its step, what it does and for how long, its host."""

    count: int
    step: int
    doing: str
    age_s: float
    host: str
    phase: int = 0
    """Number of the work that `done` counts in; it grows by one with each `begin_phase`."""
    done: int = 0
    """Cases that the rank has done in this phase."""


def is_consequence(error: BaseException) -> bool:
    """Whether `error` is what a healthy rank meets when another one, or the network, is gone."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and bool(CONNECTION_ERROR_RE.search(str(error)))


class HeartbeatMonitor:
    """`with HeartbeatMonitor(world) as watch:` after the process group is up. Alone it does nothing.

    `timeout_s`: how long a collective waits, for whoever makes a group of its own. `patience_s`: rank 0 warns of ranks
    that have been silent, or have held the others up, for this long.
    """

    def __init__(
        self,
        world: World,
        timeout_s: float = 1800.0,
        patience_s: float = 120.0,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.world, self.patience_s = world, patience_s
        self.timeout_s = timeout_s
        self._tell = tell or (lambda line: print(f"warning: {line}", file=sys.stderr, flush=True))
        self._step, self._doing, self._since = 0, "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None
        self._host = socket.gethostname()
        self._silent: list[int] = []
        self.done = 0
        """Cases that this rank has done in the present phase."""
        self.on_others: Callable[[int], None] | None = None
        """Called on rank 0, on the watch's thread, with the cases that the other ranks have done in this phase."""
        self._phase = 0
        self.last_step = 0
        """Where the run is to end."""
        self.samples: Sequence[str] = ()
        """This rank's last ones, for the story of a failure."""

    def __enter__(self) -> "HeartbeatMonitor":
        if self.world.is_distributed:
            host, _, port = self.world.master.rpartition(":")
            patience = timedelta(seconds=30)
            self._store = store_of_attempt(
                dist.TCPStore(host, int(port), wait_for_workers=False, timeout=patience)
            )
            self._beat(0)
            barrier()  # from here on every rank's key is there: reading one never waits
            self._thread = threading.Thread(target=self._live, name="liverseg-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    @property
    def step(self) -> int:
        return self._step

    def mark(self, step: int, doing: str) -> None:
        """Say where this rank stands; costs nothing, the thread passes it on. Step -1: its work has no steps."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def begin_phase(self, on_others: Callable[[int], None]) -> None:
        """Count cases from 0. Every rank calls it as often as the others do."""
        self._phase, self.done, self.on_others = self._phase + 1, 0, on_others

    def account(
        self, error: BaseException, message: str, name_rank: bool = True
    ) -> tuple[str, bool]:
        """Why the run ends, and whether this rank is the one to print it. Waits some seconds for other ranks' words."""
        if self._store is None:
            return message, True
        # On a thread: where the network is cut, a call to the store waits as long as TCP hopes, a quarter of an hour.
        answer: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        agree = threading.Thread(
            target=lambda: answer.put(self._agree(error, message, name_rank)),
            name="liverseg-account",
            daemon=True,
        )
        agree.start()
        try:
            return answer.get(timeout=REPORT_TIMEOUT_S)
        except queue.Empty:
            return (
                f"rank 0 on {self._master_host} no longer answers; is the network gone? ({_one_line(error)})",
                True,
            )

    @property
    def _master_host(self) -> str:
        return self.world.master.rpartition(":")[0]

    def _agree(self, error: BaseException, message: str, name_rank: bool) -> tuple[str, bool]:
        assert self._store is not None
        try:
            if is_consequence(error):
                said = self._other_rank_says()
                if said:
                    return said, False
                message = f"{self._missing() or 'the ranks lost each other'} ({_one_line(error)})"
            else:
                message = (
                    f"rank {self.world.global_rank} on {self._host}: {message}"
                    if name_rank
                    else message
                )
            tag = f"{self.world.global_rank} "
            winner = self._store.compare_set(f"{KEY_PREFIX}failed", "", tag + message).decode()
        except (RuntimeError, ValueError, OSError):  # the store went with rank 0's process or node
            return f"rank 0 on {self._master_host} is gone ({_one_line(error)})", True
        return winner.partition(" ")[2], winner.startswith(tag)

    def _other_rank_says(self) -> str:
        """The word of the rank that failed first, waited for until silence is telling."""
        assert self._store is not None
        end = time.monotonic() + SILENCE_LIMIT_S
        before = self._signs()
        while time.monotonic() < end:
            if self._store.check([f"{KEY_PREFIX}failed"]):
                return str(self._store.get(f"{KEY_PREFIX}failed").decode().partition(" ")[2])
            time.sleep(0.2)
        after = self._signs()
        self._silent = [rank for rank, sign in after.items() if sign.count == before[rank].count]
        return ""

    def _where(self, rank: int, sign: Heartbeat, news: str) -> str:
        step = f"in step {sign.step + 1}, " if sign.step >= 0 else ""
        return f"rank {rank} on {sign.host} {news}, last heard of {step}{sign.doing}"

    def _missing(self) -> str:
        signs = self._signs()
        if gone := [rank for rank in self._silent if rank != self.world.global_rank]:
            news = "is gone: no sign of life"
            return "; ".join(self._where(rank, signs[rank], news) for rank in gone[:4]) + (
                f"; and {len(gone) - 4} more" if len(gone) > 4 else ""
            )
        return find_stragglers(signs, 0.0)

    def _live(self) -> None:
        count, told = 0, ""
        seen: dict[int, tuple[int, float]] = {}
        with suppress(
            RuntimeError, OSError, ValueError
        ):  # the store is gone: who needs it next will say so
            while not self._ended.wait(HEARTBEAT_INTERVAL_S):
                count += 1
                self._beat(count)
                if not self.world.is_main or count % 4:
                    continue
                now = time.monotonic()
                signs = self._signs()
                seen = {
                    rank: (
                        sign.count,
                        now if rank not in seen or seen[rank][0] != sign.count else seen[rank][1],
                    )
                    for rank, sign in signs.items()
                }
                on_others = self.on_others
                if on_others is not None:
                    own = self.world.global_rank
                    others = [
                        sign
                        for rank, sign in signs.items()
                        if rank != own and sign.phase == self._phase
                    ]
                    on_others(sum(sign.done for sign in others))
                line = self._silence(
                    signs, {rank: now - heard for rank, (_, heard) in seen.items()}
                )
                line = line or find_stragglers(signs, self.patience_s)
                if line and line.partition(" for ")[0] != told:
                    self._tell(line)
                told = line.partition(" for ")[0]

    def _silence(self, signs: dict[int, Heartbeat], silent_s: dict[int, float]) -> str:
        gone = [rank for rank, seconds in silent_s.items() if seconds > self.patience_s]
        return "; ".join(
            self._where(rank, signs[rank], f"has given no sign of life for {silent_s[rank]:.0f} s")
            for rank in gone[:4]
        )

    def _beat(self, count: int) -> None:
        assert self._store is not None
        age_s = round(time.monotonic() - self._since, 1)
        sign = [count, self._step, self._doing, age_s, self._host, self._phase, self.done]
        self._store.set(f"{KEY_PREFIX}alive/{self.world.global_rank}", json.dumps(sign))

    def _signs(self) -> dict[int, Heartbeat]:
        assert self._store is not None
        keys = [f"{KEY_PREFIX}alive/{rank}" for rank in range(self.world.world_size)]
        return {
            rank: Heartbeat(*json.loads(value))
            for rank, value in enumerate(self._store.multi_get(keys))
        }


def find_stragglers(signs: dict[int, Heartbeat], patience_s: float) -> str:
    """Who holds the others up: ranks behind the furthest one, at the same place for longer than `patience_s`."""
    place = {
        rank: (sign.step, ACTIVITY_ORDER.index(sign.doing) if sign.doing in ACTIVITY_ORDER else -1)
        for rank, sign in signs.items()
    }
    furthest = max(place.values())
    behind = [
        rank for rank in sorted(place) if place[rank] < furthest and signs[rank].age_s > patience_s
    ]
    waiting = [
        rank
        for rank, where in place.items()
        if where == furthest and signs[rank].age_s > patience_s
    ]
    if not behind or not waiting:
        return ""
    ranks = ", ".join(
        f"rank {rank} on {signs[rank].host} has been {signs[rank].doing} in step {signs[rank].step + 1}"
        for rank in behind[:4]
    )
    return f"{ranks} for {max(signs[rank].age_s for rank in behind):.0f} s; the others wait for it"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]

"""The reason why a job failed, in its key-value store: set once, read by every rank."""

import threading
import time
from contextlib import suppress

import torch.distributed as dist

KEY_PREFIX = "liverseg/"
FAILURE_KEY = f"{KEY_PREFIX}failed"
READERS_KEY = f"{KEY_PREFIX}failure_readers"
READ_LIMIT_S = 7.0
"""Longer than ranks wait for the reason of another rank (`heartbeat.SILENCE_LIMIT_S`)."""


class SharedFailure:
    """The failure of the job: the rank that reports it first sets it for all.

    Args:
        store: the job's key-value store.
        rank: global rank of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._lock = threading.Lock()
        self.known: tuple[str, int] | None = None
        """The failure, once this rank has read it: the store may be gone later."""

    def claim(self, message: str, exit_code: int) -> tuple[str, bool]:
        """Report a failure for all ranks, unless another rank has done so.

        Returns:
            The message of the first rank, and whether that is this rank.
        """
        tag = f"{self._rank} {exit_code} "
        # Atomic, so exactly one rank is the first.
        first = self._store.compare_set(FAILURE_KEY, "", tag + message).decode()
        return self._remember(first)[0], first.startswith(tag)

    def read(self) -> tuple[str, int] | None:
        """Return the message and the exit code of the failure; None if no rank has failed."""
        if self.known is None and self._store.check([FAILURE_KEY]):
            self._remember(self._store.get(FAILURE_KEY).decode())
        return self.known

    def wait_until_read(self, limit_s: float = READ_LIMIT_S) -> None:
        """Wait until all ranks have read the failure, or until `limit_s` is over.

        For the rank whose process serves the store: the others lose the reason when it ends.
        """
        end = time.monotonic() + limit_s
        with suppress(RuntimeError, OSError):
            while self._store.add(READERS_KEY, 0) < self._world_size and time.monotonic() < end:
                time.sleep(0.05)

    def _remember(self, value: str) -> tuple[str, int]:
        _, code, message = value.split(" ", 2)
        reason = message, int(code)
        # The main thread and the monitor's thread may both read: the rank counts once.
        with self._lock:
            is_new = self.known is None
            self.known = reason
        if is_new:
            # The process that serves the store may end as soon as it has counted this rank.
            with suppress(RuntimeError, OSError):
                self._store.add(READERS_KEY, 1)
        return reason

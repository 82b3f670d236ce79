"""`PatchLoader`: batches in order, read ahead by threads.

Threads, not processes: reading a patch is decompression and copying, for which numcodecs and numpy release the GIL. One
thread reads a 64x128x128 sample in about 3 ms; behind torch's DataLoader with one process the same costs 9 ms of CPU,
because the voxels cross a pipe. A main thread that runs torch operators is not slowed by it; one that runs pure Python
all the time is, by a sixth. Batches appear straight in the (pinned) buffer, and there is nothing to pickle, to orphan
or to leak. `tools/bench/loader.py` measures it.

Which samples a batch holds is given from outside and its content is a function of them, so threads and prefetch depth
cannot change the stream. A reader that fails or hangs is named with its case, and the loader stops with `RunFailed`.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import torch

from liverseg_dist.data.loading.case_source import PatchSource
from liverseg_dist.errors import LiversegError, RunFailed
from liverseg_dist.volume import Index3


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as stored: int16 HU and labels; the patch with the surrounding its augmentation needs.

    `intensity_B4` (lower_hu, upper_hu, mean, std) and `augment_seed_B` stay on the CPU: the host decides with them.
    """

    indices: list[int]
    case_ids: list[str]
    image_BCDHW: torch.Tensor
    label_BDHW: torch.Tensor
    intensity_B4: torch.Tensor
    augment_seed_B: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> "Batch":
        image = self.image_BCDHW.to(device, non_blocking=non_blocking)
        return replace(
            self,
            image_BCDHW=image,
            label_BDHW=self.label_BDHW.to(device, non_blocking=non_blocking),
        )


@dataclass(eq=False)
class _Job:
    indices: Sequence[int]
    done: threading.Event
    batch: Batch | None = None
    error: BaseException | None = None
    doing: str = "waiting for a free thread"
    since: float = 0.0


class PatchLoader:
    """Iterates batches of `source` in the order of `index_batches`, `workers * prefetch` of them ahead.

    workers 0 reads in the caller. Memory: (workers * prefetch + 1) batches of at most the largest augmentation field,
    and what `PatchSource` states. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        source: PatchSource,
        index_batches: Iterable[Sequence[int]],
        workers: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self._source = source
        self._index_batches = iter(index_batches)
        self._ahead = workers * prefetch
        self._pin = pin_memory and torch.cuda.is_available()
        self._timeout_s = source.settings.stall_timeout_s
        self._pending: deque[_Job] = deque()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self.wait_s = 0.0
        """Seconds the caller has waited for batches so far."""
        # Daemons: a thread stuck in a dead file system must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._work, name=f"liverseg-loader-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        started = time.monotonic()
        try:
            return (
                self._next_read_ahead() if self._threads else self._load(next(self._index_batches))
            )
        except LiversegError:
            self.close()
            raise
        finally:
            self.wait_s += time.monotonic() - started

    def _next_read_ahead(self) -> Batch:
        while len(self._pending) < self._ahead:
            indices = next(self._index_batches, None)
            if indices is None:
                break
            job = _Job(list(indices), threading.Event(), since=time.monotonic())
            self._pending.append(job)
            self._jobs.put(job)
        if not self._pending:
            raise StopIteration
        job = self._pending.popleft()
        if not job.done.wait(self._timeout_s):
            raise RunFailed(
                f"the loader has been stuck for {self._timeout_s:.0f} s: {job.doing} "
                f"(batch of samples {', '.join(map(str, job.indices))}); is the store's file system alive? "
                "data.stall_timeout_s sets the patience"
            )
        if job.error is not None:
            if isinstance(job.error, LiversegError):
                raise job.error
            raise RunFailed(f"the loader failed while {job.doing}: {job.error!r}") from job.error
        assert job.batch is not None
        return job.batch

    def ready(self) -> bool:
        """Whether the next batch could be had without waiting."""
        return bool(self._pending) and self._pending[0].done.is_set()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closed:
                continue
            try:
                job.batch = self._load(job.indices, job)
            except BaseException as error:  # handed to the consumer, whatever it is
                job.error = error
            job.done.set()

    def _load(self, indices: Sequence[int], job: _Job | None = None) -> Batch:
        job = job or _Job(indices, threading.Event())
        planned = []
        for index in indices:
            job.doing = f"looking up sample {index}"
            planned.append(self._source.readable_plan(index))
        z, y, x = np.max([plan.shape for plan, _ in planned], axis=0).tolist()
        images, labels = self._buffers(len(planned), (z, y, x))
        plans = []
        for i, (plan, attempt) in enumerate(planned):
            job.doing = f"reading case {plan.case_id} (sample {plan.index})"
            plans.append(
                self._source.read_or_replace(plan, attempt, images[i, 0].numpy(), labels[i].numpy())
            )
        cases = [plan.case_id for plan in plans]
        values = [self._source.intensity(case) for case in cases]
        return Batch(
            [plan.index for plan in plans],
            cases,
            images,
            labels,
            torch.tensor(
                [[v.lower_hu, v.upper_hu, v.mean, v.std] for v in values], dtype=torch.float32
            ),
            torch.tensor([plan.augment_seed for plan in plans], dtype=torch.int64),
        )

    def _buffers(self, count: int, shape: Index3) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.empty((count, 1, *shape), dtype=torch.int16, pin_memory=self._pin)
        return images, torch.empty((count, *shape), dtype=torch.uint8, pin_memory=self._pin)

    def close(self) -> None:
        """Stop the threads and close the source. A thread that hangs is left behind: it cannot be stopped, and as a
        daemon it does not keep the process alive."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5.0)
        self._pending.clear()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

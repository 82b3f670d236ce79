"""`PatchLoader`: batches in order, read ahead by threads.

It uses threads and not processes: a patch is decompressed and copied, and numcodecs and numpy
release the GIL for both. One thread reads a 64x128x128 sample in about 3 ms; torch's DataLoader
with one process needs 9 ms of CPU time, because the voxels are sent through a pipe. A main thread
that runs torch operators does not become slower; one that runs only Python becomes slower by a
sixth. Batches are read directly into the (pinned) buffer, nothing is pickled, and no process can be
orphaned. `tools/bench/loader.py` measures it.

The caller decides which samples a batch contains, and its content is a function of them, so the
number of threads and the prefetch depth cannot change the stream. If reading fails or hangs, the
loader stops with `RunFailed` and names the case.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import torch

from liverseg_dist.config import IntensityConfig
from liverseg_dist.data.augment.host_tables import (
    NO_TABLES,
    DeviceTables,
    TableKey,
    compute_tables,
)
from liverseg_dist.data.loading.case_source import PatchPlan, PatchSource
from liverseg_dist.data.loading.packed_buffer import PackedBuffer
from liverseg_dist.errors import LiversegError, RunFailed
from liverseg_dist.volume import Index3


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as stored: the patch with the surrounding that its augmentation needs.

    `intensity_BC4`, `present_BC` and `augment_seed_B` stay on the CPU, where the augmentation is drawn.
    """

    indices: list[int]
    """Run-wide numbers of the samples."""
    case_ids: list[str]
    image_BCDHW: torch.Tensor
    """int16, all channels as stored."""
    label_BDHW: torch.Tensor
    """uint8."""
    intensity_BC4: torch.Tensor
    """lower_hu, upper_hu, mean, std of each channel."""
    present_BC: torch.Tensor
    """bool: whether the case has the channel."""
    augment_seed_B: torch.Tensor
    annotated: list[tuple[str, ...]]
    """Names of the annotated structures of each sample's case."""

    tables: DeviceTables = NO_TABLES
    """Tables of the augmentation, on the device of the images."""
    packed: PackedBuffer | None = None
    """The memory that holds images, labels and tables; None: they are separate."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> "Batch":
        """Return the batch with images, labels and tables on a device, by one transfer."""
        if self.packed is None:
            return replace(
                self,
                image_BCDHW=self.image_BCDHW.to(device, non_blocking=non_blocking),
                label_BDHW=self.label_BDHW.to(device, non_blocking=non_blocking),
            )
        packed = self.packed.to(device, non_blocking=non_blocking)
        return replace(
            self,
            image_BCDHW=packed.images,
            label_BDHW=packed.labels,
            tables=packed.tables,
            packed=packed,
        )


@dataclass(eq=False)
class _Job:
    indices: Sequence[int]
    done: threading.Event
    batch: Batch | None = None
    error: BaseException | None = None
    activity: str = "waiting for a free thread"
    since: float = 0.0


class PatchLoader:
    """Iterates over batches of a source. Use it as a context manager, or call `close`.

    Memory: (workers * prefetch + 1) batches of at most the largest augmentation field, and that of
    `PatchSource`.

    Args:
        source: reads samples.
        index_batches: numbers of the samples of each batch, in order.
        workers: number of threads; 0: the caller reads.
        prefetch: batches per thread that are read ahead.
        pin_memory: whether batches are in pinned memory, which a GPU copies faster.
        list_tables: tables that the augmentation of a sample needs on the device
            (`DeviceTransform.list_tables`), which then travel with the batch; None: none.
    """

    def __init__(
        self,
        source: PatchSource,
        index_batches: Iterable[Sequence[int]],
        workers: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
        list_tables: Callable[[int, Index3], list[TableKey]] | None = None,
    ) -> None:
        self._source = source
        self._index_batches = iter(index_batches)
        self._ahead = workers * prefetch
        self._list_tables = list_tables
        self._pin = pin_memory and torch.cuda.is_available()
        self._timeout_s = source.settings.stall_timeout_s
        self._pending: deque[_Job] = deque()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self.wait_s = 0.0
        """Seconds for which the caller has waited for batches."""
        # Daemons, because a thread that hangs in a file system must not prevent the process's exit.
        self._threads = [
            threading.Thread(target=self._run_worker, name=f"liverseg-loader-{i}", daemon=True)
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
            if self._threads:
                return self._take_next_batch()
            return self._load_batch(next(self._index_batches))
        except LiversegError:
            self.close()
            raise
        finally:
            self.wait_s += time.monotonic() - started

    def _take_next_batch(self) -> Batch:
        # Jobs are queued by the consumer, so that their order is the order of the batches.
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
                f"the loader has been stuck for {self._timeout_s:.0f} s: {job.activity} "
                f"(batch of samples {', '.join(map(str, job.indices))}); check the store's file "
                "system, or increase data.stall_timeout_s"
            )
        if job.error is not None:
            if isinstance(job.error, LiversegError):
                raise job.error
            raise RunFailed(f"the loader failed while {job.activity}: {job.error!r}") from job.error
        assert job.batch is not None
        return job.batch

    def is_ready(self) -> bool:
        """Whether the next batch is available without waiting."""
        return bool(self._pending) and self._pending[0].done.is_set()

    def _run_worker(self) -> None:
        while (job := self._jobs.get()) is not None:
            # Jobs that are still queued are dropped, so that the thread ends fast.
            if self._closed:
                continue
            try:
                job.batch = self._load_batch(job.indices, job)
            # The consumer raises it, of any type.
            except BaseException as error:
                job.error = error
            job.done.set()

    def _load_batch(self, indices: Sequence[int], job: _Job | None = None) -> Batch:
        job = job or _Job(indices, threading.Event())
        planned = []
        for index in indices:
            job.activity = f"looking up sample {index}"
            planned.append(self._source.plan_readable_sample(index))
        # The samples of a batch need different surroundings; the batch has the largest.
        z, y, x = np.max([plan.shape for plan, _ in planned], axis=0).tolist()
        job.activity = f"computing the tables of sample {indices[0]}"
        packed = self._allocate_buffer([plan for plan, _ in planned], (z, y, x))
        images, labels = packed.images, packed.labels
        plans = []
        for i, (plan, attempt) in enumerate(planned):
            job.activity = f"reading case {plan.case_id} (sample {plan.index})"
            plans.append(
                self._source.read_or_replace(plan, attempt, images[i].numpy(), labels[i].numpy())
            )
        cases = [plan.case_id for plan in plans]
        traits = [self._source.get_traits(case) for case in cases]
        return Batch(
            [plan.index for plan in plans],
            cases,
            images,
            labels,
            torch.stack([_intensity_tensor(entry.intensities) for entry in traits]),
            torch.tensor([entry.present for entry in traits], dtype=torch.bool),
            torch.tensor([plan.augment_seed for plan in plans], dtype=torch.int64),
            [entry.annotated for entry in traits],
            packed.tables,
            packed,
        )

    def _allocate_buffer(self, plans: Sequence[PatchPlan], shape: Index3) -> PackedBuffer:
        """Memory of a batch, with its tables filled in; a replaced sample keeps its tables."""
        keys: list[TableKey] = []
        if self._list_tables is not None:
            for plan in plans:
                keys += self._list_tables(plan.augment_seed, shape)
        tables = compute_tables(keys)
        image_shape = (len(plans), self._source.channels, *shape)
        return PackedBuffer.allocate(image_shape, tables, pin_memory=self._pin)

    def close(self) -> None:
        """Stop the threads and close the source.

        A thread that hangs cannot be stopped; as a daemon it does not keep the process alive.
        """
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        # A limited wait: a thread may hang in the file system.
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


def _intensity_tensor(intensities: Sequence[IntensityConfig]) -> torch.Tensor:
    """float32 (C, 4): lower_hu, upper_hu, mean, std of each channel."""
    rows = []
    for intensity in intensities:
        rows.append([intensity.lower_hu, intensity.upper_hu, intensity.mean, intensity.std])
    return torch.tensor(rows, dtype=torch.float32)

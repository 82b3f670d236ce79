"""Segment scans in stages that run at the same time: read, compute, finish.

While the network computes one scan, a thread reads and prepares the next one, and another thread
post-processes, checks and writes the one before. On a GPU the host's part of a scan takes longer
than the network; in series the GPU would wait for it. The masks are the same bit for bit, because
each stage is the same function of the same scan.

Memory: three scans at most, one in each stage; a stage waits until the next one takes its scan.
Used by `liverseg predict`.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.inference.predict_scans import ScanInWork, ScanPredictor
from liverseg_dist.inference.scan_files import ScanFiles

Outcome = tuple[dict[str, Any], bool] | UserError | RunFailed
"""Record of a scan and whether it was done already, or why it failed."""


def segment_in_stages(
    prediction: ScanPredictor, scans: Sequence[ScanFiles]
) -> Generator[tuple[ScanFiles, Outcome], None, None]:
    """Segment scans, and yield each with its outcome, in the order of the scans.

    The caller's thread computes. When it stops (an exception, an interrupt, `close`), the scan that
    is being read ends its stage, the mask that is computed is written, and no other scan begins a
    stage: what has no entry in the ledger is segmented by the next call.

    Raises:
        Exception: a stage failed in a way that concerns all scans (the ledger cannot be written).
    """
    reading: deque[tuple[ScanFiles, Future[ScanInWork]]] = deque()
    finishing: deque[tuple[ScanFiles, Future[Outcome]]] = deque()
    todo = iter(scans)
    with _single_thread("reader") as reader, _single_thread("writer") as writer:

        def read_next() -> None:
            files = next(todo, None)
            if files is not None:
                reading.append((files, reader.submit(_read, prediction, files)))

        try:
            read_next()
            while reading:
                files, future = reading.popleft()
                outcome: Outcome | None = None
                try:
                    work = future.result()
                    # Read while this one is computed, and not earlier: its image needs memory.
                    read_next()
                    if work.known is not None:
                        outcome = work.known, True
                    else:
                        prediction.compute_mask(work)
                except (UserError, RunFailed) as error:
                    outcome = error
                    if not reading:
                        read_next()
                # The writer has one scan at a time: its mask is in memory until it is written.
                while finishing:
                    yield _take(finishing)
                if outcome is not None:
                    yield files, outcome
                else:
                    finishing.append((files, writer.submit(_finish, prediction, work)))
                    del work
            while finishing:
                yield _take(finishing)
        finally:
            # A computed mask is still written: that takes less time than to compute it again.
            for _, waiting in reading:
                waiting.cancel()


def _single_thread(stage: str) -> ThreadPoolExecutor:
    # One thread of torch: the windows have the cores, and results do not depend on threads.
    return ThreadPoolExecutor(
        1, f"liverseg-{stage}", initializer=torch.set_num_threads, initargs=(1,)
    )


def _read(prediction: ScanPredictor, files: ScanFiles) -> ScanInWork:
    work = ScanInWork(files)
    prediction.read_scan(work)
    return work


def _finish(prediction: ScanPredictor, work: ScanInWork) -> Outcome:
    try:
        return prediction.finish_scan(work), False
    except (UserError, RunFailed) as error:
        return error


def _take(finishing: deque[tuple[ScanFiles, Future[Outcome]]]) -> tuple[ScanFiles, Outcome]:
    files, future = finishing.popleft()
    return files, future.result()

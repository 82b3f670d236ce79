"""Runs conversion jobs: in processes of this machine, or as tasks of a running Ray cluster.

In both cases one process with one thread converts one scan: whole scans run in parallel, not parts
of a scan, because scans are independent and there are many.
"""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from liverseg_dist.cores import usable_cores
from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord
from liverseg_dist.data.conversion.convert_case import convert_case
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

CaseOutcome = tuple[CaseRecord, bool]
"""Record of a scan, and whether it was converted now."""
Executor = Callable[[list[CaseJob], int], Iterator[CaseOutcome]]
SINGLE_THREAD = {"OMP_NUM_THREADS": "1"}
NO_TRACKER_WARNINGS = {"PYTHONWARNINGS": "ignore:resource_tracker"}
"""Workers that are stopped in the middle of a scan leave semaphores; Python's warning about them
does not concern the user."""


def run_in_processes(jobs: list[CaseJob], workers: int) -> Iterator[CaseOutcome]:
    """Convert scans in processes of this machine; yields the outcomes as they arrive.

    Args:
        jobs: The scans, in the order in which they start.
        workers: Number of processes; 0: one for each core that this process may use.

    Raises:
        RunFailed: A worker process died.
    """
    workers = min(workers or usable_cores(), max(1, len(jobs)))
    # The fork server imports the package once; each worker then starts in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([convert_case.__module__])
    with (
        _environment_variables(SINGLE_THREAD | NO_TRACKER_WARNINGS),
        worker_pool(workers, context) as pool,
    ):
        # Workers inherit the blocked signals: Ctrl-C cannot stop one before its handler is set.
        with terminal_signals_blocked():
            futures = {pool.submit(convert_case, job): job.case.case_id for job in jobs}
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise RunFailed(_describe_lost_worker(futures, workers)) from None


def _describe_lost_worker(futures: dict[Future[CaseOutcome], str], workers: int) -> str:
    """Error message for a dead worker process, with the scans it may have worked on."""
    unfinished = []
    for future, case_id in futures.items():
        if not future.done() or future.exception():
            unfinished.append(case_id)
    candidates = ", ".join(sorted(unfinished)[:workers])
    remedy = ", with fewer convert.workers if memory is short" if workers > 1 else ""
    return (
        f"a conversion worker died (out of memory?) around {candidates}; what is done stays, "
        f"run the same command again{remedy}"
    )


def run_on_ray(jobs: list[CaseJob], workers: int) -> Iterator[CaseOutcome]:
    """Convert scans on a running Ray cluster; yields the outcomes as they arrive.

    The cluster is `RAY_ADDRESS`, or else the one that this node belongs to. Its nodes must see
    source and store under the same paths.

    Args:
        jobs: The scans, in the order in which they start.
        workers: Number of scans converted at the same time; 0: all cores of the cluster.

    Raises:
        UserError: No cluster was found.
        RunFailed: Ray lost a task.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import RayError, RayTaskError

    _connect_to_ray(ray)
    as_task = ray.remote(num_cpus=1, max_retries=1, runtime_env={"env_vars": SINGLE_THREAD})
    remote: Any = as_task(convert_case)
    # Jobs are submitted one by one as others end: an interrupted run then cancels few tasks.
    waiting = list(reversed(jobs))
    running: dict[Any, str] = {}
    max_running = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        while waiting or running:
            while waiting and len(running) < max_running:
                job = waiting.pop()
                running[remote.remote(job)] = job.case.case_id
            (ready,), _ = ray.wait(list(running), num_returns=1)
            case_id = running.pop(ready)
            try:
                yield ray.get(ready)
            except RayTaskError as error:
                # The error that the task itself raised, for example OSError for a full disk.
                raise error.cause from None
            except RayError as error:
                reason = f"Ray lost the task of {case_id} ({type(error).__name__})"
                raise RunFailed(
                    f"{reason}; what is done stays, run the same command again"
                ) from None
    finally:
        for task in running:
            ray.cancel(task, force=True)
        ray.shutdown()


def _connect_to_ray(ray: Any) -> None:
    """Connect to a running cluster. Raises `UserError` when there is none."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--executor ray: no Ray cluster found ({reason}); start one, e.g. ray start --head"
        ) from None


EXECUTORS: dict[str, Executor] = {"process": run_in_processes, "ray": run_on_ray}


@contextmanager
def _environment_variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started inside the block."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value

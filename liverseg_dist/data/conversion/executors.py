"""Who converts: processes of this machine, or the tasks of a Ray cluster that is there already.

Either way each scan is converted by a process with one thread: scans, not their parts, run side by side.
"""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from liverseg_dist.cores import usable_cores
from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord
from liverseg_dist.data.conversion.convert_case import convert_case
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

Outcome = tuple[CaseRecord, bool]
Executor = Callable[[list[CaseJob], int], Iterator[Outcome]]
THREADS = {"OMP_NUM_THREADS": "1"}

QUIET = {"PYTHONWARNINGS": "ignore:resource_tracker"}
"""When workers are ended in the middle of their work, Python's book-keeper of semaphores need not tell the user."""


def run_in_processes(jobs: list[CaseJob], workers: int) -> Iterator[Outcome]:
    """Outcomes as they come. `workers` 0: one per core this process may use. Raises `RunFailed` for a lost worker."""
    workers = min(workers or usable_cores(), max(1, len(jobs)))
    context = multiprocessing.get_context(
        "forkserver"
    )  # imports once, then each worker starts in milliseconds
    context.set_forkserver_preload([convert_case.__module__])
    with _environment(THREADS | QUIET), worker_pool(workers, context) as pool:
        with terminal_signals_blocked():
            futures = {pool.submit(convert_case, job): job.case.case_id for job in jobs}
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            lost = sorted(
                name for future, name in futures.items() if not future.done() or future.exception()
            )
            raise RunFailed(
                f"a conversion worker died (out of memory?) around {', '.join(lost[:workers])}; what is done stays, "
                f"run the same line again{', with fewer convert.workers if memory is short' if workers > 1 else ''}"
            ) from None


def run_on_ray(jobs: list[CaseJob], workers: int) -> Iterator[Outcome]:
    """The same on a running Ray cluster (`RAY_ADDRESS`, else the one this node belongs to); `workers` 0: all its cores.

    The nodes see source and store under the same paths.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--executor ray: no Ray cluster found ({reason}); start one, e.g. ray start --head"
        ) from None
    remote: Any = ray.remote(num_cpus=1, max_retries=1, runtime_env={"env_vars": THREADS})(
        convert_case
    )
    waiting, running = list(reversed(jobs)), dict[Any, str]()
    most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        while waiting or running:
            while waiting and len(running) < most:
                job = waiting.pop()
                running[remote.remote(job)] = job.case.case_id
            (ready,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(ready)
            try:
                yield ray.get(ready)
            except RayTaskError as error:  # what the task itself raised
                raise error.cause from None
            except RayError as error:
                reason = f"Ray lost the task of {name} ({type(error).__name__})"
                raise RunFailed(f"{reason}; what is done stays, run the same line again") from None
    finally:
        for left in running:
            ray.cancel(left, force=True)
        ray.shutdown()


EXECUTORS: dict[str, Executor] = {"process": run_in_processes, "ray": run_on_ray}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What processes find that are started from here on."""
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

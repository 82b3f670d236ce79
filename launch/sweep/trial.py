"""A trial inside Ray: folds to a rung, one report, and on. Imports little, as each trial's process starts with it."""

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import tune

from .fold import FoldJob, RemoteRanks, run_fold, run_part

LAST_WORDS_S = 60.0
"""Ranks on other nodes may take this long to end after those on the first one have."""


def run_trial(config: dict[str, Any]) -> None:
    """Runs in a Ray actor: all folds to the next stop, then one report, on which the scheduler decides."""
    jobs = [FoldJob(**job) for job in config["jobs"]]
    for step in config["stops"]:  # folds travel as text: Tune flattens nested results
        folds = _to_step(jobs, step, config["parallel"])
        reasons = [found["failed"] for found in folds.values() if "failed" in found]
        if reasons:
            tune.report({"trial": config["trial"], "failed": reasons[0]})
            return
        score = sum(found["score"] for found in folds.values()) / len(folds)
        seconds = sum(found.pop("seconds") for found in folds.values())
        tune.report(
            {
                "trial": config["trial"],
                "step": step,
                "score": score,
                "folds": json.dumps(folds),
                "seconds": seconds,
            }
        )


def _to_step(jobs: Sequence[FoldJob], step: int, parallel: int) -> dict[str, dict[str, Any]]:
    """Each fold's outcome. No more at once than have room for all their nodes, or they would wait for each other."""
    waiting, running = list(jobs), dict[Any, FoldJob]()
    found: dict[str, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.pop(0)
            running[_task(_fold, job, job.max_failures).remote(job, step)] = job
        done, _ = ray.wait(list(running))
        for one in done:
            found[str(running.pop(one).fold)] = ray.get(one)
    return {str(job.fold): found[str(job.fold)] for job in jobs}


def _task(function: Any, job: FoldJob, retries: int) -> Any:
    """A task of Ray's with the resources of one node's part of a fold."""
    return ray.remote(function).options(
        num_cpus=job.cpus, num_gpus=job.gpus, max_retries=retries, retry_exceptions=False
    )


def _fold(job: FoldJob, step: int) -> dict[str, Any]:
    return run_fold(job, step, _on_other_nodes)


@contextlib.contextmanager
def _on_other_nodes(job: FoldJob, step: int) -> Iterator[RemoteRanks]:
    """Starts the ranks of the fold's other nodes, which meet those of this one, and sees them end."""
    if job.nodes == 1:
        yield RemoteRanks()
        return
    with socket.create_server(("", 0)) as free:
        master = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    tasks = [
        _task(run_part, job, 0).remote(job, step, master, part) for part in range(1, job.nodes)
    ]

    def lost() -> bool:
        done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        return any(_code(one) != 0 for one in done)

    try:
        yield RemoteRanks(master, lost)
    finally:
        _, left = ray.wait(tasks, num_returns=len(tasks), timeout=LAST_WORDS_S)
        for one in left:
            ray.cancel(one, force=True)  # SIGTERM for what it watches


def _code(task: Any) -> int:
    """Its torchrun's exit code; 1 when its node or its process is gone."""
    try:
        return int(ray.get(task))
    except ray.exceptions.RayError:
        return 1

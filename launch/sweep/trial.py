"""A trial inside Ray: trains its folds to a rung, reports, and continues.

The module imports little, because the process of each trial imports it at its start.
"""

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import tune

from .fold import FoldTask, RemoteRanks, run_fold, run_remote_ranks

EXIT_TIMEOUT_S = 60.0
"""Ranks on other nodes may take this long to end after those on the first one have."""


def run_trial(config: dict[str, Any]) -> None:
    """Train all folds to each stop, and report there; the scheduler decides on the report.

    Runs in an actor of Ray.
    """
    tasks = [FoldTask(**task) for task in config["tasks"]]
    for step in config["stops"]:
        folds = _run_folds(tasks, step, config["parallel"])
        reasons = [fold["failed"] for fold in folds.values() if "failed" in fold]
        if reasons:
            tune.report({"trial": config["trial"], "failed": reasons[0]})
            return
        # The mean over folds, on which the scheduler decides.
        score = sum(fold["score"] for fold in folds.values()) / len(folds)
        seconds = sum(fold.pop("seconds") for fold in folds.values())
        report = {
            "trial": config["trial"],
            "step": step,
            "score": score,
            # As text, because Tune flattens nested results.
            "folds": json.dumps(folds),
            "seconds": seconds,
        }
        tune.report(report)


def _run_folds(tasks: Sequence[FoldTask], step: int, parallel: int) -> dict[str, dict[str, Any]]:
    """Train the folds to a step.

    Args:
        tasks: The folds.
        step: The step to reach.
        parallel: How many run at the same time. Not more than fit with all their nodes, or they
            would wait for one another.

    Returns:
        Fold -> scores, or the reason of its failure.
    """
    waiting = list(tasks)
    running: dict[Any, FoldTask] = {}
    results: dict[str, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < parallel:
            task = waiting.pop(0)
            remote_function = _make_ray_task(_run_fold, task, task.max_failures)
            running[remote_function.remote(task, step)] = task
        done, _ = ray.wait(list(running))
        for reference in done:
            task = running.pop(reference)
            results[str(task.fold)] = ray.get(reference)
    # In the order of the folds, not of their ends.
    return {str(task.fold): results[str(task.fold)] for task in tasks}


def _make_ray_task(function: Any, task: FoldTask, retries: int) -> Any:
    """A task of Ray with the resources of one node of a fold."""
    return ray.remote(function).options(
        num_cpus=task.cpus, num_gpus=task.gpus, max_retries=retries, retry_exceptions=False
    )


def _run_fold(task: FoldTask, step: int) -> dict[str, Any]:
    return run_fold(task, step, _start_on_other_nodes)


@contextlib.contextmanager
def _start_on_other_nodes(task: FoldTask, step: int) -> Iterator[RemoteRanks]:
    """Run the ranks on the other nodes of the fold during the block, and wait for their end."""
    if task.nodes == 1:
        yield RemoteRanks()
        return
    # The port is free again at once; another process could take it, which fails the fold.
    with socket.create_server(("", 0)) as free_port:
        master = f"{ray.util.get_node_ip_address()}:{free_port.getsockname()[1]}"
    references = []
    for part in range(1, task.nodes):
        remote_function = _make_ray_task(run_remote_ranks, task, 0)
        references.append(remote_function.remote(task, step, master, part))

    def have_failed() -> bool:
        done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return any(_get_exit_code(reference) != 0 for reference in done)

    try:
        yield RemoteRanks(master, have_failed)
    finally:
        _, left = ray.wait(references, num_returns=len(references), timeout=EXIT_TIMEOUT_S)
        for reference in left:
            # Ends the watching process, after which its trainer gets SIGTERM.
            ray.cancel(reference, force=True)


def _get_exit_code(reference: Any) -> int:
    """The exit code of torchrun; 1 if its node or its process is gone."""
    try:
        return int(ray.get(reference))
    except ray.exceptions.RayError:
        return 1

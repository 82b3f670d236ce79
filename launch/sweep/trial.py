"""A trial inside Ray: folds to a rung, one report, and on. Imports little, as each trial's process starts with it."""

import json
from typing import Any

import ray
from ray import tune

from launch.sweep.fold import FoldJob, run_fold


def run_trial(config: dict[str, Any]) -> None:
    """Runs in a Ray actor: all folds to the next stop, then one report, on which the scheduler decides."""
    jobs = [FoldJob(**job) for job in config["jobs"]]
    first = jobs[0]
    task = ray.remote(run_fold).options(
        num_cpus=first.cpus, num_gpus=first.gpus, max_retries=first.max_failures, retry_exceptions=False
    )
    for step in config["stops"]:  # folds travel as text: Tune flattens nested results
        folds = dict(
            zip([str(job.fold) for job in jobs], ray.get([task.remote(job, step) for job in jobs]), strict=True)
        )
        reasons = [found["failed"] for found in folds.values() if "failed" in found]
        if reasons:
            tune.report({"trial": config["trial"], "failed": reasons[0]})
            return
        score = sum(found["score"] for found in folds.values()) / len(folds)
        seconds = sum(found.pop("seconds") for found in folds.values())
        tune.report(
            {"trial": config["trial"], "step": step, "score": score, "folds": json.dumps(folds), "seconds": seconds}
        )

"""One cluster for all tests of this folder, and jobs on it.

Where no SLURM can run, the tests are skipped with the reason; with LIVERSEG_REQUIRE_CLUSTER=1 they
fail. Tests marked `long` wait for minutes for timeouts of SLURM.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.slurm.sbatch import INDEX, BatchJob, Resources, render_batch_file
from tests.cluster.slurm import Cluster, find_missing_requirement

ROOT = Path(__file__).resolve().parents[2]
Submit = Callable[..., str]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := find_missing_requirement():
        if os.environ.get("LIVERSEG_REQUIRE_CLUSTER"):
            pytest.fail(f"LIVERSEG_REQUIRE_CLUSTER is set, but: {reason}")
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="lseg-"))  # short, because it contains sockets
    try:
        with Cluster(folder / "c") as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _login_node(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the cluster like a user on a login node; all nodes run when a test starts."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in cluster.address:
        cluster.start_node(name)
    cluster.wait_for(
        lambda: set(cluster.node_states().values()) <= {"idle", "mix", "alloc", "comp"},
        60,
        "all nodes up",
    )


def stand_in_job(run: Path, **settings: object) -> BatchJob:
    """A job of 2 x 2 ranks with the batch file of a training and the stand-in trainer."""
    options = {
        k: settings.pop(k)
        for k in ("launcher", "restarts", "is_folder_job", "array")
        if k in settings
    }
    requested = {
        "nodes": 2,
        "tasks_per_node": 2,
        "cpus_per_task": 1,
        **settings.pop("resources", {}),
    }  # type: ignore[dict-item]
    resources, folder = Resources(**requested), run
    if "array" in options:
        run = options["run"] = run / f"task_{INDEX}"
    words = [f"{key}={value}" for key, value in ({"steps": 25} | settings).items()]
    return BatchJob(
        name="stand-in",
        module=("tests.cluster.stand_in", f"run.dir={run}", *words),
        folder=folder,
        resources=resources,
        workdir=ROOT,
        python=sys.executable,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def submit(cluster: Cluster) -> Submit:
    """`submit(run, *sbatch_options, steps=25, fail="3:7:kill", ...)` -> job id."""

    def start(run: Path, *sbatch: str, **settings: object) -> str:
        job = stand_in_job(run, **settings)
        (run / "jobs").mkdir(parents=True, exist_ok=True)
        job.file.write_text(render_batch_file(job))
        return cluster.sbatch(*sbatch, job.file)

    return start

"""The real trainer on a real SLURM: a disturbed job ends with the bytes of an undisturbed run.

Two nodes with one rank each, a tiny U-Net on phantoms. slurm/train.sbatch and launch, srun and torchrun.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from launch.cli import run as launch_submit
from liverseg_dist.commands.main import main
from tests.cluster.conftest import ROOT
from tests.cluster.slurm import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
STEPS, EVERY = 12, 2
TINY = (
    "data.patch_size=[16,32,32]", "data.workers=1", "data.augmentation=light", "model.features=[4,8]",
    "train.global_batch_size=4", "train.optimizer=adamw", "train.learning_rate=1e-3", "train.threads=1",
    "train.log_every_steps=1", f"checkpoint.every_steps={EVERY}", "validation.every_steps=100",
    "validation.max_cases=1", f"train.max_steps={STEPS}",
)  # fmt: skip


def hash_weights(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def submit_batch_file(
    cluster: Cluster, run: Path, store: Path, launcher: str = "srun", *sbatch: str
) -> str:
    run.mkdir(parents=True)
    options = (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--gpus-per-node=0",
        "--mem=0",
    )
    environment = {
        "LIVERSEG_HOME": str(ROOT),
        "LIVERSEG_PYTHON": sys.executable,
        "LIVERSEG_LAUNCHER": launcher,
    }
    words = ("--device", "cpu", f"data.store={store}", f"run.dir={run}", *TINY)
    log = f"--output={run}.log"
    return cluster.sbatch(
        *options, log, *sbatch, ROOT / "slurm" / "train.sbatch", *words, cwd=run, **environment
    )


def submit_with_launch(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    requested = (
        "--nodes",
        "2",
        "--tasks-per-node",
        "1",
        "--cpus-per-task",
        "1",
        "--parsable",
        *options,
    )
    assert (
        launch_submit(
            ["train", *requested, "--device", "cpu", f"data.store={store}", f"run.dir={run}", *TINY]
        )
        == 0
    )
    return capsys.readouterr().out.strip()


def wait_for_step(cluster: Cluster, run: Path, job_id: str, step: int) -> None:
    def reached() -> bool:
        assert cluster.state(job_id) in ("PENDING", "RUNNING", "CONFIGURING"), read_log(run, job_id)
        return any(number >= step for number, _ in read_losses(run))

    cluster.wait_for(reached, 120, f"step {step} of {run.name}")


def read_losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of the metrics of the run."""
    try:
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    except (OSError, ValueError):  # no file yet, or half a line
        return []
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def read_log(run: Path, job_id: str) -> str:
    logs = [Path(f"{run}.log"), run / "jobs" / f"{job_id}_0_log.out"]
    return "\n".join(log.read_text() for log in logs if log.exists())


def expect_completion(cluster: Cluster, run: Path, job_id: str, *, restarts: int) -> int:
    """Wait for a successful end; returns the number of restarts from a checkpoint."""
    ended = cluster.wait_state(job_id, timeout_s=300)
    log = read_log(run, job_id)
    assert (ended["JobState"], ended["ExitCode"], int(ended["Restarts"])) == (
        "COMPLETED",
        "0:0",
        restarts,
    ), log
    assert [step for step, _ in read_losses(run)] == list(range(1, STEPS + 1)), log
    left = {
        node: cluster.processes_of(node) for node in cluster.address if node in cluster.processes
    }
    assert not any(left.values()), left
    return len(re.findall(r"continues at step", log))


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, phantom_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("cluster") / "undisturbed"
    job_id = submit_batch_file(cluster, run, phantom_store)
    expect_completion(cluster, run, job_id, restarts=0)
    return run


def disturb(how: str, cluster: Cluster, job_id: str) -> None:
    if how == "USR2":
        cluster.run("scancel", "--signal=USR2", job_id)
    elif how == "requeue":
        cluster.run("scontrol", "requeue", job_id)
    elif how == "preemption":
        cluster.sbatch("-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    else:
        nodes = cluster.run(
            "scontrol", "show", "hostnames", cluster.job(job_id)["NodeList"]
        ).split()
        dead = nodes[0 if how == "first node" else 1]
        cluster.kill_node(dead)
        cluster.run(
            "scontrol", "update", f"NodeName={dead}", "State=DOWN", "Reason=health"
        )  # saves a wait of 20 s


@pytest.mark.parametrize(
    ("how", "through"),
    [
        ("USR2", "train.sbatch torchrun"),
        ("first node", "train.sbatch srun"),
        pytest.param("USR2", "submit srun", marks=pytest.mark.long),
        pytest.param("requeue", "train.sbatch srun", marks=pytest.mark.long),
        pytest.param("preemption", "submit srun", marks=pytest.mark.long),
        pytest.param("second node", "submit torchrun", marks=pytest.mark.long),
    ],
)
def test_a_disturbed_job_ends_with_the_same_bytes(
    how: str,
    through: str,
    undisturbed: Path,
    cluster: Cluster,
    phantom_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, launcher = tmp_path / "run", through.split()[1]
    partition = ["--partition", "preemptible"] if how == "preemption" else []
    if through.startswith("submit"):
        job_id = submit_with_launch(run, phantom_store, capsys, "--launcher", launcher, *partition)
    else:
        job_id = submit_batch_file(cluster, run, phantom_store, launcher, *partition)
    wait_for_step(cluster, run, job_id, 4)
    disturb(how, cluster, job_id)
    assert expect_completion(cluster, run, job_id, restarts=1) == 1, (
        "it continued from a checkpoint"
    )
    assert hash_weights(run) == hash_weights(undisturbed)


def test_a_refusal_of_slurm_is_one_line_and_leaves_no_job(
    cluster: Cluster, phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "chain",
        str(phantom_source),
        str(tmp_path / "s.zarr"),
        f"run.dir={tmp_path / 'run'}",
        *TINY,
    ]
    options = [
        "--partition",
        "nowhere",
        "--convert-sbatch",
        "partition=main",
        "--convert-sbatch",
        "hold",
    ]
    assert launch_submit([*words, *options]) == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "SLURM refused the job: " in message
    assert "Invalid partition name specified" in message
    assert not cluster.run("squeue", "-h").strip(), (
        "the conversion, which was accepted, is cancelled"
    )


@pytest.mark.long
def test_a_chain_with_folds_ends_with_one_report(
    cluster: Cluster, phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Convert (an array), train two folds (an array), evaluate each, pool: seven tasks from one command."""
    run = tmp_path / "cv"
    words = [
        "chain",
        str(phantom_source),
        str(tmp_path / "s.zarr"),
        f"run.dir={run}",
        *TINY,
        "train.max_steps=2",
    ]
    coarse = ["convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.folds=2"]
    options = ["--array", "folds", "--convert-tasks", "2", "--cpus-per-task", "1", "--follow"]
    assert launch_submit([*words, *coarse, *options]) == 0, capsys.readouterr().out
    assert json.loads((run / "evaluation" / "summary.json").read_text())["n_cases"] >= 2
    capsys.readouterr()
    assert launch_submit(["status", str(run), "--json"]) == 0
    jobs = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [job["state"] for job in jobs] == ["COMPLETED"] * 7
    assert launch_submit(["logs", str(run), "--lines", "3"]) == 0
    assert launch_submit(["cancel", str(run)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_the_doctor_finds_no_problem_on_two_nodes(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "doctor",
        "--nodes",
        "2",
        "--cpus-per-task",
        "1",
        "--job-dir",
        str(tmp_path / "runs"),
        "--json",
    ]
    code = launch_submit(words)
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert not [finding for finding in found["findings"] if finding["level"] == "problem"], out
    assert code == 0
    assert [report["meets"] for report in found["ranks"]] == [True, True]
    assert len({report["node"] for report in found["ranks"]}) == 2


def test_the_doctor_reports_a_folder_that_is_not_shared(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node has its own /dev/shm here."""
    monkeypatch.setattr("launch.diagnose.doctor.LOG_TIMEOUT_S", 1.0)
    folder = Path(f"/dev/shm/{cluster.folder.parent.name}")
    try:
        assert launch_submit(["doctor", "--cpus-per-task", "1", "--job-dir", str(folder)]) == 1
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    out = capsys.readouterr().out
    assert "problem: " in out
    assert "choose a --job-dir" in out
    assert out.splitlines()[-1] == "verdict: training would fail here"


def test_conversion_and_evaluation_by_their_batch_files(
    cluster: Cluster, phantom_source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two tasks convert; two nodes evaluate with exactly the results of one process."""
    store, run, alone = tmp_path / "store.zarr", tmp_path / "run", tmp_path / "alone"
    environment = {"LIVERSEG_HOME": str(ROOT), "LIVERSEG_PYTHON": sys.executable}
    requested = ("--cpus-per-task=1", "--mem=4G")
    coarse = ("convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.folds=2")
    words = (ROOT / "slurm" / "to_zarr.sbatch", phantom_source, store, *coarse)
    job_id = cluster.sbatch(
        "--array=0-1", *requested, f"--output={tmp_path}/convert_%a.log", *words, **environment
    )
    logs = [tmp_path / f"convert_{task}.log" for task in (0, 1)]
    for task, log in enumerate(logs):
        assert cluster.wait_state(f"{job_id}_{task}")["JobState"] == "COMPLETED", log.read_text()
    assert main(["verify", str(store)]) == 0

    for copy in (run, alone):
        shutil.copytree(undisturbed, copy)
    log, words = tmp_path / "evaluate.log", (run, "--store", store, "--device", "cpu")
    nodes = ("--nodes=2", "--gpus-per-node=0", f"--output={log}")
    job_id = cluster.sbatch(
        *nodes, *requested, ROOT / "slurm" / "evaluate.sbatch", *words, **environment
    )
    assert cluster.wait_state(job_id)["JobState"] == "COMPLETED", log.read_text()
    assert main(["evaluate", str(alone), "--store", str(store), "--device", "cpu"]) == 0
    distributed, expected = (
        json.loads((folder / "evaluation" / "summary.json").read_text()) for folder in (run, alone)
    )
    for summary, folder in ((distributed, run), (expected, alone)):
        assert summary["details"].pop("run") == folder.name
        del summary["details"]["title"]
    assert distributed["n_cases"] >= 1
    assert distributed == expected

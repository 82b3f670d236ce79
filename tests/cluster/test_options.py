"""The real sbatch accepts the batch files of `launch`, with every option that launch writes."""

import subprocess
from pathlib import Path

import pytest

from launch.cli import run as launch_submit
from launch.slurm.sbatch_options import KNOWN, REPLACED, SHORT_OPTIONS
from tests.cluster.slurm import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]


def test_sbatch_accepts_every_job_of_a_chain(
    cluster: Cluster, phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text("true\n")
    words = ["chain", str(phantom_source), str(tmp_path / "s.zarr"), f"run.dir={tmp_path / 'run'}"]
    words += [
        "convert.splits.folds=2",
        "--array",
        "folds%1",
        "--gpus-per-node",
        "gpu:1",
        "--convert-tasks",
        "3%2",
    ]
    words += [
        "--partition",
        "main",
        "--cpu-partition",
        "preemptible",
        "--mem",
        "4G",
        "--time",
        "1-00:00:00",
    ]
    words += [
        "--stage-option",
        "aggregate:partition=urgent",
        "--sbatch",
        "exclusive",
        "--sbatch",
        "mail-type=NONE",
    ]
    words += ["--cpus-per-task", "1", "--setup", str(setup), "--env", "NCCL_DEBUG=WARN"]
    words += ["--cpu-bind", "none", "--distribution", "block:block", "--gpu-bind", "none"]
    assert launch_submit([*words, "--dry-run"]) == 0
    jobs = capsys.readouterr().out.split("# --- job ")[1:]
    assert len(jobs) == 4
    # Jobs of earlier tests may still hold nodes, and an exclusive job would be refused then.
    cluster.wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, 60, "all nodes idle")
    for number, job in enumerate(jobs):
        text = job.partition("\n")[2]
        # No job runs here, so there is none to wait for.
        lines = [line for line in text.splitlines() if not line.startswith("#SBATCH --dependency")]
        file = tmp_path / f"{number}.sbatch"
        file.write_text("\n".join(lines) + "\n")
        done = subprocess.run(["sbatch", "--test-only", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_table_of_short_options_equals_that_of_sbatch() -> None:
    """From `sbatch --help`, e.g. `  -a, --array=indexes         job array index values`."""
    shown = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in shown.splitlines():
        short, _, long = line.strip().partition(", --")
        if len(short) == 2 and short.startswith("-") and long:
            found[short[1]] = long.split()[0].partition("=")[0].partition("[")[0]
    assert len(found) > 20
    differing = {
        letter: name for letter, name in found.items() if SHORT_OPTIONS.get(letter) != name
    }
    assert not differing


def test_every_option_of_sbatch_is_known() -> None:
    """No option of sbatch is refused as unknown."""
    from_help = subprocess.run(
        ["sbatch", "--help"], capture_output=True, text=True, check=True
    ).stdout
    names = set()
    for line in from_help.splitlines():
        words = line.strip().split()
        names |= {
            w[2:].partition("=")[0].partition("[")[0] for w in words[:2] if w.startswith("--")
        }
    known = set(REPLACED) | KNOWN
    assert names - known == set()

"""What is handed to SLURM: the batch file, and mistakes that are found before anything is submitted."""

import subprocess
from pathlib import Path

import pytest

from launch.submit import run

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["train", "data.store=store.zarr", "run.dir=runs/first"]


def test_the_batch_file(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dry-run", "--nodes", "2", "--gpus-per-node", "4", "--time", "1:30", "--partition", "gpu"]
    more = ["--after", "77", "--sbatch", "reservation=x", "--mem-gib", "64", "--folder", "/shared/logs"]
    assert run([*options, *more, *TRAIN]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = {line for line in lines if line.startswith("#SBATCH")}
    assert wanted == {
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --dependency=afterok:77",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --job-name=liverseg-train",
        "#SBATCH --mem=64G",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=/shared/logs/%j/%j_0_log.out",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
        "#SBATCH --reservation=x",
        "#SBATCH --signal=USR2@180",
        "#SBATCH --time=90",
        "#SBATCH --wckey=submitit",
    }
    last = [line for line in lines if line][-1]
    assert last.startswith("srun ")
    assert "--kill-on-bad-exit=1" in last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "data.store=x"], "run.dir is not set"),
        (["train", "run.dir=x"], "data.store is not set"),
        (["train", "run.dir=x", "data.store=y", "trian.x=1"], "did you mean train?"),
        (["--time", "90", *TRAIN], "hours:minutes"),
    ],
)
def test_mistakes_are_found_before_submission(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(arguments) == 2
    assert said in capsys.readouterr().err


def test_without_slurm_it_says_where_to_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(["--folder", str(tmp_path / "logs"), *TRAIN]) == 2
    assert "submit from a login node" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda p: p.name)
def test_batch_scripts_are_sound_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    head = script.read_text().splitlines()
    assert head[0] == "#!/bin/bash"
    assert any(line.startswith("#   sbatch") for line in head), "the head shows how it is called"

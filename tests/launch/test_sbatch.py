"""Batch files equal the golden files, which users read and sbatch receives.

After an intended change: LIVERSEG_WRITE_GOLDEN=1 pytest tests/launch/test_sbatch.py, and read the difference.
"""

import importlib.util
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.sbatch import (
    INDEX,
    BatchJob,
    Resources,
    render_batch_file,
    shell_quote,
)
from launch.slurm.units import parse_time_limit
from liverseg_dist.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[2]
RUN = Path("/shared/runs/first")
TRAIN = BatchJob(
    name="liverseg-train",
    module=("liverseg_dist", "train", "--config", "a b.yaml", "run.dir=runs/first", "data.store=$STORE"),
    folder=RUN,
    is_folder_job=True,
    workdir=Path("/shared/project"),
    code=RUN / "code" / "0123456789ab",
    python="/shared/project/.venv/bin/python",
    resources=Resources(
        nodes=2, gpus_per_node=4, mem_gib=64, time="24:00:00", partition="gpu", account="lab", qos="long",
        constraint="a100&ib", extra=("reservation=x", "exclusive", "mail-type=END,FAIL"), signal_s=120,
    ),
)  # fmt: skip
CASES = {
    "train_2x4": TRAIN,
    "train_2x4_torchrun": replace(TRAIN, launcher="torchrun", restarts=2),
    "train_folds": replace(
        TRAIN,
        module=("liverseg_dist", "train", f"run.dir={RUN}/fold_{INDEX}", f"data.fold={INDEX}"),
        run=RUN / f"fold_{INDEX}",
        array="0-4",
        after="afterok:77",
        resources=Resources(),
    ),
    "tune": replace(
        TRAIN, name="liverseg-tune", module=("launch.tune", "run.dir=x"), launcher="ray"
    ),
    "tune_1": replace(
        TRAIN,
        name="liverseg-tune",
        module=("launch.tune", "run.dir=x"),
        launcher="ray",
        resources=Resources(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_batch_file_equals_the_golden_file(name: str) -> None:
    text, golden = render_batch_file(CASES[name]), GOLDEN / f"{name}.sbatch"
    if os.environ.get("LIVERSEG_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    "script", [*(ROOT / "slurm").glob("*.sbatch"), *GOLDEN.glob("*")], ids=lambda p: p.name
)
def test_batch_files_are_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/bin/bash\n# ")


@pytest.mark.parametrize("script", [*(ROOT / "slurm").glob("*.sbatch")], ids=lambda p: p.name)
def test_batch_files_to_edit_have_their_options_at_the_top(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert any(line.startswith("#   sbatch slurm/") for line in lines[:6]), (
        "the head shows how to call it"
    )
    options_at = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    code = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert options_at[-1] < code[0]
    options = " ".join(lines[i] for i in options_at)
    for option in (
        "nodes",
        "cpus-per-task",
        "mem",
        "time",
        "requeue",
        "open-mode=append",
        "output",
    ):
        assert f"--{option}" in options, option
    assert len(lines) <= 60


@pytest.mark.parametrize(
    "text", ["plain", "a b", "it's", "$HOME;`id`", 'say "x"', "", "--x=[1,2]", "*"]
)
def test_quoted_words_reach_the_program_unchanged(text: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf %s {shell_quote(text)}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == text


def test_the_index_becomes_the_array_task_index() -> None:
    text = shell_quote(f"run.dir=/my runs/fold_{INDEX}/x")
    env = {"SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(
        ["bash", "-c", f"printf %s {text}"], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout == "run.dir=/my runs/fold_3/x"
    assert shlex.split(shell_quote(INDEX)) == ["$SLURM_ARRAY_TASK_ID"]


@pytest.mark.parametrize(
    ("given", "slurm"),
    [("90", "01:30:00"), ("90m", "01:30:00"), ("24h", "24:00:00"), ("2d", "48:00:00"), ("1:30:00", "1:30:00"),
     ("2-12", "2-12"), ("1-00:30:00", "1-00:30:00")],
)  # fmt: skip
def test_time_limits(given: str, slurm: str) -> None:
    assert parse_time_limit(given) == slurm


@pytest.mark.parametrize(
    ("given", "message"),
    [("24:00", "hours or minutes"), ("soon", "is written"), ("0", "at least one")],
)
def test_ambiguous_time_limits_are_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_time_limit(given)


@pytest.mark.parametrize(
    "file", [*(ROOT / "slurm").glob("*.sbatch"), *GOLDEN.glob("*.sbatch")], ids=lambda f: f.name
)
def test_every_module_that_a_batch_file_names_exists(file: Path) -> None:
    text = re.sub(r"#.*", "", file.read_text()).replace('"$launch.', "launch.").replace('" ', " ")
    named = re.findall(r"\b(?:launch|liverseg_dist)(?:\.\w+)*(?= )", text)
    assert named
    assert [name for name in named if importlib.util.find_spec(name) is None] == []

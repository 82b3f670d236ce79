"""Mistakes are found before submission, and a command line becomes the right jobs."""

import time
from pathlib import Path

import pytest

from launch.cli import run, split_arguments
from launch.slurm.job_records import measure_progress
from liverseg_dist.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def train(phantom_store: Path, tmp_path: Path) -> list[str]:
    return ["train", f"data.store={phantom_store}", f"run.dir={tmp_path / 'run'}"]


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def expect_user_error(capsys: Capture, *words: str) -> str:
    assert run(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    return output.err


def print_batch_files(capsys: Capture, *words: str) -> str:
    assert run([*words, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run.dir is not set"),
        (["run.dir=x"], "data.store is not set"),
        (["run.dir=x", "data.store=nowhere.zarr"], "nowhere.zarr"),
        (["run.dir=x", "data.store=y", "trian.x=1"], "did you mean train?"),
        (["run.dir=x", "data.store=y", "--confg", "z"], "--confg"),
        (["run.dir=x", "data.store=y", "--time", "24:00"], "hours or minutes"),
        (
            ["run.dir=x", "data.store=y", "--nodes", "3"],
            "train.global_batch_size = 2 leaves some of 3 ranks",
        ),
        (
            ["--config", "nowhere.yaml"],
            "nowhere.yaml: no such config file; shipped with the program: configs/",
        ),
    ],
)
def test_a_mistake_in_the_training_settings_is_one_line(
    words: list[str], message: str, capsys: Capture
) -> None:
    assert message in expect_user_error(capsys, "train", *words)


def test_other_mistakes_are_one_line(train: list[str], capsys: Capture, tmp_path: Path) -> None:
    assert "no sbatch on this machine" in expect_user_error(capsys, *train)
    assert "fold" in expect_user_error(capsys, *train, "data.fold=7")
    assert "data.fold: --array folds sets" in expect_user_error(
        capsys, *train, "--array", "folds", "data.fold=1"
    )
    assert "no such command" in expect_user_error(capsys, "trian", "x=1")
    assert "write python -m launch COMMAND" in expect_user_error(capsys, "--nodez", "2", *train)
    assert "one process" in expect_user_error(capsys, "verify", "x.zarr", "--nodes", "2")
    assert "has no dataset.json" in expect_user_error(
        capsys, "chain", str(tmp_path), "s.zarr", "run.dir=x"
    )
    assert "no jobs/ in it" in expect_user_error(capsys, "status", str(tmp_path))


def test_options_may_stand_anywhere_and_the_rest_belongs_to_the_command() -> None:
    options, command, rest = split_arguments(
        ["--nodes", "2", "train", "--config", "c.yaml", "--time", "2h", "a.b=1", "--", "--nodes"]
    )
    assert (options.nodes, options.time, command) == (2, "2h", "train")
    assert rest == ["--config", "c.yaml", "a.b=1", "--nodes"]
    with pytest.raises(UserError, match="no command"):
        split_arguments(["--nodes", "2"])


def test_a_dry_run_writes_nothing(train: list[str], capsys: Capture, tmp_path: Path) -> None:
    text = print_batch_files(capsys, *train, "--nodes", "2")
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2" in text
    assert not (tmp_path / "run").exists()


def test_folds_become_an_array_its_evaluation_and_one_aggregate(
    train: list[str], capsys: Capture
) -> None:
    first, second, third = print_batch_files(capsys, *train, "--array", "folds").split(
        "# --- job "
    )[1:]
    run_dir = train[2].removeprefix("run.dir=")
    assert "#SBATCH --array=0-1\n" in first  # the store has two folds
    assert (
        f'run.dir={run_dir}/fold_"$SLURM_ARRAY_TASK_ID" data.fold="$SLURM_ARRAY_TASK_ID"' in first
    )
    assert "#SBATCH --dependency=aftercorr:JOB_1\n" in second
    assert "--part validation" in second
    assert "#SBATCH --dependency=afterok:JOB_2\n" in third
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in third
    assert f"launch.slurm.pool_folds {run_dir} 2" in third


@pytest.mark.parametrize("kind", ["nnunet", "file"])
def test_a_chain_with_folds_has_the_folds_that_the_store_will_have(
    kind: str, phantom_source: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "folds.json").write_text('{"folds": [["liver_0"], ["liver_1"], ["liver_2"]]}')
    words = ["chain", str(phantom_source), str(tmp_path / "s.zarr"), f"run.dir={tmp_path / 'run'}"]
    words += [f"convert.splits.kind={kind}", "convert.splits.folds=2"]
    words += [f"convert.splits.file={tmp_path / 'folds.json'}"] if kind == "file" else []
    _, training, evaluation, pooled = print_batch_files(capsys, *words, "--array", "folds").split(
        "# --- job "
    )[1:]
    count = {"nnunet": 5, "file": 3}[kind]
    assert f"#SBATCH --array=0-{count - 1}\n" in training
    assert f"#SBATCH --array=0-{count - 1}\n" in evaluation
    assert f"--source {phantom_source}" in evaluation, "the complete scans, as without folds"
    assert f"launch.slurm.pool_folds {tmp_path / 'run'} {count}" in pooled


def test_progress_is_measured_in_the_folder_of_the_results(tmp_path: Path, capsys: Capture) -> None:
    for command, *words in (
        ("predict", str(tmp_path / "run"), str(tmp_path)),
        ("evaluate", str(tmp_path / "run")),
    ):
        assert f"--progress {tmp_path}/out --" in print_batch_files(
            capsys, command, *words, "--out", f"{tmp_path}/out"
        )


def test_repeated_work_counts_as_progress(tmp_path: Path) -> None:
    """Repeated scores and conversions replace earlier ones. Repeated failures do not count."""

    def mark_after(name: str, content: str) -> int:
        time.sleep(0.01)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        return measure_progress(tmp_path)

    done = '{"error": null}'
    marks = [
        measure_progress(tmp_path),
        mark_after("evaluation/ledger/a.json", done),
        mark_after("ledger/b.json", done),
    ]
    marks += [
        mark_after(".liverseg/records/c.json", '{"final": true}'),
        mark_after("evaluation/ledger/a.json", done),
    ]
    for name, content in (
        ("ledger/d", '{"error": "x"}'),
        (".liverseg/records/e", '{"final": false}'),
    ):
        assert mark_after(f"{name}.json", content) == marks[-1]
    (tmp_path / "checkpoints" / "step_7").mkdir(parents=True)
    marks.append(measure_progress(tmp_path))
    assert marks == sorted(set(marks))


def test_a_chain_converts_trains_and_evaluates(
    phantom_source: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["chain", str(phantom_source), str(tmp_path / "s.zarr"), f"run.dir={tmp_path / 'run'}"]
    more = [
        "convert.splits.folds=2",
        "train.max_steps=3",
        "--convert-tasks",
        "3",
        "--tasks-per-node",
        "2",
    ]
    more += ["--convert-sbatch", "partition=cpu", "--partition", "gpu"]
    convert, training, evaluation = print_batch_files(capsys, *words, *more).split("# --- job ")[1:]
    assert "#SBATCH --array=0-2\n" in convert
    assert "#SBATCH --partition=cpu\n" in convert
    assert '--shard "$SLURM_ARRAY_TASK_ID"/3' in convert
    assert "train.max_steps" not in convert
    assert "#SBATCH --dependency=afterok:JOB_1\n" in training
    assert "#SBATCH --partition=gpu\n" in training
    assert "#SBATCH --ntasks-per-node=2\n" in training
    assert "#SBATCH --dependency=afterok:JOB_2\n" in evaluation
    assert f"--source {phantom_source}" in evaluation

"""A real sweep under a real Ray: killed and continued, it ends with the results of an undisturbed one."""

import contextlib
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.sweep.fold import (
    FoldTask,
    build_fold_environment,
    build_training_command,
    count_threads,
    read_scores,
    run_fold,
)
from launch.sweep.journal import Journal, Rung, Trial, find_best_trial
from launch.sweep.process_guard import Processes, list_alive, list_descendants
from launch.sweep.search import compute_importances, propose_params, trial_id
from launch.sweep.sweep_config import Dimension, SweepConfig, SweepSettings, build_trial_config
from launch.sweep.sweep_driver import SweepDriver
from launch.sweep.sweep_page import render_sweep_page
from launch.tune import detect_standstill, run
from liverseg_dist.config import load_settings
from liverseg_dist.config.settings import load_settings_as
from liverseg_dist.errors import EXIT_FAILED, EXIT_RESUMABLE, EXIT_USER, RunFailed, UserError
from tests.distributed.launch import clean_environment

ROOT = Path(__file__).resolve().parents[2]
SWEEP = {
    "sweep": {
        "search": "random",
        "trials": 2,
        "folds": [0, 1],
        "rungs": [2],
        "reduction_factor": 2,
        "space": {
            "train.learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
            "data.augmentation": {"type": "choice", "values": ["none", "light"]},
        },
        "resources": {"cpus": 1, "parallel_folds": 2},
        "max_concurrent": 1,
        "max_failures": 0,
    },
    "data": {"patch_size": [16, 32, 32], "workers": 0},
    "model": {"features": [4, 8]},
    "train": {"max_steps": 4, "optimizer": "adamw", "log_every_steps": 1},
    "checkpoint": {"keep_best": False},
    "validation": {"max_cases": 1, "pictures": 0},
    "inference": {"overlap": 0.25},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    return file


def make_settings(**changes: object) -> SweepSettings:
    return SweepSettings.model_validate({**SWEEP, "sweep": {**SWEEP["sweep"], **changes}})


def build_command_line(config: Path, store: Path, folder: Path, *more: str) -> list[str]:
    base = [
        sys.executable,
        "-m",
        "launch.tune",
        "--no-dashboard",
        "--cpus",
        "2",
        "--json",
        "--config",
        str(config),
    ]
    return [*base, f"data.store={store}", f"run.dir={folder}", *more]


def start_process(line: list[str], tmp: Path) -> subprocess.Popen[str]:
    environment = clean_environment(TMPDIR=str(tmp))
    return subprocess.Popen(
        line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )


def assert_no_process_stays(processes: Processes, patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while list_alive(processes) and time.monotonic() < end:
        time.sleep(0.2)
    left = list_alive(processes)
    assert left == [], [Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in left]


def read_outcome(folder: Path) -> list[tuple]:
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    return [
        (t["id"], t["state"], t["score"], [(r["step"], r["score"]) for r in t["rungs"]])
        for t in trials
    ]


@pytest.fixture
def short_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")  # short, because Ray puts Unix sockets into it


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_killed_sweep_continues_to_the_score_of_an_uninterrupted_training(
    config: Path, phantom_store: Path, short_tmp: Path
) -> None:
    folder = config.parent / "sweep"
    line = build_command_line(
        config, phantom_store, folder, "sweep.trials=1", "sweep.folds=[0]", "sweep.metric={}"
    )
    process = start_process(line, short_tmp)
    wait_for_rungs(folder, 1, process)
    below = list_descendants(process.pid)
    assert len(below) > 3
    process.kill()
    process.communicate(timeout=120)
    assert_no_process_stays(below)
    last = start_process(line, short_tmp)
    out, err = last.communicate(timeout=240)
    assert last.returncode == 0, err[-3000:]
    assert "continues:" in out
    ((trial_name, state, score, rungs),) = read_outcome(folder)
    assert state == "finished"
    assert [step for step, _ in rungs] == [2, 4]
    # The reference needs neither Ray nor the sweep: the trial's own settings, trained at once.
    alone = config.parent / "alone"
    alone.mkdir()
    shutil.copy2(folder / "trials" / trial_name / "config.yaml", alone)
    weights = {"liver": 1.0, "tumour": 1.0}
    task = make_fold_task(alone, fold=0, cpus=1, processes=1, weights=weights)
    assert run_fold(task, 4)["score"] == score


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_killed_and_continued_sweep_has_the_results_of_an_undisturbed_one(
    config: Path, phantom_store: Path, short_tmp: Path
) -> None:
    undisturbed_dir, folder = config.parent / "alone", config.parent / "disturbed"
    undisturbed = start_process(
        build_command_line(config, phantom_store, undisturbed_dir), short_tmp
    )
    wait_for_rungs(undisturbed_dir, 1, undisturbed)
    below = list_descendants(undisturbed.pid)
    assert len(below) > 3
    out, err = undisturbed.communicate(timeout=420)
    assert undisturbed.returncode == 0, err[-3000:]
    assert json.loads(out.splitlines()[-1])["best"]["state"] == "finished"
    assert_no_process_stays(below)

    line = build_command_line(config, phantom_store, folder)
    for number, wanted in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        process = start_process(line, short_tmp)
        wait_for_rungs(folder, wanted, process)
        below = list_descendants(process.pid)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (
            EXIT_RESUMABLE if number == signal.SIGTERM else -signal.SIGKILL
        ), err[-3000:]
        assert "Traceback" not in err
        assert_no_process_stays(below)
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.glob("trials/*/fold_*/checkpoints/step_4/*")
    }
    last = start_process(line, short_tmp)
    out, err = last.communicate(timeout=420)
    assert last.returncode == 0, err[-3000:]
    assert "continues:" in out
    assert read_outcome(folder) == read_outcome(undisturbed_dir)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished fold ran again"
    best = load_settings([folder / "best.yaml"], ["run.dir=x"])
    assert best.train.max_steps == 4
    assert list((folder / "tensorboard").glob("trial_*/events.*"))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_ray_without_progress_ends_the_sweep(
    config: Path, phantom_store: Path, short_tmp: Path
) -> None:
    line = build_command_line(
        config, phantom_store, config.parent / "sweep", "sweep.start_timeout_s=3"
    )
    process = start_process(line, short_tmp)
    assert process.stdout is not None
    assert any("dashboard" in lines for lines in process.stdout)  # Ray has started
    below = list_descendants(process.pid)
    servers = [
        pid
        for pid in below
        if Path(f"/proc/{pid}/comm").read_text().strip() in ("raylet", "gcs_server")
    ]
    assert len(servers) == 2
    for pid in servers:
        os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    out, err = process.communicate(timeout=240)
    assert time.monotonic() - begun < 120
    assert process.returncode == EXIT_FAILED, err[-3000:]
    lines = [line for line in err.splitlines() if line.startswith("launch")]
    assert len(lines) == 1, "the process guard prints nothing"
    assert lines[0].startswith("launch.tune: Ray has started no fold for")
    assert "run the same line again" in lines[0]
    assert json.loads(out.splitlines()[-1])["exit_code"] == EXIT_FAILED
    assert_no_process_stays(below)


def test_a_standstill_needs_no_running_fold_and_no_new_journal_line(tmp_path: Path) -> None:
    lock = tmp_path / "trials" / "a" / "fold_0.lock"
    lock.parent.mkdir(parents=True)
    with Journal(tmp_path) as journal:
        check = detect_standstill(tmp_path, journal, 0.05)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            time.sleep(0.1)
            assert check() == "", "a fold runs"
        assert check() == "", "a fold ran just before"
        time.sleep(0.1)
        assert "no fold for 0 s" in check()
        journal.add_trial("a", {})
        assert check() == "", "a trial was added"
        time.sleep(0.1)
        assert check()


def test_time_in_which_this_process_was_suspended_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("launch.tune.time.monotonic", lambda: clock[0])
    with Journal(tmp_path) as journal:
        check = detect_standstill(tmp_path, journal, 60)
        clock[0] += 3600  # stopped and continued
        assert check() == ""
        for _ in range(6):
            clock[0] += 5
            assert check() == ""
        for _ in range(6):
            clock[0] += 5
            lines = check()
        assert lines


def wait_for_rungs(
    folder: Path, wanted: int, process: subprocess.Popen[str], timeout_s: float = 240
) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        journal = folder / "journal.jsonl"
        if journal.exists() and journal.read_text().count('"rung"') >= wanted:
            return
        assert process.poll() is None, process.stderr and process.stderr.read()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"{wanted} rungs were not reached in {timeout_s} s")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.trails=3", "did you mean sweep.trials?"),
        ("sweep.rungs=[4]", "must stay below train.max_steps=4"),
        ("sweep.folds=[0,7]", "fold"),
        (
            "sweep.space={train.learning_rate: {type: uniform, low: 2, high: 1}}",
            "train.learning_rate",
        ),
        ("sweep.space={data.fold: {type: choice, values: [0]}}", "data.fold cannot be searched"),
        ("sweep.resources.gpu=1", "did you mean sweep.resources.gpus?"),
        ("train.learning_rat=1", "did you mean train.learning_rate?"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(
    override: str,
    message: str,
    config: Path,
    phantom_store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [
        "--config",
        str(config),
        "--dry-run",
        f"data.store={phantom_store}",
        f"run.dir={config.parent}/x",
        override,
    ]
    assert run(line) == EXIT_USER
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_another_sweep_in_the_same_folder_is_refused(
    config: Path, phantom_store: Path, tmp_path: Path
) -> None:
    line = ["--config", str(config), f"data.store={phantom_store}", f"run.dir={tmp_path / 'x'}"]
    with Journal(tmp_path / "x"):
        assert run(line) == EXIT_USER


@pytest.mark.long
@pytest.mark.ray
def test_joining_ray_needs_the_token(config: Path, phantom_store: Path, short_tmp: Path) -> None:
    process = start_process(build_command_line(config, phantom_store, short_tmp / "run"), short_tmp)
    try:
        address, end = "", time.monotonic() + 120
        while not address and time.monotonic() < end:
            for pid in list_descendants(process.pid):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                    address = next(
                        (w.partition("=")[2] for w in words if w.startswith("--gcs-address=")),
                        address,
                    )
            time.sleep(0.2)
        assert address, "no Ray has started"
        ask = f"import ray; ray._raylet.GcsClient(address={address!r}).check_alive([], 5); print('in')"
        secret = next(short_tmp.glob("ray-*/token"))
        assert secret.stat().st_mode & 0o077 == 0
        keys = [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret)}]
        message = []
        for key in keys:
            environment = clean_environment(HOME=str(short_tmp), **key)
            line = [sys.executable, "-c", ask]
            done = subprocess.run(
                line, env=environment, capture_output=True, text=True, timeout=120
            )
            message.append(done.stdout.strip() or done.stderr.strip().splitlines()[-1])
    finally:
        process.terminate()
        process.communicate(timeout=120)
    assert "AuthenticationError" in message[0]
    assert message[1] == "in"


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_proposals_depend_only_on_seed_and_history(search: str) -> None:
    if search == "optuna":
        pytest.importorskip("optuna")
    sweep = make_settings(search=search).sweep
    history: list[Trial] = []
    for number in range(5):
        params = propose_params(sweep, 3, number, history)
        assert params is not None
        assert propose_params(sweep, 3, number, list(history)) == params
        assert trial_id(params) not in {trial.id for trial in history}
        assert 1e-4 <= params["train.learning_rate"] <= 1e-2
        rung = Rung.from_folds(4, {"0": {"score": 0.1 * number}, "1": {"score": 0.2}}, "end", 1.0)
        history.append(Trial(number, trial_id(params), params, [rung], "finished"))
    assert propose_params(sweep, 4, 0, []) != propose_params(sweep, 3, 0, [])


def test_a_trial_that_exceeds_the_memory_budget_is_not_started(
    phantom_store: Path, tmp_path: Path
) -> None:
    """A wide network exceeds the budget, a narrow one does not; no process is started."""
    space = {"model.features": {"type": "choice", "values": [[4, 8], [256, 512]]}}
    lines: list[str] = []
    both = make_settings(space=space, search="grid").model_copy(
        update={"data": make_settings().data.model_copy(update={"store": str(phantom_store)})}
    )
    tight = both.model_copy(update={"memory": both.memory.model_copy(update={"budget_gib": 1.0})})
    with Journal(tmp_path) as journal:
        sweep = SweepDriver(tight, tmp_path, journal, lines.append)
        first = sweep.start_next_trial()
        assert first is not None
        assert first.params["model.features"] == [4, 8]
        assert sweep.start_next_trial() is None
        states = [(trial.state, trial.reason) for trial in journal.trials.values()]
    assert states[0][0] == "running"
    assert states[1][0] == "failed"
    assert states[1][1].startswith("not tried: batch 1 of 16x32x32 needs ")
    assert "> 1 GiB" in lines[-1]


def test_a_grid_has_every_combination_once() -> None:
    space = {
        "train.learning_rate": Dimension(type="loguniform", low=1e-4, high=1e-2),
        "data.patch_size": Dimension(type="choice", values=([16, 32, 32], [16, 48, 48])),
    }
    sweep = SweepConfig(space=space, search="grid", trials=99)
    points = [propose_params(sweep, 0, number, ()) for number in range(7)]
    assert points[6] is None
    assert [p["train.learning_rate"] for p in points[:6] if p] == [
        1e-4,
        1e-4,
        1e-3,
        1e-3,
        1e-2,
        1e-2,
    ]
    assert len({trial_id(p) for p in points[:6] if p}) == 6


CONDITIONAL = {
    "train.optimizer": {"type": "choice", "values": ["sgd", "adamw"]},
    "train.momentum": {
        "type": "uniform",
        "low": 0.8,
        "high": 0.99,
        "when": {"train.optimizer": "sgd"},
    },
}


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_hyperparameter_is_drawn_only_where_its_condition_holds(search: str) -> None:
    sweep = make_settings(search=search, space=CONDITIONAL).sweep
    history: list[Trial] = []
    for number in range(12):
        params = propose_params(sweep, 1, number, history)
        if params is None:  # adamw alone is one setting
            break
        assert ("train.momentum" in params) == (params["train.optimizer"] == "sgd")
        rung = Rung.from_folds(4, {"0": {"score": 0.1 * number}, "1": {"score": 0.2}}, "end", 1.0)
        history.append(Trial(number, trial_id(params), params, [rung], "finished"))
    assert {trial.params["train.optimizer"] for trial in history} == {"sgd", "adamw"}
    counts = {
        "steps_run": 6,
        "steps_unpruned": 8,
        "fold_hours": 0.1,
        "gpu_hours": 0.0,
        "last_session": {},
    }
    assert "<td>–</td>" in render_sweep_page(make_settings(space=CONDITIONAL), history, counts)


def test_a_conditional_grid_has_no_duplicates() -> None:
    sweep = make_settings(search="grid", space=CONDITIONAL).sweep
    points = [propose_params(sweep, 0, number, ()) for number in range(5)]
    assert [None if p is None else p.get("train.momentum") for p in points] == [
        0.8,
        0.895,
        0.99,
        None,
        None,
    ]
    assert points[3] == {"train.optimizer": "adamw"}
    assert points[4] is None


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"train.learning_rate": 1}, "is not a choice named before it"),
        ({"train.optimizer": "adam"}, "is never 'adam'"),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(when: dict, message: str) -> None:
    space = {
        **CONDITIONAL,
        "train.clip_grad_norm": {"type": "uniform", "low": 1, "high": 20, "when": when},
    }
    with pytest.raises(ValueError, match=message):
        make_settings(space=space)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], lines[1].replace(b"0.7", b"0.8"), *lines[2:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[1], *lines[1:]],
        lambda lines: [lines[0], b"[" * 100_000 + b"\n", *lines[2:]],
        lambda lines: [lines[0], b"{}\n", *lines[2:]],
        lambda lines: [lines[0], b"[[1]]\n", *lines[2:]],
    ],
    ids=["digit", "lost", "doubled", "nested", "empty", "list"],
)
def test_a_damaged_journal_stops_the_sweep(tmp_path: Path, change: Any) -> None:
    with Journal(tmp_path) as journal:
        journal.add_trial("a", {"k": 1})
        journal.add_rung(
            "a", Rung.from_folds(2, {"0": {"score": 0.5}, "1": {"score": 0.7}}, "continue", 1.0)
        )
        journal.add_failure("a", "why")
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    with pytest.raises(RunFailed, match=r"journal\.jsonl: line [23] is damaged"):
        Journal(tmp_path)


def test_a_half_written_line_is_ignored(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.add_trial("a", {"k": 1})
        journal.add_rung(
            "a", Rung.from_folds(2, {"0": {"score": 0.5}, "1": {"score": 0.7}}, "continue", 1.0)
        )
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + b'{"event": "failed", "id": "a", "rea')
    with Journal(tmp_path) as journal:
        assert journal.trials["a"].state == "running"
        assert journal.trials["a"].score == pytest.approx(0.6)
        assert journal.trials["a"].rungs[0].spread == pytest.approx(0.02**0.5)
        journal.add_failure("a", "why")
    with Journal(tmp_path) as journal:
        assert journal.trials["a"].reason == "why"


def test_a_trial_config_is_an_ordinary_config() -> None:
    tree = build_trial_config(
        make_settings(), {"train.learning_rate": 0.003, "data.augmentation": "light"}
    )
    assert tree["train"]["learning_rate"] == 0.003
    assert tree["validation"]["every_steps"] == 2
    assert "sweep" not in tree
    assert "fold" not in tree["data"]


def make_fold_task(folder: Path, **changes: object) -> FoldTask:
    values = {"fold": 1, "nodes": 1, "cpus": 4, "gpus": 0.0, "processes": 2, "max_failures": 0}
    values |= {"weights": {"liver": 1.0, "tumour": 3.0}}
    return FoldTask(trial_dir=str(folder), **{**values, **changes})  # type: ignore[arg-type]


def test_the_cpus_of_a_fold_are_divided_among_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    job = make_fold_task(tmp_path)
    assert count_threads(job) == 2
    assert build_fold_environment(job)["OMP_NUM_THREADS"] == "2"
    assert "SLURM_STEP_NUM_TASKS" not in build_fold_environment(job)
    assert "--nproc-per-node=2" in build_training_command(job, 6)
    assert "train.stop_at_step=6" in build_training_command(job, 6)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"state": "stopped", "step": 4}, 0.75 * 0.4 + 0.25 * 0.8),
        ({"state": "running", "step": 4}, 0.75 * 0.4 + 0.25 * 0.8),
        ({"state": "running", "step": 2}, None),
        ({"state": "running", "step": 5, "saved_step": 2}, None),
        ({"state": "running", "step": 5, "saved_step": 4}, 0.75 * 0.4 + 0.25 * 0.8),
        ({"state": "failed", "step": 4}, None),
    ],
)
def test_a_fold_counts_only_after_its_step_is_saved(
    status: dict[str, object], expected: float | None, tmp_path: Path
) -> None:
    job = make_fold_task(tmp_path)
    job.folder.mkdir()
    figures = {
        "step": 4,
        "validation/score": 0.6,
        "validation/dice_liver": 0.8,
        "validation/dice_tumour": 0.4,
    }
    (job.folder / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    (job.folder / "status.json").write_text(json.dumps(status))
    scores = read_scores(job, 4)
    assert (scores and scores["score"]) == (expected and pytest.approx(expected))


def test_the_page_escapes_reasons_of_failures() -> None:
    params = {"train.learning_rate": 0.001, "data.augmentation": "light"}
    rungs = [
        Rung.from_folds(step, {"0": {"score": 0.4, "liver": 0.4}}, "end", 3.0) for step in (2, 4)
    ]
    trials = [
        Trial(0, "a", params, rungs, "finished"),
        Trial(1, "b", {**params, "train.learning_rate": 0.002}, rungs[:1], "pruned"),
        Trial(2, "c", params, [], "failed", "<script>alert(1)</script>"),
    ]
    best = find_best_trial(trials)
    assert best is trials[0]
    page = render_sweep_page(
        make_settings(),
        trials,
        {
            "steps_run": 6,
            "steps_unpruned": 8,
            "fold_hours": 0.1,
            "gpu_hours": 0.0,
            "last_session": {},
        },
    )
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "pruned at step 2" in page
    assert "http://" not in page
    assert "https://" not in page


def test_importances_are_computed_from_ten_trials_on() -> None:
    """The score depends on the learning rate only."""
    draw = random.Random(1)
    trials = []
    for number in range(24):
        params = {
            "train.learning_rate": float(f"{10 ** draw.uniform(-4, -2):.4g}"),
            "data.augmentation": draw.choice(["none", "light"]),
        }
        score = 0.9 - abs(math.log10(params["train.learning_rate"]) + 3) / 3
        rung = Rung.from_folds(2, {"0": {"score": score, "liver": score}}, "end", 1.0)
        trials.append(Trial(number, f"t{number}", params, [rung], "finished"))
    assert compute_importances(make_settings().sweep.space, trials[:9]) is None
    found = compute_importances(make_settings().sweep.space, trials)
    assert found is not None
    assert list(found) == ["train.learning_rate", "data.augmentation"]
    assert found["train.learning_rate"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    counts = {
        "steps_run": 6,
        "steps_unpruned": 8,
        "fold_hours": 0.1,
        "gpu_hours": 0.0,
        "last_session": {},
    }
    assert 'class="bar"' in render_sweep_page(make_settings(), trials, counts)


def test_the_sweep_section_is_unknown_to_other_programs(config: Path) -> None:
    assert load_settings_as(SweepSettings, [config]).sweep.trials == 2
    with pytest.raises(UserError, match="unknown key sweep"):
        load_settings([config])


def test_a_fold_that_cannot_train_reports_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data:\n  store: no_such_store.zarr\n")
    found = run_fold(make_fold_task(tmp_path, processes=1, max_failures=3), 2)
    assert set(found) == {"failed"}
    assert found["failed"].startswith("fold 1: exit code 2: ")
    assert "no_such_store.zarr" in found["failed"]
    log = (tmp_path / "fold_1.log").read_text()
    assert log.count("liverseg: ") == 1, "a user error is not tried again"

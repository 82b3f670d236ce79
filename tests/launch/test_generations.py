"""The decisions of Hyperband and PBT depend on the settings and the journal only."""

import json
import pickle
import random
import threading
from pathlib import Path

import pytest

from launch.sweep.generations import decide_groups, find_bracket, find_next_stop, iterate_brackets
from launch.sweep.journal import Journal, Rung, Trial, find_best_trial
from launch.sweep.ray_tune import JournalSearch
from launch.sweep.schedulers import JournalScheduler
from launch.sweep.search import (
    compute_objectives,
    find_pareto_front,
    mutate_params,
    propose_params,
    trial_id,
)
from launch.sweep.sweep_config import SweepSettings
from launch.sweep.sweep_driver import SweepDriver
from launch.sweep.sweep_page import count_steps_run, list_lineage, write_results
from liverseg_dist.errors import RunFailed
from tests.launch.test_tune import SWEEP
from tests.test_files import little_room

SPACE = {
    "train.learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
    "data.augmentation": {"type": "choice", "values": ["none", "light", "nnunet"]},
}


def make_settings(max_steps: int = 27, **changes: object) -> SweepSettings:
    sweep = {**SWEEP["sweep"], "space": SPACE, **changes}
    return SweepSettings.model_validate(
        {**SWEEP, "train": {"max_steps": max_steps}, "sweep": sweep}
    )


def make_rung(step: int, score: float, decision: str = "wait") -> Rung:
    return Rung.from_folds(step, {"0": {"score": score}, "1": {"score": score}}, decision, 1.0)


def compute_quality(params: dict) -> float:
    """The score of a trial in these tests; it depends on the learning rate."""
    return 1.0 - abs(params["train.learning_rate"] - 3e-3) / 1e-2


def run_without_training(
    folder: Path, settings: SweepSettings, order: random.Random, stop_after: int = 10**6
) -> list[Trial]:
    """Run a sweep without training, in a random order of reports.

    Ends after `stop_after` reports, like an interrupted sweep.
    """
    with Journal(folder) as journal:
        sweep = SweepDriver(settings, folder, journal, lambda _: None)
        sweep.decide_waiting_trials()
        for _ in range(stop_after):
            ready = [trial for trial in journal.open_trials if trial.state == "running"]
            while len(ready) < 3 and (new := sweep.start_next_trial()):
                ready.append(new)
            if not ready:
                break
            trial = order.choice(ready)
            step = find_next_stop(settings, trial)
            checkpoint = sweep.trial_dir(trial.id) / "fold_0" / "checkpoints" / f"step_{step}"
            for fold in settings.sweep.folds:
                copy = Path(str(checkpoint).replace("fold_0", f"fold_{fold}"))
                copy.mkdir(parents=True, exist_ok=True)
                (copy / "state.json").write_text(json.dumps({"by": trial.id}))
            sweep.record_rung(
                trial,
                make_rung(
                    step,
                    compute_quality(trial.params) + step / 1000,
                    "end" if step == 27 else "wait",
                ),
            )
        return list(journal.trials.values())


def test_brackets_equal_those_of_the_paper() -> None:
    """Li et al. 2018, table 1 (R = 81, eta = 3), without the lowest budget: here four budgets."""
    settings = make_settings(
        81, scheduler="hyperband", rungs=[3, 9, 27], reduction_factor=3, trials=100
    )
    found = [
        (bracket.size, settings.stops[bracket.start])
        for bracket, _ in zip(iterate_brackets(settings), range(4), strict=False)
    ]
    assert found == [(27, 3), (12, 9), (6, 27), (4, 81)]
    assert find_bracket(settings, 26).start == 0
    assert find_bracket(settings, 27).start == 1
    assert find_bracket(settings, 49).first == 49, "the fifth bracket has the size of the first"


def test_hyperband_keeps_the_best_third_and_waits_for_all() -> None:
    settings = make_settings(27, scheduler="hyperband", rungs=[3, 9], reduction_factor=3, trials=9)
    trials = [Trial(n, f"t{n}", {}, [make_rung(3, n / 10)], "waiting") for n in range(8)]
    assert decide_groups(settings, trials) == [], "the ninth trial has not started"
    trials.append(Trial(8, "t8", {}, [], "running"))
    assert decide_groups(settings, trials) == [], "the ninth trial has not reached the rung"
    trials[8].state = "failed"
    decided = {one.trial.id: one.decision for one in decide_groups(settings, trials)}
    assert {id_ for id_, decision in decided.items() if decision == "continue"} == {
        "t5",
        "t6",
        "t7",
    }
    assert set(decided.values()) == {"continue", "prune"}


@pytest.mark.parametrize("scheduler", ["hyperband", "pbt"])
def test_order_and_interruptions_change_nothing(scheduler: str, tmp_path: Path) -> None:
    settings = make_settings(scheduler=scheduler, rungs=[3, 9], reduction_factor=3, trials=12)
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"store": "unused"})}
    )

    def outcome(trials: list[Trial]) -> dict[str, tuple]:
        return {
            t.id: (t.params, t.state, t.parent, [(r.step, r.score, r.decision) for r in t.rungs])
            for t in trials
        }

    expected = run_without_training(tmp_path / "whole", settings, random.Random(0))
    assert all(trial.state in ("finished", "pruned", "replaced") for trial in expected)
    for seed in (1, 2):
        folder, order = tmp_path / str(seed), random.Random(seed)
        for _ in range(60):
            trials = run_without_training(folder, settings, order, stop_after=2)
        assert outcome(trials) == outcome(expected)


def test_the_replacement_of_a_trial_continues_from_a_better_one(tmp_path: Path) -> None:
    settings = make_settings(scheduler="pbt", rungs=[3, 9], trials=8, pbt={"resample_share": 0.0})
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"store": "unused"})}
    )
    trials = run_without_training(tmp_path, settings, random.Random(0))
    by_id = {trial.id: trial for trial in trials}
    first = [trial for trial in trials if not trial.parent]
    assert len(first) == 8
    children = [trial for trial in trials if trial.parent]
    assert children
    for child in children:
        parent = by_id[child.parent]
        given = (
            tmp_path
            / "trials"
            / child.id
            / "fold_1"
            / "checkpoints"
            / f"step_{child.from_step}"
            / "state.json"
        )
        assert json.loads(given.read_text()) == {"by": parent.id}
        ratio = child.params["train.learning_rate"] / parent.params["train.learning_rate"]
        assert (
            ratio == pytest.approx(1.2, rel=1e-3)
            or ratio == pytest.approx(1 / 1.2, rel=1e-3)
            or ratio == 1
        )
    replaced = [trial for trial in trials if trial.state == "replaced"]
    assert len(replaced) == len(children)
    for step in (3, 9):
        scores = {t.id: r.score for t in trials for r in t.rungs if r.step == step}
        assert sum(t.step == step for t in replaced) == 2, "a quarter of eight"
        assert max(scores[t.id] for t in replaced if t.step == step) <= min(
            scores[id_] for id_ in scores if id_ not in {t.id for t in replaced if t.step == step}
        )
    assert count_steps_run(trials, settings) == 8 * 27 * 2, (
        "a population runs as many steps as its members alone"
    )
    best = find_best_trial(trials)
    assert best is not None
    write_results(tmp_path, settings, trials)
    header = (tmp_path / "best.yaml").read_text()
    for step, params in list_lineage(best, trials):
        assert f"# until step {step} with {params}" in header


def test_a_group_decision_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    settings = make_settings(scheduler="pbt", rungs=[3, 9], trials=4)
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"store": "unused"})}
    )
    run_without_training(tmp_path, settings, random.Random(0), stop_after=4)
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "decisions"
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    with Journal(tmp_path) as journal:
        assert {trial.state for trial in journal.trials.values()} == {"waiting"}
        SweepDriver(settings, tmp_path, journal, lambda _: None).decide_waiting_trials()
        assert json.loads(file.read_bytes().splitlines()[-1]) == json.loads(lines[-1])


def test_searcher_and_scheduler_can_be_pickled_with_a_live_table(tmp_path: Path) -> None:
    """Ray Tune pickles both; the live table has locks, the journal an open file."""
    lock = threading.RLock()
    with Journal(tmp_path) as journal:
        sweep = SweepDriver(make_settings(), tmp_path, journal, lambda _: lock.release())
        pickle.dumps(JournalSearch(sweep))
        pickle.dumps(JournalScheduler(sweep))


def test_mutations_stay_in_the_space() -> None:
    sweep = make_settings(scheduler="pbt", rungs=[3], trials=4).sweep
    params = {"train.learning_rate": 9.9e-3, "data.augmentation": "nnunet"}
    seen = [mutate_params(sweep, params, random.Random(n)) for n in range(200)]
    assert all(1e-4 <= one["train.learning_rate"] <= 1e-2 for one in seen)
    assert {one["data.augmentation"] for one in seen} == {"none", "light", "nnunet"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "hyperband", "rungs": []}, "decides at rungs"),
        ({"scheduler": "pbt", "rungs": [2], "search": "grid"}, "needs a population"),
        (
            {
                "scheduler": "pbt",
                "rungs": [2],
                "space": {"model.features": {"type": "choice", "values": [[4], [8]]}},
            },
            "pbt cannot search model.features",
        ),
        ({"objectives": ["dice", "memory_gib"], "rungs": [2]}, "leave rungs empty"),
        ({"objectives": ["step_s"], "rungs": []}, "must begin with dice"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(**changes)


def make_trial(number: int, params: dict, dice: float, memory_gib: float) -> Trial:
    folds = {"0": {"score": dice, "memory_gib": memory_gib, "step_s": 0.1}}
    return Trial(
        number, trial_id(params), params, [Rung.from_folds(27, folds, "end", 1.0)], "finished"
    )


def test_the_pareto_front_equals_that_of_optuna() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    draw, names = random.Random(5), ("dice", "memory_gib")
    trials = [
        make_trial(n, {"n": n}, round(draw.random(), 1), round(draw.random(), 1)) for n in range(30)
    ]
    study = optuna.create_study(directions=["maximize", "minimize"])
    for trial in trials:
        study.add_trial(optuna.trial.create_trial(values=compute_objectives(trial, names)))
    expected = sorted(found.number for found in study.best_trials)
    assert sorted(trial.number for trial in find_pareto_front(trials, names)) == expected


def test_a_search_for_two_objectives_finds_the_pareto_front(tmp_path: Path) -> None:
    """Dice and memory grow with the learning rate. Augmentation lowers Dice and needs memory."""
    pytest.importorskip("optuna")
    settings = make_settings(
        search="optuna", objectives=["dice", "memory_gib"], rungs=[], trials=24
    )
    history: list[Trial] = []
    for number in range(24):
        params = propose_params(settings.sweep, 3, number, history)
        assert params is not None
        share = params["train.learning_rate"] / 1e-2
        waste = ["none", "light", "nnunet"].index(params["data.augmentation"])
        history.append(
            make_trial(number, params, 0.5 + 0.4 * share - 0.1 * waste, 1 + share + waste)
        )
    late = [trial.params["data.augmentation"] for trial in history[12:]]
    assert late.count("none") > 6
    summary = write_results(tmp_path, settings, history)
    front = {trial.id for trial in find_pareto_front(history, settings.sweep.objectives)}
    assert set(summary["pareto"]) == front
    assert all(
        trial.params["data.augmentation"] == "none" for trial in history if trial.id in front
    )
    assert "Dice and its cost" in (tmp_path / "sweep.html").read_text()


def test_a_trial_whose_folder_cannot_be_written_is_not_marked_as_failed(tmp_path: Path) -> None:
    """With a full or read-only disk every trial fails; the sweep ends and can be continued."""
    with Journal(tmp_path) as journal:
        sweep = SweepDriver(make_settings(), tmp_path, journal, lambda _: None)
        trial = sweep.start_next_trial()
        assert trial is not None
        with (
            little_room(0),
            pytest.raises(RunFailed, match=f"trials/{trial.id}: File too large; .*no checkpoint"),
        ):
            sweep.record_failure(trial, "fold 0: no checkpoint could be written")
        with pytest.raises(RunFailed, match="fold 1: a: No space left on device; fix that and run"):
            sweep.record_failure(trial, "fold 1: a: No space left on device")
        assert journal.trials[trial.id].state == "running"
        sweep.record_failure(trial, "fold 0: a NaN")
        assert journal.trials[trial.id].state == "failed"

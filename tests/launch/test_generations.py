"""Hyperband's brackets and PBT's exploitation: what is decided, from what, and that nothing else matters."""

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


def settings(max_steps: int = 27, **changes: object) -> SweepSettings:
    sweep = {**SWEEP["sweep"], "space": SPACE, **changes}
    return SweepSettings.model_validate(
        {**SWEEP, "train": {"max_steps": max_steps}, "sweep": sweep}
    )


def rung(step: int, score: float, decision: str = "wait") -> Rung:
    return Rung.from_folds(step, {"0": {"score": score}, "1": {"score": score}}, decision, 1.0)


def quality(params: dict) -> float:
    """What trials score in these tests: the learning rate decides."""
    return 1.0 - abs(params["train.learning_rate"] - 3e-3) / 1e-2


def play(
    folder: Path, of: SweepSettings, order: random.Random, stop_after: int = 10**6
) -> list[Trial]:
    """Runs a sweep without training: trials that can go on do so in any order. Ends early after some reports."""
    with Journal(folder) as journal:
        sweep = SweepDriver(of, folder, journal, lambda _: None)
        sweep.decide_waiting_trials()
        for _ in range(stop_after):
            ready = [trial for trial in journal.open_trials if trial.state == "running"]
            while len(ready) < 3 and (new := sweep.start_next_trial()):
                ready.append(new)
            if not ready:
                break
            trial = order.choice(ready)
            step = find_next_stop(of, trial)
            checkpoint = sweep.trial_dir(trial.id) / "fold_0" / "checkpoints" / f"step_{step}"
            for fold in of.sweep.folds:
                made = Path(str(checkpoint).replace("fold_0", f"fold_{fold}"))
                made.mkdir(parents=True, exist_ok=True)
                (made / "state.json").write_text(json.dumps({"by": trial.id}))
            sweep.record_rung(
                trial,
                rung(step, quality(trial.params) + step / 1000, "end" if step == 27 else "wait"),
            )
        return list(journal.trials.values())


def test_brackets_are_those_of_the_paper() -> None:
    """Li et al. 2018, table 1 (R = 81, eta = 3), without its first bracket's lowest budget: here four budgets."""
    of = settings(81, scheduler="hyperband", rungs=[3, 9, 27], reduction_factor=3, trials=100)
    found = [
        (bracket.size, of.stops[bracket.start])
        for bracket, _ in zip(iterate_brackets(of), range(4), strict=False)
    ]
    assert found == [(27, 3), (12, 9), (6, 27), (4, 81)]
    assert find_bracket(of, 26).start == 0
    assert find_bracket(of, 27).start == 1
    assert find_bracket(of, 49).first == 49, "the fifth is like the first"


def test_hyperband_keeps_the_best_third_and_waits_for_all() -> None:
    of = settings(27, scheduler="hyperband", rungs=[3, 9], reduction_factor=3, trials=9)
    trials = [Trial(n, f"t{n}", {}, [rung(3, n / 10)], "waiting") for n in range(8)]
    assert decide_groups(of, trials) == [], "the ninth has not begun"
    trials.append(Trial(8, "t8", {}, [], "running"))
    assert decide_groups(of, trials) == [], "the ninth has not reached the rung"
    trials[8].state = "failed"
    made = {one.trial.id: one.decision for one in decide_groups(of, trials)}
    assert {id_ for id_, decision in made.items() if decision == "continue"} == {"t5", "t6", "t7"}
    assert set(made.values()) == {"continue", "prune"}


@pytest.mark.parametrize("scheduler", ["hyperband", "pbt"])
def test_order_and_interruptions_change_nothing(scheduler: str, tmp_path: Path) -> None:
    of = settings(scheduler=scheduler, rungs=[3, 9], reduction_factor=3, trials=12)
    of = of.model_copy(update={"data": of.data.model_copy(update={"store": "unused"})})

    def outcome(trials: list[Trial]) -> dict[str, tuple]:
        return {
            t.id: (t.params, t.state, t.parent, [(r.step, r.score, r.decision) for r in t.rungs])
            for t in trials
        }

    whole = play(tmp_path / "whole", of, random.Random(0))
    assert all(trial.state in ("finished", "pruned", "replaced") for trial in whole)
    for seed in (1, 2):
        folder, order = tmp_path / str(seed), random.Random(seed)
        for _ in range(60):
            trials = play(folder, of, order, stop_after=2)
        assert outcome(trials) == outcome(whole)


def test_a_replaced_trial_goes_on_from_a_better_one(tmp_path: Path) -> None:
    of = settings(scheduler="pbt", rungs=[3, 9], trials=8, pbt={"resample_share": 0.0})
    of = of.model_copy(update={"data": of.data.model_copy(update={"store": "unused"})})
    trials = play(tmp_path, of, random.Random(0))
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
    losers = [trial for trial in trials if trial.state == "replaced"]
    assert len(losers) == len(children)
    for step in (3, 9):
        scores = {t.id: r.score for t in trials for r in t.rungs if r.step == step}
        assert sum(t.step == step for t in losers) == 2, "a quarter of eight"
        assert max(scores[t.id] for t in losers if t.step == step) <= min(
            scores[id_] for id_ in scores if id_ not in {t.id for t in losers if t.step == step}
        )
    assert count_steps_run(trials, of) == 8 * 27 * 2, (
        "a population costs what its members would cost alone"
    )
    best = find_best_trial(trials)
    assert best is not None
    write_results(tmp_path, of, trials)
    header = (tmp_path / "best.yaml").read_text()
    for step, params in list_lineage(best, trials):
        assert f"# until step {step} with {params}" in header


def test_a_decision_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    of = settings(scheduler="pbt", rungs=[3, 9], trials=4)
    of = of.model_copy(update={"data": of.data.model_copy(update={"store": "unused"})})
    play(tmp_path, of, random.Random(0), stop_after=4)
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "decisions"
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    with Journal(tmp_path) as journal:
        assert {trial.state for trial in journal.trials.values()} == {"waiting"}
        SweepDriver(of, tmp_path, journal, lambda _: None).decide_waiting_trials()
        assert json.loads(file.read_bytes().splitlines()[-1]) == json.loads(lines[-1])


def test_a_live_table_is_no_hindrance(tmp_path: Path) -> None:
    """Ray Tune pickles searcher and scheduler; a terminal's table holds locks, the journal a file."""
    lock = threading.RLock()
    with Journal(tmp_path) as journal:
        sweep = SweepDriver(settings(), tmp_path, journal, lambda _: lock.release())
        pickle.dumps(JournalSearch(sweep))
        pickle.dumps(JournalScheduler(sweep))


def test_mutations_stay_in_the_space() -> None:
    sweep = settings(scheduler="pbt", rungs=[3], trials=4).sweep
    params = {"train.learning_rate": 9.9e-3, "data.augmentation": "nnunet"}
    seen = [mutate_params(sweep, params, random.Random(n)) for n in range(200)]
    assert all(1e-4 <= one["train.learning_rate"] <= 1e-2 for one in seen)
    assert {one["data.augmentation"] for one in seen} == {"none", "light", "nnunet"}


@pytest.mark.parametrize(
    ("changes", "said"),
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
def test_what_cannot_work_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def costly(number: int, params: dict, dice: float, memory_gib: float) -> Trial:
    folds = {"0": {"score": dice, "memory_gib": memory_gib, "step_s": 0.1}}
    return Trial(
        number, trial_id(params), params, [Rung.from_folds(27, folds, "end", 1.0)], "finished"
    )


def test_the_pareto_front_is_optunas() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    draw, names = random.Random(5), ("dice", "memory_gib")
    trials = [
        costly(n, {"n": n}, round(draw.random(), 1), round(draw.random(), 1)) for n in range(30)
    ]
    study = optuna.create_study(directions=["maximize", "minimize"])
    for trial in trials:
        study.add_trial(optuna.trial.create_trial(values=compute_objectives(trial, names)))
    theirs = sorted(found.number for found in study.best_trials)
    assert sorted(trial.number for trial in find_pareto_front(trials, names)) == theirs


def test_a_search_for_two_objectives_finds_the_trade(tmp_path: Path) -> None:
    """Dice grows with the learning rate and so does memory, augmentation costs both: the search leaves it out."""
    pytest.importorskip("optuna")
    of = settings(search="optuna", objectives=["dice", "memory_gib"], rungs=[], trials=24)
    history: list[Trial] = []
    for number in range(24):
        params = propose_params(of.sweep, 3, number, history)
        assert params is not None
        share = params["train.learning_rate"] / 1e-2
        waste = ["none", "light", "nnunet"].index(params["data.augmentation"])
        history.append(costly(number, params, 0.5 + 0.4 * share - 0.1 * waste, 1 + share + waste))
    late = [trial.params["data.augmentation"] for trial in history[12:]]
    assert late.count("none") > 6
    summary = write_results(tmp_path, of, history)
    front = {trial.id for trial in find_pareto_front(history, of.sweep.objectives)}
    assert set(summary["pareto"]) == front
    assert all(
        trial.params["data.augmentation"] == "none" for trial in history if trial.id in front
    )
    assert "Dice and its cost" in (tmp_path / "sweep.html").read_text()


def test_nothing_is_held_against_a_trial_whose_folder_cannot_be_written(tmp_path: Path) -> None:
    """A full or locked disk fails every trial; the sweep ends and goes on with all of them when that is mended."""
    with Journal(tmp_path) as journal:
        sweep = SweepDriver(settings(), tmp_path, journal, lambda _: None)
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

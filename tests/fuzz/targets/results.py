"""What evaluations and sweeps keep: ledger entries, summary.json, the journal."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from launch.sweep.journal import Journal, Rung, find_best_trial
from launch.sweep.sweep_config import SweepSettings
from launch.sweep.sweep_page import count_steps_run, render_sweep_page
from liverseg_dist.config.settings import load_settings_as
from liverseg_dist.evaluation.compare import compare_evaluations
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.metrics.case import score_case
from liverseg_dist.evaluation.results import (
    LEDGER,
    SUMMARY,
    load_results,
    rewrite_results,
    write_results,
)
from tests.fuzz.judge import Wrong
from tests.fuzz.mutate import damaged, damaged_json


class LedgerTarget:
    """A finished evaluation with damage in an entry or in the summary: `report` and `compare_evaluations` of it."""

    name = "ledger"

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        ledger = Ledger(folder / LEDGER, {"weights": "a"})
        for number in range(3):
            masks = [rng.choice([0, 0, 0, 1, 2], (6, 7, 8)).astype(np.uint8) for _ in range(2)]
            ledger.write(
                f"liver_{number}",
                score_case(f"liver_{number}", *masks, (2.0, 1.0, 1.0)),
                inputs=f"{number}",
            )
        ledger.write_failure("liver_9", "the file ends early")
        write_results(folder, ledger.read_all(), ledger.failures(), {"title": "t"}, ledger)
        self.scores = {case["case_id"]: case for case in ledger.read_all()}
        self.entries = {p.name: p.read_bytes() for p in sorted((folder / LEDGER).iterdir())}
        self.summary = (folder / SUMMARY).read_bytes()

    def make(self, case: Path, chance: Random) -> None:
        (case / LEDGER).mkdir()
        entries, summary = dict(self.entries), self.summary
        if chance.random() < 0.6:
            name = chance.choice(sorted(entries))
            entries[name] = damaged_json(json.loads(entries[name]), chance)
        else:
            summary = damaged_json(json.loads(summary), chance)
        for name, raw in entries.items():
            (case / LEDGER / name).write_bytes(raw)
        (case / SUMMARY).write_bytes(summary)

    def check(self, case: Path) -> None:
        results = load_results(case)
        for scores in results.cases:
            if scores != self.scores.get(scores["case_id"]):
                raise Wrong(
                    f"{scores['case_id']}: other scores than were written are taken for good"
                )
        compare_evaluations(list(results.cases), list(results.cases))
        rewrite_results(results)
        ledger = Ledger(case / LEDGER, str(results.summary["ledger"]["fingerprint"]))
        ledger.done({"liver_1": "1"}), ledger.failures()


class JournalTarget:
    """A sweep's journal: the trials that were written, or a refusal."""

    name = "journal"

    def __init__(self, folder: Path) -> None:
        configs = Path(__file__).resolve().parents[3] / "configs"
        self.settings = load_settings_as(SweepSettings, [configs / "sweep_cpu.yaml"])
        with Journal(folder) as journal:
            for number in range(3):
                journal.add_trial(f"t{number}", {"train.learning_rate": 0.01 * (number + 1)})
                for step in (100, 200):
                    folds = {
                        str(k): {"score": 0.5 + 0.01 * k, "liver": 0.9, "tumour": 0.1}
                        for k in range(2)
                    }
                    decision = "continue" if step == 100 else ("end", "prune", "continue")[number]
                    journal.add_rung(f"t{number}", Rung.from_folds(step, folds, decision, 3.0))
            journal.add_failure("t2", "out of memory")
            self.trials = [self._told(trial) for trial in journal.trials.values()]
        self.raw = (folder / "journal.jsonl").read_bytes()

    def make(self, case: Path, chance: Random) -> None:
        lines = self.raw.splitlines(keepends=True)
        how, at = chance.randrange(6), chance.randrange(len(lines))
        if how <= 2:
            lines[at] = damaged_json(json.loads(lines[at]), chance).replace(b"\n", b" ") + b"\n"
        elif how == 3:
            lines[at] = damaged(lines[at], chance)
        elif how == 4:
            del lines[at]
        else:
            lines.insert(at, lines[chance.randrange(len(lines))])
        raw = b"".join(lines)
        (case / "journal.jsonl").write_bytes(damaged(raw, chance) if chance.random() < 0.1 else raw)

    def check(self, case: Path) -> None:
        with Journal(case) as journal:
            trials = list(journal.trials.values())
        told = [self._told(trial) for trial in trials]
        whole = self._whole_prefixes()
        if told not in whole:
            raise Wrong(f"trials that were never so: {told!r}"[:900])
        best = find_best_trial(trials)
        count_steps_run(trials, self.settings)
        summary: dict[str, Any] = {
            "best": best and {"id": best.id},
            "trials": [],
            "fold_hours": 0.0,
            "gpu_hours": 0.0,
        }
        summary["last_session"] = {}
        render_sweep_page(self.settings, trials, {**summary, "steps_run": 1, "steps_unpruned": 1})

    def _told(self, trial: Any) -> str:
        return json.dumps(
            [trial.id, trial.params, [r.__dict__ for r in trial.rungs], trial.state, trial.reason]
        )

    def _whole_prefixes(self) -> list[list[str]]:
        """What the trials were after each line: a journal may lose its end, and nothing else."""
        states: list[list[str]] = [[]]
        found: dict[str, Any] = {}
        for line in self.raw.splitlines():
            record = json.loads(line)
            del record["check"]
            Journal._apply(_Trials(found), record)
            states.append([self._told(trial) for trial in found.values()])
        return states


class _Trials:
    """As much of a journal as `_apply` needs."""

    def __init__(self, trials: dict[str, Any]) -> None:
        self.trials = trials

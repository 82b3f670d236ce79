"""What a sweep leaves: `best.yaml`, `sweep.json`, `sweep.html` and TensorBoard HParams, all made from the journal."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import t as student_t
from torch.utils.tensorboard import SummaryWriter

from liverseg_dist.files import write_text
from liverseg_dist.pages import load_theme

from .journal import Trial, best_of
from .search import MANY, Params, hyperparameter_importances, pareto_front
from .sweep_charts import (
    WIDTHS,
    format_value,
    learning_curves,
    parallel_coordinates,
    pareto_charts,
    scatter_chart,
    stacked_coordinates,
)
from .sweep_config import SweepSettings, to_yaml, trial_tree


def write_results(
    folder: Path,
    settings: SweepSettings,
    trials: Sequence[Trial],
    usage: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write all four; returns what sweep.json holds. best.yaml is absent while no trial has finished.

    usage: wall time, folds at once and the share of both that was used, of the last session.
    """
    best = best_of(trials)
    resources, objectives = settings.sweep.resources, settings.sweep.objectives
    summary = {
        "schema": 1,
        "best": None if best is None else _record(best),
        "trials": [_record(trial) for trial in trials],
        "objectives": list(objectives),
        "pareto": [trial.id for trial in pareto_front(trials, objectives)]
        if len(objectives) > 1
        else [],
        "last_session": dict(usage or {}),
        "fold_hours": fold_seconds(trials) / 3600,
        "gpu_hours": resources.gpus * resources.nodes * fold_seconds(trials) / 3600,
        "steps_run": steps_run(trials, settings),
        "steps_unpruned": sum(t.state != "failed" and not t.parent for t in trials)
        * settings.train.max_steps
        * len(settings.sweep.folds),
    }
    if best is not None:
        header = f"Best of {len(trials)} trials: Dice {best.score:.4f} ± {best.rungs[-1].spread:.4f} over folds.\n"
        header += "train --config THIS run.dir=DIR data.fold=K"
        header += "".join(
            f"\nuntil step {step} with {params}" for step, params in trial_lineage(best, trials)
        )
        write_text(
            folder / "best.yaml", to_yaml(_for_training(trial_tree(settings, best.params)), header)
        )
    write_text(folder / "sweep.json", json.dumps(summary, indent=1))
    write_text(folder / "sweep.html", render_sweep_page(settings, trials, summary))
    _write_hparams(folder / "tensorboard", trials)
    return summary


def fold_seconds(trials: Iterable[Trial]) -> float:
    """Wall time of all folds' processes, summed."""
    return sum(rung.seconds for trial in trials for rung in trial.rungs)


def trial_lineage(trial: Trial, trials: Sequence[Trial]) -> list[tuple[int, Params]]:
    """Of a trial that went on from others' checkpoints: until which step it was trained with which hyperparameters."""
    by_id, found = {one.id: one for one in trials}, []
    while trial.parent:
        until, trial = trial.from_step, by_id[trial.parent]
        found.append((until, trial.params))
    return found[::-1]


def confidence_half_width(trial: Trial) -> float | None:
    """Half the width of the 95 % interval of the mean over folds (Student's t); None for one fold."""
    count = len(trial.rungs[-1].folds)
    if count < 2:
        return None
    return float(student_t.ppf(0.975, count - 1)) * trial.rungs[-1].spread / math.sqrt(count)


def steps_run(trials: Sequence[Trial], settings: SweepSettings) -> int:
    """Optimizer steps of all folds up to the last common stop."""
    return sum(trial.step - trial.from_step for trial in trials) * len(settings.sweep.folds)


def render_sweep_page(
    settings: SweepSettings, trials: Sequence[Trial], summary: dict[str, Any]
) -> str:
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    store = (
        Path(settings.data.store or "").name or "an unnamed store"
    )  # where it lies is no part of the result
    best = best_of(trials)
    ranked = sorted(
        trials,
        key=lambda t: (_ORDER[t.state], -(t.rungs[-1].step if t.rungs else 0), -(t.score or 0)),
    )
    keys = list(settings.sweep.space)
    return environment.get_template("sweep.html.j2").render(
        sweep=settings.sweep,
        store=store,
        max_steps=settings.train.max_steps,
        best=best,
        best_yaml="\n".join(f"{key}: {format_value(value)}" for key, value in best.params.items())
        if best
        else "",
        trials=ranked,
        summary=summary,
        counts={state: sum(t.state == state for t in trials) for state in _ORDER},
        theme=Markup(load_theme()),  # our own file, no text from data  # nosec B704
        title=f"Hyperparameter sweep on {store}, {len(trials)} trial{'' if len(trials) == 1 else 's'}",
        curves=[learning_curves(trials, best, settings.train.max_steps, width) for width in WIDTHS],
        parallel=[
            parallel_coordinates(settings.sweep.space, trials, best),
            stacked_coordinates(settings.sweep.space, trials, best),
        ],
        scatters=[
            (key, scatter_chart(key, settings.sweep.space[key], trials, best)) for key in keys
        ],
        importances=hyperparameter_importances(settings.sweep.space, trials),
        fronts=list(
            zip(
                *(
                    pareto_charts(settings.sweep.objectives, trials, best, width)
                    for width in WIDTHS
                ),
                strict=True,
            )
        ),
        lineage=trial_lineage(best, trials) if best else [],
        confidence=confidence_half_width(best) if best else None,
        numbers={trial.id: trial.number for trial in trials},
        many=MANY,
        keys=keys,
        shown=format_value,
    )


_ORDER = {"finished": 0, "running": 1, "waiting": 2, "pruned": 3, "replaced": 4, "failed": 5}


def _record(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number, "id": trial.id, "state": trial.state, "reason": trial.reason, "params": trial.params,
        "score": trial.score, "spread": trial.rungs[-1].spread if trial.rungs else None,
        "step": trial.step,
        "parent": trial.parent, "from_step": trial.from_step, "folds": trial.rungs[-1].folds if trial.rungs else {},
        "rungs": [rung.__dict__ for rung in trial.rungs],
    }  # fmt: skip


def _for_training(tree: dict[str, Any]) -> dict[str, Any]:
    return {section: value for section, value in tree.items() if value != {}}


def _write_hparams(folder: Path, trials: Sequence[Trial]) -> None:
    """A run per trial, so that TensorBoard's HPARAMS page compares them; written anew each time."""
    shutil.rmtree(folder, ignore_errors=True)
    for trial in trials:
        writer = SummaryWriter(str(folder / f"trial_{trial.number:03d}_{trial.id}"))
        for rung in trial.rungs:
            writer.add_scalar("sweep/dice_mean", rung.score, rung.step)
            writer.add_scalar("sweep/dice_spread", rung.spread, rung.step)
        values = {
            k: v if isinstance(v, (bool, int, float, str)) else format_value(v)
            for k, v in trial.params.items()
        }
        figures = {"hparam/dice_mean": trial.score or 0.0, "hparam/steps": trial.step}
        writer.add_hparams({**values, "state": trial.state}, figures, run_name=".")
        writer.close()

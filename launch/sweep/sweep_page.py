"""The results of a sweep: `best.yaml`, `sweep.json`, `sweep.html` and TensorBoard HParams.

All are written from the journal, so they can be written again at any time.
"""

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

from .fold import FIGURES
from .journal import Trial, find_best_trial
from .search import MIN_TRIALS_FOR_IMPORTANCE, Params, compute_importances, find_pareto_front
from .sweep_charts import (
    WIDTHS,
    format_value,
    learning_curves,
    parallel_coordinates,
    pareto_charts,
    scatter_chart,
    stacked_coordinates,
)
from .sweep_config import SweepSettings, build_trial_config, to_yaml

_STATE_ORDER = {"finished": 0, "running": 1, "waiting": 2, "pruned": 3, "replaced": 4, "failed": 5}
"""The order of the trials on the page."""

NOT_DICE = {"score", "seconds", *FIGURES.values()}
"""Figures of a fold that are not the Dice of a structure."""


def write_results(
    folder: Path,
    settings: SweepSettings,
    trials: Sequence[Trial],
    usage: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write all results. best.yaml is absent while no trial has finished.

    Args:
        folder: The folder of the sweep.
        settings: The settings of the sweep.
        trials: All trials.
        usage: Of the last session: wall time, folds at the same time, and the used share of both.

    Returns:
        The content of sweep.json.
    """
    summary = _build_summary(settings, trials, usage or {})
    best = find_best_trial(trials)
    if best is not None:
        config = build_trial_config(settings, best.params)
        used_sections = {name: section for name, section in config.items() if section != {}}
        header = _format_header(best, trials)
        write_text(folder / "best.yaml", to_yaml(used_sections, header))
    write_text(folder / "sweep.json", json.dumps(summary, indent=1))
    write_text(folder / "sweep.html", render_sweep_page(settings, trials, summary))
    _write_hparams(folder / "tensorboard", trials)
    return summary


def _build_summary(
    settings: SweepSettings, trials: Sequence[Trial], usage: Mapping[str, float]
) -> dict[str, Any]:
    """The content of sweep.json."""
    best = find_best_trial(trials)
    resources, objectives = settings.sweep.resources, settings.sweep.objectives
    pareto: list[str] = []
    if len(objectives) > 1:
        pareto = [trial.id for trial in find_pareto_front(trials, objectives)]
    fold_hours = sum_fold_seconds(trials) / 3600
    # Replaced trials take over the steps of their parents, so they do not add to the total.
    complete_trials = sum(trial.state != "failed" and not trial.parent for trial in trials)
    return {
        "schema": 1,
        "best": None if best is None else _trial_to_json(best),
        "trials": [_trial_to_json(trial) for trial in trials],
        "objectives": list(objectives),
        "pareto": pareto,
        "last_session": dict(usage),
        "fold_hours": fold_hours,
        "gpu_hours": resources.gpus * resources.nodes * fold_hours,
        "steps_run": count_steps_run(trials, settings),
        "steps_unpruned": complete_trials * settings.train.max_steps * len(settings.sweep.folds),
    }


def _format_header(best: Trial, trials: Sequence[Trial]) -> str:
    """The comment at the top of best.yaml."""
    lines = [
        f"Best of {len(trials)} trials: "
        f"Dice {best.score:.4f} ± {best.rungs[-1].spread:.4f} over folds.",
        "train --config THIS run.dir=DIR data.fold=K",
    ]
    for step, params in list_lineage(best, trials):
        lines.append(f"until step {step} with {params}")
    return "\n".join(lines)


def sum_fold_seconds(trials: Iterable[Trial]) -> float:
    """Wall time of the processes of all folds, summed, in seconds."""
    return sum(rung.seconds for trial in trials for rung in trial.rungs)


def list_lineage(trial: Trial, trials: Sequence[Trial]) -> list[tuple[int, Params]]:
    """The earlier training of a trial that continued from the checkpoints of others.

    Returns:
        (step until which it was trained, with these hyperparameters), oldest first.
    """
    by_id = {one.id: one for one in trials}
    found = []
    while trial.parent:
        until, trial = trial.from_step, by_id[trial.parent]
        found.append((until, trial.params))
    return found[::-1]


def confidence_half_width(trial: Trial) -> float | None:
    """Half the width of the 95 % interval of the mean over folds (Student's t).

    None for one fold.
    """
    count = len(trial.rungs[-1].folds)
    if count < 2:
        return None
    return float(student_t.ppf(0.975, count - 1)) * trial.rungs[-1].spread / math.sqrt(count)


def count_steps_run(trials: Sequence[Trial], settings: SweepSettings) -> int:
    """Optimizer steps of all folds, up to the last common stop of each trial."""
    return sum(trial.step - trial.from_step for trial in trials) * len(settings.sweep.folds)


def list_structures(trials: Sequence[Trial]) -> list[str]:
    """Structures whose Dice some fold has, in the order of the label scheme."""
    names: dict[str, None] = {}
    for trial in trials:
        for rung in trial.rungs:
            for figures in rung.folds.values():
                names |= dict.fromkeys(figures)
    return [name for name in names if name not in NOT_DICE]


def render_sweep_page(
    settings: SweepSettings, trials: Sequence[Trial], summary: dict[str, Any]
) -> str:
    """The HTML of sweep.html.

    Args:
        settings: The settings of the sweep.
        trials: All trials.
        summary: The content of sweep.json.
    """
    environment = Environment(
        loader=PackageLoader(__package__),
        # Reasons of failures contain texts of programs.
        autoescape=True,
        # A misspelt name in the template is an error.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The name only: the path of the store may identify users or sites.
    store = Path(settings.data.store or "").name or "an unnamed store"
    best = find_best_trial(trials)
    plural = "" if len(trials) == 1 else "s"
    structures = list_structures(trials)
    return environment.get_template("sweep.html.j2").render(
        **_render_charts(settings, trials, best),
        sweep=settings.sweep,
        structures=structures,
        weights=[(name, settings.sweep.metric.get(name, 1.0)) for name in structures],
        store=store,
        max_steps=settings.train.max_steps,
        best=best,
        best_yaml=_format_params(best.params) if best else "",
        trials=sorted(trials, key=_rank_trial),
        summary=summary,
        counts={state: _count_state(trials, state) for state in _STATE_ORDER},
        # A file of this package, without text from data.
        theme=Markup(load_theme()),  # nosec B704
        title=f"Hyperparameter sweep on {store}, {len(trials)} trial{plural}",
        importances=compute_importances(settings.sweep.space, trials),
        lineage=list_lineage(best, trials) if best else [],
        confidence=confidence_half_width(best) if best else None,
        numbers={trial.id: trial.number for trial in trials},
        min_trials=MIN_TRIALS_FOR_IMPORTANCE,
        keys=list(settings.sweep.space),
        format_value=format_value,
    )


def _render_charts(
    settings: SweepSettings, trials: Sequence[Trial], best: Trial | None
) -> dict[str, Any]:
    """The charts of the page; those that fill it in two widths."""
    space, max_steps = settings.sweep.space, settings.train.max_steps
    scatters = []
    for key, dimension in space.items():
        scatters.append((key, scatter_chart(key, dimension, trials, best)))
    wide, narrow = [
        pareto_charts(settings.sweep.objectives, trials, best, width) for width in WIDTHS
    ]
    return {
        "curves": [learning_curves(trials, best, max_steps, width) for width in WIDTHS],
        "parallel": [
            parallel_coordinates(space, trials, best),
            stacked_coordinates(space, trials, best),
        ],
        "scatters": scatters,
        "fronts": list(zip(wide, narrow, strict=True)),
    }


def _rank_trial(trial: Trial) -> tuple[float, ...]:
    """Sort key of the trials on the page."""
    last_step = trial.rungs[-1].step if trial.rungs else 0
    return (_STATE_ORDER[trial.state], -last_step, -(trial.score or 0))


def _count_state(trials: Sequence[Trial], state: str) -> int:
    return sum(trial.state == state for trial in trials)


def _format_params(params: Params) -> str:
    return "\n".join(f"{key}: {format_value(value)}" for key, value in params.items())


def _trial_to_json(trial: Trial) -> dict[str, Any]:
    """A trial in sweep.json."""
    last = trial.rungs[-1] if trial.rungs else None
    return {
        "number": trial.number,
        "id": trial.id,
        "state": trial.state,
        "reason": trial.reason,
        "params": trial.params,
        "score": trial.score,
        "spread": last.spread if last else None,
        "step": trial.step,
        "parent": trial.parent,
        "from_step": trial.from_step,
        "folds": last.folds if last else {},
        "rungs": [rung.__dict__ for rung in trial.rungs],
    }


def _write_hparams(folder: Path, trials: Sequence[Trial]) -> None:
    """Write a TensorBoard run per trial, for the page HPARAMS; earlier ones are replaced."""
    # Otherwise TensorBoard would show the trials of the last session twice.
    shutil.rmtree(folder, ignore_errors=True)
    for trial in trials:
        writer = SummaryWriter(str(folder / f"trial_{trial.number:03d}_{trial.id}"))
        for rung in trial.rungs:
            writer.add_scalar("sweep/dice_mean", rung.score, rung.step)
            writer.add_scalar("sweep/dice_spread", rung.spread, rung.step)
        values: dict[str, Any] = {}
        for key, value in trial.params.items():
            # TensorBoard accepts scalars only.
            is_scalar = isinstance(value, (bool, int, float, str))
            values[key] = value if is_scalar else format_value(value)
        values["state"] = trial.state
        figures = {"hparam/dice_mean": trial.score or 0.0, "hparam/steps": trial.step}
        writer.add_hparams(values, figures, run_name=".")
        writer.close()

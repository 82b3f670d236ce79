"""Search hyperparameters with Ray Tune, judged by cross-validation. Run the same line again to continue.

  one machine    python -m launch.tune --config configs/sweep_cpu.yaml data.store=STORE run.dir=runs/sweep
  a Ray cluster  python -m launch.tune --address HOST:6379 --config configs/sweep.yaml ...   (shared file system)
  only the plan  python -m launch.tune --dry-run --config ...

The `sweep:` section of the config says what is searched; the other sections are what all trials share. A trial's score
is the mean over folds of validation Dice; it is pruned only after all its folds have reached a rung. run.dir gets
best.yaml (a --config for train), sweep.json, sweep.html, TensorBoard HParams and every fold's run folder.

  sweep.search     random, grid, optuna (TPE; several sweep.objectives: dice, memory_gib, step_s)
  sweep.scheduler  asha, hyperband, pbt: who goes on from a rung; they decide on means over folds
  sweep.resources  what a fold takes: cpus, gpus (or a share of one), processes, nodes
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from liverseg_dist.config.settings import load_settings_as
from liverseg_dist.cores import usable_cores
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    LiversegError,
    RunFailed,
    UserError,
    os_error_line,
)
from liverseg_dist.files import restrict_umask, write_text
from liverseg_dist.interrupts import AGAIN
from liverseg_dist.streams import guard_output_streams, print_checked
from liverseg_dist.texts.paths import path_argument, quoted
from liverseg_dist.training.run_folder import check_settings_compatible

from . import PACKAGE, name_programs
from .sweep.fold import some_fold_runs
from .sweep.journal import Journal
from .sweep.live_table import show_live_table
from .sweep.ray_cluster import asking_for, own_token, ray_session, token_file
from .sweep.ray_tune import parallel_folds, tune_trials
from .sweep.search import propose_params, require_search_package
from .sweep.sweep_config import SweepSettings, to_yaml
from .sweep.sweep_driver import Sweep
from .sweep.sweep_page import fold_seconds, write_results

MOST_BETWEEN_CHECKS_S = 10.0
FREE_TO_CHANGE = ("trials", "max_failures", "max_concurrent", "start_timeout_s", "resources")
"""Of the sweep's section: what may differ when it is continued."""


def build_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.tune",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 failed, 2 a mistake in the call, 75 stopped on request (run again to continue)",
    )
    made.add_argument(
        "--config",
        action="append",
        type=path_argument,
        default=[],
        metavar="FILE",
        help="YAML; repeatable",
    )
    made.add_argument(
        "--address", metavar="HOST:PORT", help="an existing Ray cluster, or auto (default: our own)"
    )
    made.add_argument(
        "--cpus",
        type=int,
        default=0,
        metavar="N",
        help="CPUs our own Ray shares out (default: all)",
    )
    made.add_argument("--no-dashboard", action="store_true", help="do not start Ray's dashboard")
    made.add_argument(
        "--retry-failed", action="store_true", help="give failed trials another chance"
    )
    made.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    made.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on the last line"
    )
    made.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. sweep.trials=20 train.max_steps=300"
    )
    return made


def load_sweep(args: argparse.Namespace) -> tuple[SweepSettings, Path]:
    """The settings, checked against the store, and the sweep's folder. Raises `UserError`."""
    settings = load_settings_as(SweepSettings, args.config, args.overrides)
    folder = settings.run.dir
    if folder is None:
        raise UserError("run.dir is not set; give the sweep a folder, e.g. run.dir=runs/sweep")
    if settings.data.store is None:
        raise UserError(
            "data.store is not set; make one with tools/to_zarr and pass data.store=STORE"
        )
    store = CaseStore.open(settings.data.store)
    for fold in settings.sweep.folds:
        if not store.ids("validation", fold):
            raise UserError(
                f"{settings.data.store}: fold {fold} of sweep.folds has no validation case"
            )
    require_search_package(settings.sweep.search)
    if "://" not in settings.data.store:
        data = settings.data.model_copy(update={"store": str(Path(settings.data.store).resolve())})
        settings = settings.model_copy(update={"data": data})
    return settings, folder.resolve()


def print_plan(settings: SweepSettings) -> str:
    sweep = settings.sweep
    resources = sweep.resources
    lines = [
        f"{sweep.search} search, at most {sweep.trials} trials x {len(sweep.folds)} folds, {settings.train.max_steps} "
        f"steps; "
        + (
            f"{sweep.scheduler} at steps {list(sweep.rungs)}"
            if sweep.rungs
            else "nothing is pruned"
        ),
        f"a fold: {resources.processes} process(es), {resources.cpus} CPU(s), {resources.gpus:g} GPU(s)"
        + (f" on each of {resources.nodes} nodes" if resources.nodes > 1 else "")
        + f"; {parallel_folds(settings)} fold(s) of a trial at once",
    ]
    for key, dimension in sweep.space.items():
        what = (
            list(dimension.values)
            if dimension.values is not None
            else f"{dimension.low:g} to {dimension.high:g}"
        )
        when = "".join(
            f", when {other} is {' or '.join(map(str, v))}" for other, v in dimension.when.items()
        )
        lines.append(f"  {key}: {dimension.type} {what}{when}")
    if sweep.search != "optuna":
        first = [
            propose_params(sweep, settings.seed, number, ())
            for number in range(min(3, sweep.trials))
        ]
        lines += [f"  first trials: {params}" for params in first if params]
    return "\n".join(lines)


def run_sweep(args: argparse.Namespace) -> dict[str, Any]:
    settings, folder = load_sweep(args)
    print(print_plan(settings), flush=True)
    if args.dry_run:
        return {"run": str(folder), "dry_run": True}
    with Journal(folder) as journal:
        _same_sweep(folder, settings)
        for trial in journal.trials.values():
            if args.retry_failed and trial.state == "failed":
                journal.retry(trial.id)
        if journal.trials:
            settled = len(journal.trials) - len(journal.unsettled)
            print(
                f"continues: {settled} trials are settled, {len(journal.unsettled)} go on",
                flush=True,
            )
        usage = _run(args, settings, folder, journal)
        summary = write_results(folder, settings, list(journal.trials.values()), usage)
    if summary["best"] is None:
        raise RunFailed(f"no trial has finished; their reasons are in {folder / 'sweep.html'}")
    best = summary["best"]
    print(
        f"best: Dice {best['score']:.4f} ± {best['spread']:.4f} with {best['params']}", flush=True
    )
    best = quoted(folder / "best.yaml")
    print(
        f"train it: --config {best}; look: {folder / 'sweep.html'}; tensorboard --logdir {quoted(folder)}"
    )
    return {
        "run": str(folder),
        "best": best,
        "trials": len(summary["trials"]),
        "exit_code": EXIT_DONE,
    }


def _run(
    args: argparse.Namespace, settings: SweepSettings, folder: Path, journal: Journal
) -> dict[str, float]:
    """All that is left to do; what it made of the slots it had."""
    wanted = settings.sweep.trials
    if (
        not journal.unsettled
        and sum(not trial.parent for trial in journal.trials.values()) >= wanted
    ):
        return _last_session(folder)
    cpus = args.cpus or usable_cores()
    try:
        # A cluster may be taken by others, and then there is nothing wrong with waiting.
        stands_still = (
            None
            if args.address
            else detect_standstill(folder, journal, settings.sweep.start_timeout_s)
        )
        last_words = partial(_tell, args)
        with ray_session(
            args.address, cpus, not args.no_dashboard, stands_still, last_words
        ) as dashboard:
            missing = "none" if args.no_dashboard else "none; pip install 'ray[default]' brings it"
            token = f"; the token it asks for: cat {token_file()}" if token_file() else ""
            print(
                f"Ray dashboard: {f'http://{dashboard}{token}' if dashboard else missing}",
                flush=True,
            )
            before, begun = fold_seconds(journal.trials.values()), time.monotonic()
            with show_live_table(settings, journal) as say:
                slots = tune_trials(Sweep(settings, folder, journal, say))
            wall_s = time.monotonic() - begun
    finally:
        _wait_for_folds(folder)
    if journal.unsettled:
        raise RunFailed(
            f"Ray ended before {len(journal.unsettled)} trials were settled; run the same line again"
        )
    busy = (fold_seconds(journal.trials.values()) - before) / (wall_s * slots)
    print(
        f"{wall_s:.0f} s, {slots} fold(s) at once: folds ran for {100 * busy:.0f} % of that",
        flush=True,
    )
    return {"wall_s": round(wall_s, 1), "folds_at_once": slots, "utilisation": round(busy, 4)}


def _last_session(folder: Path) -> dict[str, float]:
    try:
        return dict(json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["last_session"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _wait_for_folds(folder: Path, timeout_s: float = 60.0) -> None:
    """Folds that were told to stop are saving; they hold their locks until they are gone."""
    end = time.monotonic() + timeout_s
    while some_fold_runs(folder) and time.monotonic() < end:
        time.sleep(0.1)


def detect_standstill(folder: Path, journal: Journal, timeout_s: float) -> Callable[[], str]:
    """A check, to be asked every few seconds, that has a reason when no fold has run, and no trial come on, for so
    long: a Ray of our own has nothing else to do. Seen when the clock had gone back by an hour."""
    seen, still_s, asked = journal.lines, 0.0, time.monotonic()

    def check() -> str:
        nonlocal seen, still_s, asked
        since_s, asked = time.monotonic() - asked, time.monotonic()
        still_s += min(since_s, MOST_BETWEEN_CHECKS_S)  # more, and this process was asleep itself
        if journal.lines != seen or some_fold_runs(folder):
            seen, still_s = journal.lines, 0.0
        if still_s <= timeout_s:
            return ""
        return f"Ray has started no fold for {still_s:.0f} s (sweep.start_timeout_s), as when the clock is set back"

    return check


def _same_sweep(folder: Path, settings: SweepSettings) -> None:
    """A sweep goes on only as it was begun. Raises `UserError` naming the difference."""
    file = folder / "sweep_config.yaml"
    if not file.exists():
        write_text(
            file, to_yaml(settings.model_dump(mode="json", exclude_defaults=True, exclude={"run"}))
        )
        return
    before = load_settings_as(SweepSettings, [file])
    allowed = {key: getattr(settings.sweep, key) for key in FREE_TO_CHANGE}
    before = before.model_copy(update={"sweep": before.sweep.model_copy(update=allowed)})
    check_settings_compatible(before, settings, folder)


def _start_over_with_a_token() -> None:
    """Whoever reaches Ray's ports can run anything as us, also from another account of this machine.

    Ray reads its mode once, when it is imported: so this program begins again with it set.
    """
    os.execve(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:]],
        {**os.environ, **asking_for(own_token())},
    )


def _tell(args: argparse.Namespace, error: LiversegError) -> None:
    print(f"launch.tune: {error}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    restrict_umask()
    args = build_parser().parse_intermixed_args(argv)
    try:
        if argv is None and not (args.address or args.dry_run or "RAY_AUTH_MODE" in os.environ):
            _start_over_with_a_token()
        result = run_sweep(args)
    except LiversegError as error:
        _tell(args, error)
        return error.exit_code
    except (
        KeyboardInterrupt
    ):  # before Ray has been started or after it has ended; see `launch.sweep.ray_cluster`
        print(f"launch.tune: {AGAIN}", file=sys.stderr)
        return EXIT_RESUMABLE
    except OSError as error:
        print(f"launch.tune: {os_error_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    if args.json and (failure := print_checked(json.dumps(result))):
        print(f"launch.tune: the result could not be written to stdout: {failure}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(run())

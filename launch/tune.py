"""Search hyperparameters with Ray Tune and cross-validation. Run the same line again to continue.

  one machine    python -m launch.tune --config configs/sweep_cpu.yaml data.store=STORE \\
                     run.dir=runs/sweep
  a Ray cluster  python -m launch.tune --address HOST:6379 --config configs/sweep.yaml ...
                     (run.dir on a shared file system)
  preview only   python -m launch.tune --dry-run --config ...

The `sweep:` section of the config has the search space; the other sections hold for all trials. The
score of a trial is the mean over folds of the validation Dice. A trial is pruned only after all its
folds have reached a rung. run.dir gets best.yaml (a --config for train), sweep.json, sweep.html,
TensorBoard HParams and the run folder of every fold.

  sweep.search     random, grid, optuna (TPE; several sweep.objectives: dice, memory_gib, step_s)
  sweep.scheduler  asha, hyperband, pbt: which trials continue from a rung, by the mean over folds
  sweep.resources  resources of a fold: cpus, gpus (or a share of one), processes, nodes
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
from liverseg_dist.console import write_error, write_lines
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
from liverseg_dist.interrupts import INTERRUPTED_MESSAGE
from liverseg_dist.logging_setup import set_up_logging
from liverseg_dist.streams import guard_output_streams, print_checked
from liverseg_dist.texts.paths import path_argument, quote_path
from liverseg_dist.texts.suggestions import SuggestingParser
from liverseg_dist.training.run_folder import check_settings_compatible

from . import PACKAGE, name_programs
from .sweep.fold import is_any_fold_running
from .sweep.journal import Journal
from .sweep.live_table import show_live_table
from .sweep.preview import describe_sweep
from .sweep.ray_cluster import (
    ensure_user_token,
    find_token_file,
    ray_session,
    token_environment,
)
from .sweep.ray_tune import run_open_trials
from .sweep.search import require_search_package
from .sweep.sweep_config import SweepSettings, to_yaml
from .sweep.sweep_driver import SweepDriver
from .sweep.sweep_page import sum_fold_seconds, write_results

NAME = "launch.tune"
"""Name before errors. It is the same in a checkout and in a wheel, because scripts match it."""
MAX_CHECK_INTERVAL_S = 10.0
"""Time since the last check that counts at most; more means that this process was suspended."""
FOLD_EXIT_TIMEOUT_S = 60.0
CHANGEABLE = ("trials", "max_failures", "max_concurrent", "start_timeout_s", "resources")
"""Settings of the section `sweep` that may differ when a sweep is continued."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `launch.tune`."""
    parser = SuggestingParser(
        prog=f"python -m {PACKAGE}.tune",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 failed, 2 a mistake in the call, "
        "75 stopped on request (run again to continue)",
    )
    parser.add_argument(
        "--config",
        action="append",
        type=path_argument,
        default=[],
        metavar="FILE",
        help="YAML; repeatable",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="an existing Ray cluster, or auto (default: start a local Ray)",
    )
    parser.add_argument(
        "--cpus",
        type=int,
        default=0,
        metavar="N",
        help="CPUs of the local Ray (default: all)",
    )
    parser.add_argument(
        "--no-dashboard", action="store_true", help="do not start the dashboard of Ray"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be searched and stop"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on the last line"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. sweep.trials=20 train.max_steps=300"
    )
    return parser


def load_sweep(args: argparse.Namespace) -> tuple[SweepSettings, Path]:
    """Load the settings and check them against the store.

    Args:
        args: The parsed command line.

    Returns:
        The settings and the folder of the sweep.

    Raises:
        UserError: A setting is missing or invalid, or the store does not have a fold.
    """
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
    # Folds run in other working directories; a URL stays as it is.
    if "://" not in settings.data.store:
        data = settings.data.model_copy(update={"store": str(Path(settings.data.store).resolve())})
        settings = settings.model_copy(update={"data": data})
    return settings, folder.resolve()


def run_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Run or continue a sweep.

    Args:
        args: The parsed command line.

    Returns:
        The result for --json.

    Raises:
        UserError: A mistake in the settings, or another sweep uses the folder.
        RunFailed: No trial has finished, or Ray ended.
    """
    settings, folder = load_sweep(args)
    write_lines(describe_sweep(settings))
    if args.dry_run:
        return {"run": str(folder), "dry_run": True}
    with Journal(folder) as journal:
        _check_same_sweep(folder, settings)
        if args.retry_failed:
            for trial in list(journal.trials.values()):
                if trial.state == "failed":
                    journal.add_retry(trial.id)
        if journal.trials:
            open_count = len(journal.open_trials)
            closed_count = len(journal.trials) - open_count
            write_lines(f"continues: {closed_count} trials have ended, {open_count} continue")
        usage = _run_session(args, settings, folder, journal)
        summary = write_results(folder, settings, list(journal.trials.values()), usage)
    best = summary["best"]
    if best is None:
        raise RunFailed(f"no trial has finished; {folder / 'sweep.html'} has the reasons")
    write_lines(
        f"best: Dice {best['score']:.4f} ± {best['spread']:.4f} with {best['params']}",
        f"train with it: --config {quote_path(folder / 'best.yaml')}; "
        f"report: {folder / 'sweep.html'}; tensorboard --logdir {quote_path(folder)}",
    )
    return {
        "run": str(folder),
        "best": best,
        "trials": len(summary["trials"]),
        "exit_code": EXIT_DONE,
    }


def _run_session(
    args: argparse.Namespace, settings: SweepSettings, folder: Path, journal: Journal
) -> dict[str, float]:
    """Run all trials that are left.

    Returns:
        Wall time in s, folds at the same time, and the share of both that was used.

    Raises:
        RunFailed: Ray ended before all trials.
    """
    proposed = sum(not trial.parent for trial in journal.trials.values())
    if not journal.open_trials and proposed >= settings.sweep.trials:
        # No trial is left; the results are only written again.
        return _read_last_usage(folder)
    # On an existing cluster other users may take the resources, and then waiting is right.
    find_standstill = None
    if not args.address:
        find_standstill = detect_standstill(folder, journal, settings.sweep.start_timeout_s)
    try:
        with ray_session(
            args.address,
            args.cpus or usable_cores(),
            not args.no_dashboard,
            find_standstill,
            partial(_print_error, args),
        ) as dashboard:
            _print_dashboard(args, dashboard)
            seconds_before = sum_fold_seconds(journal.trials.values())
            begun = time.monotonic()
            with show_live_table(settings, journal) as print_line:
                slots = run_open_trials(SweepDriver(settings, folder, journal, print_line))
            # Without the time that Ray needs to start and to stop.
            wall_s = time.monotonic() - begun
    finally:
        _wait_for_folds(folder)
    if journal.open_trials:
        raise RunFailed(
            f"Ray ended before {len(journal.open_trials)} trials had ended; run the same line again"
        )
    fold_s = sum_fold_seconds(journal.trials.values()) - seconds_before
    utilisation = fold_s / (wall_s * slots)
    write_lines(
        f"{wall_s:.0f} s, {slots} fold(s) at the same time: "
        f"folds ran for {100 * utilisation:.0f} % of that"
    )
    return {
        "wall_s": round(wall_s, 1),
        "folds_at_once": slots,
        "utilisation": round(utilisation, 4),
    }


def _print_dashboard(args: argparse.Namespace, dashboard: str) -> None:
    """Print the address of Ray's dashboard, or how to get one."""
    if dashboard:
        token = find_token_file()
        hint = f"; it asks for a token: cat {token}" if token else ""
        text = f"http://{dashboard}{hint}"
    elif args.no_dashboard:
        text = "none"
    else:
        text = "none; install it with pip install 'ray[default]'"
    write_lines(f"Ray dashboard: {text}")


def _read_last_usage(folder: Path) -> dict[str, float]:
    """The usage of the last session from sweep.json; empty without one."""
    try:
        return dict(json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["last_session"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _wait_for_folds(folder: Path) -> None:
    """Wait for folds that save after a request to stop; they hold their locks until they end."""
    end = time.monotonic() + FOLD_EXIT_TIMEOUT_S
    while is_any_fold_running(folder) and time.monotonic() < end:
        time.sleep(0.1)


def detect_standstill(folder: Path, journal: Journal, timeout_s: float) -> Callable[[], str]:
    """A check whether a local Ray makes no progress.

    Seen when the clock of the machine was set back by an hour: Ray then starts no task.

    Args:
        folder: The folder of the sweep.
        journal: Its journal.
        timeout_s: Time without a running fold and without a new line of the journal.

    Returns:
        A function, to be called every few seconds, that returns the reason or an empty text.
    """
    seen_lines, still_s, last_check = journal.lines, 0.0, time.monotonic()

    def find_standstill() -> str:
        nonlocal seen_lines, still_s, last_check
        now = time.monotonic()
        still_s += min(now - last_check, MAX_CHECK_INTERVAL_S)
        last_check = now
        if journal.lines != seen_lines or is_any_fold_running(folder):
            seen_lines, still_s = journal.lines, 0.0
        if still_s <= timeout_s:
            return ""
        return (
            f"Ray has started no fold for {still_s:.0f} s (sweep.start_timeout_s), "
            "as happens when the clock is set back"
        )

    return find_standstill


def _check_same_sweep(folder: Path, settings: SweepSettings) -> None:
    """Save the settings of a new sweep; compare those of a continued one.

    Raises:
        UserError: Names the setting that differs.
    """
    file = folder / "sweep_config.yaml"
    if not file.exists():
        tree = settings.model_dump(mode="json", exclude_defaults=True, exclude={"run"})
        write_text(file, to_yaml(tree))
        return
    saved = load_settings_as(SweepSettings, [file])
    changes = {key: getattr(settings.sweep, key) for key in CHANGEABLE}
    saved = saved.model_copy(update={"sweep": saved.sweep.model_copy(update=changes)})
    check_settings_compatible(saved, settings, folder)


def _restart_with_token() -> None:
    """Start this program again with a Ray that requires a token.

    Any process that reaches Ray's ports, also of another account of this machine, could run code
    as this user. Ray reads the mode once, when it is imported, so it must be set before.
    """
    environment = {**os.environ, **token_environment(ensure_user_token())}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _print_error(args: argparse.Namespace, error: LiversegError) -> None:
    """Print an error, with --json also as the result."""
    write_error(error, NAME)
    if args.json:
        write_lines(json.dumps({"error": str(error), "exit_code": error.exit_code}))


def run(argv: Sequence[str] | None = None) -> int:
    """Run `launch.tune`; returns the exit code."""
    restrict_umask()
    set_up_logging()
    set_up_logging(package=PACKAGE)
    args = build_parser().parse_intermixed_args(argv)
    try:
        # A process that calls this function must not be replaced.
        if argv is None and not (args.address or args.dry_run or "RAY_AUTH_MODE" in os.environ):
            _restart_with_token()
        result = run_sweep(args)
    except LiversegError as error:
        _print_error(args, error)
        return error.exit_code
    except KeyboardInterrupt:
        # Before Ray has started or after it has ended; see `ray_session` for the time between.
        write_error(INTERRUPTED_MESSAGE, NAME)
        return EXIT_RESUMABLE
    except OSError as error:
        write_error(os_error_line(error), NAME)
        return EXIT_FAILED
    if args.json and (failure := print_checked(json.dumps(result))):
        write_error(f"the result could not be written to stdout: {failure}", NAME)
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(run())

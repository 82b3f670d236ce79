"""From nothing to exact Dice: phantom CTs, conversion, training on two processes, evaluation, a report.

  liverseg demo                        synthetic CTs, under 10 minutes on 2 CPU cores
  liverseg demo --data DIR             the same on any folder with dataset.json, planned for 8 minutes
  liverseg demo --data DIR --minutes 60    more time: more steps (liverseg plan --cpu-minutes)
  liverseg demo --out DIR              folder for all results (default: demo); run again to continue
  liverseg demo --config FILE          a configuration instead of the plan (phantoms: configs/demo_cpu.yaml)
  liverseg demo ... KEY=VALUE          settings, e.g. train.max_steps=50

Each step is a process of its own, and its command line is printed. tools/demo does the same after tools/setup.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from liverseg_dist.config import load_settings
from liverseg_dist.console import write_error, write_lines, write_progress
from liverseg_dist.cores import usable_cores
from liverseg_dist.errors import EXIT_DONE, UserError
from liverseg_dist.texts.paths import path_argument, quote_path

# The seed is fixed so that everybody who runs the demo trains on the same phantoms.
CASES, SEED = 20, 7
MINUTES = 8.0
PLAN_FILE = "plan.yaml"
DEFAULT_CONFIG = Path("configs/demo_cpu.yaml")
# SLURM and users send these to the parent process only; Ctrl-C reaches the steps through the
# terminal.
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
"""glibc returns large blocks to the kernel at each free. Keeping them saves a third of a training step on a CPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=path_argument,
        metavar="DIR",
        help="a folder with dataset.json (default: phantoms)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="with --data: time for which the training is planned, on the CPU cores of this "
        f"machine (default: {MINUTES:g})",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("demo"),
        metavar="DIR",
        help="folder for all results (default: demo)",
    )
    parser.add_argument(
        "--config",
        type=path_argument,
        metavar="FILE",
        help=f"config file (default: {DEFAULT_CONFIG}; with --data the plan of liverseg plan)",
    )
    parser.add_argument(
        "--cases",
        type=int,
        default=CASES,
        metavar="N",
        help=f"number of phantoms (default: {CASES})",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, e.g. train.max_steps=50"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the four steps; each continues the work of an earlier call.

    Returns:
        The folders and, when all steps succeeded, the evaluation's summary; `exit_code` of the step that failed.

    Raises:
        UserError: a folder, config file or setting is not usable.
    """
    if args.data is not None and not args.data.is_dir():
        raise UserError(
            f"{args.data}: no such folder; --data is a folder with dataset.json, imagesTr and labelsTr"
        )
    _check_minutes(args)
    # A plan fits the data better than any fixed file; phantoms have a tuned configuration that the
    # README's figures come from.
    args.config = args.config or (DEFAULT_CONFIG if args.data is None else None)
    # Find mistakes in settings before the phantoms are made, which takes a while.
    load_settings([args.config] if args.config else [], args.overrides)
    args.out.mkdir(parents=True, exist_ok=True)
    ranks = count_processes()
    store, training = args.out / "store.zarr", args.out / "run"
    environment = os.environ | KEEP_FREED_MEMORY
    # The processes share the machine's cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    # The processes of the steps do not inherit the verbosity of this one.
    verbosity = [f"--{name}" for name in ("quiet", "verbose") if getattr(args, name, False)]
    total = 3 + (args.data is None) + (args.config is None)
    for number, (title, command) in enumerate(_list_steps(args, ranks), start=1):
        write_progress("", f"== {number}/{total} {title}", shlex.join(command))
        code = run_step([*command, *verbosity], environment)
        if code != EXIT_DONE:
            reason = f"step {number} ({title}) ended with exit code {code}"
            write_error(f"{reason}; run the same line again to continue", "liverseg demo")
            return {"exit_code": code, "error": reason}
    _print_next_steps(training, args.out)
    # Read from the file, not from the last step's output: the step may have been done by an
    # earlier call.
    summary = json.loads((training / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    return {"store": str(store), "run": str(training), "summary": summary}


def _check_minutes(args: argparse.Namespace) -> None:
    if args.minutes is None:
        return
    if args.data is None or args.config is not None:
        raise UserError("--minutes: only with --data and without --config, which fix the steps")
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")


def _list_steps(args: argparse.Namespace, ranks: int) -> Iterator[tuple[str, list[str]]]:
    """Yield title and command line of each step; the last one depends on the plan's file."""
    data = args.data or args.out / "phantom"
    store, training = args.out / "store.zarr", args.out / "run"
    config = args.config or args.out / PLAN_FILE
    settings = ["--config", str(config), *args.overrides]
    # sys.executable and not `python`: the environment of the demo may not be the active one.
    one, in_parallel = [sys.executable, "-m", "liverseg_dist"], torchrun_command(ranks)
    if args.data is None:
        phantoms = ["--cases", str(args.cases), "--seed", str(SEED), "--size", "small"]
        yield f"phantom CTs -> {data}", [*one, "phantom", str(data), *phantoms]
    if args.config is None:
        minutes = f"{args.minutes or MINUTES:g}"
        line = [*one, "plan", str(data), "--out", str(config), "--cpu-minutes", minutes]
        yield f"plan -> {config}", [*line, *args.overrides]
    yield f"convert -> {store}", [*one, "convert", str(data), str(store), *settings]
    # A folder per kind of result, so that each step can find what an earlier call has finished.
    folders = [f"data.store={store}", f"run.dir={training}"]
    yield (
        f"train with {ranks} process(es) -> {training}",
        [*in_parallel, "train", *settings, *folders],
    )
    evaluate = [*in_parallel, "evaluate", str(training), "--store", str(store)]
    # A plan for one case trains on it: there is no other part to evaluate.
    if load_settings([config], args.overrides).data.fold == "all" and args.config is None:
        evaluate += ["--part", "train", "--out", str(training / "evaluation")]
    yield (
        f"evaluate with {ranks} process(es) on the scans' own grids",
        [*evaluate, "--source", str(data)],
    )


def count_processes() -> int:
    """Return 2, or 1 on a machine with a single GPU: two ranks cannot share it."""
    return 1 if torch.cuda.device_count() == 1 else 2


def torchrun_command(ranks: int) -> list[str]:
    """Return `torchrun ... -m liverseg_dist` for this interpreter, which the PATH may not contain."""
    # The port 0 lets the system choose a free one: two demos on one machine do not disturb each
    # other.
    rendezvous = ["--rdzv-backend=liverseg", "--rdzv-endpoint=localhost:0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    return [*launcher, f"--nproc-per-node={ranks}", "-m", "liverseg_dist"]


def run_step(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a step and return its exit code. Signals that ask this process to stop are forwarded to it."""
    with subprocess.Popen(list(command), env=environment) as process:

        def forward_signal(number: int, _frame: FrameType | None) -> None:
            process.send_signal(number)

        before = {number: signal.signal(number, forward_signal) for number in FORWARDED_SIGNALS}
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # the terminal sends Ctrl-C to the step as well, which saves its work
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    # A process that a signal ended has a negative code; shells report 128 + the signal's number.
    return 128 - code if code < 0 else code


def _print_next_steps(training: Path, out: Path) -> None:
    scripts = Path(sys.executable).parent
    run_folder, masks = quote_path(training), quote_path(out / "masks")
    report = training / "evaluation" / "report.html"
    write_lines(
        "",
        f"report:        {report}",
        f"curves:        {quote_path(scripts / 'tensorboard')} --logdir {quote_path(out)}      "
        "then open http://localhost:6006",
        f"a mask of your own CT:  {quote_path(scripts / 'liverseg')} predict {run_folder} "
        f"SCAN.nii.gz --out {masks}",
    )

"""Runs the sections one after the other, each in a process of its own with a time limit.

The processes are forks of one that has imported torch but not touched the GPU, because imports take
seconds. After a first use of CUDA torch refuses forks (some package may have asked for the number
of GPUs); a section is then a new program instead. A section that hangs or crashes loses nothing but
its own remaining lines.
"""

import contextlib
import gc
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .context import FAILED, Context, append_line, first_line, read_lines

PROGRAM = Path(__file__).resolve().parents[1] / "gpu"
DEVICES = {"cpu": "cpu", "cuda": "cuda:0"}
POLL_S = 0.05
TIMED_OUT, DONE = "stopped at its time limit", "done"


@dataclass(frozen=True)
class Section:
    """A part of the benchmark."""

    module: str
    """Module of this package whose `run(context)` measures it."""
    limit_s: float
    """Most seconds on a GPU."""
    summary: str


SECTIONS = {
    "ceilings": Section("ceilings", 25, "hardware: copies, matrix products, convolutions"),
    "steps": Section("steps", 130, "training steps M, S, ResEnc-L, and nnU-Net's; peak memory"),
    "training": Section("training", 60, "`liverseg train` with 1 to 8 loader threads"),
    "nnunet": Section("nnunet_training", 70, "nnU-Net's trainer and loader, same patch and batch"),
    "augmentation": Section("augmentation", 20, "augmentation: time and waits for the device"),
    "inference": Section("scan_inference", 60, "a scan of 400 x 512 x 512, and file to mask"),
    "correctness": Section("correctness", 45, "against float64; hashes of equal and resumed runs"),
    "checkpoint": Section(
        "checkpoint_stall", 20, "wait for a checkpoint; EMA, clipping, optimizer"
    ),
    "dice": Section("time_to_dice", 75, "Dice on held-out phantoms after equally many samples"),
}
"""In the order in which they run."""
SMALL_LIMIT_S = 120.0
"""Limit of each section in the CPU mode, on a busy machine."""


def run_sections(
    names: Sequence[str], device: str, work: Path, out: Path, limit_s: float
) -> list[str]:
    """Run sections and return the names of those that failed.

    Args:
        names: keys of `SECTIONS`.
        device: cpu (tiny sizes) or cuda.
        work: folder for data.
        out: file of results.
        limit_s: most seconds of all sections together.
    """
    end = time.monotonic() + limit_s
    failed = []
    preload()
    for name in names:
        limit = SECTIONS[name].limit_s if device == "cuda" else SMALL_LIMIT_S
        limit = min(limit, end - time.monotonic())
        if limit <= 0:
            append_line(out, {"section": name, "status": "skipped", "reason": "no time is left"})
            continue
        print(f"-- {name}: {SECTIONS[name].summary} (at most {limit:.0f} s)", file=sys.stderr)
        started, lines_before = time.monotonic(), len(read_lines(out))
        status = run_in_process(name, device, work, out, limit)
        line = {"section": name, "status": status}
        append_line(out, line | {"took_s": round(time.monotonic() - started, 1)})
        # Also a section that ran out of time after a case had failed.
        statuses = [row["status"] for row in read_lines(out)[lines_before:-1]]
        if status not in (DONE, TIMED_OUT) or FAILED in statuses:
            failed.append(name)
    return failed


def preload() -> None:
    """Import what every section needs, before the forks."""
    for command in ("phantom", "convert", "train", "predict", "score"):
        importlib.import_module(f"liverseg_dist.commands.{command}")
    for section in SECTIONS.values():
        importlib.import_module(f"{__package__}.{section.module}")
    # The sections collect garbage between cases; the imported modules need not be searched.
    gc.collect()
    gc.freeze()


def run_in_process(name: str, device: str, work: Path, out: Path, limit_s: float) -> str:
    """Run one section in a child process; returns how it ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    end = time.monotonic() + limit_s
    child = os.fork()
    if child == 0:
        run_child(name, device, work, out, end)
    status: int | None = None
    while status is None and time.monotonic() < end:
        pid, ended = os.waitpid(child, os.WNOHANG)
        status = ended if pid else None
        time.sleep(POLL_S)
    if status is None:
        kill_group(child)
        os.waitpid(child, 0)
        return TIMED_OUT
    # What the section may have started.
    kill_group(child)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return DONE
    return FAILED if code > 0 else f"killed by {signal.Signals(-code).name}"


def run_child(name: str, device: str, work: Path, out: Path, end: float) -> None:
    """The child: its own process group, standard output to standard error, never returns."""
    code = 1
    try:
        os.setsid()
        # Peers and commands print; the table is the only output of the program.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        if torch.cuda._is_in_bad_fork():
            words = [str(PROGRAM), "--section", name, "--out", str(out), "--work", str(work)]
            words += ["--limit-s", str(end - time.monotonic())]
            words += ["--cpu"] if device == "cpu" else []
            os.execv(sys.executable, [sys.executable, *words])
        code = run_section(name, device, work, out, end)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the parent's exit handlers.
        os._exit(code)


def run_section(name: str, device: str, work: Path, out: Path, end: float) -> int:
    """Run a section in this process; returns 0, or 1 if a case failed."""
    try:
        context = Context(name, torch.device(DEVICES[device]), work, out, end)
        importlib.import_module(f"{__package__}.{SECTIONS[name].module}").run(context)
        return min(context.failures, 1)
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        reason = f"{type(error).__name__}: {first_line(error)}"
        append_line(out, {"section": name, "case": "section", "status": FAILED, "reason": reason})
        return 1


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def make_work_folder(given: Path | None) -> tuple[Path, tempfile.TemporaryDirectory | None]:
    """Return the folder for data, and the temporary folder to remove, if it is one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        return given.resolve(), None
    temporary = tempfile.TemporaryDirectory(prefix="liverseg-gpu-bench-")
    return Path(temporary.name), temporary

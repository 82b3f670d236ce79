"""What chaos is done to: a conversion, a training and an evaluation, small enough to be run some hundred times.

A stage is a command that continues where it was interrupted, and a digest of what it must leave behind. Everything a
stage writes lies in one folder on a small file system of its own, and its processes talk over a loopback of their own,
so that a full disk or a dead network hit nothing else.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launch import clean_environment

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16
STORE_SETTINGS = ("convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.folds=2", "convert.workers=2")
RUN_SETTINGS = (
    "data.patch_size=[16,32,32]", "data.workers=1", "data.augmentation=light", "model.features=[4,8]",
    "train.global_batch_size=4", "train.optimizer=adamw", "train.learning_rate=1e-3", "train.ema_decay=0.9",
    "train.threads=1", "train.log_every_steps=1", f"train.max_steps={STEPS}", "checkpoint.every_steps=2",
    "validation.every_steps=8", "validation.max_cases=1",
)  # fmt: skip
PEER_TIMEOUT_S = 10
"""After this long without a word a rank takes its peer for lost."""


@dataclass(frozen=True)
class Ended:
    exit_code: int
    seconds: float
    err: str

    @property
    def last_words(self) -> str:
        """The last line that is a message rather than part of a launcher's report."""
        lines = [line.strip() for line in self.err.splitlines()]
        told = [line for line in lines if line.startswith(("liverseg:", "warning:", "error:"))]
        rest = [
            line for line in lines if line and not line.startswith(("=", "-", "[")) and "ResourceWarning" not in line
        ]
        return (told or rest or [""])[-1]


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    output: Path
    """What the command writes; below `disk`."""
    needs: Path
    """The store or run it reads."""
    disk: Path
    digest: Callable[[Path], str]

    def fresh(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)

    def result(self) -> str:
        return self.digest(self.output)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """In a network namespace of its own, and a session of its own."""
        quiet_loopback = "ip link set lo up && exec "
        inner = quiet_loopback + " ".join(f"'{word}'" for word in self.command)
        return subprocess.Popen(
            ["unshare", "--net", "sh", "-c", inner],
            env=clean_environment(GLOO_SOCKET_IFNAME="lo", **environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
        )

    def run(self, timeout_s: float = 240) -> Ended:
        began = time.monotonic()
        return wait(self.start(), timeout_s, began)


class Hang(AssertionError):
    """A stage did not end in the time it was given."""


def wait(process: subprocess.Popen[str], timeout_s: float, began: float | None = None) -> Ended:
    """Until all of it has ended. Raises `Hang`, with nothing left running."""
    began = time.monotonic() if began is None else began
    tree = descendants(process.pid)
    try:
        _, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *descendants(process.pid), *tree]:
            send(pid, signal.SIGKILL)
        _, err = process.communicate()
        raise Hang(f"no end after {timeout_s:.0f} s: {err[-1500:]}") from None
    return Ended(process.returncode, time.monotonic() - began, err)


def descendants(pid: int) -> list[int]:
    """Processes that work for it, its children's children too, oldest first."""
    found, new = [], [pid]
    while new:
        listed = [Path(f"/proc/{one}/task/{one}/children") for one in new]
        new = []
        for path in listed:
            try:
                new += [int(child) for child in path.read_text().split()]
            except OSError:
                continue
        found += new
    return found


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def stages(folder: Path, source: Path) -> list[Stage]:
    """Convert, train, evaluate; each reads what an undisturbed earlier one left in `folder`/ready."""
    disk, ready = folder / "disk", folder / "ready"
    store, run = ready / "store.zarr", ready / "run"
    single = (sys.executable, "-m", "liverseg_dist")
    two = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "liverseg_dist")
    patience = ("--device", "cpu", "--timeout", str(PEER_TIMEOUT_S))

    def of_store(output: Path) -> str:
        return (output / "SHA256SUMS").read_text()

    def of_run(output: Path) -> str:
        return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()

    def of_evaluation(output: Path) -> str:
        summary = json.loads((output / "summary.json").read_text())
        return json.dumps({key: summary[key] for key in ("n_cases", "liver", "tumour")}, sort_keys=True)

    convert = (*single, "convert", str(source), str(disk / "store.zarr"), *STORE_SETTINGS)
    train = (*two, "train", *patience, f"data.store={store}", f"run.dir={disk / 'run'}", *RUN_SETTINGS)
    evaluate = (*two, "evaluate", str(run), *patience, "--store", str(store), "--out", str(disk / "evaluation"))
    return [
        Stage("convert", convert, disk / "store.zarr", source, disk, of_store),
        Stage("train", train, disk / "run", store, disk, of_run),
        Stage("evaluate", (*evaluate, "--part", "validation"), disk / "evaluation", store, disk, of_evaluation),
    ]


def undisturbed(all_stages: Sequence[Stage], ready: Path) -> dict[str, tuple[str, float]]:
    """Digest and seconds of each stage when nothing happens; what later stages read is moved to `ready`."""
    expected = {}
    ready.mkdir(parents=True, exist_ok=True)
    for stage in all_stages:
        stage.fresh()
        ended = stage.run()
        assert ended.exit_code == 0, f"{stage.name} fails without any fault: {ended.err[-2000:]}"
        expected[stage.name] = (stage.result(), ended.seconds)
        shutil.copytree(stage.output, ready / stage.output.name, dirs_exist_ok=True)
        stage.fresh()
    return expected

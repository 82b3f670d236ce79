"""Kinds of faults. Each is done to a running stage and, where it outlasts the process, undone before the next start."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.stages import PEER_TIMEOUT_S, Stage, descendants, send

Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Fault:
    """`strike(process, stage, random)` happens once the stage has run for a while; it says what it did."""

    kind: str
    stages: tuple[str, ...]
    strike: Callable[[Process, Stage, random.Random], str]
    heal: Callable[[Stage], None] = lambda stage: None
    """Before the command is run again."""
    says: str = ""
    """What the failing command must tell, if it fails by itself."""


ALL = ("convert", "train", "evaluate")
RANKS = ("train", "evaluate")


def workers(process: Process) -> list[int]:
    """Python processes below the first one: ranks, or converting workers."""
    below = descendants(process.pid)
    return [pid for pid in below[1:] or below if _is_python(pid)] or below or [process.pid]


def _is_python(pid: int) -> bool:
    try:
        return "python" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def to_launcher(number: signal.Signals) -> Callable[[Process, Stage, random.Random], str]:
    def strike(process: Process, _stage: Stage, _random: random.Random) -> str:
        send(process.pid, number)
        return f"{number.name} to the launcher"

    return strike


def to_one(number: signal.Signals) -> Callable[[Process, Stage, random.Random], str]:
    def strike(process: Process, _stage: Stage, chance: random.Random) -> str:
        send(chance.choice(workers(process)), number)
        return f"{number.name} to one rank or worker"

    return strike


def to_all(number: signal.Signals) -> Callable[[Process, Stage, random.Random], str]:
    def strike(process: Process, _stage: Stage, _random: random.Random) -> str:
        for pid in [process.pid, *descendants(process.pid)]:
            send(pid, number)
        return f"{number.name} to all processes"

    return strike


def to_ranks(number: signal.Signals) -> Callable[[Process, Stage, random.Random], str]:
    """Not to torchrun itself, which dies of signals it does not know."""

    def strike(process: Process, _stage: Stage, _random: random.Random) -> str:
        for pid in workers(process):
            send(pid, number)
        return f"{number.name} to all ranks"

    return strike


def pause(seconds: float) -> Callable[[Process, Stage, random.Random], str]:
    def strike(process: Process, _stage: Stage, chance: random.Random) -> str:
        pid = chance.choice(workers(process))
        send(pid, signal.SIGSTOP)
        time.sleep(seconds)
        send(pid, signal.SIGCONT)
        return f"one rank or worker asleep for {seconds:g} s"

    return strike


def fill(process: Process, stage: Stage, _random: random.Random) -> str:
    filler = stage.disk / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"\0" * (1 << 20))
                file.flush()
        except OSError:
            pass
    return "disk full"


def free(stage: Stage) -> None:
    (stage.disk / "filler").unlink(missing_ok=True)


def read_only(_process: Process, stage: Stage, _random: random.Random) -> str:
    # Refused while a file is just open for writing: once more, until the gap between two files is met.
    command = ["mount", "-o", "remount,ro,bind", str(stage.disk)]
    for _ in range(1000):
        if subprocess.run(command, capture_output=True).returncode == 0:
            return "disk read-only"
    return "disk never idle enough to be made read-only"


def writable(stage: Stage) -> None:
    subprocess.run(["mount", "-o", "remount,rw,bind", str(stage.disk)], check=True, capture_output=True)


def cut(process: Process, _stage: Stage, _random: random.Random) -> str:
    """For good. The ranks must end by themselves; torchrun's own agent then waits for its store for ever."""
    command = ["nsenter", "--net", "--target", str(process.pid), "ip", "link", "set", "lo", "down"]
    subprocess.run(command, check=True, capture_output=True)
    end = time.monotonic() + 3 * PEER_TIMEOUT_S + 30
    while ranks := [pid for pid in descendants(process.pid) if _is_python(pid)]:
        if time.monotonic() > end:
            return f"network cut, {len(ranks)} ranks still wait"  # the caller's patience will find the hang
        time.sleep(0.05)
    send(process.pid, signal.SIGKILL)
    return "network cut"


def kill_then(damage: Callable[[Stage, random.Random], str]) -> Callable[[Process, Stage, random.Random], str]:
    kill = to_all(signal.SIGKILL)

    def strike(process: Process, stage: Stage, chance: random.Random) -> str:
        kill(process, stage, chance)
        process.wait()
        return damage(stage, chance)

    return strike


def newest_checkpoint(stage: Stage) -> list[Path]:
    folders = sorted(stage.output.glob("checkpoints/step_*"), key=lambda path: int(path.name[5:]))
    return sorted(path for path in folders[-1].iterdir() if path.is_file()) if folders else []


def truncate_checkpoint(stage: Stage, chance: random.Random) -> str:
    if not (files := newest_checkpoint(stage)):
        return "killed before the first checkpoint"
    file = chance.choice(files)
    os.truncate(file, chance.randrange(file.stat().st_size))
    return f"newest checkpoint: {file.name} cut short"


def flip_checkpoint(stage: Stage, chance: random.Random) -> str:
    if not (files := newest_checkpoint(stage)):
        return "killed before the first checkpoint"
    file = chance.choice(files)
    flip(file, chance.randrange(file.stat().st_size))
    return f"newest checkpoint: a bit of {file.name} flipped"


def remove_from_checkpoint(stage: Stage, chance: random.Random) -> str:
    if not (files := newest_checkpoint(stage)):
        return "killed before the first checkpoint"
    file = chance.choice(files)
    file.unlink()
    return f"newest checkpoint: {file.name} gone"


def tear_ledger(stage: Stage, chance: random.Random) -> str:
    files = sorted(stage.output.glob("ledger/*.json"))
    if not files:
        return "killed before the first case"
    file = chance.choice(files)
    os.truncate(file, chance.randrange(file.stat().st_size))
    return "a ledger entry cut short"


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


FAULTS = (
    Fault("kill -9 of the launcher", ALL, to_launcher(signal.SIGKILL)),
    Fault("kill -9 of one rank or worker", ALL, to_one(signal.SIGKILL)),
    Fault("kill -9 of all", ALL, to_all(signal.SIGKILL)),
    Fault("SIGTERM to the launcher", ALL, to_launcher(signal.SIGTERM)),
    Fault("SIGTERM to one rank or worker", ALL, to_one(signal.SIGTERM)),
    Fault("SIGTERM to all", ALL, to_all(signal.SIGTERM)),
    Fault("SIGUSR2 to all ranks", ("train",), to_ranks(signal.SIGUSR2)),
    Fault("Ctrl-C", ALL, to_all(signal.SIGINT)),
    Fault("one asleep, then awake", ALL, pause(3)),
    Fault("one asleep longer than its peers wait", RANKS, pause(1.5 * PEER_TIMEOUT_S)),
    Fault("disk full", ALL, fill, free),
    Fault("disk read-only", ALL, read_only, writable),
    Fault("network cut in mid-step", RANKS, cut),
    Fault("newest checkpoint cut short", ("train",), kill_then(truncate_checkpoint)),
    Fault("bit flipped in the newest checkpoint", ("train",), kill_then(flip_checkpoint)),
    Fault("file gone from the newest checkpoint", ("train",), kill_then(remove_from_checkpoint)),
    Fault("ledger entry cut short", ("evaluate",), kill_then(tear_ledger)),
)


@contextmanager
def small_disk(folder: Path, mib: int = 96) -> Iterator[Path]:
    """A file system of its own, so that it can be filled and made read-only. Needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)

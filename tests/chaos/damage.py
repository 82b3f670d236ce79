"""What is done to the disk and to the files on it, and how it is undone."""

import os
import random
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.processes import Process
from tests.chaos.stages import Stage
from tests.chaos.strikes import Strike, to_all

TOO_EARLY = "killed before there was such a file"


@contextmanager
def small_disk(folder: Path, mib: int = 96) -> Iterator[Path]:
    """A file system of its own, so that it can be filled and made read-only. Needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(_process: Process, stage: Stage, _chance: random.Random) -> str:
    descriptor = os.open(stage.disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, b"\0" * (1 << 16))
    except OSError:
        return "disk full"
    finally:
        os.close(descriptor)


def free(stage: Stage) -> None:
    (stage.disk / "filler").unlink(missing_ok=True)


def read_only(_process: Process, stage: Stage, _chance: random.Random) -> str:
    # Refused while a file is just open for writing: once more, until the gap between two files is met.
    command = ["mount", "-o", "remount,ro,bind", str(stage.disk)]
    for _ in range(1000):
        if subprocess.run(command, capture_output=True).returncode == 0:
            return "disk read-only"
    return "disk never idle enough to be made read-only"


def writable(stage: Stage) -> None:
    subprocess.run(
        ["mount", "-o", "remount,rw,bind", str(stage.disk)], check=True, capture_output=True
    )


def forbid(_process: Process, stage: Stage, _chance: random.Random) -> str:
    """The folders, so that no file can be made, replaced or removed in them."""
    _permit_writing(stage, False)
    return "write permission taken from all folders"


def permit(stage: Stage) -> None:
    _permit_writing(stage, True)


def _permit_writing(stage: Stage, may: bool) -> None:
    for folder in [stage.disk, *(path for path in stage.disk.rglob("*") if path.is_dir())]:
        mode = stat.S_IMODE(folder.stat().st_mode)
        folder.chmod(mode | 0o200 if may else mode & ~0o222)


def newest_checkpoint(stage: Stage) -> list[Path]:
    folders = sorted(stage.output.glob("checkpoints/step_*"), key=lambda path: int(path.name[5:]))
    return sorted(path for path in folders[-1].iterdir() if path.is_file()) if folders else []


def to_file(
    choose: Callable[[Stage], list[Path]], harm: Callable[[Path, random.Random], str]
) -> Strike:
    """After all is killed: a crash that takes some of what was written with it."""

    def strike(process: Process, stage: Stage, chance: random.Random) -> str:
        _kill(process, stage, chance)
        if not (files := choose(stage)):
            return TOO_EARLY
        return harm(chance.choice(files), chance)

    return strike


def _kill(process: Process, stage: Stage, chance: random.Random) -> None:
    to_all(signal.SIGKILL)(process, stage, chance)
    process.wait()


def ledger(stage: Stage) -> list[Path]:
    return sorted(stage.output.glob("ledger/*.json"))


def converted(stage: Stage) -> list[Path]:
    return _files(stage.output)


def cut_short(file: Path, chance: random.Random) -> str:
    os.truncate(file, chance.randrange(max(1, file.stat().st_size)))
    return f"{file.name} cut short"


def gone(file: Path, _chance: random.Random) -> str:
    file.unlink()
    return f"{file.name} gone"


def flipped(file: Path, chance: random.Random) -> str:
    with file.open("r+b") as stream:
        stream.seek(chance.randrange(max(1, file.stat().st_size)))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ (1 << chance.randrange(8))]))
    return f"a bit of {file.name} flipped"


def flip_what_is_read(process: Process, stage: Stage, chance: random.Random) -> str:
    """After all is killed: a bit in each image of the store that the stage reads; what was there is kept."""
    _kill(process, stage, chance)
    for shard in (files := [path for path in _files(stage.needs) if "image" in path.parts]):
        kept = _kept(stage) / shard.relative_to(stage.needs)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(shard, kept)
        flipped(shard, chance)
    return f"a bit flipped in each of {len(files)} shards of the store that is read"


def restore(stage: Stage) -> None:
    if _kept(stage).is_dir():
        shutil.copytree(_kept(stage), stage.needs, dirs_exist_ok=True)
        shutil.rmtree(_kept(stage))


def _kept(stage: Stage) -> Path:
    return stage.disk.parent / "kept"


def _files(store: Path) -> list[Path]:
    """Shards of a store's arrays."""
    return sorted(path for path in store.glob("cases/**/c/**/*") if path.is_file())

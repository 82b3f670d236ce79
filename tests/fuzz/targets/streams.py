"""Standard streams that are closed, full, or lose their reader at any moment: the work and its exit code are the same.

Every command runs as a real process with real pipes, /dev/full or a real terminal. It must end with the exit code of
the undisturbed command, leave complete results, and write neither a traceback nor a crash report.
"""

import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from liverseg_dist.errors import EXIT_RESUMABLE, EXIT_USER, UserError
from tests.distributed.launch import clean_environment, torchrun_command
from tests.fuzz.judge import Wrong

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 110
SMALL = (
    "data.patch_size=[16,32,32]", "data.workers=1", "data.augmentation=light", "model.features=[4,8]",
    "train.global_batch_size=2", "train.threads=1", "train.log_every_steps=1", "checkpoint.every_steps=2",
    "validation.every_steps=0", "train.max_steps=6",
)  # fmt: skip
HOW = ("closed", "full", "no reader", "reader leaves", "ascii", "terminal", "terminal, nohup")
WHICH = ("stdout", "stderr", "both")


@dataclass(frozen=True)
class Inputs:
    """What the commands work on; made once, read only."""

    source: Path
    store: Path
    run: Path
    masks: Path

    @classmethod
    def below(cls, folder: Path) -> "Inputs":
        return cls(folder / "source", folder / "store.zarr", folder / "run", folder / "masks")


@dataclass(frozen=True)
class Command:
    """One command line, and what it must have written when it is done."""

    words: Callable[[Inputs, Path], Sequence[object]]
    """Of the inputs and an output folder that does not exist yet."""
    results: Sequence[str] = ()
    """Files below the output folder."""
    exit_code: int = 0
    copied_run: bool = False
    """Whether it writes into the run: the output folder then begins as a copy of it."""


def liverseg(*words: object) -> list[str]:
    return [sys.executable, "-m", "liverseg_dist", *map(str, words)]


def launch(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, words)]


def _train(inputs: Inputs, out: Path) -> list[object]:
    return ["train", "--device", "cpu", f"data.store={inputs.store}", f"run.dir={out}", *SMALL]


CPU = ("--device", "cpu", "--threads", "1")
COMMANDS = {
    "help": Command(lambda i, o: liverseg("--help")),
    "unknown option": Command(lambda i, o: liverseg("verify", "--no-such-option"), exit_code=EXIT_USER),
    "settings": Command(lambda i, o: liverseg("settings")),
    "doctor": Command(lambda i, o: liverseg("doctor")),
    "phantom": Command(
        lambda i, o: liverseg("phantom", o, "--cases", 2, "--workers", 2), ["dataset.json", "imagesTr/liver_0.nii.gz"]
    ),
    "convert": Command(
        lambda i, o: liverseg("convert", i.source, o, "convert.cleaning.spacing_mm=[6,6,6]", "convert.workers=2"),
        ["zarr.json", "audit.html"],
    ),
    "convert, no source": Command(lambda i, o: liverseg("convert", o / "absent", o), exit_code=EXIT_USER),
    "verify": Command(lambda i, o: liverseg("verify", i.store, "--json")),
    "preview": Command(
        lambda i, o: liverseg("preview", i.store, "--out", o / "p.png", "--samples", 1, *SMALL), ["p.png"]
    ),
    "plan": Command(lambda i, o: liverseg("plan", i.store, "--gpu-memory", 24, *SMALL)),
    "train": Command(
        lambda i, o: liverseg(*_train(i, o)), ["model.safetensors", "metrics.jsonl", "checkpoints/step_6/state.json"]
    ),
    "train, two ranks": Command(
        lambda i, o: torchrun_command(2, "-m", "liverseg_dist", *map(str, _train(i, o))),
        ["model.safetensors", "metrics.jsonl", "checkpoints/step_6/state.json"],
    ),
    "evaluate": Command(
        lambda i, o: liverseg("evaluate", o, *CPU, "--store", i.store, "--cases", "liver_0"),
        ["evaluation/cases/report.html"],
        copied_run=True,
    ),
    # The run has too few validation cases to choose from.
    "postprocess": Command(
        lambda i, o: liverseg("postprocess", o, *CPU, "--dry-run"), exit_code=EXIT_USER, copied_run=True
    ),
    "predict": Command(
        lambda i, o: liverseg("predict", i.run, i.source / "imagesTr" / "liver_0.nii.gz", "--out", o, *CPU),
        ["liver_0.nii.gz"],
    ),
    "score": Command(
        lambda i, o: liverseg("score", i.masks, i.source / "labelsTr", "--out", o, "--workers", 2), ["report.html"]
    ),
    "report": Command(lambda i, o: liverseg("report", o), ["evaluation/report.html"], copied_run=True),
    "compare": Command(lambda i, o: liverseg("compare", i.run, i.run, "--out", o), []),
    "denoiser": Command(
        lambda i, o: liverseg("denoiser", i.source, "--out", o, "--steps", 2, "--scans", 1),
        [""],
    ),
    "launch help": Command(lambda i, o: launch("launch", "--help")),
    "launch train": Command(lambda i, o: launch("launch", "train", "--dry-run", *_train(i, o)[3:])),
    "launch status": Command(lambda i, o: launch("launch", "status", i.source), exit_code=EXIT_USER),
    "launch.tune": Command(
        lambda i, o: launch(
            "launch.tune", "--dry-run", "--config", ROOT / "configs/sweep_cpu.yaml", f"data.store={i.store}",
            f"run.dir={o}", "sweep.folds=[0]",
        ),
    ),
}  # fmt: skip


def prepare(folder: Path) -> Inputs:
    """Phantoms, their store, a short run with its evaluation, and masks to score."""
    inputs = Inputs.below(folder)
    steps = [
        ["phantom", inputs.source, "--cases", "4", "--test-cases", "0", "--seed", "3"],
        [
            "convert",
            inputs.source,
            inputs.store,
            "convert.cleaning.spacing_mm=[6,6,6]",
            "convert.splits.folds=2",
        ],
        _train(inputs, inputs.run),
        ["evaluate", inputs.run, *CPU, "--source", inputs.source],
    ]
    for words in steps:
        done = subprocess.run(
            liverseg(*words), capture_output=True, text=True, cwd=ROOT, env=clean_environment()
        )
        assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(inputs.source / "labelsTr", inputs.masks)
    return inputs


class StreamsTarget:
    """One command with one disturbance of its streams, chosen by chance."""

    name = "streams"

    def __init__(self, folder: Path) -> None:
        self.inputs = prepare(folder)

    def make(self, case: Path, chance: Random) -> None:
        chosen = {
            "command": chance.choice(sorted(COMMANDS)),
            "how": chance.choice(HOW),
            "which": chance.choice(WHICH),
            "bytes": chance.choice((0, 1, chance.randrange(200), chance.randrange(5000))),
        }
        (case / "case.json").write_text(json.dumps(chosen))

    def check(self, case: Path) -> None:
        chosen = json.loads((case / "case.json").read_text())
        try:
            check_disturbed(
                self.inputs,
                case / "out",
                chosen["command"],
                chosen["how"],
                chosen["which"],
                chosen["bytes"],
            )
        except AssertionError as error:
            raise Wrong(f"{chosen}: {error}") from None
        if COMMANDS[chosen["command"]].exit_code == EXIT_USER:
            raise UserError(f"{chosen['command']}: refused, as it should be")


def check_disturbed(
    inputs: Inputs, out: Path, name: str, how: str, which: str, after_bytes: int = 0
) -> None:
    """Run the command with its streams disturbed. Raises `AssertionError` where that changes its outcome."""
    command = COMMANDS[name]
    if command.copied_run:
        shutil.copytree(inputs.run, out)
    words = [str(word) for word in command.words(inputs, out)]
    code, said = run_disturbed(words, how, which, after_bytes)
    # The hang-up is a request to stop; it ends programs that have nothing to save, and any in its first moments.
    stopped = how == "terminal" and code in (EXIT_RESUMABLE, -signal.SIGHUP)
    full_json = how == "full" and which != "stderr" and "--json" in words and not command.exit_code
    expected = 1 if full_json else command.exit_code
    assert stopped or code == expected, f"exit code {code}, not {expected}: {said[-1500:]}"
    for unwanted in ("Traceback", "Exception ignored", "BrokenPipeError", "UnicodeEncodeError"):
        assert unwanted not in said, said[-3000:]
    assert not list(out.glob("errors/*")), "a crash report"
    if not stopped:
        missing = [result for result in command.results if not (out / result).is_file()]
        assert not missing, f"not written: {missing}; {said[-1500:]}"


def run_disturbed(words: Sequence[str], how: str, which: str, after_bytes: int) -> tuple[int, str]:
    """Exit code of the process, and what could still be read of its output."""
    if how.startswith("terminal"):
        return _on_terminal(words, after_bytes, ignore_hang_up="nohup" in how)
    streams = ("stdout", "stderr") if which == "both" else (which,)
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    for stream in ("stdout", "stderr"):
        if how == "full" and stream in streams:
            theirs[stream] = os.open("/dev/full", os.O_WRONLY)
        else:
            ours[stream], theirs[stream] = os.pipe()
        if how == "no reader" and stream in streams:
            os.close(ours.pop(stream))
    environment = clean_environment(**({"PYTHONIOENCODING": "ascii"} if how == "ascii" else {}))
    closed = [1 if stream == "stdout" else 2 for stream in streams] if how == "closed" else []

    def begin() -> None:
        _lift_limit()
        for descriptor in closed:
            os.close(descriptor)

    process = subprocess.Popen(
        words,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=begin,
        stdin=subprocess.DEVNULL,
        **theirs,
    )
    for descriptor in theirs.values():
        os.close(descriptor)
    leaves = (
        {ours[stream] for stream in streams if stream in ours} if how == "reader leaves" else set()
    )
    return _read(process, list(ours.values()), leaves, after_bytes)


def _on_terminal(words: Sequence[str], after_bytes: int, ignore_hang_up: bool) -> tuple[int, str]:
    """With a terminal of its own, which is closed after so many bytes."""
    ours, theirs = pty.openpty()

    def begin() -> None:
        _lift_limit()
        os.login_tty(0)  # the process leads the terminal's session, so it gets SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore_hang_up else signal.SIG_DFL)

    process = subprocess.Popen(
        words,
        env=clean_environment(),
        cwd=ROOT,
        preexec_fn=begin,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    return _read(process, [ours], {ours}, after_bytes)


def _lift_limit() -> None:
    """The fuzzer's own limit of memory is not for the command."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)


def _read(
    process: subprocess.Popen[bytes], pipes: list[int], leaves: set[int], after_bytes: int
) -> tuple[int, str]:
    said, counts, end = b"", dict.fromkeys(pipes, 0), time.monotonic() + TIMEOUT_S
    try:
        while pipes and time.monotonic() < end:
            for pipe in select.select(pipes, [], [], 0.2)[0]:
                most = min(65536, max(1, after_bytes - counts[pipe])) if pipe in leaves else 65536
                try:
                    part = os.read(pipe, most)
                except OSError:  # the other end of a terminal is closed
                    part = b""
                said, counts[pipe] = said + part, counts[pipe] + len(part)
                if not part or (pipe in leaves and counts[pipe] >= after_bytes):
                    pipes.remove(pipe)
                    os.close(pipe)
        return process.wait(max(1.0, end - time.monotonic())), said.decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {TIMEOUT_S} s: {said[-1000:]!r}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in pipes:
            os.close(pipe)

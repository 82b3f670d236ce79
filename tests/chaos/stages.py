"""What chaos is done to: convert, train (on one node and on two), evaluate, tune, small enough for some hundred runs.

A stage is a command that continues where it was interrupted, a digest of what it must leave behind, and a count of the
work it has done so far. Everything a stage writes lies in one folder on a small file system of its own, and its
processes talk over a network of their own, so that a full disk or a dead network hit nothing else. They run as root
without root's right to pass over permissions.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from tests.chaos.processes import Hang, Process, wait
from tests.chaos.warm import Forked, network_of_its_own
from tests.distributed.launch import clean_environment, torchrun_command

ROOT = Path(__file__).resolve().parents[2]
STEPS, CHECKPOINT_EVERY = 40, 5
STORE_SETTINGS = (
    "convert.cleaning.spacing_mm=[6,6,6]",
    "convert.splits.folds=2",
    "convert.workers=2",
)
RUN_SETTINGS = (
    "data.patch_size=[16,32,32]", "data.workers=1", "data.augmentation=light", "model.features=[4,8]",
    "train.global_batch_size=2", "train.optimizer=adamw", "train.learning_rate=1e-3", "train.ema_decay=0.9",
    "train.threads=1", "train.log_every_steps=1", f"train.max_steps={STEPS}",
    f"checkpoint.every_steps={CHECKPOINT_EVERY}", "validation.every_steps=20", "validation.max_cases=1",
    "inference.overlap=0.25",
)  # fmt: skip
SWEEP = {
    "sweep": {
        "search": "random",
        "trials": 2,
        "folds": [0, 1],
        "rungs": [4],
        "reduction_factor": 2,
        "space": {"train.learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2}},
        "resources": {"cpus": 1, "parallel_folds": 2},
        "max_concurrent": 1,
        "max_failures": 2,
        "start_timeout_s": 60,
    },
    "data": {"patch_size": [16, 32, 32], "workers": 0},
    "model": {"features": [4, 8]},
    "train": {"max_steps": 12, "optimizer": "adamw", "log_every_steps": 1, "threads": 1},
    "checkpoint": {"keep_best": False, "every_steps": 2},
    "validation": {"max_cases": 1, "pictures": 0},
    "inference": {"overlap": 0.25},
}
PEER_TIMEOUT_S = 20
"""After this long without a word a rank takes its peer for lost."""
USUAL_S = 300.0
"""Without any progress, on a machine that does much else, while nothing is done to a stage."""
OURS = ("liverseg:", "launch.tune:", "warning:", "error:")


@dataclass(frozen=True)
class Ended:
    exit_code: int
    seconds: float
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line that is a message of ours, else the last that is no part of a launcher's report."""
        lines = [line.strip() for line in self.err.splitlines()]
        told = [line for line in lines if line.startswith(OURS)]
        rest = [
            line
            for line in lines
            if line and not line.startswith(("=", "-", "[")) and "Warning" not in line
        ]
        return (told or rest or [""])[-1]


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    output: Path
    """What the command writes; below `disk`."""
    needs: Path
    """The store or data set it reads."""
    disk: Path
    digest: Callable[[Path], str]
    progress: Callable[[Path], int]
    """Steps, scans or cases that `output` holds."""
    environment: Mapping[str, str]

    @property
    def can_be_warm(self) -> bool:
        return self.name in ("convert", "train", "evaluate")

    def fresh(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)

    def result(self) -> str:
        return self.digest(self.output)

    def done(self) -> int:
        return self.progress(self.output)

    def start(self, warm: bool = False, **environment: str) -> Process:
        """In a network namespace of its own, and a session of its own. `warm`: see `tests.chaos.warm`."""
        everything = clean_environment(GLOO_SOCKET_IFNAME="lo", **self.environment, **environment)
        inner = "ip link set lo up && exec " + " ".join(f"'{word}'" for word in self.command)
        limited = "setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search"
        with self.log("out").open("wb") as out, self.log("err").open("wb") as err:
            if warm:
                return Forked(self.command, everything, out, err, prepare=network_of_its_own)
            return subprocess.Popen(
                ["unshare", "--net", *limited.split(), "sh", "-c", inner],
                env=everything,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                cwd=ROOT,
                preexec_fn=lambda: signal.signal(
                    signal.SIGINT, signal.SIG_DFL
                ),  # a background shell has it ignored
            )

    def wait(
        self, process: Process, timeout_s: float, others: frozenset[int] = frozenset()
    ) -> Ended:
        """`others`: processes of ours that are not the stage's. Raises `Hang`: no end, no progress for so long."""
        began = time.monotonic()
        wait(process, timeout_s, others, self.done)
        out, err = (self.log(name).read_text(errors="replace") for name in ("out", "err"))
        assert process.returncode is not None
        return Ended(process.returncode, time.monotonic() - began, out, err)

    def log(self, name: str) -> Path:
        return self.disk.parent / f"{self.name}.{name}"


def stages(folder: Path, source: Path) -> list[Stage]:
    """Each reads what an undisturbed earlier one left in `folder`/ready."""
    disk, ready, temporary = folder / "disk", folder / "ready", folder / "t"
    store, run = ready / "store.zarr", ready / "run"
    two = tuple(torchrun_command(2)[1:])
    nodes = (str(ROOT / "tests" / "chaos" / "two_nodes.py"),)
    patience = ("--device", "cpu", "--timeout", str(PEER_TIMEOUT_S))
    temporary.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))

    def stage(
        name: str,
        launcher: tuple[str, ...],
        arguments: tuple[str | Path, ...],
        output: str,
        needs: Path,
        digest: Callable[[Path], str],
        progress: Callable[[Path], int],
    ) -> Stage:
        command = (sys.executable, *launcher, *map(str, arguments))
        return Stage(
            name, command, disk / output, needs, disk, digest, progress, {"TMPDIR": str(temporary)}
        )

    ours = ("-m", "liverseg_dist")
    convert = (source, disk / "store.zarr", *STORE_SETTINGS)
    evaluate = (
        run,
        *patience,
        "--store",
        store,
        "--out",
        disk / "evaluation",
        "--part",
        "validation",
    )
    tune = (
        "--no-dashboard",
        "--cpus",
        "2",
        "--config",
        folder / "sweep.yaml",
        f"data.store={store}",
    )

    def train(name: str) -> tuple[str | Path, ...]:
        return (
            *ours,
            "train",
            *patience,
            f"data.store={store}",
            f"run.dir={disk / name}",
            *RUN_SETTINGS,
        )

    return [
        stage("convert", (*ours, "convert"), convert, "store.zarr", source, of_store, scans),
        stage("train", two, train("run"), "run", store, of_run, steps),
        stage("train on two nodes", nodes, train("run2"), "run2", store, of_run, steps),
        stage("evaluate", (*two, *ours, "evaluate"), evaluate, "evaluation", store, of_evaluation, cases),
        stage("tune", ("-m", "launch.tune"), (*tune, f"run.dir={disk / 'sweep'}"), "sweep", store, of_sweep, all_steps),
    ]  # fmt: skip


def of_store(output: Path) -> str:
    """What it promises, and whether its files are that: a line for each that is not."""
    sums = (output / "SHA256SUMS").read_text()
    wrong = []
    for line in sums.splitlines():
        digest, _, name = line.partition("  ")
        file = output / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            wrong.append(f"{name} has changed")
    return "\n".join([sums, *wrong])


def of_run(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def of_evaluation(output: Path) -> str:
    summary = json.loads((output / "summary.json").read_text())
    return json.dumps({key: summary[key] for key in ("n_cases", "liver", "tumour")}, sort_keys=True)


def of_sweep(output: Path) -> str:
    """Hyperparameters, decisions and scores of all trials, and which is best."""
    summary = json.loads((output / "sweep.json").read_text())
    trials = [
        (
            trial["id"],
            trial["params"],
            trial["state"],
            [(rung["step"], rung["score"]) for rung in trial["rungs"]],
        )
        for trial in summary["trials"]
    ]
    return json.dumps([trials, summary["best"]["id"]], sort_keys=True)


def scans(output: Path) -> int:
    return len(list(output.glob(".liverseg/records/*.json")))


def cases(output: Path) -> int:
    return len(list(output.glob("ledger/*.json")))


def steps(output: Path) -> int:
    """Of a training, as logged."""
    log = output / "metrics.jsonl"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def all_steps(output: Path) -> int:
    return sum(steps(path) for path in output.glob("trials/*/fold_*"))


@dataclass(frozen=True)
class Undisturbed:
    """How a stage goes when nothing happens: result, work in all, seconds until the first of it, and until all."""

    result: str
    total: int
    start_s: float
    work_s: float
    close_s: float

    @property
    def each_s(self) -> float:
        return self.work_s / self.total


def undisturbed(stage: Stage, ready: Path, others: frozenset[int]) -> Undisturbed:
    """What later stages read is moved to `ready`, and kept there for the next campaign on the same `ready`."""
    known = ready / f"{stage.name}.json"
    if known.is_file():
        return Undisturbed(**json.loads(known.read_text()))
    found = next((found for _ in range(3) if (found := _measured(stage, others))), None)
    assert found is not None, (
        f"{stage.name} fails without any fault: {stage.log('err').read_text()[-2000:]}"
    )
    shutil.copytree(stage.output, ready / stage.output.name, dirs_exist_ok=True)
    known.write_text(json.dumps(asdict(found)))
    stage.fresh()
    return found


def _measured(stage: Stage, others: frozenset[int]) -> Undisturbed | None:
    """None when it failed, as where the machine was busy for longer than ranks wait for each other."""
    stage.fresh()
    began = time.monotonic()
    process = stage.start()
    first = last = began
    most = 0
    while process.poll() is None and time.monotonic() < last + USUAL_S:
        if (now := stage.done()) > most:
            first, last, most = first if most else time.monotonic(), time.monotonic(), now
        time.sleep(0.05)
    try:
        if stage.wait(process, 30, others).exit_code:
            return None
    except Hang:
        return None
    return Undisturbed(
        stage.result(), stage.done(), first - began, last - first, time.monotonic() - last
    )

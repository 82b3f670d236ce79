"""Does a long run grow? Two days of a run's occasions in little time, and what its processes hold meanwhile.

  tools/soak                         48 hours: a step stands for a minute, a checkpoint each half hour (30 steps), a
                                     validation each hour; then as many batches through loaders, a tenth as many scans
                                     through one predictor
  tools/soak --hours 4 --out DIR

Prints what each process holds after a fifth of the time, when caches are filled, and at the end: own memory, open
files, mapped shared memory, threads; and event files and checkpoints in the run's folder. Exit code 1: something grew.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from liverseg_dist.commands.main import main as liverseg
from liverseg_dist.config import InferenceConfig, ModelConfig, load_settings
from liverseg_dist.data.augment import DeviceTransform, build_preset
from liverseg_dist.data.loading import DevicePrefetcher, PatchLoader, PatchSource
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.inference import SlidingWindowPredictor
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.model import build_model
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.streams import guard_output_streams
from tests.distributed.launch import clean_environment, torchrun_command

STEPS_AN_HOUR, CHECKPOINT_STEPS, VALIDATION_STEPS = 60, 30, 60
WARM_SHARE = 0.2
GROWTH_MIB = 16.0
"""Memory that may come and go between two looks: a checkpoint's buffers, an allocator's arena."""
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Python's pools (Zarr reads and writes through one) begin a thread whenever all are busy, up to this many: by chance a
pool is full after minutes or after a day. A thread left behind at each checkpoint is far more."""
PATCH = (16, 32, 32)
TINY = (
    "data.patch_size=[16,32,32]", "data.workers=1", "data.augmentation=strong", "model.features=[4,8]",
    "train.global_batch_size=2", "train.optimizer=adamw", "train.ema_decay=0.9", "train.threads=1",
    "train.log_every_steps=1", "validation.max_cases=2",
)  # fmt: skip


@dataclass(frozen=True)
class Held:
    """What a process holds at a step."""

    step: int
    rss_mib: float
    """Anonymous: pages of files come and go with what else the machine does."""
    files: int
    shared: int
    threads: int
    event_files: int = 0
    checkpoints: int = 0


@dataclass(frozen=True)
class Verdict:
    name: str
    warm: Held
    last: Held
    mib_per_1000: float
    """Slope of resident memory over steps since it was warm (least squares)."""
    grew: tuple[str, ...]


def held_by(process: int | str, step: int, run: Path | None = None) -> Held:
    """Raises OSError when the process is gone."""
    home = Path("/proc", str(process))
    status = dict(re.findall(r"^(\w+):\s+(\d+)", (home / "status").read_text(), re.MULTILINE))
    shared = set(re.findall(r"/dev/shm/\S+", (home / "maps").read_text()))
    return Held(
        step,
        int(status["RssAnon"]) / 1024,
        len(list((home / "fd").iterdir())),
        len(shared),
        int(status["Threads"]),
        0 if run is None else len(list(run.glob("events.*"))),
        0 if run is None else len(list((run / "checkpoints").glob("step_*"))),
    )


def judge(name: str, looks: list[Held], total: int) -> Verdict:
    """Memory may go up and down, counts vary by what is under way; neither may follow the steps."""
    steady = [held for held in looks if held.step >= WARM_SHARE * total]
    third = max(1, len(steady) // 3)
    early, late = steady[:third], steady[-third:]
    slope = (
        float(np.polyfit([h.step for h in steady], [h.rss_mib for h in steady], 1)[0])
        if len(steady) > 2
        else 0.0
    )
    grew = [
        field
        for field, of_third, slack in (
            ("files", min, 0), ("shared", min, 0), ("threads", min, POOL_THREADS), ("event_files", max, 0),
            ("checkpoints", max, 0),
        )
        if of_third(getattr(h, field) for h in late) > of_third(getattr(h, field) for h in early) + slack
    ]  # fmt: skip
    if np.median([h.rss_mib for h in late]) > np.median([h.rss_mib for h in early]) + GROWTH_MIB:
        grew.append("rss_mib")
    return Verdict(name, steady[0], steady[-1], 1000 * slope, tuple(grew))


def soak_training(
    store: Path, run: Path, hours: float, ranks: int = 1, every_s: float = 1.0
) -> list[Verdict]:
    """A training of `hours` simulated hours, looked at from outside. Raises AssertionError when it fails."""
    steps = max(1, round(hours * STEPS_AN_HOUR))
    occasions = (
        f"checkpoint.every_steps={CHECKPOINT_STEPS}",
        f"validation.every_steps={VALIDATION_STEPS}",
    )
    words = [
        "-m",
        "liverseg_dist",
        "train",
        "--device",
        "cpu",
        f"data.store={store}",
        f"run.dir={run}",
    ]
    words += [*TINY, *occasions, f"train.max_steps={steps}"]
    command = torchrun_command(ranks, *words) if ranks > 1 else [sys.executable, *words]
    looks: dict[int, list[Held]] = {}
    with (run.parent / "soak.log").open("w") as log:
        job = subprocess.Popen(command, env=clean_environment(), stdout=log, stderr=log)
    try:
        while job.poll() is None:
            step = _step(run)
            for rank, process in enumerate(_ranks(job.pid) if ranks > 1 else [job.pid]):
                with suppress(OSError, KeyError):
                    looks.setdefault(rank, []).append(held_by(process, step, run))
            time.sleep(every_s)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(60)
    assert job.returncode == 0, (run.parent / "soak.log").read_text()[-2000:]
    seen = {
        rank: [held for held in held_s if 0 < held.step < steps] for rank, held_s in looks.items()
    }
    return [judge(f"train, rank {rank} of {ranks}", held_s, steps) for rank, held_s in seen.items()]


def _step(run: Path) -> int:
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2000))
            lines = file.read().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _ranks(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()
    ]


def soak_here(
    name: str, work: Callable[[], Iterator[object]], total: int, looks: int = 60
) -> Verdict:
    """The same for work in this process: one item of `work` is a step."""
    seen = []
    for step, _ in zip(range(1, total + 1), work(), strict=False):
        if step % max(1, total // looks) == 0:
            seen.append(held_by("self", step))
    return judge(name, seen, total)


def samples(store: CaseStore) -> Iterator[object]:
    """A loader's batches without end; it is closed and opened again every 50, as folds and restarts do."""
    data = load_settings([], [*TINY, "data.workers=2"]).data
    transform = DeviceTransform(build_preset(data), data.patch_size)
    while True:
        source = PatchSource(store, store.ids("train", "all"), data, 0, 2)
        with PatchLoader(
            source, iter([[n, n + 1] for n in range(0, 100, 2)]), 2, 2, False
        ) as loader:
            yield from DevicePrefetcher(loader, transform, torch.device("cpu"))
        source.close()


def scans(store: CaseStore) -> Iterator[object]:
    """An evaluator that lives on: scan after scan through one network."""
    config = resolve_topology(ModelConfig(features=(4, 8)), PATCH, store.spacing_mm)
    predictor = SlidingWindowPredictor(
        build_model(config).eval(),
        PATCH,
        OutputChannels(store.labels, config.regions),
        InferenceConfig(),
        torch.device("cpu"),
    )
    while True:
        for case_id in store.case_ids:
            meta = store.meta(case_id)
            yield predictor.predict_labels(store.image(case_id), meta.intensities, meta.present)


def table(verdicts: list[Verdict]) -> str:
    heads = (
        "process",
        "steps",
        "own MiB",
        "MiB per 1,000",
        "files",
        "shared",
        "threads",
        "events",
        "checkpoints",
    )
    rows = [f"| {' | '.join(heads)} |"]
    rows.append("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for one in verdicts:
        pairs = [
            f"{a} to {b}" if a != b else str(a)
            for a, b in (
                (getattr(one.warm, field), getattr(one.last, field))
                for field in ("files", "shared", "threads", "event_files", "checkpoints")
            )
        ]
        memory = f"{one.warm.rss_mib:.0f} to {one.last.rss_mib:.0f}"
        steps = f"{one.warm.step} to {one.last.step}"
        rows.append(
            f"| {one.name} | {steps} | {memory} | {one.mib_per_1000:+.2f} | {' | '.join(pairs)} |"
        )
    return "\n".join(rows)


def small_store(folder: Path) -> Path:
    source, store = folder / "phantom", folder / "s.zarr"
    coarse = ("convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.folds=2", "convert.workers=1")
    if liverseg(["phantom", str(source), "--cases", "4", "--seed", "3"]) or liverseg(
        ["convert", str(source), str(store), *coarse]
    ):
        raise SystemExit("tools/soak: no store could be made")
    return store


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=48.0, help="simulated hours (48)")
    parser.add_argument("--ranks", type=int, default=2, help="of the training (2)")
    parser.add_argument(
        "--out", type=Path, help="a new folder for store and run (default: a temporary one)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as aside:
        folder = args.out or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        store = small_store(folder)
        steps = round(args.hours * STEPS_AN_HOUR)
        verdicts = soak_training(store, folder / "run", args.hours, args.ranks)
        keep_freed_memory()
        torch.set_num_threads(1)
        opened = CaseStore.open(store)
        verdicts.append(soak_here("loader", lambda: samples(opened), steps))
        verdicts.append(soak_here("evaluator", lambda: scans(opened), max(100, steps // 10)))
    print(table(verdicts))
    for one in verdicts:
        print(json.dumps(asdict(one)))
        if one.grew:
            print(f"{one.name}: grew in {', '.join(one.grew)}", file=sys.stderr)
    return int(any(one.grew for one in verdicts))


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())

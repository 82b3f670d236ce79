"""Train a 3D U-Net on a Zarr store. Run the same line again to continue from the newest checkpoint.

  one process    liverseg train --config configs/demo_cpu.yaml data.store=STORE run.dir=runs/first
  two GPUs       torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 --nproc-per-node=2 \\
                     -m liverseg_dist train --config configs/task03_S.yaml data.store=STORE run.dir=runs/first
  a cluster      sbatch slurm/train.sbatch configs/task03_S.yaml ...      (or python -m launch train ...)

The run's folder gets config.yaml, TensorBoard events, metrics.jsonl, checkpoints/ and model.safetensors.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from liverseg_dist.commands.options import add_settings, settings_from
from liverseg_dist.commands.run_distributed import run_distributed
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.collectives import broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_RESUMABLE, LiversegError, RunFailed, UserError
from liverseg_dist.inference.load_run import find_outdated_results
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.tracking.writer import tensorboard_command
from liverseg_dist.training.components import (
    TrainingComponents,
    build_components,
    open_store,
    resolve_settings,
    settings_conflicting_with_store,
)
from liverseg_dist.training.extension import Horizons, Schedule, change_max_steps, read_horizons
from liverseg_dist.training.run_folder import EXTENSIBLE, RunFolder, check_settings_compatible
from liverseg_dist.training.trainer import Trainer, TrainingResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="default: a GPU if there is one",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, store and model, say the plan, and stop",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="seconds a collective waits for a lost rank (1800)",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    settings = settings_from(args)
    if settings.run.dir is None:
        raise UserError("run.dir is not set; give the run a folder, e.g. run.dir=runs/first")
    folder = RunFolder(settings.run.dir)
    world = World.from_environment(args.device)
    keep_freed_memory()
    if not world.is_main:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115 - for the process's life; rank 0 does the talking
    store = open_store(settings)
    told = list_store_conflicts(settings, store, args.overrides)
    if told and world.is_main:
        print(f"warning: {told}", file=sys.stderr)
    settings = resolve_settings(settings, store)
    begun = folder.config.exists()
    if (
        settings.train.fine_tune.freeze != "none"
        and settings.model.pretrained is None
        and not begun
    ):
        raise UserError(
            "train.fine_tune.freeze keeps random weights as they are without model.pretrained; give both"
        )
    if settings.data.patch_size[0] > settings.convert.slab.slices and world.is_main:
        slices = settings.convert.slab.slices
        print(
            f"warning: data.patch_size is {settings.data.patch_size[0]} slices high, slabs have {slices}: the rest is "
            "padding",
            file=sys.stderr,
        )

    def work(watch: HeartbeatMonitor) -> dict[str, Any]:
        recorded = folder.recorded_threads(world.global_rank, world.world_size)
        parts = build_components(settings, store, world, recorded)
        print(_plan(parts, world), flush=True)
        if args.dry_run:
            if begun:
                check_settings_compatible(
                    load_settings([folder.config], warn_of_old_keys=False),
                    settings,
                    folder.path,
                    EXTENSIBLE,
                )
            return {"run": str(folder.path), "dry_run": True}
        _agreed(lambda: folder.open(settings) if world.is_main else None)
        try:
            return _train(folder, parts, world, watch)
        except KeyboardInterrupt:
            # Before the first step or after the last one; in between a signal only asks for a stop.
            if world.is_main:
                with suppress(OSError):
                    step, message = (
                        folder.newest_checkpoint(),
                        "interrupted outside of the training steps",
                    )
                    folder.set_status("stopped", step, watch.last_step, message)
            raise

    def keep(watch: HeartbeatMonitor, line: str) -> None:
        if world.is_main:
            with suppress(OSError):  # a full disk, which is perhaps what the line is about
                folder.set_status("failed", watch.step, watch.last_step, line[:500])

    return run_distributed(world, args.timeout, folder.path, work, keep)


def list_store_conflicts(settings: Settings, store: CaseStore, overrides: list[str]) -> str:
    """What was asked for and the store decides otherwise, to be told; empty if nothing.

    Of a file, which may be another run's or the one for many conversions; on the command line it raises `UserError`.
    """
    here = [word.partition("=")[0] + "." for word in overrides]
    lines = settings_conflicting_with_store(settings, store)
    for line in lines:
        key = line.partition(" ")[0] + "."
        if any(key.startswith(word) or word.startswith(key) for word in here):
            raise UserError(
                f"{line}: the store decides it ({store.path}); leave it out, or convert again"
            )
    return (
        f"{store.path} decides: {'; '.join(lines)}; for these convert with --config"
        if lines
        else ""
    )


def _train(
    folder: RunFolder, parts: TrainingComponents, world: World, watch: HeartbeatMonitor
) -> dict[str, Any]:
    max_steps = watch.last_step = parts.settings.train.max_steps
    trainer = Trainer(folder, parts, world, watch)
    first = trainer.resume()
    threads = gather_from_ranks(torch.get_num_threads())

    def begin() -> tuple[str, Horizons]:
        change = change_max_steps(folder, parts.settings, first)
        folder.record_start(parts.settings, first, threads)
        return change, read_horizons(folder.path)

    # Rank 0 reads and writes the folder; the other ranks get what it found.
    change, earlier = _agreed(lambda: begin() if world.is_main else None)
    trainer.schedule = Schedule(parts.settings.train, earlier)
    if change:
        print(change, flush=True)
    if first:
        print(f"continues at step {first} of {max_steps}", flush=True)
    if world.is_main:
        folder.set_status("running", first, max_steps)
    outcome = trainer.run()
    if world.is_main:
        folder.set_status(
            "stopped" if outcome.stopped_by else "finished", outcome.progress.step, max_steps
        )
    if outcome.stopped_by and not outcome.saved:
        raise RunFailed(
            f"stopped at step {outcome.progress.step} by {outcome.stopped_by}, but the last checkpoint could not be "
            f"written to {folder.checkpoints}; free some space: the same line goes on from the one before"
        )
    return _result(folder, outcome, max_steps)


def _result(folder: RunFolder, outcome: TrainingResult, max_steps: int) -> dict[str, Any]:
    step, by = outcome.progress.step, outcome.stopped_by
    if by:
        print(
            f"stopped at step {step} of {max_steps} by {by}; all is saved, the same line continues",
            flush=True,
        )
    else:
        print(f"done: {step} steps{describe_scores(folder, outcome)}", flush=True)
        print(f"weights: {folder.model}; curves: {tensorboard_command(folder.path)}", flush=True)
        for stale in find_outdated_results(folder.path):
            print(f"note: {stale}", flush=True)
    return {
        "run": str(folder.path),
        "step": step,
        "stopped_by": by,
        "dice": outcome.progress.last_dice,
        "exit_code": EXIT_DONE if by in ("", "stop_at_step") else EXIT_RESUMABLE,
    }


def describe_scores(folder: RunFolder, outcome: TrainingResult) -> str:
    """The last validation and the best one, for the line that ends a training; empty without validation."""
    progress = outcome.progress
    if not progress.last_dice:
        return "; not validated (validation.every_steps, data.fold)"
    best = ""
    if progress.best_step and progress.best_step != progress.last_dice_step:
        best = f"; best mean {progress.best_score:.3f} after step {progress.best_step}"
        if folder.best.is_file():
            best += f": {folder.best}"
    return f"; validation {progress.describe_dice()}{best}"


def _plan(parts: TrainingComponents, world: World) -> str:
    settings: Settings = parts.settings
    parameters = sum(p.numel() for p in parts.strategy.plain.parameters())
    model = settings.model
    threads = f", {torch.get_num_threads()} thread(s) each" if world.device.type == "cpu" else ""
    return (
        f"{world.world_size} x {world.device.type}, {settings.train.strategy}, {settings.train.precision}{threads}; "
        f"{model.architecture} with {parameters / 1e6:.2f} M parameters, features {list(model.features or ())}; "
        f"patch {'x'.join(map(str, settings.data.patch_size))}, global batch {settings.train.global_batch_size}; "
        f"{len(parts.train_ids)} cases to train on, {len(parts.validation_ids)} to validate"
    )


def _agreed(action: Callable[[], Any]) -> Any:
    """Do it and return rank 0's result; if it fails on rank 0, every rank ends with the same message."""
    problem: LiversegError | None = None
    result = None
    try:
        result = action()
    except LiversegError as error:
        problem = error
    except OSError as error:
        problem = RunFailed(f"{error.filename or 'the run'}: {error.strerror or error}")
    problem, result = broadcast_from_rank0((problem, result))
    if problem is not None:
        raise problem
    return result

"""Train a 3D U-Net on a Zarr store. Run the same line again to continue from the newest checkpoint.

  one process    liverseg train --config configs/demo_cpu.yaml data.store=STORE run.dir=runs/first
  two GPUs       torchrun --standalone --nproc-per-node=2 -m liverseg_dist train \\
                     --config configs/task03_S.yaml data.store=STORE run.dir=runs/first
  a cluster      sbatch slurm/train.sbatch configs/task03_S.yaml ...      (or python -m launch train ...)

The run folder gets config.yaml, TensorBoard events, metrics.jsonl, checkpoints/ and model.safetensors.
"""

import argparse
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from liverseg_dist.commands.options import add_device, add_settings, settings_from
from liverseg_dist.commands.run_distributed import run_distributed
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.console import write_lines
from liverseg_dist.distributed.collectives import gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.startup import start_rank
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_RESUMABLE, RunFailed, UserError
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.outdated_results import find_outdated_results
from liverseg_dist.logging_setup import ONCE
from liverseg_dist.tracking.writer import tensorboard_command
from liverseg_dist.training.components import (
    TrainingComponents,
    build_components,
    open_store,
    resolve_settings,
)
from liverseg_dist.training.extension import Horizons, Schedule, change_max_steps, read_horizons
from liverseg_dist.training.run_folder import EXTENSIBLE, RunFolder, check_settings_compatible
from liverseg_dist.training.store_conflicts import describe_store_conflicts
from liverseg_dist.training.trainer import Trainer, TrainingResult

_logger = logging.getLogger(__name__)
# The status is one line of a table for launch status; the error file has the whole reason.
MAX_STATUS_CHARACTERS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, store and model, print the plan, and exit",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="seconds that ranks wait for each other at start-up, in validation and while saving; "
        "within the steps: train.collective_timeout_s (default: 1800)",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train on all ranks; rank 0 writes the run folder."""
    settings = settings_from(args)
    if settings.run.dir is None:
        raise UserError("run.dir is not set; give the run a folder, e.g. run.dir=runs/first")
    folder = RunFolder(settings.run.dir)
    world = start_rank(args.device)
    keep_freed_memory()
    store = open_store(settings)
    # The store's voxel size and channels override those of the config file; what the user gave
    # explicitly is mentioned.
    conflicts = describe_store_conflicts(settings, store, args.overrides)
    if conflicts:
        _logger.warning("%s", conflicts, extra=ONCE)
    settings = resolve_settings(settings, store)
    was_started = folder.config.exists()
    _check_settings(settings, was_started)

    def work(monitor: HeartbeatMonitor) -> dict[str, Any]:
        # The number of threads changes the order of sums, so a resumed run uses the recorded one.
        threads = folder.recorded_threads(world.global_rank, world.world_size)
        components = build_components(settings, store, world, threads)
        _logger.info("%s", _describe_plan(components, world))
        # A dry run in a started folder also shows whether the run could continue with these
        # settings.
        if args.dry_run:
            if was_started:
                recorded = load_settings([folder.config], warn_of_old_keys=False)
                check_settings_compatible(recorded, settings, folder.path, EXTENSIBLE)
            return {"run": str(folder.path), "dry_run": True}
        share_from_rank0(lambda: folder.open(settings))
        try:
            return _train(folder, components, world, monitor)
        except KeyboardInterrupt:
            # Before the first step or after the last one: within the steps a signal only requests a stop.
            message = "interrupted outside of the training steps"
            _record_status(folder, world, "stopped", folder.newest_checkpoint, monitor, message)
            raise

    def record_failure(monitor: HeartbeatMonitor, line: str) -> None:
        message = line[:MAX_STATUS_CHARACTERS]
        _record_status(folder, world, "failed", lambda: monitor.step, monitor, message)

    return run_distributed(world, args.timeout, folder.path, work, record_failure)


def _record_status(
    folder: RunFolder,
    world: World,
    status: str,
    read_step: Callable[[], int],
    monitor: HeartbeatMonitor,
    message: str,
) -> None:
    """Write the status of a run that ends early."""

    def write_status() -> None:
        folder.set_status(status, read_step(), monitor.last_step, message)

    # A full disk may be the cause. It must not hide the reason.
    with suppress(OSError):
        world.call_on_rank0(write_status)


def _check_settings(settings: Settings, was_started: bool) -> None:
    """Refuse or warn of settings that are valid one by one but not together. Raises `UserError`."""
    freeze = settings.train.fine_tune.freeze
    if freeze != "none" and settings.model.pretrained is None and not was_started:
        raise UserError(
            f"train.fine_tune.freeze={freeze} without model.pretrained would freeze random weights; "
            "give both"
        )
    slices = settings.convert.slab.slices
    # Slabs end at 64 slices by design; a higher patch costs time and learns nothing.
    if settings.data.patch_size[0] > slices:
        _logger.warning(
            "data.patch_size is %d slices high, slabs have %d: the rest is padding",
            settings.data.patch_size[0],
            slices,
            extra=ONCE,
        )


def _train(
    folder: RunFolder, components: TrainingComponents, world: World, monitor: HeartbeatMonitor
) -> dict[str, Any]:
    max_steps = monitor.last_step = components.settings.train.max_steps
    # After resume: the schedule depends on the horizons of earlier calls.
    trainer = Trainer(folder, components, world, monitor)
    first = trainer.resume()
    threads = gather_from_ranks(torch.get_num_threads())

    def record_start() -> tuple[str, Horizons]:
        change = change_max_steps(folder, components.settings, first)
        folder.record_start(components.settings, first, threads)
        return change, read_horizons(folder.path)

    # Only rank 0 accesses the folder; the other ranks receive what it has read.
    change, earlier = share_from_rank0(record_start)
    trainer.schedule = Schedule(components.settings.train, earlier)
    if change:
        _logger.info("%s", change)
    if first:
        _logger.info("continues at step %d of %d", first, max_steps)
    world.call_on_rank0(partial(folder.set_status, "running", first, max_steps))
    result = trainer.run()
    step = result.progress.step
    status = "stopped" if result.stopped_by else "finished"
    world.call_on_rank0(partial(folder.set_status, status, step, max_steps))
    # The stop was in time but the disk refused: the job must not count as stopped safely.
    if result.stopped_by and not result.saved:
        raise RunFailed(
            f"stopped at step {step} by {result.stopped_by}, but the last checkpoint could not be "
            f"written to {folder.checkpoints}; free some space: the same line continues from the "
            "checkpoint before"
        )
    return _report_result(folder, result, max_steps)


def _report_result(folder: RunFolder, result: TrainingResult, max_steps: int) -> dict[str, Any]:
    """Print how the training ended and return the result of the command."""
    step, reason = result.progress.step, result.stopped_by
    if reason:
        write_lines(
            f"stopped at step {step} of {max_steps} by {reason}; all is saved, the same line continues"
        )
    else:
        write_lines(
            f"done: {step} steps{describe_scores(folder, result)}",
            f"weights: {folder.model}; curves: {tensorboard_command(folder.path)}",
            *(f"note: {stale}" for stale in find_outdated_results(folder.path)),
        )
    return {
        "run": str(folder.path),
        "step": step,
        "stopped_by": reason,
        "dice": result.progress.last_dice,
        "exit_code": EXIT_DONE if reason in ("", "stop_at_step") else EXIT_RESUMABLE,
    }


def describe_scores(folder: RunFolder, result: TrainingResult) -> str:
    """The last and the best validation, for the last line of a training."""
    progress = result.progress
    if not progress.last_dice:
        return "; not validated (validation.every_steps, data.fold)"
    best = ""
    if progress.best_step and progress.best_step != progress.last_dice_step:
        best = f"; best mean {progress.best_score:.3f} after step {progress.best_step}"
        if folder.best.is_file():
            best += f": {folder.best}"
    return f"; validation {progress.describe_dice()}{best}"


def _describe_plan(components: TrainingComponents, world: World) -> str:
    """One line: devices, strategy, precision, network, patch, batch and number of cases."""
    settings = components.settings
    parameters = sum(p.numel() for p in components.strategy.plain.parameters())
    device = world.device.type
    threads = f", {torch.get_num_threads()} thread(s) each" if device == "cpu" else ""
    patch = "x".join(map(str, settings.data.patch_size))
    return (
        f"{world.world_size} x {device}, {settings.train.strategy}, {settings.train.precision}{threads}; "
        f"{settings.model.architecture} with {parameters / 1e6:.2f} M parameters, "
        f"features {list(settings.model.features or ())}; "
        f"patch {patch}, global batch {settings.train.global_batch_size}; "
        f"{len(components.train_ids)} cases to train on, {len(components.validation_ids)} to validate"
    )

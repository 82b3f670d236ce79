"""nnU-Net's own trainer and loader on the patch, batch, network and voxels of the M configuration.

Eager and, on a GPU, compiled (its default). An epoch is `ITERATIONS` steps; the first one contains
compilation and the start of its worker processes and is not counted.
"""

import os
from typing import Any

import torch

from .context import Context, Figures
from .data import load_preset, phantom_store
from .nnunet_plans import (
    CONFIGURATION,
    DATASET_JSON,
    build_plans,
    set_environment,
    set_nnunet_variable,
    write_preprocessed,
)

ITERATIONS, EPOCHS = 50, 3
PACKAGES = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "blosc2", "SimpleITK")
PROCESSES = 12
"""nnU-Net's default number of augmentation processes."""


def run(context: Context) -> None:
    set_environment(context.work)
    for compiles in (False, True):
        context.measure(
            "nnU-Net's trainer, M",
            "compiled" if compiles else "eager",
            lambda c=compiles: train(context, compiles=c),
            packages=PACKAGES,
            needs_s=60 if compiles else 25,
            needs_cuda=compiles,
        )


def train(context: Context, *, compiles: bool) -> Figures:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    settings = load_preset(context, "M")
    write_preprocessed(context.work, settings, phantom_store(context))
    set_nnunet_variable("compile", "t" if compiles else "f")
    cores = len(os.sched_getaffinity(0))
    processes = context.choose(min(PROCESSES, cores), 0)
    set_nnunet_variable("n_proc_DA", processes)
    trainer: Any = nnUNetTrainer(
        build_plans(settings), CONFIGURATION, "all", dict(DATASET_JSON), context.device
    )
    trainer.num_iterations_per_epoch = iterations = context.choose(ITERATIONS, 1)
    trainer.num_epochs = context.choose(EPOCHS, 2)
    trainer.num_val_iterations_per_epoch = 1
    trainer.disable_checkpointing = True
    # Drawing takes a second, which epochs of 250 iterations do not feel.
    trainer.logger.plot_progress_png = lambda *_: None
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.run_training()
    spans = []
    for epoch in range(1, trainer.num_epochs):
        begin = trainer.logger.get_value("epoch_start_timestamps", step=epoch)
        end = trainer.logger.get_value("epoch_end_timestamps", step=epoch)
        spans.append(end - begin)
    step_s = min(spans) / iterations
    found: Figures = {
        "step_ms": step_s * 1e3,
        "samples_per_s": trainer.batch_size / step_s,
        "epochs_of_250_per_hour": 3600 / (250 * step_s),
        "augmentation_processes": processes,
    }
    if context.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found

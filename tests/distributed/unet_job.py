"""Run under torchrun by test_unet.py: a few steps of a small U-Net. Prints losses and weights from rank 0."""

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from liverseg_dist.commands.main import run_and_exit
from liverseg_dist.config import LossConfig, ModelConfig, load_settings
from liverseg_dist.distributed.strategies.parallelize import parallelize_model
from liverseg_dist.distributed.world import World
from liverseg_dist.model import build_model
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology

BATCH = 2
PATCH = (16, 16, 16)


def run(
    levels: tuple[int, ...],
    steps: int,
    mine: Callable[[int], list[int]],
    world: World,
    overrides: list[str],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Summed loss of this rank's samples per step, and the weights at the end."""
    config = load_settings([], [f"train.global_batch_size={BATCH}", *overrides]).train
    model_config = resolve_topology(ModelConfig(features=(4, 6, 8)), PATCH, (1.0, 1.0, 1.0))
    torch.manual_seed(0)
    strategy = parallelize_model(
        build_model(model_config),
        world.device,
        config,
        levels,
        lambda m: [{"params": list(m.parameters())}],
    )
    strategy.warm_up(torch.zeros(1, 1, *PATCH))
    loss = build_loss(LossConfig(), OutputChannels())
    losses = []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        samples = mine(step)
        for position, sample in enumerate(samples):
            made = torch.Generator().manual_seed(sample)
            image = torch.randn(1, 1, *PATCH, generator=made)
            label = torch.randint(0, 3, (1, *PATCH), generator=made, dtype=torch.uint8)
            value = (
                loss(strategy.forward(image, last=position == len(samples) - 1), label).total
                / BATCH
            )
            strategy.backward(value)
            total += value.detach().double()
        losses.append(total)
        strategy.step(1e-2)
    return losses, strategy.weights()


def main(levels: str, *overrides: str) -> int:
    world = World.from_environment("cpu")
    torch.set_num_threads(1)
    with world.connected(60):
        losses, weights = run(
            tuple(json.loads(levels)),
            3,
            lambda step: [step * BATCH + n for n in range(BATCH)][
                world.global_rank :: world.world_size
            ],
            world,
            list(overrides),
        )
        for value in losses:
            if world.is_distributed:
                torch.distributed.all_reduce(value)
    if world.is_main:
        flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
        print(
            json.dumps(
                {
                    "losses": [float(v) for v in losses],
                    "weights": flat.tolist(),
                    "names": sorted(weights),
                }
            )
        )
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: main(*sys.argv[1:]))

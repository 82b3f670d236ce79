"""Run under torchrun by test_batch_dice.py: a step with `loss.batch_dice` for each of several settings.

Prints one JSON line from rank 0: for each setting the loss and the gradient. The batch is the same, however it is cut.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from liverseg_dist.commands.main import run_and_exit
from liverseg_dist.config import ModelConfig, load_settings
from liverseg_dist.data.loading.device_batches import DeviceBatch
from liverseg_dist.distributed.strategies.parallelize import parallelize_model
from liverseg_dist.distributed.world import World
from liverseg_dist.model import build_model
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.training.step import Stepper, rank_batches

PATCH = (16, 16, 16)


class MadeBatches:
    """This rank's micro-batches of the first step. Only sample 0 has a tumour, in a corner."""

    wait_s = 0.0

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self._batches = iter(batches)

    def __next__(self) -> DeviceBatch:
        samples = next(self._batches)
        images, labels = [], []
        for sample in samples:
            images.append(torch.randn(1, *PATCH, generator=torch.Generator().manual_seed(sample)))
            label = torch.zeros(PATCH, dtype=torch.uint8)
            label[: 4 + sample] = 1
            if sample == 0:
                label[:3, :3, :3] = 2
            labels.append(label)
        cases = [f"case_{sample}" for sample in samples]
        return DeviceBatch(samples, cases, torch.stack(images), torch.stack(labels), None)  # type: ignore[arg-type]

    def begin_next(self) -> None:
        """Nothing to launch ahead."""


def take_step(world: World, overrides: Sequence[str]) -> dict[str, Any]:
    settings = load_settings(
        [],
        [
            "loss.batch_dice=true",
            # Cross-entropy would be most of the gradient.
            "loss.name=dice",
            "train.momentum=0",
            "train.weight_decay=0",
            "train.clip_grad_norm=0",
            *overrides,
        ],
    )
    model_config = resolve_topology(ModelConfig(features=(4, 6, 8)), PATCH, (1.0, 1.0, 1.0))
    torch.manual_seed(0)
    strategy = parallelize_model(
        build_model(model_config),
        world.device,
        settings.train,
        (),
        lambda m: [{"params": list(m.parameters())}],
    )
    before = strategy.weights()
    before = {name: value.clone() for name, value in before.items()}
    strategy.warm_up(torch.zeros(1, 1, *PATCH))
    loss = build_loss(settings.loss, OutputChannels())
    stepper = Stepper(settings, strategy, loss, lambda *_: None, lambda _: None, lambda _: 1.0)
    stepper.run(0, MadeBatches(list(rank_batches(settings, 0, 1))), lambda: False)  # type: ignore[arg-type]
    result = stepper.finish()
    assert result is not None
    after = strategy.weights()
    gradient = torch.cat([(before[name] - after[name]).flatten() for name in sorted(after)])
    return {"loss": result.loss, "dice": result.parts["dice"], "gradient": gradient.tolist()}


def main(configurations: str) -> int:
    world = World.from_environment("cpu")
    torch.set_num_threads(1)
    with world.connected(60):
        results = [take_step(world, overrides) for overrides in json.loads(configurations)]
    if world.is_main:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1]))

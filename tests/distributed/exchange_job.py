"""Run under torchrun by test_exchange.py: one step of two micro-batches of a small U-Net for each of several settings.

Prints one JSON line from rank 0: a list with bytes and calls of the collectives, the gradient's norm and the weights.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liverseg_dist.commands.main import run_and_exit
from liverseg_dist.config import LossConfig, ModelConfig, load_settings
from liverseg_dist.distributed.strategies.parallelize import check_strategy, parallelize_model
from liverseg_dist.distributed.world import World
from liverseg_dist.model import build_model
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology

PATCH = (16, 16, 16)
MICRO_BATCHES = 2


class BytesOfCollectives(TorchDispatchMode):
    """Counts calls of collectives, and the bytes of the largest tensor of each."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.nbytes)
            name = f"{func.overloadpacket.__name__} {str(largest.dtype)[6:]}"
            self.bytes[name] += largest.nbytes
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def run_step(world: World, overrides: list[str]) -> dict[str, Any]:
    """One step with these settings: bytes and calls by operation and number format, and what it gives."""
    config = load_settings([], ["train.global_batch_size=4", *overrides]).train
    model_config = resolve_topology(ModelConfig(features=(4, 6, 8)), PATCH, (1.0, 1.0, 1.0))
    loss = build_loss(LossConfig(), OutputChannels())
    check_strategy(config, world.world_size, world.device)
    torch.manual_seed(0)
    model = build_model(model_config)
    parameters = sum(p.numel() for p in model.parameters())
    strategy = parallelize_model(
        model, world.device, config, (), lambda m: [{"params": list(m.parameters())}]
    )
    strategy.warm_up(torch.zeros(1, 1, *PATCH))
    with BytesOfCollectives() as counts:
        for number in range(MICRO_BATCHES):
            made = torch.Generator().manual_seed(number * world.world_size + world.global_rank)
            image = torch.randn(1, 1, *PATCH, generator=made)
            label = torch.randint(0, 3, (1, *PATCH), generator=made, dtype=torch.uint8)
            outputs = strategy.forward(image, last=number == MICRO_BATCHES - 1)
            strategy.backward(loss(outputs, label).total / 4)
    norm = float(strategy.step(1e-2))
    weights = strategy.weights()
    flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
    result = {"parameters": parameters, "bytes": counts.bytes, "calls": counts.calls}
    return {**result, "norm": norm, "weights": flat.tolist()}


def main(configurations: str) -> int:
    world = World.from_environment("cpu")
    torch.set_num_threads(1)
    with world.connected(60):
        results = [run_step(world, overrides) for overrides in json.loads(configurations)]
    if world.is_main:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1]))

"""Run under torchrun by test_strategies.py: tasks with a small network, one after another.

A task takes a few steps, saves and takes more (`fresh`), takes the same from the save (`resume`), or
reports the type of the network's output (`dtype`). The tasks share the processes, because a start
takes much longer than the steps. Prints one JSON line from rank 0: name of the task -> its result.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liverseg_dist.config import TrainConfig, load_settings
from liverseg_dist.distributed.strategies.base import Strategy
from liverseg_dist.distributed.strategies.parallelize import check_strategy, parallelize_model
from liverseg_dist.distributed.world import World
from liverseg_dist.training.checkpoint import Checkpoints

BATCH = 4
SAVE_AT, END = 3, 6
"""Steps."""


class Net(nn.Module):
    """Odd parameter counts on purpose: they do not divide among ranks."""

    def __init__(self) -> None:
        super().__init__()
        # Without a bias: under a norm its gradient would be rounding noise.
        self.first = nn.Conv3d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(6, affine=True)
        self.last = nn.Conv3d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))

    def shard_groups(self) -> list[nn.Module]:
        return [self.first, self.last]

    def set_checkpointing(self, levels: object) -> None:
        pass


def make_sample(number: int) -> Tensor:
    return torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(number))


@contextmanager
def autocast_as_on_a_gpu() -> Iterator[None]:
    """Without a device type torch reports autocast of GPUs only; DeepSpeed asks in this way."""
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device_type="cpu": asked(device_type)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


def build_strategy(world: World, config: TrainConfig, seed: int) -> Strategy:
    torch.manual_seed(seed)
    check_strategy(config, world.world_size, world.device)
    strategy = parallelize_model(
        Net(), world.device, config, (), lambda m: [{"params": list(m.parameters())}]
    )
    strategy.warm_up(torch.zeros(1, 1, 8, 8, 8))
    return strategy


def take_steps(world: World, strategy: Strategy, first: int, last: int) -> list[float]:
    """Train on this rank's share of each batch; loss and gradient norm of each step."""
    values = []
    for step in range(first, last):
        batch = list(range(step * BATCH, (step + 1) * BATCH))
        mine = batch[world.global_rank :: world.world_size]
        total = torch.zeros((), dtype=torch.float64)
        for position, number in enumerate(mine):
            x = make_sample(number)
            output = strategy.forward(x, last=position == len(mine) - 1)
            loss = ((output - x) ** 2).mean() / BATCH
            strategy.backward(loss)
            total += loss.detach().double()
        if world.is_distributed:
            torch.distributed.all_reduce(total)
        values += [float(total), float(strategy.step(1e-2))]
    return values


def run_fresh(world: World, config: TrainConfig, checkpoints: Checkpoints) -> dict[str, Any]:
    # Each rank has other weights: those of rank 0 must win.
    strategy = build_strategy(world, config, seed=world.global_rank)
    losses = take_steps(world, strategy, 0, SAVE_AT)
    checkpoints.save(SAVE_AT, strategy.state(), {"from": world.world_size}, wait=False)
    # Steps while the bytes are written must not change what is written.
    losses += take_steps(world, strategy, SAVE_AT, END)
    checkpoints.finish()
    return {"losses": losses, "weights": flatten_weights(strategy)}


def run_resumed(world: World, config: TrainConfig, checkpoints: Checkpoints) -> dict[str, Any]:
    # Other weights than at the fresh start: those of the checkpoint must win.
    strategy = build_strategy(world, config, seed=99)
    state = checkpoints.newest()
    assert state is not None
    tensors = strategy.state()
    checkpoints.load(state["step"], tensors)
    strategy.state_loaded(tensors)
    losses = take_steps(world, strategy, SAVE_AT, END)
    return {"losses": losses, "weights": flatten_weights(strategy)}


def find_output_type(world: World, config: TrainConfig) -> dict[str, Any]:
    strategy = build_strategy(world, config, seed=0)
    with autocast_as_on_a_gpu():
        output = strategy.forward(torch.zeros(1, 1, 8, 8, 8), last=True)
    return {"dtype": str(output.dtype)}


def flatten_weights(strategy: Strategy) -> list[float]:
    weights = strategy.weights()
    flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
    return flat.tolist()


def run_task(world: World, mode: str, folder: str, overrides: list[str]) -> dict[str, Any]:
    config = load_settings([], [f"train.global_batch_size={BATCH}", *overrides]).train
    if mode == "dtype":
        return find_output_type(world, config)
    checkpoints = Checkpoints(Path(folder), keep_last=3)
    run = run_fresh if mode == "fresh" else run_resumed
    found = run(world, config, checkpoints)
    checkpoints.close()
    return found


def main(plan: str) -> None:
    world = World.from_environment("cpu")
    torch.set_num_threads(1)
    results = {}
    with world.connected(60):
        for name, mode, folder, overrides in json.loads(plan):
            # A task that fails ends all ranks; the last line of this kind names it.
            print(f"task {name}", file=sys.stderr, flush=True)
            results[name] = run_task(world, mode, folder, overrides)
    if world.is_main:
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""Run under torchrun by test_strategies.py: a few steps of a small network, a save, more steps, and the same again from
the save. Prints one JSON line from rank 0."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from liverseg_dist.config import load_settings
from liverseg_dist.distributed.strategies.parallelize import check_strategy, parallelize_model
from liverseg_dist.distributed.world import World
from liverseg_dist.training.checkpoint import Checkpoints

BATCH = 4


class Net(nn.Module):
    """Odd parameter counts on purpose: they do not divide among ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(
            1, 6, 3, padding=1, bias=False
        )  # under a norm its gradient would be rounding noise
        self.norm = nn.InstanceNorm3d(6, affine=True)
        self.last = nn.Conv3d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))

    def shard_groups(self) -> list[nn.Module]:
        return [self.first, self.last]

    def set_checkpointing(self, levels: object) -> None:
        pass


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Asked without a device, torch tells of autocast on GPUs alone: only there does DeepSpeed see one around it."""
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device_type="cpu": asked(device_type)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


def main(folder: str, mode: str, overrides: list[str]) -> None:
    world = World.from_environment("cpu")
    config = load_settings([], [f"train.global_batch_size={BATCH}", *overrides]).train
    torch.set_num_threads(1)
    torch.manual_seed(
        world.global_rank if mode == "fresh" else 0
    )  # rank 0's initial weights must win
    with world.connected(60):
        check_strategy(config, world.world_size, world.device)
        strategy = parallelize_model(
            Net(), world.device, config, (), lambda m: [{"params": list(m.parameters())}]
        )
        strategy.warm_up(torch.zeros(1, 1, 8, 8, 8))
        checkpoints = Checkpoints(Path(folder), keep_last=3)
        if mode == "dtype":
            with as_on_a_gpu():
                found = strategy.forward(torch.zeros(1, 1, 8, 8, 8), last=True).dtype
            if world.is_main:
                print(json.dumps({"dtype": str(found)}))
            checkpoints.close()
            return

        def steps(first: int, last: int) -> list[float]:
            losses = []
            for step in range(first, last):
                mine = list(range(step * BATCH, (step + 1) * BATCH))[
                    world.global_rank :: world.world_size
                ]
                total = torch.zeros((), dtype=torch.float64)
                for position, sample in enumerate(mine):
                    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(sample))
                    loss = (
                        (strategy.forward(x, last=position == len(mine) - 1) - x) ** 2
                    ).mean() / BATCH
                    strategy.backward(loss)
                    total += loss.detach().double()
                if world.is_distributed:
                    torch.distributed.all_reduce(total)
                losses.append(float(total))
                losses.append(float(strategy.step(1e-2)))
            return losses

        if mode == "fresh":
            losses = steps(0, 3)
            checkpoints.save(3, strategy.state(), {"from": world.world_size}, wait=False)
            losses += steps(
                3, 6
            )  # goes on while the bytes are written: the copy must be untouched by it
            checkpoints.finish()
        else:
            state = checkpoints.newest()
            assert state is not None
            tensors = strategy.state()
            checkpoints.load(state["step"], tensors)
            strategy.state_loaded(tensors)
            losses = steps(3, 6)
        weights = strategy.weights()
        checkpoints.close()
    if world.is_main:
        flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
        print(
            json.dumps({"losses": losses, "names": sorted(weights), "weights": flat.tolist()}),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

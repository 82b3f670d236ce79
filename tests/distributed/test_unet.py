"""The real U-Net with recomputed activations gives the same results sharded (FSDP2, ZeRO-3) and not."""

import json
from pathlib import Path

import pytest
import torch

from liverseg_dist.distributed.world import World
from tests.distributed.launch import torchrun
from tests.distributed.unet_job import BATCH, run

JOB = str(Path(__file__).with_name("unet_job.py"))

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "overrides",
    [["train.strategy=fsdp"], ["train.strategy=deepspeed", "train.zero_stage=3"]],
    ids=["fsdp", "zero 3"],
)
def test_sharded_and_checkpointed_equals_one_process(overrides: list[str]) -> None:
    done = torchrun(2, JOB, "[0, 1, 2]", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    alone = World.from_environment("cpu")
    losses, weights = run((), 3, lambda step: [step * BATCH + n for n in range(BATCH)], alone, [])
    assert sharded["names"] == sorted(weights)
    flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
    torch.testing.assert_close(
        torch.tensor(sharded["losses"]), torch.stack(losses).float(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(torch.tensor(sharded["weights"]), flat, rtol=1e-5, atol=1e-7)

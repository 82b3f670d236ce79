"""Frozen parts stay, the others learn at their level's rate; a profile and a row of HParams come with a run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from liverseg_dist.config import FineTuneConfig, ModelConfig, load_settings
from liverseg_dist.distributed.strategies.optimizers import build_optimizer
from liverseg_dist.distributed.strategies.parallelize import check_strategy, parallelize_model
from liverseg_dist.errors import UserError
from liverseg_dist.model.flops import peak_tflops, sample_flops
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.model.unet import UNet
from liverseg_dist.training.fine_tuning import freeze_parameters, parameter_groups
from tests.distributed.launch import liverseg
from tests.training.test_resume import arguments

CPU = torch.device("cpu")


def make(**changes: object) -> UNet:
    torch.manual_seed(0)
    return UNet(
        resolve_topology(
            ModelConfig(**{"features": (4, 6, 8), **changes}), (16, 16, 16), (1.0, 1.0, 1.0)
        )
    )


@pytest.mark.parametrize(
    ("what", "moves"), [("none", {"encoder", "decoder", "heads"}), ("encoder", {"decoder", "heads"}),
                        ("all_but_heads", {"heads"})]
)  # fmt: skip
@pytest.mark.parametrize(
    "overrides", [[], ["train.deterministic_reduction=true"]], ids=["plain", "fixed order"]
)
def test_frozen_parameters_do_not_change(what: str, moves: set[str], overrides: list[str]) -> None:
    config = load_settings([], [f"train.fine_tune.freeze={what}", *overrides]).train
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze_parameters(model, what)
    strategy = parallelize_model(
        model, CPU, config, (0, 1), lambda _: parameter_groups(model, config.fine_tune)
    )
    outputs = strategy.forward(torch.randn(1, 1, 16, 16, 16), last=True)
    strategy.backward(sum(out.square().mean() for out in outputs))
    strategy.step(0.1)
    changed = {
        name.partition(".")[0]
        for name, p in strategy.plain.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert changed == moves


def test_rates_fall_with_the_distance_from_the_output() -> None:
    model, config = make(), load_settings([], ["train.optimizer=sgd", "train.weight_decay=0"]).train
    optimizer = build_optimizer(config, parameter_groups(model, FineTuneConfig(layer_decay=0.5)))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(scale), "each parameter once"
    assert found["heads.0.weight"] == 1
    assert found["decoder.0.up.weight"] == 0.5
    assert found["decoder.1.up.weight"] == 0.25
    assert found["encoder.2.0.conv.weight"] == 0.125
    assert found["encoder.0.0.conv.weight"] == 0.03125


def test_layer_decay_with_deepspeed_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.fine_tune works with strategies ddp and fsdp"):
        check_strategy(
            load_settings(
                [], ["train.strategy=deepspeed", "train.fine_tune.layer_decay=0.9"]
            ).train,
            1,
            CPU,
        )


def test_arithmetic_of_a_step() -> None:
    """An upper level of one convolution, by hand: forward 2 k^3 inside outside voxels, backward twice that."""
    model = ModelConfig(
        features=(4,), strides=((1, 1, 1),), kernels=((3, 3, 3),), blocks_per_level=(1,)
    )
    voxels = 8 * 8 * 8
    first, head = 2 * 27 * 4 * voxels, 2 * 4 * 3 * voxels
    assert sample_flops(model, (8, 8, 8)) == 2 * first + 3 * head, "no gradient of the image"
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert peak_tflops("NVIDIA A100-SXM4-40GB", "tf32") == 156.0
    assert peak_tflops("NVIDIA A100-SXM4-40GB", "fp32") is None
    assert peak_tflops("cpu", "bf16") is None


def test_a_fine_tuned_run_with_profile_and_hparams(phantom_store: Path, tmp_path: Path) -> None:
    tune = (
        "train.fine_tune.freeze=encoder",
        "train.fine_tune.layer_decay=0.8",
        "train.ema_decay=0",
    )
    first, second = tmp_path / "first", tmp_path / "second"
    assert liverseg(*arguments(phantom_store, first, "train.max_steps=2")[2:]).returncode == 0
    done = liverseg(
        *arguments(phantom_store, second, *tune, "train.max_steps=3", "train.profile_steps=[2,3]")[
            2:
        ],
        f"model.pretrained={first}",
    )
    assert done.returncode == 0, done.stderr
    old, new = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    same = {name.partition(".")[0] for name in old if torch.equal(old[name], new[name])}
    assert same == {"encoder"}
    trace = json.loads((second / "profile" / "steps_2_3.json").read_text())
    assert any("convolution" in event.get("name", "") for event in trace["traceEvents"])
    board = EventAccumulator(str(second)).Reload()
    assert "_hparams_/session_start_info" in board.summary_metadata
    assert board.Scalars("result/loss")[-1].value > 0
    figures = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert figures[0]["speed/tflops_per_s_per_rank"] > 0
    assert {"train/pseudo_dice_liver", "speed/data_wait_share"} <= set(figures[0])

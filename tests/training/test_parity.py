"""Our trainer against a plain loop in PyTorch and MONAI: same start, same samples, same losses."""

import json
from pathlib import Path

import monai.losses
import monai.networks.nets
import pytest
import torch
from safetensors.torch import save_file

from liverseg_dist.config import load_settings
from liverseg_dist.data.loading import PatchSource
from liverseg_dist.training.components import open_store, resolve_settings
from tests.distributed.launch import liverseg

STEPS, BATCH, PATCH, RATE, FEATURES = 4, 2, (16, 32, 32), 0.02, (4, 8, 8)


def test_losses_equal_a_plain_loop_with_monais_network_and_loss(
    phantom_store: Path, tmp_path: Path
) -> None:
    """Also that `model.pretrained_names=monai` takes all of DynUNet's weights over."""
    overrides = [
        f"data.store={phantom_store}", f"data.patch_size={list(PATCH)}", "data.augmentation=none",
        f"model.features={list(FEATURES)}", "model.blocks_per_level=2", "model.deep_supervision=false",
        f"model.pretrained={tmp_path / 'start.safetensors'}", "model.pretrained_names=monai",
        f"train.max_steps={STEPS}", f"train.global_batch_size={BATCH}", f"train.learning_rate={RATE}",
        "train.log_every_steps=1", "train.threads=1", "validation.every_steps=0",
    ]  # fmt: skip
    settings = resolve_settings(
        load_settings([], overrides), open_store(load_settings([], overrides))
    )
    torch.manual_seed(0)
    net = monai.networks.nets.DynUNet(
        3, 1, 3, settings.model.kernels, settings.model.strides, settings.model.strides[1:], filters=FEATURES,
        norm_name=("INSTANCE", {"affine": True}), deep_supervision=False,
    )  # fmt: skip
    save_file(
        {name: tensor.clone() for name, tensor in net.state_dict().items()},
        tmp_path / "start.safetensors",
    )
    done = liverseg("train", "--device", "cpu", f"run.dir={tmp_path / 'run'}", *overrides)
    assert done.returncode == 0, done.stderr
    assert "not in the file" not in done.stdout
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]

    source = PatchSource(
        open_store(settings),
        open_store(settings).ids("train", 0),
        settings.data,
        settings.seed,
        BATCH,
    )
    optimizer = torch.optim.SGD(
        net.parameters(), lr=RATE, momentum=0.99, nesterov=True, weight_decay=3e-5
    )
    dice = monai.losses.DiceLoss(
        include_background=False, softmax=True, to_onehot_y=True, smooth_nr=2e-5, smooth_dr=2e-5
    )
    for step in range(STEPS):
        samples = [source.read_sample(step * BATCH + n) for n in range(BATCH)]
        affine = samples[0].intensity
        hu = torch.stack(
            [torch.from_numpy(sample.image_CDHW[0]).float() for sample in samples]
        ).unsqueeze(1)
        unit = (hu.clamp(affine.lower_hu, affine.upper_hu) - affine.lower_hu) / (
            affine.upper_hu - affine.lower_hu
        )
        label = torch.stack([torch.from_numpy(sample.label_DHW).long() for sample in samples])
        assert label.max() <= 2, "no padding, which MONAI's losses would count"
        logits = net((unit - affine.mean) / affine.std)
        loss = dice(logits, label.unsqueeze(1)) + torch.nn.functional.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS) ** 0.9
        optimizer.step()
        assert lines[step]["train/loss"] == pytest.approx(loss.item(), rel=2e-4), step
        assert lines[step]["train/gradient_norm"] == pytest.approx(norm.item(), rel=2e-3), step
        truth, found = label > 0, logits.argmax(1) > 0
        overlap = 2 * (truth & found).sum() / (truth.sum() + found.sum())
        assert lines[step]["train/pseudo_dice_liver"] == pytest.approx(overlap.item(), abs=2e-3), (
            step
        )

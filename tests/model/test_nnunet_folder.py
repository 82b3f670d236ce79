"""Result folders of nnU-Net v2: their networks, and files that are refused."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.model import build_model
from liverseg_dist.model.nnunet_folder import NnunetFolder
from liverseg_dist.model.pretrained import (
    apply_nnunet_settings,
    load_initial_weights,
    load_pretrained,
    name_other_network,
)
from tests.nnunet_results import (
    BLOCKS,
    CLASSES,
    compute_logits,
    make_plans,
    make_tensors,
    write_results,
)

KINDS = sorted(BLOCKS)
ORDER = (0, 1, 3, 2, 4)
"""From the axes of the files to those of the plans, and back."""


class RunsCode:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("kind", KINDS)
def test_network_gives_the_logits_of_nnunets_network(kind: str, tmp_path: Path) -> None:
    """With another order of axes, kernels that differ, and biases that have an effect."""
    config = ModelConfig(pretrained=write_results(tmp_path, kind), out_channels=CLASSES)
    config = apply_nnunet_settings(config)
    assert config.kernels is not None
    assert config.kernels[0] == (3, 1, 3), "z, y, x"
    model = build_model(config).eval()
    report = load_initial_weights(model, config)
    assert not report.missing
    assert "licence of its training data: CC-BY-SA 4.0" in str(report)
    image = torch.randn(1, 1, 8, 16, 12)
    with torch.no_grad():
        expected = compute_logits(make_tensors(kind), image.permute(ORDER)).permute(ORDER)
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of that package
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_dynamic_network_architectures(kind: str) -> None:
    networks = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    settings = make_plans(kind)["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    settings |= {
        "conv_op": torch.nn.Conv3d,
        "norm_op": torch.nn.InstanceNorm3d,
        "nonlin": torch.nn.LeakyReLU,
    }
    network = getattr(networks, kind)(input_channels=1, num_classes=CLASSES, **settings).eval()
    tensors = make_tensors(kind)
    assert not network.load_state_dict(tensors, strict=False).unexpected_keys
    image = torch.randn(1, 1, 8, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(network(image), compute_logits(tensors, image))


def test_training_with_other_classes_keeps_all_but_the_heads(tmp_path: Path) -> None:
    config = apply_nnunet_settings(ModelConfig(pretrained=write_results(tmp_path), out_channels=5))
    report = load_initial_weights(build_model(config), config)
    assert sorted(report.missing) == ["heads.0.bias", "heads.0.weight"]


def test_settings_that_contradict_the_folder_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig(pretrained=write_results(tmp_path), features=(4, 8, 16))
    assert apply_nnunet_settings(config).features == (4, 6, 8)
    assert "model.features is (4, 6, 8), as in" in caplog.text


def test_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    root = write_results(tmp_path, extra={"logging": RunsCode()})
    with pytest.raises(UserError, match="contains more than tensors"):
        NnunetFolder.open(root)


def test_fold_must_be_given_where_there_are_several(tmp_path: Path) -> None:
    root = write_results(tmp_path)
    assert NnunetFolder.open(root).checkpoint == NnunetFolder.open(root / "fold_0").checkpoint
    (root / "fold_1").mkdir()
    with pytest.raises(UserError, match=r"fold_N; it has fold_0, fold_1"):
        NnunetFolder.open(root)
    with pytest.raises(UserError, match=r"has none of checkpoint_final\.pth"):
        NnunetFolder.open(root / "fold_1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_class_name": "x.Primus"}, "the network is Primus, which this program does not"),
        ({"dropout_op": "torch.nn.Dropout3d"}, "the network has dropout_op="),
        ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, "the network has norm_op_kwargs="),
        ({"n_conv_per_stage_decoder": [1, 2]}, r"the decoder has \[2, 1\] convolutions"),
        ({"features_per_stage": [4, 8]}, "2 values for 3 levels"),
        ({"kernel_sizes": [[2, 2, 2]] * 3}, "the network is not supported: .*odd edges"),
    ],
)
def test_other_networks_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    plans = make_plans()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    for key, value in change.items():
        place = architecture if key in architecture else architecture["arch_kwargs"]
        place[key] = value
    with pytest.raises(UserError, match=message):
        NnunetFolder.open(write_results(tmp_path, plans=plans)).list_model_settings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ({"patch_size": [64, 64]}, "not a 3D network"),
        ({"inherits_from": "absent"}, "configuration absent cannot be found"),
        ({"inherits_from": "3d_fullres"}, "cannot be found"),
    ],
)
def test_other_configurations_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plans = make_plans()
    plans["configurations"]["3d_fullres"] |= change
    with pytest.raises(UserError, match=message):
        NnunetFolder.open(write_results(tmp_path, plans=plans))


def test_plans_before_version_2_3_describe_the_same_network(tmp_path: Path) -> None:
    """The keys that nnU-Net's `ConfigurationManager` turns into `architecture`."""
    plans = make_plans()
    earlier = copy.deepcopy(plans)
    configuration = earlier["configurations"]["3d_fullres"]
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "conv_kernel_sizes": arguments["kernel_sizes"],
        "pool_op_kernel_sizes": arguments["strides"],
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
    }
    now = NnunetFolder.open(write_results(tmp_path / "now", plans=plans))
    before = NnunetFolder.open(write_results(tmp_path / "before", plans=earlier))
    assert before.list_model_settings() == now.list_model_settings() | {"features": (4, 8, 8)}


@pytest.mark.parametrize(
    ("tensor", "network"),
    [
        ("conv_blocks_context.0.0.conv1.weight", "STU-Net"),
        ("conv_blocks_context.0.blocks.0.conv.weight", "nnU-Net v1"),
        ("swinViT.patch_embed.proj.weight", "SwinUNETR"),
        ("encoder.conv_init.weight", "CT-FM"),
        ("module.backbone.convInit.conv.weight", "SegResNet"),
        ("module.backbone.down_tr64.ops.0.conv1.weight", "SuPreM"),
    ],
)
def test_networks_of_other_projects_are_refused_by_name(
    tensor: str, network: str, tmp_path: Path
) -> None:
    torch.save({"net": {tensor: torch.zeros(2, 2)}}, tmp_path / "weights.pth")
    model = build_model(apply_nnunet_settings(ModelConfig(pretrained=write_results(tmp_path))))
    with pytest.raises(UserError, match=f"these are weights of .*{network}"):
        load_pretrained(model, tmp_path / "weights.pth")
    assert name_other_network(["encoder.0.0.conv.weight"]) is None

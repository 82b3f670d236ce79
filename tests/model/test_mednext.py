"""MedNeXt against MONAI's implementation with the same weights."""

from pathlib import Path

import pytest
import torch
from monai.networks.nets.mednext import MedNeXt, create_mednext
from safetensors.torch import save_file
from torch import nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.model import build_model
from liverseg_dist.model.external_weights import external_parameter_names
from liverseg_dist.model.pretrained import load_pretrained
from liverseg_dist.model.topology import resolve_topology

PATCH, SPACING_MM = (16, 32, 32), (1.0, 1.0, 1.0)


def make_config(**changes: object) -> ModelConfig:
    return resolve_topology(
        ModelConfig(architecture="mednext", **{"features": (4, 8, 16), **changes}),
        PATCH,
        SPACING_MM,
    )


@pytest.mark.parametrize("kernel_edge", [3, 5])
def test_logits_and_gradients_are_those_of_monai(kernel_edge: int, tmp_path: Path) -> None:
    config = make_config(
        kernel_edge=kernel_edge, expansion_ratios=(2, 3, 4), blocks_per_level=(1, 2, 1)
    )
    torch.manual_seed(4)
    reference = MedNeXt(
        init_filters=4, in_channels=1, out_channels=3, kernel_size=kernel_edge,
        use_residual_connection=True, encoder_expansion_ratio=(2, 3),
        decoder_expansion_ratio=(3, 2), bottleneck_expansion_ratio=4, blocks_down=(1, 2),
        blocks_bottleneck=1, blocks_up=(2, 1),
    )  # fmt: skip
    save_file(reference.state_dict(), tmp_path / "w.safetensors")
    model = build_model(config.model_copy(update={"deep_supervision": False}))
    names = external_parameter_names("monai", config)
    report = load_pretrained(model, tmp_path / "w.safetensors", names)
    assert report.missing == ["heads.0.weight", "heads.0.bias"]
    with torch.no_grad():
        # MONAI's head is a transposed convolution.
        model.heads[0].weight.copy_(reference.out_0.conv_out.weight.transpose(0, 1))
        model.heads[0].bias.copy_(reference.out_0.conv_out.bias)
    image = torch.randn(2, 1, *PATCH)
    first, second = reference(image), model(image)
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
    for logits in (first, second):
        logits.square().mean().backward()
    torch.testing.assert_close(
        model.encoder[0][0].weight.grad, reference.stem.weight.grad, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("preset", ["S", "B", "M", "L"])
def test_presets_have_the_parameters_of_the_paper(preset: str) -> None:
    """The number of parameters of MONAI's variants, without the heads for deep supervision."""
    config = resolve_topology(
        ModelConfig(architecture="mednext", preset=preset, deep_supervision=False),
        (128, 128, 128),
        SPACING_MM,
    )
    with torch.device("meta"):
        model, reference = build_model(config), create_mednext(preset, out_channels=3)
    assert count(model) == count(reference)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_strides_and_kernels_may_differ_between_axes() -> None:
    config = resolve_topology(
        ModelConfig(architecture="mednext", features=(4, 8, 8)), PATCH, (4.0, 1.0, 1.0)
    )
    assert config.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2))
    outputs = build_model(config.model_copy(update={"preset": "S"})).train()(
        torch.randn(1, 1, *PATCH)
    )
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    assert logits.shape == (1, 3, *PATCH)


def test_deep_supervision_and_recomputation_give_the_same_gradients() -> None:
    config = make_config(features=(4, 8, 8, 8), blocks_per_level=1)
    torch.manual_seed(1)
    model = build_model(config).train()
    image = torch.randn(1, 1, *PATCH)
    gradients = []
    for levels in ((), (0, 1, 2, 3)):
        model.zero_grad()
        model.set_checkpointing(levels)
        outputs = model(image)
        assert [tuple(logits.shape[2:]) for logits in outputs] == [PATCH, (8, 16, 16)]
        sum(logits.square().mean() for logits in outputs).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_kernels_of_3_start_kernels_of_5(tmp_path: Path) -> None:
    """UpKern: trilinear interpolation of the depthwise kernels; all else is copied."""
    small = build_model(make_config())
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    large = build_model(make_config(kernel_edge=5))
    report = load_pretrained(large, tmp_path / "w.safetensors")
    assert not report.missing
    kernel = small.encoder[0][1].depthwise.weight
    expected = nn.functional.interpolate(kernel, (5, 5, 5), mode="trilinear")
    assert torch.equal(large.encoder[0][1].depthwise.weight, expected)
    assert len(report.adapted) == sum("depthwise.weight" in name for name in small.state_dict())


def test_large_kernels_are_refused_for_other_architectures() -> None:
    with pytest.raises(UserError, match=r"model\.kernel_edge=5: model\.architecture=unet"):
        resolve_topology(ModelConfig(kernel_edge=5), PATCH, SPACING_MM)

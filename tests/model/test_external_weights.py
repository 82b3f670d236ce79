"""Weights with the parameter names of other projects (MONAI, nnU-Net)."""

from pathlib import Path

import monai.networks.nets
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.model import build_model
from liverseg_dist.model.external_weights import external_parameter_names
from liverseg_dist.model.pretrained import load_pretrained
from liverseg_dist.model.topology import resolve_topology

CONFIG = resolve_topology(
    ModelConfig(features=(4, 6, 8, 8), blocks_per_level=2), (16, 64, 64), (1.0, 1.0, 1.0)
)
assert len(set(CONFIG.strides)) == 3, (
    "strides differ; kernels do not, as DynUNet takes a decoder's from the level below"
)


def shuffled(net: nn.Module) -> nn.Module:
    """Random norms and biases, so that they have an effect."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return net.eval()


def test_network_gives_the_logits_of_monais_network(tmp_path: Path) -> None:
    reference = shuffled(monai.networks.nets.DynUNet(
        3, 1, 3, CONFIG.kernels, CONFIG.strides, CONFIG.strides[1:], filters=CONFIG.features,
        norm_name=("INSTANCE", {"affine": True}), deep_supervision=True, deep_supr_num=1,
    ))  # fmt: skip
    save_file(
        {name: tensor.clone() for name, tensor in reference.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    result = build_model(CONFIG).eval()
    report = load_pretrained(
        result, tmp_path / "w.safetensors", external_parameter_names("monai", CONFIG)
    )
    assert not report.missing
    image = torch.randn(1, 1, 16, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(result(image), reference(image), rtol=1e-4, atol=1e-4)


def test_nnunet_names_cover_every_tensor() -> None:
    """Names as its PlainConvUNet has them (dynamic-network-architectures 0.4)."""
    names = external_parameter_names("nnunet", CONFIG)
    result = build_model(CONFIG.model_copy(update={"upsampling_bias": True})).state_dict()
    assert set(result) <= set(names.values())
    assert names["decoder.transpconvs.0.bias"] == "decoder.2.up.bias"
    assert names["decoder.seg_layers.2.weight"] == "heads.0.weight"
    assert names["encoder.stages.1.0.convs.1.conv.weight"] == "encoder.1.1.conv.weight"


def test_file_of_names(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    save_file({"w": torch.ones(2, 2), "b": torch.ones(2)}, tmp_path / "w.safetensors")
    (tmp_path / "names.yaml").write_text("w: weight\nb: bias\n")
    assert not load_pretrained(
        net, tmp_path / "w.safetensors", external_parameter_names(tmp_path / "names.yaml", CONFIG)
    ).missing
    assert net.weight.eq(1).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "nnunet, monai or a file"), ("[1]", "one line"), ("a: {", "not valid YAML")],
)
def test_invalid_file_of_names_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "names.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        external_parameter_names(tmp_path / "names.yaml", CONFIG)


def test_other_networks_are_refused() -> None:
    with pytest.raises(UserError, match=r"does not support model\.architecture=resenc"):
        external_parameter_names("monai", CONFIG.model_copy(update={"architecture": "resenc"}))
    with pytest.raises(UserError, match="two convolutions per level"):
        external_parameter_names(
            "monai", CONFIG.model_copy(update={"blocks_per_level": (1, 2, 2, 2)})
        )

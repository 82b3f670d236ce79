"""Other projects' names for the parameters of an equal U-Net, for `model.pretrained_names`.

The networks must be equal: same features, kernels, strides and blocks per level. A convolution's bias right before an
instance norm has no effect and is left out; that of nnU-Net's transposed convolutions has (`model.upsampling_bias`).
"""

from collections.abc import Iterator
from pathlib import Path

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.texts.structured import read_yaml_as_text


def external_parameter_names(kind: str | Path, config: ModelConfig) -> dict[str, str]:
    """Their name -> ours. `kind`: nnunet, monai, or a YAML or JSON file of such pairs. Raises `UserError`."""
    makers = {"nnunet": _nnunet, "monai": _monai}
    if str(kind) not in makers:
        return _from_file(Path(kind))
    if config.architecture != "unet":
        raise UserError(
            f"model.pretrained_names={kind} knows the names of plain U-Nets only; give a file of names"
        )
    return dict(makers[str(kind)](config))


def _nnunet(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """PlainConvUNet of dynamic-network-architectures, whose decoder counts from the bottom."""
    blocks = _blocks(config)
    for level, count in enumerate(blocks):
        for block in range(count):
            yield from _pair(
                f"encoder.stages.{level}.0.convs.{block}",
                f"encoder.{level}.{block}",
                "conv",
                "norm",
            )
    for number, level in enumerate(range(len(blocks) - 2, -1, -1)):
        for block in range(blocks[level]):
            theirs = f"decoder.stages.{number}.convs.{block}"
            yield from _pair(theirs, f"decoder.{level}.convs.{block}", "conv", "norm")
        for kind in ("weight", "bias"):
            yield f"decoder.transpconvs.{number}.{kind}", f"decoder.{level}.up.{kind}"
            yield f"decoder.seg_layers.{number}.{kind}", f"heads.{level}.{kind}"


def _monai(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """DynUNet, https://docs.monai.io/en/stable/networks.html#dynunet

    Its decoder takes each level's kernel from the level below: where kernels differ, those tensors do not fit.
    """
    blocks = _blocks(config)
    if set(blocks) != {2}:
        raise UserError(
            f"MONAI's DynUNet has two convolutions per level, model.blocks_per_level is {list(blocks)}"
        )
    for level in range(len(blocks)):
        theirs = "input_block" if level == 0 else f"downsamples.{level - 1}"
        theirs = "bottleneck" if level == len(blocks) - 1 else theirs
        for block in range(2):
            yield from _pair(
                theirs, f"encoder.{level}.{block}", f"conv{block + 1}.conv", f"norm{block + 1}"
            )
    for number, level in enumerate(range(len(blocks) - 2, -1, -1)):
        yield f"upsamples.{number}.transp_conv.conv.weight", f"decoder.{level}.up.weight"
        for block in range(2):
            theirs, ours = f"upsamples.{number}.conv_block", f"decoder.{level}.convs.{block}"
            yield from _pair(theirs, ours, f"conv{block + 1}.conv", f"norm{block + 1}")
    for kind in ("weight", "bias"):
        yield f"output_block.conv.conv.{kind}", f"heads.0.{kind}"
        for level in range(1, len(blocks) - 1):
            yield f"deep_supervision_heads.{level - 1}.conv.conv.{kind}", f"heads.{level}.{kind}"


def _pair(theirs: str, ours: str, conv: str, norm: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.{conv}.weight", f"{ours}.conv.weight"
    for kind in ("weight", "bias"):
        yield f"{theirs}.{norm}.{kind}", f"{ours}.norm.{kind}"


def _blocks(config: ModelConfig) -> tuple[int, ...]:
    if not isinstance(config.blocks_per_level, tuple):
        raise ValueError("the config's topology is not filled in; call topology.resolve first")
    return config.blocks_per_level


def _from_file(path: Path) -> dict[str, str]:
    content = read_yaml_as_text(
        path, "; model.pretrained_names is nnunet, monai or a file of names"
    )
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise UserError(f"{path}: a line `their.name: our.name` for each tensor is expected")
    return content

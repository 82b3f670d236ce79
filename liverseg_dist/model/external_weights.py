"""Parameter names that other projects use for an equal U-Net, for `model.pretrained_names`.

The networks must be equal: same features, kernels, strides and blocks per level. A convolution's
bias directly before an instance norm has no effect and is ignored; the bias of nnU-Net's transposed
convolutions has an effect (`model.upsampling_bias`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.texts.structured import read_yaml_as_text


def external_parameter_names(kind: str | Path, config: ModelConfig) -> dict[str, str]:
    """Return the table from external name to this project's name.

    Args:
        kind: nnunet, monai, or a YAML or JSON file with such a table.
        config: settings `model.*` with the topology filled in.

    Raises:
        UserError: the file cannot be used, or the architecture has no table.
    """
    if str(kind) not in EXTERNAL_NAMES:
        return _read_names(Path(kind))
    list_names = EXTERNAL_NAMES[str(kind)].get(config.architecture)
    if list_names is None:
        raise UserError(
            f"model.pretrained_names={kind} does not support model.architecture="
            f"{config.architecture}; give a YAML file of names"
        )
    return dict(list_names(config))


def _list_plain_nnunet_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield names of PlainConvUNet of dynamic-network-architectures."""
    blocks = _resolved_blocks(config)
    for level, count in enumerate(blocks):
        for block in range(count):
            yield from _list_block_names(
                f"encoder.stages.{level}.0.convs.{block}",
                f"encoder.{level}.{block}",
                "conv",
                "norm",
            )
    yield from _list_nnunet_decoder_names(blocks[:-1])


def _list_residual_nnunet_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield names of ResidualEncoderUNet of dynamic-network-architectures."""
    blocks = _resolved_blocks(config)
    assert config.features is not None
    assert config.strides is not None
    channels = config.in_channels or 1
    if config.stem:
        yield from _list_block_names("encoder.stem.convs.0", "encoder.0.0", "conv", "norm")
        channels = config.features[0]
    for level, count in enumerate(blocks):
        for block in range(count):
            external = f"encoder.stages.{level}.blocks.{block}"
            # The stem is the first module of the first level.
            own = f"encoder.{level}.{block + (config.stem and level == 0)}"
            yield from _list_block_names(external, f"{own}.first", "conv1.conv", "conv1.norm")
            yield from _list_block_names(external, own, "conv2.conv", "conv2.norm")
            if block == 0 and channels != config.features[level]:
                # Average pooling, where there is one, comes before the projection.
                number = int(any(edge > 1 for edge in config.strides[level]))
                skip = f"{external}.skip.{number}"
                yield f"{skip}.conv.weight", f"{own}.shortcut.{number}.weight"
                for kind in ("weight", "bias"):
                    yield f"{skip}.norm.{kind}", f"{own}.shortcut.{number + 1}.{kind}"
        channels = config.features[level]
    yield from _list_nnunet_decoder_names((1,) * (len(blocks) - 1))


def _list_nnunet_decoder_names(blocks: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield names of UNetDecoder, whose levels are numbered from the bottom.

    Args:
        blocks: convolutions of each decoder level, full resolution first.
    """
    for number, level in enumerate(range(len(blocks) - 1, -1, -1)):
        for block in range(blocks[level]):
            external = f"decoder.stages.{number}.convs.{block}"
            yield from _list_block_names(external, f"decoder.{level}.convs.{block}", "conv", "norm")
        for kind in ("weight", "bias"):
            yield f"decoder.transpconvs.{number}.{kind}", f"decoder.{level}.up.{kind}"
            yield f"decoder.seg_layers.{number}.{kind}", f"heads.{level}.{kind}"


def _list_monai_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield names of DynUNet, https://docs.monai.io/en/stable/networks.html#dynunet

    Its decoder takes the kernel of the level below: where kernels differ, those tensors do not fit.
    """
    blocks = _resolved_blocks(config)
    # DynUNet has no setting for the number of blocks.
    if set(blocks) != {2}:
        raise UserError(
            "model.pretrained_names=monai: DynUNet has two convolutions per level, "
            f"but model.blocks_per_level is {list(blocks)}; set model.blocks_per_level=2"
        )
    for level in range(len(blocks)):
        external = "input_block" if level == 0 else f"downsamples.{level - 1}"
        external = "bottleneck" if level == len(blocks) - 1 else external
        for block in range(2):
            yield from _list_block_names(
                external, f"encoder.{level}.{block}", f"conv{block + 1}.conv", f"norm{block + 1}"
            )
    for number, level in enumerate(range(len(blocks) - 2, -1, -1)):
        yield f"upsamples.{number}.transp_conv.conv.weight", f"decoder.{level}.up.weight"
        for block in range(2):
            external, own = f"upsamples.{number}.conv_block", f"decoder.{level}.convs.{block}"
            yield from _list_block_names(external, own, f"conv{block + 1}.conv", f"norm{block + 1}")
    # The last head is DynUNet's output block, the others are its deep-supervision heads.
    for kind in ("weight", "bias"):
        yield f"output_block.conv.conv.{kind}", f"heads.0.{kind}"
        for level in range(1, len(blocks) - 1):
            yield f"deep_supervision_heads.{level - 1}.conv.conv.{kind}", f"heads.{level}.{kind}"


def _list_mednext_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield names of MedNeXt. Its heads have transposed weights, so they are left out."""
    blocks = _resolved_blocks(config)
    lowest = len(blocks) - 1
    for kind in ("weight", "bias"):
        yield f"stem.{kind}", f"encoder.0.0.{kind}"
    for level, count in enumerate(blocks):
        if level:
            yield from _list_mednext_block_names(f"down_blocks.{level - 1}", f"encoder.{level}.0")
        stage = "bottleneck" if level == lowest else f"enc_stages.{level}"
        for block in range(count):
            own = f"encoder.{level}.{block + 1}"
            yield from _list_mednext_block_names(f"{stage}.{block}", own)
    for number, level in enumerate(range(lowest - 1, -1, -1)):
        yield from _list_mednext_block_names(f"up_blocks.{number}", f"decoder.{level}.up")
        for block in range(blocks[level]):
            own = f"decoder.{level}.blocks.{block}"
            yield from _list_mednext_block_names(f"dec_stages.{number}.{block}", own)


def _list_mednext_block_names(external: str, own: str) -> Iterator[tuple[str, str]]:
    pairs = (
        ("conv1", "depthwise"),
        ("norm", "norm"),
        ("conv2", "expand"),
        ("conv3", "reduce"),
        ("res_conv", "shortcut"),
    )
    for theirs, ours in pairs:
        for kind in ("weight", "bias"):
            yield f"{external}.{theirs}.{kind}", f"{own}.{ours}.{kind}"


def _list_block_names(external: str, own: str, conv: str, norm: str) -> Iterator[tuple[str, str]]:
    yield f"{external}.{conv}.weight", f"{own}.conv.weight"
    for kind in ("weight", "bias"):
        yield f"{external}.{norm}.{kind}", f"{own}.norm.{kind}"


def _resolved_blocks(config: ModelConfig) -> tuple[int, ...]:
    if not isinstance(config.blocks_per_level, tuple):
        raise ValueError(
            "the topology of the settings is not filled in; call topology.resolve_topology first"
        )
    return config.blocks_per_level


def _read_names(path: Path) -> dict[str, str]:
    content = read_yaml_as_text(
        path, "; model.pretrained_names is nnunet, monai or a file of names"
    )
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise UserError(f"{path}: write one line `their.name: our.name` for each tensor")
    return content


EXTERNAL_NAMES = {
    "nnunet": {"unet": _list_plain_nnunet_names, "resenc": _list_residual_nnunet_names},
    "monai": {"unet": _list_monai_names, "mednext": _list_mednext_names},
}
"""Names by `model.pretrained_names` and `model.architecture`."""

"""Settings `model.*` from the network that nnU-Net's `plans.json` describes.

Two networks have an equal here: PlainConvUNet (`unet`) and ResidualEncoderUNet (`resenc` with a
stem). Every argument that changes the result is checked, so that no network is taken for another.
Used by `nnunet_folder`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError, printable

ARCHITECTURES = {
    "PlainConvUNet": ("unet", "n_conv_per_stage"),
    "ResidualEncoderUNet": ("resenc", "n_blocks_per_stage"),
}
"""Class of dynamic-network-architectures -> `model.architecture`, argument of the blocks."""
FIXED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "conv_op": ("torch.nn.modules.conv.Conv3d", "torch.nn.Conv3d"),
    "norm_op": (
        "torch.nn.modules.instancenorm.InstanceNorm3d",
        "torch.nn.InstanceNorm3d",
    ),
    "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
    "dropout_op": (None,),
    "nonlin": ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    "nonlin_kwargs": ({"inplace": True}, {"inplace": False}, {}),
    "nonlin_first": (None, False),
    "block": (None,),
    "bottleneck_channels": (None,),
    "stem_channels": (None,),
    "stochastic_depth_p": (None, 0.0),
    "squeeze_excitation": (None, False),
}
"""Arguments of the network, and the values that this program's networks have."""


def list_network_settings(
    configuration: Mapping[str, Any], file_axes: Sequence[int], where: Path
) -> dict[str, Any]:
    """Return the settings `model.*` of an equal network.

    Args:
        configuration: one configuration of `plans.json`.
        file_axes: for each axis of z, y, x its number in the plans.
        where: `plans.json`, for messages.

    Raises:
        UserError: the network has no equal in this program.
    """
    class_name, arguments = _read_architecture(configuration, where)
    if class_name not in ARCHITECTURES:
        raise UserError(
            f"{where}: the network is {printable(class_name)}, which this program does not have; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    architecture, blocks_key = ARCHITECTURES[class_name]
    for key, allowed in FIXED_ARGUMENTS.items():
        if arguments.get(key) not in allowed:
            value = printable(str(arguments.get(key)))[:80]
            raise UserError(f"{where}: the network has {key}={value}, which is not supported")
    try:
        stages = int(arguments["n_stages"])
        blocks = _repeat(arguments[blocks_key], stages)
        decoder_blocks = _repeat(arguments["n_conv_per_stage_decoder"], stages - 1)
        settings = {
            "architecture": architecture,
            "features": tuple(_repeat(arguments["features_per_stage"], stages)),
            "strides": _order_axes(arguments["strides"], file_axes),
            "kernels": _order_axes(arguments["kernel_sizes"], file_axes),
            "blocks_per_level": tuple(blocks),
            "norm": "instance",
            "stem": architecture == "resenc",
            # nnU-Net's transposed convolutions have a bias where its convolutions have one.
            "upsampling_bias": bool(arguments.get("conv_bias", False)),
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: the network is not described as expected ({error!r})") from None
    expected = blocks[:-1] if architecture == "unet" else [1] * (stages - 1)
    # nnU-Net counts the decoder's levels from the bottom.
    if decoder_blocks[::-1] != expected:
        raise UserError(
            f"{where}: the decoder has {decoder_blocks[::-1]} convolutions per level, full "
            f"resolution first; {architecture} has {expected}"
        )
    try:
        ModelConfig.model_validate(settings)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(f"{where}: the network is not supported: {problem['msg']}") from None
    return settings


def _read_architecture(
    configuration: Mapping[str, Any], where: Path
) -> tuple[str, Mapping[str, Any]]:
    """The class of the network without its module, and its arguments."""
    architecture = configuration.get("architecture")
    if isinstance(architecture, Mapping):
        name = str(architecture.get("network_class_name")).rpartition(".")[2]
        arguments = architecture.get("arch_kwargs")
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where}: arch_kwargs of the network are missing")
        return name, arguments
    if "UNet_class_name" not in configuration:
        raise UserError(f"{where}: the network is not described (architecture)")
    return _read_earlier_architecture(configuration, where)


def _read_earlier_architecture(
    configuration: Mapping[str, Any], where: Path
) -> tuple[str, Mapping[str, Any]]:
    """Plans of nnU-Net before 2.3, as its `ConfigurationManager` reads them."""
    name = str(configuration["UNet_class_name"])
    try:
        blocks = configuration["n_conv_per_stage_encoder"]
        base, cap = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
        features = [min(base * 2**level, cap) for level in range(len(blocks))]
        arguments = {
            "n_stages": len(blocks),
            "features_per_stage": features,
            "strides": configuration["pool_op_kernel_sizes"],
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "n_conv_per_stage": blocks,
            "n_blocks_per_stage": blocks,
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: the network is not described as expected ({error!r})") from None
    first_values = {key: allowed[0] for key, allowed in FIXED_ARGUMENTS.items()}
    return name, {**first_values, "conv_bias": True, **arguments}


def _repeat(value: Any, count: int) -> list[int]:
    """One number per level; a single number stands for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    numbers = [int(number) for number in values]
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} values for {count} levels")
    return numbers


def _order_axes(
    levels: Sequence[int | Sequence[int]], file_axes: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Values of each level in the order z, y, x."""
    ordered = []
    for level in levels:
        values = [level] * len(file_axes) if isinstance(level, int) else list(level)
        ordered.append(tuple(int(values[axis]) for axis in file_axes))
    return tuple(ordered)

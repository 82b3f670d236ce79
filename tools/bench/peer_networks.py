"""Networks of nnU-Net and MONAI with the topology of this project's settings.

The packages are imported when a network is built, because they need seconds and may be absent.
"""

import warnings

from torch import nn

from liverseg_dist.config import ModelConfig

CLASSES = 3


def build_plain_conv_unet(config: ModelConfig, deep_supervision: bool = False) -> nn.Module:
    """nnU-Net's PlainConvUNet, as its planner configures it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    assert config.features
    assert isinstance(config.blocks_per_level, tuple)
    return PlainConvUNet(
        **_common_arguments(config, deep_supervision),
        n_conv_per_stage=config.blocks_per_level,
        n_conv_per_stage_decoder=config.blocks_per_level[:-1],
    )


def build_residual_encoder_unet(config: ModelConfig, deep_supervision: bool = False) -> nn.Module:
    """nnU-Net's ResidualEncoderUNet, as its ResEnc planners configure it."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    assert config.features
    assert isinstance(config.blocks_per_level, tuple)
    return ResidualEncoderUNet(
        **_common_arguments(config, deep_supervision),
        n_blocks_per_stage=config.blocks_per_level,
        n_conv_per_stage_decoder=(1,) * (len(config.features) - 1),
    )


def build_nnunet(config: ModelConfig, deep_supervision: bool = False) -> nn.Module:
    """nnU-Net's network for an architecture of this project."""
    if config.architecture == "resenc":
        return build_residual_encoder_unet(config, deep_supervision)
    return build_plain_conv_unet(config, deep_supervision)


def _common_arguments(config: ModelConfig, deep_supervision: bool) -> dict[str, object]:
    assert config.features
    assert config.strides
    assert config.kernels
    return {
        "input_channels": 1,
        "n_stages": len(config.features),
        "features_per_stage": config.features,
        "conv_op": nn.Conv3d,
        "kernel_sizes": config.kernels,
        "strides": config.strides,
        "num_classes": CLASSES,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": deep_supervision,
    }


def build_dynunet(config: ModelConfig) -> nn.Module:
    """MONAI's DynUNet without deep supervision."""
    warnings.simplefilter("ignore")
    from monai.networks.nets import DynUNet

    assert config.features
    assert config.strides
    assert config.kernels
    return DynUNet(
        3,
        1,
        CLASSES,
        kernel_size=config.kernels,
        strides=config.strides,
        upsample_kernel_size=config.strides[1:],
        filters=config.features,
        norm_name=("INSTANCE", {"affine": True}),
        deep_supervision=False,
    )

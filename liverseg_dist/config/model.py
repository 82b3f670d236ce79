"""Settings of the network and its losses (`model.*`, `loss.*`)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from liverseg_dist.config.base import Section
from liverseg_dist.texts.paths import UserPath

Channels = Annotated[int, Field(ge=1, le=4096)]
Blocks = Annotated[int, Field(ge=1, le=64)]
Edge = Annotated[int, Field(ge=1, le=32)]
Kernel = tuple[Edge, Edge, Edge]
MAX_LEVELS = 16
NORM_GROUPS = 8
"""Of group norm; fewer where there are fewer channels."""


class ModelConfig(Section):
    architecture: Literal["unet", "resenc"] = "unet"
    """Plain-convolution U-Net, or residual-encoder U-Net."""
    preset: Literal["tiny", "S", "M", "L"] = "S"
    """Widths and depth where the keys below are null. tiny is meant for CPUs and tests."""
    features: tuple[Channels, ...] | None = Field(default=None, min_length=1, max_length=MAX_LEVELS)
    """Channels per level, highest resolution first; null: from the preset."""
    strides: tuple[Kernel, ...] | None = Field(default=None, min_length=1, max_length=MAX_LEVELS)
    """Stride (z, y, x) on entering each level, the first is 1, 1, 1; null: from the store's spacing and the patch."""
    kernels: tuple[Kernel, ...] | None = Field(default=None, min_length=1, max_length=MAX_LEVELS)
    """Kernel (z, y, x) of each level, odd; null: from the store's spacing."""
    blocks_per_level: Blocks | tuple[Blocks, ...] | None = None
    norm: Literal["instance", "group"] = "instance"
    deep_supervision: bool = True
    """Also train the outputs of the lower levels (all but the two lowest)."""
    regions: bool = False
    """Predict liver (label 1 or 2) and tumour as overlapping regions with sigmoids instead of three classes."""
    pretrained: UserPath | None = None
    """Weights to start from: a run, a safetensors file, or a foreign state dict (tensors only)."""
    pretrained_names: Literal["ours", "nnunet", "monai"] | UserPath = "ours"
    """Whose names that file uses: nnU-Net's PlainConvUNet, MONAI's DynUNet, or a YAML file `their.name: our.name`."""
    upsampling_bias: bool = False
    """A bias in the transposed convolutions, which nnU-Net's weights come with."""

    @model_validator(mode="after")
    def _same_depth(self) -> "ModelConfig":
        depths = {
            name: len(value)
            for name in ("features", "strides", "kernels")
            if (value := getattr(self, name)) is not None
        }
        if len(set(depths.values())) > 1:
            named = ", ".join(f"{name} has {n}" for name, n in depths.items())
            raise ValueError(
                f"one entry per level is needed in each list, but {named}; make them the same length"
            )
        return self

    @model_validator(mode="after")
    def _buildable(self) -> "ModelConfig":
        if self.strides is not None and self.strides[0] != (1, 1, 1):
            raise ValueError(
                f"the first of strides is [1, 1, 1], the image's own voxels, not {list(self.strides[0])}"
            )
        for kernel in self.kernels or ():
            if any(edge % 2 == 0 for edge in kernel):
                raise ValueError(
                    f"kernels have odd edges, so that a voxel is their centre; not {list(kernel)}"
                )
        for channels in (self.features or ()) if self.norm == "group" else ():
            if channels % min(NORM_GROUPS, channels):
                raise ValueError(
                    f"norm=group divides channels into {NORM_GROUPS} groups: {channels} cannot be"
                )
        return self


class LossConfig(Section):
    name: Literal[
        "dice_ce",
        "dice_focal",
        "tversky_ce",
        "tversky_focal",
        "dice_ce_boundary",
        "dice_focal_boundary",
        "dice",
        "tversky",
        "ce",
        "focal",
    ] = "dice_ce"
    """Its terms: overlap (dice or tversky), cross-entropy (plain or focal), distance to the true surface (boundary)."""
    class_weights: tuple[float, ...] | Literal["auto", "none"] = "none"
    """Weights of background, liver, tumour in the cross-entropy; auto: from the store's class frequencies."""
    dice_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)
    batch_dice: bool = False
    """Dice over the whole micro-batch at once (nnU-Net's batch dice) instead of per sample."""
    focal_gamma: float = Field(default=2.0, ge=0)
    tversky_alpha: float = Field(default=0.3, ge=0, le=1)
    """Weight of false positives; false negatives get 1 - alpha."""
    boundary_weight: float = Field(default=1.0, ge=0)
    boundary_reach_voxels: int = Field(default=8, ge=1)
    """Errors further from the true surface than this many voxels (of the finest axis) count alike."""

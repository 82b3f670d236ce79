"""Settings of the network and its losses (`model.*`, `loss.*`)."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from liverseg_dist.config.base import Section
from liverseg_dist.texts.paths import UserPath

Channels = Annotated[int, Field(ge=1, le=4096)]
Blocks = Annotated[int, Field(ge=1, le=64)]
Edge = Annotated[int, Field(ge=1, le=32)]
Kernel = tuple[Edge, Edge, Edge]
MAX_LEVELS = 16
NORM_GROUPS = 8
"""Groups of group normalisation; fewer if there are fewer channels."""


class ModelConfig(Section):
    architecture: Literal["unet", "resenc", "mednext"] = "unet"
    """unet: plain convolutions; resenc: residual encoder; mednext: MedNeXt's blocks, with depthwise
    convolutions."""
    preset: Literal["tiny", "S", "B", "M", "L"] = "S"
    """Channels and depth where the keys below are null. tiny is for CPUs and tests; S, B, M and L
    of mednext are those of its paper."""
    features: tuple[Channels, ...] | None = Field(default=None, min_length=1, max_length=MAX_LEVELS)
    """Channels per level, highest resolution first; null: from the preset."""
    strides: tuple[Kernel, ...] | None = Field(default=None, min_length=1, max_length=MAX_LEVELS)
    """Stride (z, y, x) on entering each level, the first is 1, 1, 1; null: from the store's spacing
    and the patch size."""
    kernels: tuple[Kernel, ...] | None = Field(default=None, min_length=1, max_length=MAX_LEVELS)
    """Kernel size (z, y, x) of each level, odd; null: from the store's spacing."""
    kernel_edge: Literal[3, 5] = 3
    """Edge of the kernels where `kernels` is null; 5 for mednext only, whose weights of 3 can start
    it (UpKern)."""
    expansion_ratios: tuple[Blocks, ...] | None = Field(
        default=None, min_length=1, max_length=MAX_LEVELS
    )
    """For mednext: channels within a block per channel of its input, for each level; null: from
    the preset."""
    blocks_per_level: Blocks | tuple[Blocks, ...] | None = None
    """Convolution blocks per level, one number or one per level; null: from the preset."""
    in_channels: Channels | None = None
    """Channels of the image; filled in from the store. null: 1."""
    out_channels: Channels | None = None
    """Channels of the output: classes with the background, or regions; filled in from the store.
    null: those of LiTS."""
    stem: bool = False
    """Begin with one more convolution at full resolution, as nnU-Net's residual encoders do;
    without effect for mednext."""
    norm: Literal["instance", "group"] = "instance"
    """Normalisation over each sample; mednext always normalises each channel."""
    deep_supervision: bool = True
    """Also compute the loss on the outputs of the lower levels (all but the two lowest)."""
    regions: bool = False
    """Predict the structures of the label scheme (liver with its tumours, tumour) as overlapping
    regions with sigmoids instead of exclusive classes with a softmax."""
    pretrained: UserPath | None = None
    """Initial weights: a run, a safetensors file, a state dict of another program (tensors only),
    or a result folder of nnU-Net v2, whose plans.json also decides model.*."""
    pretrained_names: Literal["ours", "nnunet", "monai"] | UserPath = "ours"
    """Parameter names in that file: of this program, of nnU-Net's U-Nets, of MONAI's DynUNet, or
    as a YAML file maps them (`name in the file: name here`). Without effect for a result folder of
    nnU-Net."""
    upsampling_bias: bool = False
    """Add a bias to the transposed convolutions, as nnU-Net's weights have."""

    @model_validator(mode="after")
    def _check_depths(self) -> "ModelConfig":
        depths = {}
        for name in ("features", "strides", "kernels"):
            value = getattr(self, name)
            if value is not None:
                depths[name] = len(value)
        if len(set(depths.values())) > 1:
            listing = ", ".join(f"{name} has {length}" for name, length in depths.items())
            raise ValueError(
                f"each list needs one entry per level, but {listing}; make them the same length"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> "ModelConfig":
        if self.strides is not None and self.strides[0] != (1, 1, 1):
            raise ValueError(
                "the first of strides is [1, 1, 1], the resolution of the image, not "
                f"{list(self.strides[0])}"
            )
        for kernel in self.kernels or ():
            if any(edge % 2 == 0 for edge in kernel):
                raise ValueError(
                    f"kernels have odd edges, so that a voxel is their centre; not {list(kernel)}"
                )
        for channels in (self.features or ()) if self.norm == "group" else ():
            if channels % min(NORM_GROUPS, channels):
                raise ValueError(
                    f"norm=group divides the channels into {NORM_GROUPS} groups, but {channels} is "
                    f"not divisible by {NORM_GROUPS}"
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
    """Terms of the loss: overlap (dice or tversky), cross-entropy (ce or focal), distance to the
    true surface (boundary)."""
    class_weights: tuple[float, ...] | dict[str, float] | Literal["auto", "none"] = "none"
    """Weights of the classes in the cross-entropy: a number for each class, background first, or
    numbers by name of the class (the others have 1); auto: from the store's class frequencies."""
    dice_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)
    batch_dice: bool = False
    """Compute Dice over the batch of all ranks and micro-batches (nnU-Net's batch dice) instead of
    per sample. With several micro-batches a step computes the network's output twice, for a third
    more time. Needs complete annotation, except on one rank with one micro-batch, where samples
    whose annotated structures differ are kept apart."""
    focal_gamma: float = Field(default=2.0, ge=0)
    tversky_alpha: float = Field(default=0.3, ge=0, le=1)
    """Weight of false positives; false negatives get 1 - alpha."""
    boundary_weight: float = Field(default=1.0, ge=0)
    boundary_reach_voxels: int = Field(default=8, ge=1)
    """Distances to the true surface are limited to this many voxels (of the finest axis)."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _check_named_weights(cls, value: Any) -> Any:
        # pydantic's own message would be about the first type that the setting accepts, a list.
        if isinstance(value, dict):
            for name, weight in value.items():
                is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
                if not is_number or not math.isfinite(weight):
                    raise ValueError(f"the weight of {name} is {weight!r}, which is not a number")
        return value

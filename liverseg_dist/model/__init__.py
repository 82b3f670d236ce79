"""Networks, losses and weights: plain `nn.Module`s without dependence on ranks or stores."""

from liverseg_dist.model.outputs import (
    OutputChannels,
    class_probabilities,
    foreground_probabilities_,
    labels_from_logits,
    log_odds,
    paint_regions,
)
from liverseg_dist.model.unet import UNet as UNet
from liverseg_dist.model.unet import UNet as build_model

__all__ = [
    "OutputChannels",
    "UNet",
    "build_model",
    "class_probabilities",
    "foreground_probabilities_",
    "labels_from_logits",
    "log_odds",
    "paint_regions",
]

"""The loss that nnU-Net trains with: its own where nnunetv2 is installed, else this project's."""

import importlib.util
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from liverseg_dist.config import LossConfig, Settings
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.losses.terms import subsample_label
from liverseg_dist.model.outputs import OutputChannels


def build_nnunet_loss(settings: Settings) -> tuple[nn.Module, str]:
    """Return the loss of outputs (full resolution first) and a label B D H W, and its name."""
    if importlib.util.find_spec("nnunetv2") is None:
        return _OurLoss(settings), "liverseg"
    return _NnunetLoss(), "nnU-Net"


class _OurLoss(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        outputs = OutputChannels(settings.data.label_scheme, settings.model.regions)
        self.loss = build_loss(LossConfig(), outputs)

    def forward(self, outputs: Sequence[Tensor], label_BDHW: Tensor) -> Tensor:
        # nnU-Net's lowest output has the weight 0, and this project's network does not have it.
        return self.loss(outputs[:-1], label_BDHW).total


class _NnunetLoss(nn.Module):
    """As `nnUNetTrainer._build_loss` builds it for exclusive classes."""

    def __init__(self) -> None:
        super().__init__()
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        self.loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)

    def forward(self, outputs: Sequence[Tensor], label_BDHW: Tensor) -> Tensor:
        weights = np.array([0.5**level for level in range(len(outputs))])
        weights[-1] = 0
        weights /= weights.sum()
        total = outputs[0].new_zeros(())
        for output, weight in zip(outputs, weights, strict=True):
            if weight:
                target = subsample_label(label_BDHW, output.shape[2:])[:, None]
                total = total + float(weight) * self.loss(output, target.long())
        return total

"""Fine-tuning: which weights are trained, and with which learning rate."""

from typing import Any

from liverseg_dist.config import FineTuneConfig
from liverseg_dist.model.unet import UNet


def freeze_parameters(model: UNet, what: str) -> None:
    """Exclude parameters from training.

    Normalisation layers need no special treatment: they have no running statistics.

    Args:
        what: `none`, `encoder` or `all_but_heads`.
    """
    if what != "none":
        model.encoder.requires_grad_(False)
    if what == "all_but_heads":
        model.decoder.requires_grad_(False)


def parameter_groups(model: UNet, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: one, or with a layer decay one per level.

    `lr_scale` of a group is layer_decay^distance, where distance counts levels from the output
    (discriminative fine-tuning, https://arxiv.org/abs/1801.06146).
    """
    if config.layer_decay == 1:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    found = [
        {
            "params": [p for p in part.parameters() if p.requires_grad],
            "lr_scale": config.layer_decay**distance,
        }
        for distance, part in enumerate(model.modules_from_output())
    ]
    return [group for group in found if group["params"]]

"""Which weights are trained, and how fast each."""

from typing import Any

from liverseg_dist.config import FineTuneConfig
from liverseg_dist.model.unet import UNet


def freeze_parameters(model: UNet, what: str) -> None:
    """`none`, `encoder` or `all_but_heads`: those are not trained. Norms here keep no running statistics."""
    if what != "none":
        model.encoder.requires_grad_(False)
    if what == "all_but_heads":
        model.decoder.requires_grad_(False)


def parameter_groups(model: UNet, config: FineTuneConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: one, or with a layer decay one per level, `lr_scale` falling with distance to the output.

    Layer-wise decay: https://arxiv.org/abs/1801.06146 (discriminative fine-tuning), as BEiT's per layer.
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

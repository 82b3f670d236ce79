"""What TensorBoard's HParams page compares runs by."""

from pathlib import Path

from liverseg_dist.config import Settings

COMPARED_SETTINGS = {
    "data": ("fold", "patch_size", "augmentation", "oversample_foreground"),
    "model": ("architecture", "preset", "norm", "regions", "pretrained"),
    "loss": ("name", "class_weights"),
    "train": ("max_steps", "learning_rate", "global_batch_size", "optimizer", "momentum", "weight_decay", "ema_decay",
              "strategy", "precision"),
}  # fmt: skip


def comparable_settings(settings: Settings) -> dict[str, str | float]:
    """`section.key` -> value; what is no number becomes text."""
    tree = settings.model_dump()
    found = {
        f"{section}.{key}": tree[section][key]
        for section, keys in COMPARED_SETTINGS.items()
        for key in keys
    }
    found |= {"seed": settings.seed, "schedule": settings.train.schedule.name}
    return {
        name: value
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else _shown(value)
        for name, value in found.items()
    }


def _shown(value: object) -> str:
    if isinstance(value, Path):
        return value.name
    return str(list(value) if isinstance(value, tuple) else value)

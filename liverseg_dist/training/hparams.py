"""The settings by which TensorBoard's HParams page compares runs."""

from pathlib import Path

from liverseg_dist.config import Settings

COMPARED_SETTINGS = {
    "data": ("fold", "patch_size", "augmentation", "oversample_foreground"),
    "model": ("architecture", "preset", "norm", "regions", "pretrained"),
    "loss": ("name", "class_weights"),
    "train": (
        "max_steps",
        "learning_rate",
        "global_batch_size",
        "optimizer",
        "momentum",
        "weight_decay",
        "ema_decay",
        "strategy",
        "precision",
    ),
}
"""Section -> keys."""


def comparable_settings(settings: Settings) -> dict[str, str | float]:
    """Return `section.key` -> value. Values that are not numbers become text."""
    tree = settings.model_dump()
    found: dict[str, str | float] = {}
    for section, keys in COMPARED_SETTINGS.items():
        for key in keys:
            found[f"{section}.{key}"] = _to_comparable(tree[section][key])
    found["seed"] = settings.seed
    found["schedule"] = settings.train.schedule.name
    return found


def _to_comparable(value: object) -> str | float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    # Without its folders: TensorBoard logs are shown to others.
    if isinstance(value, Path):
        return value.name
    return str(list(value) if isinstance(value, tuple) else value)

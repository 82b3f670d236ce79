"""Names of the figures of a training, in `metrics.jsonl` and as TensorBoard tags.

TensorBoard shows cards in alphabetical order of the part before the slash. Its groups are therefore
dice, evaluation, loss, optimizer, resources, speed: the quality of the model comes first.
`metrics.jsonl` keeps other names, because programs read them.
"""

BOARD_TAGS = {
    "train/loss": "loss/total",
    "train/learning_rate": "optimizer/learning_rate",
    "train/gradient_norm": "optimizer/gradient_norm",
    "validation/score": "dice/validation_mean",
}
BOARD_PREFIXES = {
    "validation/dice_": "dice/validation_",
    "train/pseudo_dice_": "dice/training_patches_",
    "memory/": "resources/memory_",
}
LOSS_PARTS = {"ce": "cross_entropy"}
"""Full names of parts of the loss (`model.losses`) that have an abbreviation."""


def part_name(name: str) -> str:
    """Name in `metrics.jsonl` of a figure that a step returns in addition to its loss.

    `loss/dice` is the Dice loss (lower is better); `train/pseudo_dice_*` is the Dice of patches.
    """
    if name.startswith("pseudo_dice_"):
        return f"train/{name}"
    return f"loss/{LOSS_PARTS.get(name, name)}"


def board_tag(name: str) -> str:
    """The TensorBoard tag of a figure."""
    if name in BOARD_TAGS:
        return BOARD_TAGS[name]
    for prefix, group in BOARD_PREFIXES.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return name

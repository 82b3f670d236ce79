"""Names of a training's figures: in `metrics.jsonl`, and as TensorBoard tags.

TensorBoard shows cards in alphabetical order of the part before the slash. Its groups are therefore dice, evaluation,
loss, optimizer, resources, speed: what a training is judged by comes first. `metrics.jsonl` keeps the names that
programs read.
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
"""Short names of the loss's parts (`model.losses`) whose meaning is not plain from the name."""


def part_name(name: str) -> str:
    """Name in `metrics.jsonl` of what a step returns beside its loss: `loss/dice` is the Dice loss, which falls."""
    return (
        f"train/{name}" if name.startswith("pseudo_dice_") else f"loss/{LOSS_PARTS.get(name, name)}"
    )


def board_tag(name: str) -> str:
    """The TensorBoard tag of a figure."""
    if name in BOARD_TAGS:
        return BOARD_TAGS[name]
    for prefix, group in BOARD_PREFIXES.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return name

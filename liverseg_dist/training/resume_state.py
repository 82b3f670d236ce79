"""The part of a run's state that is not tensors: step, scores, gradient scaler.

A checkpoint stores it as JSON, so names of the fields are part of the checkpoint's format.
"""

from dataclasses import dataclass, field
from typing import Any

from liverseg_dist.errors import RunFailed

MAX_SHOWN_STRUCTURES = 6
"""Structures whose Dice is shown one by one in the progress line."""


@dataclass
class ResumeState:
    """What a resumed run needs besides tensors."""

    step: int = 0
    """Optimizer steps done; the number of samples is step * global_batch_size."""
    best_score: float = float("-inf")
    best_step: int = 0
    last_dice: dict[str, float] = field(default_factory=dict)
    """Dice by structure of the last validation, which was after `last_dice_step`."""
    last_dice_step: int = 0
    pending_validation: bool = False
    """Whether the validation after `step` was interrupted by a stop. It is run after resuming."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler (fp16); empty for other precisions."""

    def describe_dice(self) -> str:
        """Return the Dice of the last validation with its step; empty before the first one."""
        if not self.last_dice:
            return ""
        dice = ", ".join(f"{name} {value:.3f}" for name, value in self.last_dice.items())
        if len(self.last_dice) > MAX_SHOWN_STRUCTURES:
            # One line has no room for all; `metrics.jsonl` and TensorBoard have them.
            mean = sum(self.last_dice.values()) / len(self.last_dice)
            lowest = min(self.last_dice, key=lambda name: self.last_dice[name])
            dice = f"mean {mean:.3f} of {len(self.last_dice)} structures"
            dice += f", lowest {lowest} {self.last_dice[lowest]:.3f}"
        step = f" (step {self.last_dice_step})" if self.last_dice_step else ""
        return f"Dice {dice}{step}"


def parse_progress(state: dict[str, Any]) -> ResumeState:
    """Read the progress from a checkpoint's state.

    Raises:
        RunFailed: another version of this program wrote the checkpoint.
    """
    try:
        progress = ResumeState(**state["progress"])
        if progress.step != state["step"]:
            raise ValueError(f"its progress is of step {progress.step}")
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailed(
            f"the checkpoint of step {state['step']} cannot be read by this version ({error}); "
            "remove it to continue from an earlier one"
        ) from None
    return progress

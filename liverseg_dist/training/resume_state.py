"""The part of a run's state that is not tensors: step, scores, gradient scaler.

A checkpoint stores it as JSON, so names of the fields are part of the checkpoint's format.
"""

from dataclasses import dataclass, field
from typing import Any

from liverseg_dist.errors import RunFailed


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
        dice = ", ".join(f"{name} {value:.3f}" for name, value in self.last_dice.items())
        if not dice:
            return ""
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

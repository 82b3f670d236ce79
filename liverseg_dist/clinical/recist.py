"""RECIST 1.1 for lesions of organs: target choice, response of targets, of the others, and overall.

Eisenhauer et al. 2009, https://doi.org/10.1016/j.ejca.2008.10.026. The rules are stated beside the
code. Lymph nodes (short axis) are not handled: a label scheme of organs has none. Where RECIST asks
for a reader's judgement, the rule that stands in for it is a constant here, and the result names
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Response = Literal["CR", "PR", "SD", "PD", "NE"]
NonTarget = Literal["CR", "non-CR/non-PD", "PD", "NE", "none"]
Overall = Literal["CR", "PR", "SD", "PD", "NE", "non-CR/non-PD", "ND"]

MAX_TARGETS = 5
MAX_TARGETS_PER_ORGAN = 2
MEASURABLE_MM = 10.0
"""Longest diameter, with slices of at most 5 mm; with thicker ones twice the slice thickness."""
THICK_SLICE_MM = 5.0
PARTIAL_RESPONSE = 0.30
PROGRESSION = 0.20
PROGRESSION_MM = 5.0
VOLUME_PARTIAL_RESPONSE = 0.66
VOLUME_PROGRESSION = 0.73
"""The volumes that belong to 30 % less and 20 % more in diameter of a ball (1 - 0.7^3, 1.2^3 -
1)."""
NEW_LESION_MM = 5.0
"""A new lesion of at least this long axis is unequivocal; smaller ones ask for the next date."""
BEST_FIRST: tuple[Overall, ...] = ("CR", "PR", "SD", "non-CR/non-PD", "PD", "NE", "ND")
EPSILON = 1e-9


@dataclass(frozen=True)
class BaselineLesion:
    """What the choice of targets asks of a lesion at baseline.

    Attributes:
        name: Its identity over the dates.
        organ: Where it lies.
        long_axis_mm: Longest axial diameter.
        is_whole: False where the scan cuts it: its size cannot be followed.
    """

    name: str
    organ: str
    long_axis_mm: float
    is_whole: bool = True


@dataclass(frozen=True)
class Assessment:
    """Response at one date.

    Attributes:
        target: Response of the target lesions, None without any.
        non_target: Of all other lesions.
        new_lesions: Whether an unequivocal new lesion was found.
        overall: Both and new lesions together.
        rule: The rule that decided, in one sentence.
    """

    target: Response | None
    non_target: NonTarget
    new_lesions: bool
    overall: Overall
    rule: str


def measurable_mm(slice_mm: float) -> float:
    """Least long axis of a measurable lesion at this slice thickness."""
    return MEASURABLE_MM if slice_mm <= THICK_SLICE_MM else 2.0 * slice_mm


def choose_targets(lesions: Sequence[BaselineLesion], slice_mm: float) -> list[str]:
    """Names of the target lesions: the largest measurable ones, at most five, at most two in an
    organ.

    Lesions that the scan cuts are no targets. Of lesions of one size the first in order counts.
    """
    least = measurable_mm(slice_mm)
    # The tolerance: 10 mm from floating-point arithmetic must not fail at 9.9999999.
    candidates = [one for one in lesions if one.is_whole and one.long_axis_mm >= least - EPSILON]
    chosen: list[BaselineLesion] = []
    # Stable sort: of equal sizes the first one in order is chosen.
    for lesion in sorted(candidates, key=lambda one: -one.long_axis_mm):
        in_organ = sum(other.organ == lesion.organ for other in chosen)
        if len(chosen) < MAX_TARGETS and in_organ < MAX_TARGETS_PER_ORGAN:
            chosen.append(lesion)
    return [lesion.name for lesion in chosen]


def target_response(
    baseline_mm: float, nadir_mm: float, current_mm: float, all_measured: bool, all_gone: bool
) -> tuple[Response, str]:
    """Response of the target lesions and its rule.

    Args:
        baseline_mm: Sum of their long axes at baseline.
        nadir_mm: Smallest sum until the date before, baseline included.
        current_mm: Sum of those that were measured now.
        all_measured: Whether every target could be measured (or seen to be gone).
        all_gone: Whether none is left.

    Returns:
        (category, rule). Progression is stated before all else: what was measured suffices for it.
    """
    growth_mm = current_mm - nadir_mm
    # The nadir, not the baseline: regrowth after a response is progression.
    grows = nadir_mm > 0 and growth_mm >= PROGRESSION * nadir_mm - EPSILON
    if (grows or (nadir_mm == 0 and current_mm > 0)) and growth_mm >= PROGRESSION_MM - EPSILON:
        return (
            "PD",
            f"sum {_change(current_mm, nadir_mm)} over its smallest value and {growth_mm:.1f} mm (>= 20 % and >= 5 mm)",
        )
    # Progression above is certain without the missing lesions; everything below is not.
    if not all_measured:
        return "NE", "not every target lesion could be measured"
    if all_gone:
        return "CR", "every target lesion has disappeared"
    if current_mm <= (1 - PARTIAL_RESPONSE) * baseline_mm + EPSILON:
        return "PR", f"sum {_change(current_mm, baseline_mm)} from baseline (<= -30 %)"
    return "SD", (
        f"sum {_change(current_mm, baseline_mm)} from baseline, {_change(current_mm, nadir_mm)} and "
        f"{growth_mm:+.1f} mm over its smallest value: neither PR nor PD"
    )


def volume_response(
    baseline_ml: float, nadir_ml: float, current_ml: float, all_measured: bool, all_gone: bool
) -> tuple[Response, str]:
    """As `target_response`, by the volume of the targets: -66 % from baseline, +73 % over the
    smallest volume."""
    if nadir_ml > 0 and current_ml >= (1 + VOLUME_PROGRESSION) * nadir_ml - EPSILON:
        return "PD", f"volume {_change(current_ml, nadir_ml)} over its smallest value (>= +73 %)"
    if not all_measured:
        return "NE", "not every target lesion could be measured"
    if all_gone:
        return "CR", "every target lesion has disappeared"
    if nadir_ml == 0:
        return "PD", "targets that had disappeared are back"
    if current_ml <= (1 - VOLUME_PARTIAL_RESPONSE) * baseline_ml + EPSILON:
        return "PR", f"volume {_change(current_ml, baseline_ml)} from baseline (<= -66 %)"
    return "SD", f"volume {_change(current_ml, baseline_ml)} from baseline: neither PR nor PD"


def non_target_response(
    baseline_ml: float, nadir_ml: float, current_ml: float, all_seen: bool, count: int
) -> tuple[NonTarget, str]:
    """Response of all lesions that are no targets, by their total volume.

    Unequivocal progression is a reader's judgement in RECIST; its text calls a growth of the whole
    burden by 73 % in volume comparable to progression of a measurable lesion, and that stands in
    for it here.
    """
    if count == 0:
        return "none", "no lesions beside the targets"
    if nadir_ml > 0 and current_ml >= (1 + VOLUME_PROGRESSION) * nadir_ml - EPSILON:
        return (
            "PD",
            f"volume of the other lesions {_change(current_ml, nadir_ml)} (>= +73 %, for unequivocal progression)",
        )
    # Reappearance has no percentage: the volume before was 0.
    if nadir_ml == 0 and current_ml > 0:
        return "PD", "other lesions that had disappeared are back"
    if not all_seen:
        return "NE", "not every other lesion could be seen"
    if current_ml == 0:
        return "CR", "all other lesions have disappeared"
    return "non-CR/non-PD", "other lesions persist"


def overall_response(
    target: Response | None, non_target: NonTarget, new_lesions: bool
) -> tuple[Overall, str]:
    """Tables 1 and 2 of RECIST 1.1: (category, the rule)."""
    # Table 1: a new lesion is progression, independent of all measurements.
    if new_lesions:
        return "PD", "a new lesion is progression"
    if target == "PD":
        return "PD", "progression of the targets"
    if non_target == "PD":
        return "PD", "progression of the other lesions"
    if target is None:
        return _without_targets(non_target)
    if target == "NE":
        return "NE", "targets not evaluable, no progression elsewhere"
    if target == "CR":
        if non_target in ("CR", "none"):
            return "CR", "all lesions have disappeared"
        # RECIST calls it PR although no target is left: the disease is not gone.
        return "PR", "targets have disappeared, other lesions have not, or were not all seen"
    return target, "response of the targets, without progression elsewhere"


def _without_targets(non_target: NonTarget) -> tuple[Overall, str]:
    if non_target == "none":
        return "ND", "no lesion at baseline and none now"
    if non_target == "CR":
        return "CR", "all lesions have disappeared"
    if non_target == "NE":
        return "NE", "not every lesion could be seen"
    return "non-CR/non-PD", "no measurable lesion at baseline; lesions persist"


def best_response(responses: Sequence[Overall]) -> tuple[Overall, int]:
    """Best overall response and its position: the best one until progression, that one included.

    Without confirmation by a later scan and without a least duration of SD: both depend on the
    protocol of a trial.

    Args:
        responses: Of the dates after the baseline, in order; at least one.
    """
    until = list(responses)
    if "PD" in until:
        until = until[: until.index("PD") + 1]
    number = min(range(len(until)), key=lambda index: BEST_FIRST.index(until[index]))
    return until[number], number


def is_new_lesion(long_axis_mm: float) -> bool:
    """Whether a lesion without predecessor is large enough to count as new."""
    return long_axis_mm >= NEW_LESION_MM - EPSILON


def _change(now: float, before: float) -> str:
    return f"{100 * (now / before - 1):+.0f} %" if before > 0 else "from 0"

"""What a reader must know before trusting a follow-up: whether two registered scans show one
patient (overlap and texture of the organ after the rigid step), whether the registration fits, and
whether the scans show the organ as a whole."""

from collections.abc import Sequence

from liverseg_dist.clinical.quantify import StructureQuantities
from liverseg_dist.clinical.registration import Registration

LEAST_RIGID_DICE = 0.86
"""Organs that overlap less after the rigid step, where both scans show the patient, are taken for
two patients'. Real livers of different patients reached 0.74 to 0.80, two pairs of one patient
0.93."""
LEAST_SIMILARITY, CLEAR_RIGID_DICE = 0.25, 0.90
"""So are organs whose textures correlate less, unless they overlap this well: another contrast
phase changes the texture. After the rigid step it was 0.03 to 0.18 of different patients, 0.65 and
0.70 of one."""


VOLUME_RANGE = (0.6, 1.7)
"""Of an organ's volume to that of the baseline; other ratios are reported."""
GOOD_DICE, GOOD_SURFACE_MM = 0.90, 8.0
"""A worse overlap, or a worse 95th percentile of the surfaces' distance, is reported: two pairs of
real scans reached Dice 0.96 and 0.97 and 3.7 and 3.0 mm."""


def describe_poor_fit(registration: Registration, name: str, organ: str) -> list[str]:
    """Warnings about a registration that fits badly or folds; the matches then need a reader."""
    quality = registration.quality
    found = []
    if quality.dice < GOOD_DICE or quality.surface_p95_mm > GOOD_SURFACE_MM:
        found.append(
            f"{name}: the {organ} fits the baseline's poorly after registration (Dice "
            f"{quality.dice:.2f}, 95 % of the surface within {quality.surface_p95_mm:.1f} mm); check "
            "which lesion is which"
        )
    if quality.folding > 0:
        found.append(
            f"{name}: the registration folds in {100 * quality.folding:.2f} % of the {organ}; check "
            "which lesion is which there"
        )
    return found


def find_mismatch(registration: Registration, baseline: str, name: str, organ: str) -> str | None:
    """Why two scans are not taken for one patient's, or None."""
    quality = registration.quality
    remedy = "check that both are of one patient, or go on with --allow-mismatch"
    if quality.rigid_dice < LEAST_RIGID_DICE:
        return (
            f"{name} and {baseline}: the {organ} overlaps by Dice {quality.rigid_dice:.2f} after rigid registration "
            f"(below {LEAST_RIGID_DICE:.2f}); {remedy}"
        )
    similarity = quality.rigid_similarity
    if (
        similarity is not None
        and similarity < LEAST_SIMILARITY
        and quality.rigid_dice < CLEAR_RIGID_DICE
    ):
        return (
            f"{name} and {baseline}: the texture of the {organ} correlates by {similarity:.2f} after rigid "
            f"registration (below {LEAST_SIMILARITY:.2f}); {remedy}"
        )
    return None


def describe_organ_changes(
    names: Sequence[str], organs: Sequence[StructureQuantities]
) -> list[str]:
    """Warnings about scans that cut the organ or show it with another volume.

    Args:
        names: Of the scans, baseline first.
        organs: What was measured of the organ in each of them.
    """
    warnings = []
    for name, organ in zip(names, organs, strict=True):
        if organ.cut_by:
            faces = ", ".join(organ.cut_by)
            warnings.append(
                f"{name}: the scan cuts the {organ.structure} ({faces}); lesions beyond are not seen"
            )
    baseline_ml = organs[0].volume_ml
    for name, organ in zip(names[1:], organs[1:], strict=True):
        # A resection or an incomplete mask; the sizes of lesions are still valid.
        if not VOLUME_RANGE[0] <= organ.volume_ml / baseline_ml <= VOLUME_RANGE[1]:
            warnings.append(
                f"{name}: the {organ.structure} has {organ.volume_ml / baseline_ml:.1f} times its "
                "volume at baseline"
            )
    return warnings

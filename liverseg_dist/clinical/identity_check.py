"""Whether two registered scans show one patient: overlap and texture of the organ after the rigid step."""

from liverseg_dist.clinical.registration import Registration

LEAST_RIGID_DICE = 0.86
"""Organs that overlap less after the rigid step, where both scans show the patient, are taken for
two patients'. Real livers of different patients reached 0.74 to 0.80, two pairs of one patient
0.93."""
LEAST_SIMILARITY, CLEAR_RIGID_DICE = 0.25, 0.90
"""So are organs whose textures correlate less, unless they overlap this well: another contrast
phase changes the texture. After the rigid step it was 0.03 to 0.18 of different patients, 0.65 and
0.70 of one."""


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

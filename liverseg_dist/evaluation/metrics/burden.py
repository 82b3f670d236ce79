"""Burden: the share of an organ that is lesion, for example the tumour burden of the liver.

LiTS scores the difference between predicted and true burden over cases as a root mean square and as
a maximum. Its scorer takes the maximum of the signed difference (truth - prediction), which ignores
overestimates; here it is the maximum of the absolute difference. A case whose truth has no organ
has no burden and is left out. A prediction without organ counts as burden 0 (the scorer uses 9001).
"""

from liverseg_dist.evaluation.metrics.overlap import OverlapCounts


def compute_burden(organ_voxels: int, lesion_voxels: int) -> float | None:
    """Lesion / organ in voxels (the organ includes its lesions); None without an organ."""
    return lesion_voxels / organ_voxels if organ_voxels else None


def score_burden(organ: OverlapCounts, lesion: OverlapCounts) -> dict[str, float | None]:
    """Burden of one case: `truth`, `prediction` and `error` = prediction - truth."""
    truth = compute_burden(organ.truth, lesion.truth)
    prediction = compute_burden(organ.prediction, lesion.prediction) or 0.0
    return {
        "truth": truth,
        "prediction": prediction,
        "error": None if truth is None else prediction - truth,
    }

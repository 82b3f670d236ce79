"""Tumour burden: the share of the liver (label 1 or 2) that is tumour (label 2).

LiTS scores the difference between predicted and true burden over cases as a root mean square and as
a maximum. Its scorer takes the maximum of the signed difference (truth - prediction), which ignores
overestimates; here it is the maximum of the absolute difference. A case whose truth has no liver
has no burden and is left out. A prediction without liver counts as burden 0 (the scorer uses 9001).
"""

from liverseg_dist.evaluation.metrics.overlap import OverlapCounts


def compute_burden(liver_voxels: int, tumour_voxels: int) -> float | None:
    """Tumour / liver in voxels (the liver includes its tumours); None without a liver."""
    return tumour_voxels / liver_voxels if liver_voxels else None


def score_burden(liver: OverlapCounts, tumour: OverlapCounts) -> dict[str, float | None]:
    """Burden of one case: `truth`, `prediction` and `error` = prediction - truth."""
    truth = compute_burden(liver.truth, tumour.truth)
    prediction = compute_burden(liver.prediction, tumour.prediction) or 0.0
    return {
        "truth": truth,
        "prediction": prediction,
        "error": None if truth is None else prediction - truth,
    }

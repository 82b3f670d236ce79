"""All scores of one case, as a JSON-able dict that `summary.aggregate_scores` pools exactly."""

import math
from typing import Any

import numpy as np

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.metrics.boxes import find_joint_box
from liverseg_dist.evaluation.metrics.burden import score_burden
from liverseg_dist.evaluation.metrics.lesions import LITS_CONNECTIVITY, score_lesions
from liverseg_dist.evaluation.metrics.overlap import count_confusion, count_structures
from liverseg_dist.evaluation.metrics.surface import score_surface
from liverseg_dist.labels import IGNORE, TUMOUR
from liverseg_dist.volume import Float3

METRICS_VERSION = 1
"""Raised whenever a definition changes; part of every ledger fingerprint."""


def score_case(
    case_id: str,
    prediction_zyx: np.ndarray,
    truth_zyx: np.ndarray,
    spacing_mm: Float3,
    connectivity: int = LITS_CONNECTIVITY,
) -> dict[str, Any]:
    """Overlap, surface, lesion and burden scores of one case.

    Masks are integer arrays (z, y, x) of labels 0, 1, 2 on one grid; where the truth is 255, both are left out.
    `spacing_mm` is z, y, x. Raises `UserError` on shapes that differ or on other labels.
    """
    spacing: Float3 = (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))
    prediction, truth = _checked(case_id, prediction_zyx, truth_zyx)
    box = find_joint_box(prediction, truth) or (slice(0, 1),) * 3
    prediction, truth = (np.ascontiguousarray(mask[box]) for mask in (prediction, truth))
    counts = count_structures(count_confusion(prediction, truth))
    voxel_ml = math.prod(spacing) / 1000.0
    result: dict[str, Any] = {
        "case_id": case_id,
        "shape_zyx": list(truth_zyx.shape),
        "spacing_mm": list(spacing),
        "voxel_volume_ml": voxel_ml,
    }
    for structure, first_label in (("liver", 1), ("tumour", TUMOUR)):
        own = counts[structure]
        masks = [(mask >= first_label).view(np.uint8) for mask in (prediction, truth)]
        result[structure] = {
            "prediction_voxels": own.prediction,
            "truth_voxels": own.truth,
            "intersection_voxels": own.intersection,
            "prediction_ml": own.prediction * voxel_ml,
            "truth_ml": own.truth * voxel_ml,
            "volume_error_ml": (own.prediction - own.truth) * voxel_ml,
            **own.scores(),
            **score_surface(masks[0], masks[1], spacing),
        }
    result |= score_lesions(masks[0], masks[1], spacing, connectivity)
    for lesion in result["lesions"]:
        lesion["centre_zyx"] = [
            round(c + axis.start, 1) for c, axis in zip(lesion["centre_zyx"], box, strict=True)
        ]
    result["burden"] = score_burden(counts["liver"], counts["tumour"])
    return result


def _checked(
    case_id: str, prediction: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if prediction.shape != truth.shape:
        raise UserError(
            f"{case_id}: the prediction has shape {prediction.shape} (z, y, x), the truth {truth.shape}"
        )
    if truth.ndim != 3 or truth.size == 0:
        raise UserError(f"{case_id}: masks are non-empty 3D volumes, not of shape {truth.shape}")
    prediction, truth = (
        _as_uint8(case_id, "prediction", prediction),
        _as_uint8(case_id, "truth", truth),
    )
    if int(truth.max()) == IGNORE:
        ignored = truth == IGNORE
        truth = np.where(ignored, np.uint8(0), truth)
        prediction = np.where(ignored, np.uint8(0), prediction)
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if (highest := int(mask.max())) > TUMOUR:
            raise UserError(
                f"{case_id}: the {name} has label {highest}; known are 0 background, 1 liver, 2 tumour"
            )
    return prediction, truth


def _as_uint8(case_id: str, name: str, mask: np.ndarray) -> np.ndarray:
    if mask.dtype == np.uint8:
        return mask
    if mask.dtype == np.bool_:
        return mask.view(np.uint8)
    if not np.issubdtype(mask.dtype, np.integer):
        raise UserError(
            f"{case_id}: the {name} has values of type {mask.dtype}; labels are integers"
        )
    if int(mask.min()) < 0 or int(mask.max()) > IGNORE:
        raise UserError(
            f"{case_id}: the {name} has labels {mask.min()} to {mask.max()}; known are 0, 1, 2"
        )
    return mask.astype(np.uint8)

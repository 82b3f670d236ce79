"""All scores of one case, as a JSON-able dict; `summary.aggregate_scores` pools them exactly."""

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
"""Raised when a definition changes; part of every ledger fingerprint."""


def score_case(
    case_id: str,
    prediction_zyx: np.ndarray,
    truth_zyx: np.ndarray,
    spacing_mm: Float3,
    connectivity: int = LITS_CONNECTIVITY,
) -> dict[str, Any]:
    """Compute the overlap, surface, lesion and burden scores of one case.

    Args:
        case_id: Name of the case, for the result and for errors.
        prediction_zyx: Integer labels 0 background, 1 liver, 2 tumour.
        truth_zyx: Labels on the same grid. Voxels with 255 are left out of both masks.
        spacing_mm: Voxel size z, y, x.
        connectivity: Neighbours that join tumour voxels to one lesion: 6, 18 or 26.

    Raises:
        UserError: The shapes differ, or a mask has other labels.
    """
    spacing: Float3 = (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))
    prediction, truth = _check_masks(case_id, prediction_zyx, truth_zyx)
    # Without any mask a single voxel stands for the scan: all metrics then follow their empty rule.
    box = find_joint_box(prediction, truth) or (slice(0, 1),) * 3
    prediction = np.ascontiguousarray(prediction[box])
    truth = np.ascontiguousarray(truth[box])
    counts = count_structures(count_confusion(prediction, truth))
    voxel_ml = math.prod(spacing) / 1000.0
    result: dict[str, Any] = {
        "case_id": case_id,
        "shape_zyx": list(truth_zyx.shape),
        "spacing_mm": list(spacing),
        "voxel_volume_ml": voxel_ml,
    }
    for structure, first_label in (("liver", 1), ("tumour", TUMOUR)):
        overlap = counts[structure]
        masks = [(mask >= first_label).view(np.uint8) for mask in (prediction, truth)]
        result[structure] = {
            "prediction_voxels": overlap.prediction,
            "truth_voxels": overlap.truth,
            "intersection_voxels": overlap.intersection,
            "prediction_ml": overlap.prediction * voxel_ml,
            "truth_ml": overlap.truth * voxel_ml,
            "volume_error_ml": (overlap.prediction - overlap.truth) * voxel_ml,
            **overlap.scores(),
            **score_surface(masks[0], masks[1], spacing),
        }
    result |= score_lesions(masks[0], masks[1], spacing, connectivity)
    for lesion in result["lesions"]:
        # Back from the box to voxels of the scan.
        centre = zip(lesion["centre_zyx"], box, strict=True)
        lesion["centre_zyx"] = [round(index + axis.start, 1) for index, axis in centre]
    result["burden"] = score_burden(counts["liver"], counts["tumour"])
    return result


def _check_masks(
    case_id: str, prediction: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if prediction.shape != truth.shape:
        raise UserError(
            f"{case_id}: the prediction has shape {prediction.shape} (z, y, x), "
            f"the truth {truth.shape}"
        )
    if truth.ndim != 3 or truth.size == 0:
        raise UserError(
            f"{case_id}: the masks have shape {truth.shape}; expected non-empty 3D volumes"
        )
    prediction = _convert_to_uint8(case_id, "prediction", prediction)
    truth = _convert_to_uint8(case_id, "truth", truth)
    if int(truth.max()) == IGNORE:
        ignored = truth == IGNORE
        truth = np.where(ignored, np.uint8(0), truth)
        prediction = np.where(ignored, np.uint8(0), prediction)
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if (highest := int(mask.max())) > TUMOUR:
            raise UserError(
                f"{case_id}: the {name} has label {highest}; "
                "known are 0 background, 1 liver, 2 tumour"
            )
    return prediction, truth


def _convert_to_uint8(case_id: str, name: str, mask: np.ndarray) -> np.ndarray:
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

"""All scores of one case, as a JSON-able dict; `summary.aggregate_scores` pools them exactly."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.case_scores import (
    BURDEN_KEY,
    LESION_SCORES_KEY,
    STRUCTURES_KEY,
    has_first_form,
)
from liverseg_dist.evaluation.metrics.boxes import find_joint_box
from liverseg_dist.evaluation.metrics.burden import score_burden
from liverseg_dist.evaluation.metrics.lesions import LITS_CONNECTIVITY, score_lesions
from liverseg_dist.evaluation.metrics.overlap import (
    OverlapCounts,
    count_confusion,
    count_structures,
)
from liverseg_dist.evaluation.metrics.surface import score_surface
from liverseg_dist.labels import IGNORE, LARGEST_VALUE, LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.volume import Float3

METRICS_VERSION = 1
"""Raised when a definition changes; part of every ledger fingerprint."""


def score_case(
    case_id: str,
    prediction_zyx: np.ndarray,
    truth_zyx: np.ndarray,
    spacing_mm: Float3,
    connectivity: int = LITS_CONNECTIVITY,
    *,
    labels: LabelScheme = LITS_SCHEME,
    annotated: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compute the overlap, surface, lesion and burden scores of one case.

    Args:
        case_id: Name of the case, for the result and for errors.
        prediction_zyx: Integer labels of the scheme.
        truth_zyx: Labels on the same grid. Voxels with the ignore value are left out of both masks.
        spacing_mm: Voxel size z, y, x.
        connectivity: Neighbours that join voxels to one lesion: 6, 18 or 26.
        labels: Scheme of both masks.
        annotated: Names of the structures that the truth shows; the others are not scored. None:
            all.

    Returns:
        A JSON-able dict; `case_scores` describes it.

    Raises:
        UserError: The shapes differ, or a mask has labels that the scheme does not name.
    """
    spacing: Float3 = (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))
    prediction, truth = _check_masks(case_id, prediction_zyx, truth_zyx, labels)
    # Without any mask a single voxel stands for the scan: all metrics then follow their empty rule.
    box = find_joint_box(prediction, truth) or (slice(0, 1),) * 3
    prediction = np.ascontiguousarray(prediction[box])
    truth = np.ascontiguousarray(truth[box])
    confusion = count_confusion(prediction, truth, _largest_value(labels) + 1)
    counts = count_structures(confusion, labels)
    scored = [
        structure
        for structure in labels.structures
        if annotated is None or structure.name in annotated
    ]
    result: dict[str, Any] = {
        "case_id": case_id,
        "shape_zyx": list(truth_zyx.shape),
        "spacing_mm": list(spacing),
        "voxel_volume_ml": math.prod(spacing) / 1000.0,
    }
    is_first_form = has_first_form(labels)
    if not is_first_form:
        result[STRUCTURES_KEY] = list(labels.structure_names)
    pair = MaskPair(prediction, truth, spacing, box, connectivity)
    for structure in scored:
        result[structure.name] = _score_structure(pair, structure, labels, counts[structure.name])
    for structure in scored:
        # Burden and lesions come after the structures, as in the first version.
        target = result if is_first_form else result[structure.name]
        if structure.kind == "lesion":
            lesions = _score_lesions(pair, structure, labels)
            target |= lesions if is_first_form else {LESION_SCORES_KEY: lesions}
        container = structure.inside
        if container is not None and (annotated is None or container in annotated):
            target[BURDEN_KEY] = score_burden(counts[container], counts[structure.name])
    return result


@dataclass(frozen=True)
class MaskPair:
    """Prediction and truth, cut to the box that both fill."""

    prediction: np.ndarray
    truth: np.ndarray
    spacing_mm: Float3
    box: tuple[slice, ...]
    connectivity: int

    def structure_masks(
        self, structure: Structure, labels: LabelScheme
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks of a structure in prediction and truth, uint8."""
        prediction = labels.mask_of(self.prediction, structure).view(np.uint8)
        return prediction, labels.mask_of(self.truth, structure).view(np.uint8)


def _score_structure(
    pair: MaskPair, structure: Structure, labels: LabelScheme, overlap: OverlapCounts
) -> dict[str, Any]:
    voxel_ml = math.prod(pair.spacing_mm) / 1000.0
    prediction, truth = pair.structure_masks(structure, labels)
    return {
        "prediction_voxels": overlap.prediction,
        "truth_voxels": overlap.truth,
        "intersection_voxels": overlap.intersection,
        "prediction_ml": overlap.prediction * voxel_ml,
        "truth_ml": overlap.truth * voxel_ml,
        "volume_error_ml": (overlap.prediction - overlap.truth) * voxel_ml,
        **overlap.scores(),
        **score_surface(prediction, truth, pair.spacing_mm),
    }


def _score_lesions(pair: MaskPair, structure: Structure, labels: LabelScheme) -> dict[str, Any]:
    prediction, truth = pair.structure_masks(structure, labels)
    scores = score_lesions(prediction, truth, pair.spacing_mm, pair.connectivity)
    for lesion in scores["lesions"]:
        # Back from the box to voxels of the scan.
        centre = zip(lesion["centre_zyx"], pair.box, strict=True)
        lesion["centre_zyx"] = [round(index + axis.start, 1) for index, axis in centre]
    return scores


def _largest_value(labels: LabelScheme) -> int:
    return max((value for value, _ in labels.values if value != labels.ignore), default=0)


def _check_masks(
    case_id: str, prediction: np.ndarray, truth: np.ndarray, labels: LabelScheme
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
    known = _describe_values(labels)
    prediction = _convert_to_uint8(case_id, "prediction", prediction, known)
    truth = _convert_to_uint8(case_id, "truth", truth, known)
    ignore = IGNORE if labels.ignore is None else labels.ignore
    ignored = truth == ignore
    if ignored.any():
        truth = np.where(ignored, np.uint8(0), truth)
        prediction = np.where(ignored, np.uint8(0), prediction)
    if labels.drops_other_values:
        return _drop_unknown(prediction, labels), _drop_unknown(truth, labels)
    for name, mask in (("prediction", prediction), ("truth", truth)):
        unknown = labels.unknown_values(mask)
        if unknown:
            raise UserError(f"{case_id}: the {name} has label {unknown[-1]}; known are {known}")
        # The truth of another program may use the ignore value where this one predicts.
        if (mask == ignore).any():
            raise UserError(f"{case_id}: the {name} has label {ignore}; known are {known}")
    return prediction, truth


def _convert_to_uint8(case_id: str, name: str, mask: np.ndarray, known: str) -> np.ndarray:
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
            f"{case_id}: the {name} has labels {mask.min()} to {mask.max()}; known are {known}"
        )
    return mask.astype(np.uint8)


def _describe_values(labels: LabelScheme) -> str:
    return ", ".join(f"{value} {name}" for value, name in labels.values if value != labels.ignore)


def _drop_unknown(mask: np.ndarray, labels: LabelScheme) -> np.ndarray:
    """The mask with values that the scheme does not name as background."""
    is_known = np.zeros(LARGEST_VALUE + 1, dtype=np.uint8)
    is_known[[value for value, _ in labels.values if value != labels.ignore]] = 1
    return np.asarray(mask * is_known[mask])

"""Lesion detection as in the LiTS challenge, and a table of every lesion.

A lesion is a connected component of the tumour label. The LiTS scorer
(https://github.com/PatrickChrist/lits-challenge-scoring) labels with scipy's default, so lesions that touch at an edge
or a corner only are two (connectivity 6); that is our default, and `connectivity` may be 18 or 26.

Correspondence (Bilic et al. 2023, https://doi.org/10.1016/j.media.2022.102680): each true lesion goes to the predicted
one that overlaps it most, and true lesions that share one are merged; each predicted lesion then goes to the merged
true lesion it overlaps most, and those that share one are merged. What is left are pairs, compared by IoU. A pair
strictly above the threshold is detected, once with 0.5 and once with 0.

Counts: a detected pair gives as many true positives as true lesions were merged in it; the other true lesions are false
negatives. False positives are the predicted lesions in no detected pair, and in a detected pair those beyond its number
of true lesions (a lesion found in three pieces: 1 TP, 2 FP). This is the scorer's `predicted - detected`, except that
one prediction over three true lesions cannot pay for false positives elsewhere, where the scorer may go below zero.

Where the scorer's code contradicts its description we keep the description: it breaks on a case without true tumour
(here every prediction is a false positive), takes a pair's union between two different numberings (here of the pair),
and counts merged lesions once when detected but each of them when not (here each, always). With those three repaired
it gives the same TP and FN as we do. Precision without any prediction, or recall without any true lesion, is None; the
scorer puts 0.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.evaluation.metrics.boxes import find_joint_box
from liverseg_dist.evaluation.metrics.overlap import OverlapCounts
from liverseg_dist.evaluation.metrics.surface import score_surface
from liverseg_dist.volume import Float3

LITS_CONNECTIVITY = 6
CONNECTIVITIES = (6, 18, 26)
IOU_THRESHOLDS: Mapping[str, float] = {"iou_50": 0.5, "iou_0": 0.0}
DETECTION_TERMS: Mapping[str, str] = {"iou_50": "detected", "iou_0": "touched"}
"""Term for a true lesion above each threshold, in reports, in TensorBoard and on terminals."""
DETECTION_LABELS: Mapping[str, str] = {
    "iou_50": f"{DETECTION_TERMS['iou_50']} (IoU > 0.5)",
    "iou_0": f"{DETECTION_TERMS['iou_0']} (any overlap)",
}
"""The terms with their definitions."""
SIZE_CLASSES: Mapping[str, tuple[float, float]] = {
    "under_10mm": (0.0, 10.0),
    "10_to_20mm": (10.0, 20.0),
    "over_20mm": (20.0, math.inf),
}
"""Lower bound included, upper bound not; diameters in mm."""
MAX_UNMATCHED_ROWS = 500
DETECTED_METRICS = ("dice", "jaccard", "voe", "rvd", "assd_mm", "rmsd_mm", "mssd_mm")


@dataclass(frozen=True)
class Components:
    """Connected components, numbered from 1; arrays below are indexed by number - 1."""

    labels_zyx: np.ndarray
    voxels: np.ndarray
    centres_zyx: np.ndarray
    first_zyx: np.ndarray
    last_zyx: np.ndarray
    """Lowest and highest voxel index (included) along each axis."""

    @property
    def count(self) -> int:
        return int(self.voxels.size)


@dataclass(frozen=True)
class Pair:
    """A merged group of true lesions and the predicted ones that correspond to it (component numbers, ascending)."""

    truth: tuple[int, ...]
    prediction: tuple[int, ...]
    counts: OverlapCounts

    @property
    def iou(self) -> float:
        return self.counts.jaccard()


def find_components(mask_zyx: np.ndarray, connectivity: int = LITS_CONNECTIVITY) -> Components:
    """Components of a mask, with voxel counts and centres of mass (z, y, x, voxels)."""
    if connectivity not in CONNECTIVITIES:
        raise ValueError(
            f"connectivity {connectivity}: 6 (faces), 18 (and edges) or 26 (and corners)"
        )
    mask = np.ascontiguousarray(mask_zyx, dtype=bool)
    labels, count = cc3d.connected_components(mask, connectivity=connectivity, return_N=True)  # type: ignore[call-overload]
    statistics = cc3d.statistics(labels, no_slice_conversion=True)
    return Components(
        labels,
        statistics["voxel_counts"][1 : count + 1].astype(np.int64),
        statistics["centroids"][1 : count + 1],
        statistics["bounding_boxes"][1 : count + 1, 0::2].astype(np.int64),
        statistics["bounding_boxes"][1 : count + 1, 1::2].astype(np.int64),
    )


def match_lesions(prediction: Components, truth: Components) -> list[Pair]:
    """The corresponding pairs (see the module), by ascending first true lesion; a noisy prediction costs no memory."""
    both = np.flatnonzero((prediction.labels_zyx != 0) & (truth.labels_zyx != 0))
    if both.size == 0:
        return []
    predicted, rows = np.unique(prediction.labels_zyx.ravel()[both], return_inverse=True)
    true, columns = np.unique(truth.labels_zyx.ravel()[both], return_inverse=True)
    cells = np.bincount(rows * true.size + columns, minlength=predicted.size * true.size)
    shared = cells.reshape(predicted.size, true.size)
    pairs = match_components(shared, prediction.voxels[predicted - 1], truth.voxels[true - 1])
    return [
        Pair(
            tuple(int(true[n - 1]) for n in pair.truth),
            tuple(int(predicted[n - 1]) for n in pair.prediction),
            pair.counts,
        )
        for pair in pairs
    ]


def match_components(
    shared: np.ndarray, prediction_voxels: np.ndarray, truth_voxels: np.ndarray
) -> list[Pair]:
    """Pairs from the voxels that predicted lesion i and true lesion j share, (predicted, true).

    Ties of overlap go to the lower number.
    """
    groups: dict[int, list[int]] = {}
    for lesion in np.flatnonzero(shared.any(axis=0)):
        groups.setdefault(int(shared[:, lesion].argmax()), []).append(int(lesion))
    merged = sorted(groups.values())
    merged_shared = np.stack([shared[:, group].sum(axis=1) for group in merged], axis=1)
    pairs = []
    choice = merged_shared.argmax(axis=1)
    for number, group in enumerate(merged):
        members = np.flatnonzero((choice == number) & (merged_shared[:, number] > 0))
        if members.size == 0:
            continue
        counts = OverlapCounts(
            prediction=int(prediction_voxels[members].sum()),
            truth=int(truth_voxels[group].sum()),
            intersection=int(merged_shared[members, number].sum()),
        )
        pairs.append(
            Pair(tuple(lesion + 1 for lesion in group), tuple(int(m) + 1 for m in members), counts)
        )
    return pairs


def count_detections(
    pairs: list[Pair], num_prediction: int, num_truth: int, iou_above: float
) -> dict[str, int]:
    """`tp fp fn` at one threshold; definitions in the module."""
    detected = [pair for pair in pairs if pair.iou > iou_above]
    tp = sum(len(pair.truth) for pair in detected)
    used = sum(min(len(pair.truth), len(pair.prediction)) for pair in detected)
    return {"tp": tp, "fp": num_prediction - used, "fn": num_truth - tp}


def equivalent_diameter_mm(volume_ml: float) -> float:
    """Diameter of the ball of that volume: independent of orientation and slice thickness."""
    return (6000.0 * volume_ml / math.pi) ** (1 / 3)


def classify_size(diameter: float) -> str:
    return next(name for name, (low, high) in SIZE_CLASSES.items() if low <= diameter < high)


def score_lesions(
    prediction_zyx: np.ndarray,
    truth_zyx: np.ndarray,
    spacing_mm: Float3,
    connectivity: int = LITS_CONNECTIVITY,
) -> dict[str, object]:
    """Everything about lesions of one case, JSON-able: `detection`, `detected_pairs` and `lesions`.

    Masks are tumour masks (boolean or uint8) of one shape. `detected_pairs` holds the segmentation quality of each pair
    with IoU above 0.5; `lesions` a row for each true and each predicted component, centres in voxels of the masks. Of
    the predicted ones without a match only the `MAX_UNMATCHED_ROWS` largest are listed (all are counted).
    """
    box = find_joint_box(prediction_zyx, truth_zyx) or (slice(0, 1),) * 3
    prediction, truth = (
        find_components(mask[box], connectivity) for mask in (prediction_zyx, truth_zyx)
    )
    pairs = match_lesions(prediction, truth)
    detection = {
        name: count_detections(pairs, prediction.count, truth.count, iou)
        for name, iou in IOU_THRESHOLDS.items()
    }
    quality = [
        _pair_quality(pair, prediction, truth, spacing_mm)
        for pair in pairs
        if pair.iou > IOU_THRESHOLDS["iou_50"]
    ]
    rows = _rows("truth", truth, pairs, spacing_mm)
    rows += _rows("prediction", prediction, pairs, spacing_mm)
    corner = np.array([axis.start for axis in box])
    for row in rows:
        row["centre_zyx"] = [round(float(c), 1) for c in row["centre_zyx"] + corner]
    return {
        "connectivity": connectivity,
        "detection": detection,
        "detected_pairs": quality,
        "lesions": rows,
    }


def _listed(components: Components, matched: Collection[int]) -> list[int]:
    """Indices without the smallest of too many unmatched lesions: noise would fill the disk with rows nobody reads."""
    by_size = np.argsort(-components.voxels, kind="stable").tolist()
    unmatched = [index for index in by_size if index + 1 not in matched]
    return sorted([number - 1 for number in matched] + unmatched[:MAX_UNMATCHED_ROWS])


def _pair_quality(
    pair: Pair, prediction: Components, truth: Components, spacing_mm: Float3
) -> dict[str, object]:
    sides = ((prediction, np.array(pair.prediction)), (truth, np.array(pair.truth)))
    shape = np.array(truth.labels_zyx.shape)
    first = (
        np.minimum.reduce([side.first_zyx[members - 1].min(axis=0) for side, members in sides]) - 1
    )
    last = (
        np.maximum.reduce([side.last_zyx[members - 1].max(axis=0) for side, members in sides]) + 1
    )
    box = tuple(map(slice, np.maximum(first, 0), np.minimum(last + 1, shape)))
    masks = [np.isin(side.labels_zyx[box], members) for side, members in sides]
    surface = score_surface(masks[0], masks[1], spacing_mm)
    values = pair.counts.scores() | surface
    return {"truth": list(pair.truth), "prediction": list(pair.prediction)} | {
        m: values[m] for m in DETECTED_METRICS
    }


def _rows(
    side: str, components: Components, pairs: list[Pair], spacing_mm: Float3
) -> list[dict[str, Any]]:
    partner: dict[int, tuple[Pair, tuple[int, ...]]] = {}
    for pair in pairs:
        own, other = (
            (pair.truth, pair.prediction) if side == "truth" else (pair.prediction, pair.truth)
        )
        partner |= dict.fromkeys(own, (pair, other))
    rows: list[dict[str, Any]] = []
    voxel_ml = math.prod(spacing_mm) / 1000.0
    for index in (
        _listed(components, partner.keys()) if side == "prediction" else range(components.count)
    ):
        known = partner.get(index + 1)
        volume_ml = int(components.voxels[index]) * voxel_ml
        iou = known[0].iou if known else 0.0
        diameter = equivalent_diameter_mm(volume_ml)
        rows.append(
            {
                "side": side,
                "number": index + 1,
                "voxels": int(components.voxels[index]),
                "volume_ml": volume_ml,
                "diameter_mm": diameter,
                "size_class": classify_size(diameter),
                "centre_zyx": components.centres_zyx[index],
                "match": list(known[1]) if known else [],
                "iou": iou,
                "dice": known[0].counts.dice() if known else 0.0,
            }
            | {f"detected_{name}": iou > threshold for name, threshold in IOU_THRESHOLDS.items()}
        )
    return rows

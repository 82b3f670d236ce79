"""Lesion detection as in the LiTS challenge, and a table of every lesion.

A lesion is a connected component of a lesion structure. The LiTS scorer
(https://github.com/PatrickChrist/lits-challenge-scoring) labels with scipy's default, so lesions
that touch only at an edge or a corner are two (connectivity 6). That is the default here;
`connectivity` may be 18 or 26.

Correspondence (Bilic et al. 2023, https://doi.org/10.1016/j.media.2022.102680): each true lesion is
assigned to the predicted one that overlaps it most, and true lesions with the same one are merged.
Each predicted lesion is then assigned to the merged true lesion that it overlaps most, and those
with the same one are merged. The result are pairs, compared by IoU. A pair strictly above the
threshold is detected, once with 0.5 and once with 0.

Counts: a detected pair gives as many true positives as true lesions were merged in it; the other
true lesions are false negatives. False positives are the predicted lesions in no detected pair, and
in a detected pair those beyond its number of true lesions (a lesion found in three pieces: 1 TP, 2
FP). This is the scorer's `predicted - detected`, with one exception: one prediction over three true
lesions does not reduce the false positives elsewhere. In the scorer it does, so its count may be
negative.

Where the scorer's code contradicts its description, the description is implemented:

- The scorer fails on a case without true tumour; here every prediction is a false positive.
- It computes a pair's union from two different numberings; here it is the union of the pair.
- It counts merged lesions once when detected and each of them when not; here always each.

With these three corrected, the scorer gives the same TP and FN. Precision without any prediction,
or recall without any true lesion, is None; the scorer uses 0.
"""

import math
from collections.abc import Collection, Iterable, Mapping
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
    """A merged group of true lesions and the predicted ones that correspond to it.

    Both are component numbers, ascending.
    """

    truth: tuple[int, ...]
    prediction: tuple[int, ...]
    counts: OverlapCounts

    @property
    def iou(self) -> float:
        return self.counts.jaccard()


def find_components(mask_zyx: np.ndarray, connectivity: int = LITS_CONNECTIVITY) -> Components:
    """Find the components of a mask, with voxel counts and centres of mass (z, y, x, in voxels)."""
    if connectivity not in CONNECTIVITIES:
        raise ValueError(
            f"connectivity {connectivity}: 6 (faces), 18 (and edges) or 26 (and corners)"
        )
    mask = np.ascontiguousarray(mask_zyx, dtype=bool)
    labels, count = cc3d.connected_components(  # type: ignore[call-overload]
        mask, connectivity=connectivity, return_N=True
    )
    # Entry 0 of the statistics is the background.
    statistics = cc3d.statistics(labels, no_slice_conversion=True)
    return Components(
        labels,
        statistics["voxel_counts"][1 : count + 1].astype(np.int64),
        statistics["centroids"][1 : count + 1],
        statistics["bounding_boxes"][1 : count + 1, 0::2].astype(np.int64),
        statistics["bounding_boxes"][1 : count + 1, 1::2].astype(np.int64),
    )


def match_lesions(prediction: Components, truth: Components) -> list[Pair]:
    """Find the corresponding pairs (see the module), by ascending first true lesion."""
    # Only components that overlap are compared: the many components of a noisy prediction then need
    # no memory.
    both = np.flatnonzero((prediction.labels_zyx != 0) & (truth.labels_zyx != 0))
    if both.size == 0:
        return []
    predicted, rows = np.unique(prediction.labels_zyx.ravel()[both], return_inverse=True)
    true, columns = np.unique(truth.labels_zyx.ravel()[both], return_inverse=True)
    cells = np.bincount(rows * true.size + columns, minlength=predicted.size * true.size)
    shared = cells.reshape(predicted.size, true.size)
    pairs = []
    for pair in match_components(shared, prediction.voxels[predicted - 1], truth.voxels[true - 1]):
        # Back from numbers among the overlapping components to numbers among all.
        true_numbers = tuple(int(true[number - 1]) for number in pair.truth)
        predicted_numbers = tuple(int(predicted[number - 1]) for number in pair.prediction)
        pairs.append(Pair(true_numbers, predicted_numbers, pair.counts))
    return pairs


def match_components(
    shared: np.ndarray, prediction_voxels: np.ndarray, truth_voxels: np.ndarray
) -> list[Pair]:
    """Find pairs from overlaps alone. Of equal overlaps the lower number counts.

    Args:
        shared: Voxels that predicted lesion i and true lesion j have in common, (predicted, true).
        prediction_voxels: Size of each predicted lesion.
        truth_voxels: Size of each true lesion.
    """
    # First step: true lesions with the same best prediction form a group.
    groups: dict[int, list[int]] = {}
    for lesion in np.flatnonzero(shared.any(axis=0)):
        groups.setdefault(int(shared[:, lesion].argmax()), []).append(int(lesion))
    merged = sorted(groups.values())
    merged_shared = np.stack([shared[:, group].sum(axis=1) for group in merged], axis=1)
    # Second step: each predicted lesion chooses among the groups.
    pairs = []
    choice = merged_shared.argmax(axis=1)
    for number, group in enumerate(merged):
        members = np.flatnonzero((choice == number) & (merged_shared[:, number] > 0))
        # The predictions that overlap this group may all have chosen another one.
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
    """Count `tp`, `fp` and `fn` at one threshold; definitions in the module."""
    tp = 0
    accounted = 0
    for pair in pairs:
        if pair.iou > iou_above:
            tp += len(pair.truth)
            # Predicted lesions beyond the number of true ones are false positives.
            accounted += min(len(pair.truth), len(pair.prediction))
    return {"tp": tp, "fp": num_prediction - accounted, "fn": num_truth - tp}


def equivalent_diameter_mm(volume_ml: float) -> float:
    """Diameter of the ball of equal volume: independent of orientation and slice thickness."""
    return (6000.0 * volume_ml / math.pi) ** (1 / 3)


def classify_size(diameter: float) -> str:
    return next(name for name, (low, high) in SIZE_CLASSES.items() if low <= diameter < high)


def score_lesions(
    prediction_zyx: np.ndarray,
    truth_zyx: np.ndarray,
    spacing_mm: Float3,
    connectivity: int = LITS_CONNECTIVITY,
) -> dict[str, Any]:
    """Compute the lesion scores of one case.

    Args:
        prediction_zyx: Mask of the lesions, boolean or uint8.
        truth_zyx: Mask of the same shape.
        spacing_mm: Voxel size z, y, x.
        connectivity: 6, 18 or 26.

    Returns:
        A JSON-able dict: `detection` (counts at each threshold), `detected_pairs` (segmentation
        quality of each pair with IoU above 0.5) and `lesions` (a row for each true and each
        predicted component, centres in voxels of the masks). Of the predicted lesions without a
        match only the `MAX_UNMATCHED_ROWS` largest are listed; all are counted.
    """
    box = find_joint_box(prediction_zyx, truth_zyx) or (slice(0, 1),) * 3
    prediction = find_components(prediction_zyx[box], connectivity)
    truth = find_components(truth_zyx[box], connectivity)
    pairs = match_lesions(prediction, truth)
    detection = {}
    for name, threshold in IOU_THRESHOLDS.items():
        detection[name] = count_detections(pairs, prediction.count, truth.count, threshold)
    quality = []
    for pair in pairs:
        if pair.iou > IOU_THRESHOLDS["iou_50"]:
            quality.append(_score_pair(pair, prediction, truth, spacing_mm))
    rows = _list_lesions("truth", truth, pairs, spacing_mm)
    rows += _list_lesions("prediction", prediction, pairs, spacing_mm)
    # Back from the box to voxels of the masks.
    corner = np.array([axis.start for axis in box])
    for row in rows:
        row["centre_zyx"] = [round(float(c), 1) for c in row["centre_zyx"] + corner]
    return {
        "connectivity": connectivity,
        "detection": detection,
        "detected_pairs": quality,
        "lesions": rows,
    }


def _select_listed(components: Components, matched: Collection[int]) -> list[int]:
    """Indices of the lesions to list: matched ones and the largest unmatched ones.

    A noisy prediction has thousands of unmatched components; rows for all of them have no use.
    """
    by_size = np.argsort(-components.voxels, kind="stable").tolist()
    unmatched = [index for index in by_size if index + 1 not in matched]
    return sorted([number - 1 for number in matched] + unmatched[:MAX_UNMATCHED_ROWS])


def _score_pair(
    pair: Pair, prediction: Components, truth: Components, spacing_mm: Float3
) -> dict[str, object]:
    """Segmentation quality of one pair."""
    predicted_numbers, true_numbers = np.array(pair.prediction), np.array(pair.truth)
    box = _find_pair_box(prediction, predicted_numbers, truth, true_numbers)
    predicted_mask = np.isin(prediction.labels_zyx[box], predicted_numbers)
    true_mask = np.isin(truth.labels_zyx[box], true_numbers)
    values = pair.counts.scores() | score_surface(predicted_mask, true_mask, spacing_mm)
    scores: dict[str, object] = {"truth": list(pair.truth), "prediction": list(pair.prediction)}
    for metric in DETECTED_METRICS:
        scores[metric] = values[metric]
    return scores


def _find_pair_box(
    prediction: Components,
    predicted_numbers: np.ndarray,
    truth: Components,
    true_numbers: np.ndarray,
) -> tuple[slice, ...]:
    """Box of the lesions of a pair with one voxel around, within the array."""
    first = np.minimum(
        prediction.first_zyx[predicted_numbers - 1].min(axis=0),
        truth.first_zyx[true_numbers - 1].min(axis=0),
    )
    last = np.maximum(
        prediction.last_zyx[predicted_numbers - 1].max(axis=0),
        truth.last_zyx[true_numbers - 1].max(axis=0),
    )
    start = np.maximum(first - 1, 0)
    stop = np.minimum(last + 2, truth.labels_zyx.shape)
    return tuple(map(slice, start, stop))


def _list_lesions(
    side: str, components: Components, pairs: list[Pair], spacing_mm: Float3
) -> list[dict[str, Any]]:
    """One row for each component of a side (`truth` or `prediction`)."""
    pair_of: dict[int, Pair] = {}
    for pair in pairs:
        pair_of |= dict.fromkeys(pair.truth if side == "truth" else pair.prediction, pair)
    indices: Iterable[int] = range(components.count)
    if side == "prediction":
        indices = _select_listed(components, pair_of.keys())
    voxel_ml = math.prod(spacing_mm) / 1000.0
    rows = []
    for index in indices:
        matched_pair = pair_of.get(index + 1)
        match: tuple[int, ...] = ()
        if matched_pair is not None:
            match = matched_pair.prediction if side == "truth" else matched_pair.truth
        iou = matched_pair.iou if matched_pair is not None else 0.0
        volume_ml = int(components.voxels[index]) * voxel_ml
        diameter = equivalent_diameter_mm(volume_ml)
        row = {
            "side": side,
            "number": index + 1,
            "voxels": int(components.voxels[index]),
            "volume_ml": volume_ml,
            "diameter_mm": diameter,
            "size_class": classify_size(diameter),
            "centre_zyx": components.centres_zyx[index],
            "match": list(match),
            "iou": iou,
            "dice": matched_pair.counts.dice() if matched_pair is not None else 0.0,
        }
        for name, threshold in IOU_THRESHOLDS.items():
            row[f"detected_{name}"] = iou > threshold
        rows.append(row)
    return rows

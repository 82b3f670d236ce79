"""Volume overlap from integer voxel counts, so that pooling over cases is exact.

P and T are the predicted and the true mask, |.| is the number of voxels. Empty masks follow the
LiTS scorer where it has a rule (https://github.com/PatrickChrist/lits-challenge-scoring): a tumour
absent from both masks is a perfect case. It gives 0 for a liver where label 1 is not predicted at
all, even if tumours are predicted; here the region (label 1 or 2) is scored. Where the scorer has
no rule, the docstring of the metric states it. None means undefined; a summary counts the defined
cases.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from liverseg_dist.labels import LabelScheme


@dataclass(frozen=True)
class OverlapCounts:
    """Voxels of one structure."""

    prediction: int
    truth: int
    intersection: int

    @property
    def is_empty(self) -> bool:
        """Whether the structure is absent from both masks."""
        return self.prediction + self.truth == 0

    def dice(self) -> float:
        """2|P∩T| / (|P|+|T|).

        Both empty: 1 (the rule of LiTS for tumours; here also for the liver). One empty: 0.
        """
        total = self.prediction + self.truth
        return 2 * self.intersection / total if total else 1.0

    def jaccard(self) -> float:
        """|P∩T| / |P∪T|. Both empty: 1. One empty: 0."""
        union = self.prediction + self.truth - self.intersection
        return self.intersection / union if union else 1.0

    def voe(self) -> float:
        """Volumetric overlap error, 1 - Jaccard. Both empty: 0. One empty: 1."""
        return 1.0 - self.jaccard()

    def rvd(self) -> float | None:
        """Relative volume difference (|P|-|T|) / |T|: negative when too little is predicted.

        Both empty: 0. Only the truth empty: None (the LiTS scorer uses 9001). The LiTS scorer
        passes its two masks to medpy in the other order, so its RVD is (|T|-|P|) / |P|; this is the
        definition of its paper.
        """
        if self.truth:
            return (self.prediction - self.truth) / self.truth
        return None if self.prediction else 0.0

    def scores(self) -> dict[str, float | None]:
        """All overlap metrics by their name in the registry."""
        return {
            "dice": self.dice(),
            "jaccard": self.jaccard(),
            "voe": self.voe(),
            "rvd": self.rvd(),
        }


def pool_dice(counts: Iterable[OverlapCounts]) -> float | None:
    """Dice of the voxels of all cases together. None where every mask is empty."""
    intersection = total = 0
    for case in counts:
        intersection += case.intersection
        total += case.prediction + case.truth
    return 2 * intersection / total if total else None


def count_confusion(prediction_zyx: np.ndarray, truth_zyx: np.ndarray, size: int) -> np.ndarray:
    """Count voxels by predicted class (row) and true class (column).

    Args:
        prediction_zyx: uint8 labels below `size`.
        truth_zyx: Labels of the same shape.
        size: Number of rows and columns.
    """
    counts = np.zeros(size * size, dtype=np.int64)
    # The joint label of two classes must fit the type.
    joint_type = np.uint8 if size * size <= 256 else np.uint16
    # Slice by slice: bincount converts its input to int64, eight times the memory of the masks.
    for prediction_yx, truth_yx in zip(prediction_zyx, truth_zyx, strict=True):
        joint = prediction_yx * joint_type(size) + truth_yx
        counts += np.bincount(joint.ravel(), minlength=counts.size)
    return counts.reshape(size, size)


def count_structures(confusion_counts: np.ndarray, labels: LabelScheme) -> dict[str, OverlapCounts]:
    """Counts of each structure of a scheme from `count_confusion`."""
    counts = {}
    for structure in labels.structures:
        members = list(structure.values)
        counts[structure.name] = OverlapCounts(
            prediction=int(confusion_counts[members].sum()),
            truth=int(confusion_counts[:, members].sum()),
            intersection=int(confusion_counts[np.ix_(members, members)].sum()),
        )
    return counts

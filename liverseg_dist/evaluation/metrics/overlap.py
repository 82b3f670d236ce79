"""Volume overlap from integer voxel counts, so that pooling over cases is exact.

P and T are the predicted and the true mask, |.| counts voxels. Empty masks follow the LiTS scorer where it has a rule
(https://github.com/PatrickChrist/lits-challenge-scoring): tumour absent from both is a perfect case. It gives 0 for a
liver where label 1 is not predicted at all, even if tumours are; we take the region (label 1 or 2) as it is. It leaves
the rest open; what we do is said at each metric. None means undefined, and a summary counts the cases that are defined.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from liverseg_dist.labels import NUM_CLASSES


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
        """2|P∩T| / (|P|+|T|). Both empty: 1 (LiTS, for tumours; here for the liver too). One empty: 0."""
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

        Both empty: 0. Only the truth empty: None (the LiTS scorer puts 9001). The LiTS scorer hands its two masks to
        medpy the other way round, so its RVD is (|T|-|P|) / |P|; we keep the definition of its paper.
        """
        if self.truth:
            return (self.prediction - self.truth) / self.truth
        return None if self.prediction else 0.0

    def scores(self) -> dict[str, float | None]:
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


def count_confusion(prediction_zyx: np.ndarray, truth_zyx: np.ndarray) -> np.ndarray:
    """Voxel counts (3, 3), row = predicted class, column = true class. Labels are uint8 0..2."""
    counts = np.zeros(NUM_CLASSES * NUM_CLASSES, dtype=np.int64)
    for prediction_yx, truth_yx in zip(
        prediction_zyx, truth_zyx, strict=True
    ):  # slice by slice: bincount makes int64
        joint = prediction_yx * np.uint8(NUM_CLASSES) + truth_yx
        counts += np.bincount(joint.ravel(), minlength=counts.size)
    return counts.reshape(NUM_CLASSES, NUM_CLASSES)


def count_structures(confusion_counts: np.ndarray) -> dict[str, OverlapCounts]:
    """Counts of the liver (label 1 or 2) and the tumour (label 2) from a confusion matrix."""
    first_class = {"liver": 1, "tumour": 2}
    return {
        structure: OverlapCounts(
            prediction=int(confusion_counts[label:].sum()),
            truth=int(confusion_counts[:, label:].sum()),
            intersection=int(confusion_counts[label:, label:].sum()),
        )
        for structure, label in first_class.items()
    }

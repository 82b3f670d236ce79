"""Count how often each predicted probability was correct, on the scan's own voxels.

The counts are collected while the probabilities of a scan are resampled, so that no probability
volume is stored. `evaluation.metrics.calibration` turns them into calibration curves.
"""

import numpy as np
from torch import Tensor

from liverseg_dist.evaluation.metrics.calibration import CalibrationCounter, Counts
from liverseg_dist.inference.resample_to_scan import Box
from liverseg_dist.inference.segment_scan import select_structure_probability
from liverseg_dist.labels import IGNORE, STRUCTURES, structure_mask
from liverseg_dist.volume import Volume


class CalibrationCollector:
    """Callback of `segment_to_grid`: compares probabilities with the true labels.

    Args:
        truth: true labels on the scan's own grid.
        regions: whether the model's outputs are overlapping regions.
    """

    def __init__(self, truth: Volume, regions: bool) -> None:
        self._truth, self._regions = truth, regions
        self._counters = {name: CalibrationCounter() for name in STRUCTURES}
        self._reoriented_truth = truth
        self._slices: np.ndarray | None = None

    def select_piece(self, orientation: str, slices: np.ndarray | None) -> "CalibrationCollector":
        """Set what the following calls refer to, and return this object.

        Args:
            orientation: orientation of the boxes that follow.
            slices: slices of the reoriented scan to count; None: all.
        """
        self._reoriented_truth = self._truth.reoriented(orientation)
        self._slices = slices
        return self

    def __call__(self, box: Box, foreground_FDHW: Tensor) -> None:
        truth = self._reoriented_truth.voxels[box]
        is_counted = truth != IGNORE
        if self._slices is not None:
            in_piece = np.isin(np.arange(box[0].start, box[0].stop), self._slices)
            is_counted &= in_piece[:, None, None]
        for name, counter in self._counters.items():
            probability = select_structure_probability(foreground_FDHW, name, self._regions)
            # Probability 0 marks a voxel that is not counted.
            values = np.where(is_counted, probability.cpu().numpy(), 0)
            counter.add(values, structure_mask(truth, name))

    def collect_counts(self) -> dict[str, Counts]:
        """Counts by name of the structure."""
        return {name: counter.counts() for name, counter in self._counters.items()}

"""Count how often each predicted probability was correct, on the scan's own voxels.

The counts are collected while the probabilities of a scan are resampled, so that no probability
volume is stored. `evaluation.metrics.calibration` turns them into calibration curves.
"""

from collections.abc import Collection

import numpy as np
from torch import Tensor

from liverseg_dist.evaluation.metrics.calibration import CalibrationCounter, Counts
from liverseg_dist.inference.resample_to_scan import Box
from liverseg_dist.inference.segment_scan import select_structure_probability
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.labels import IGNORE
from liverseg_dist.volume import Volume


class CalibrationCollector:
    """Callback of `segment_to_grid`: compares probabilities with the true labels.

    Args:
        truth: true class values on the scan's own grid.
        predictor: the predictor whose probabilities are counted.
        annotated: structures to count: those that were annotated; None: all.
    """

    def __init__(
        self,
        truth: Volume,
        predictor: SlidingWindowPredictor,
        annotated: Collection[str] | None = None,
    ) -> None:
        self._truth, self._predictor = truth, predictor
        self._labels = predictor.outputs.labels
        self._counters = {}
        for name in self._labels.structure_names:
            if annotated is None or name in annotated:
                self._counters[name] = CalibrationCounter()
        # Voxels that nobody labelled are no evidence about the probabilities.
        ignore = self._labels.ignore
        self._ignore = IGNORE if ignore is None else ignore
        self._reoriented_truth = truth
        self._slices: np.ndarray | None = None

    def select_piece(self, orientation: str, slices: np.ndarray | None) -> "CalibrationCollector":
        """Set what the following calls refer to, and return this object.

        Args:
            orientation: orientation of the boxes that follow.
            slices: slices of the reoriented scan to count; None: all.
        """
        # The probabilities arrive in the image's orientation, so the truth is turned, which costs
        # no copy, instead of the probabilities.
        self._reoriented_truth = self._truth.reoriented(orientation)
        self._slices = slices
        return self

    def __call__(self, box: Box, foreground_FDHW: Tensor) -> None:
        truth = self._reoriented_truth.voxels[box]
        is_counted = truth != self._ignore
        if self._slices is not None:
            # Slabs of one scan overlap; each slice is counted for one of them only.
            in_piece = np.isin(np.arange(box[0].start, box[0].stop), self._slices)
            is_counted &= in_piece[:, None, None]
        for name, counter in self._counters.items():
            probability = select_structure_probability(foreground_FDHW, name, self._predictor)
            # Probability 0 marks a voxel that is not counted.
            values = np.where(is_counted, probability.cpu().numpy(), 0)
            counter.add(values, self._labels.mask_of(truth, name))

    def collect_counts(self) -> dict[str, Counts]:
        """Counts by name of the structure."""
        return {name: counter.counts() for name, counter in self._counters.items()}

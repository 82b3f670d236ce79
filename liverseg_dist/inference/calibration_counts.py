"""Counts, while a scan is being restored, how often each probability was right (see `evaluation.calibration`)."""

import numpy as np
from torch import Tensor

from liverseg_dist.evaluation.metrics.calibration import CalibrationCounter, Counts
from liverseg_dist.inference.resample_to_scan import Box
from liverseg_dist.inference.segment_scan import select_structure_probability
from liverseg_dist.labels import IGNORE, STRUCTURES, structure_mask
from liverseg_dist.volume import Volume


class CalibrationCollector:
    """`watch` for `segment_onto`: probabilities on the scan's own voxels against the truth there."""

    def __init__(self, truth: Volume, regions: bool) -> None:
        self._truth, self._regions = truth, regions
        self._counters = {name: CalibrationCounter() for name in STRUCTURES}
        self._turned = truth
        self._slices: np.ndarray | None = None

    def of_piece(self, orientation: str, slices: np.ndarray | None) -> "CalibrationCollector":
        """What comes next has this orientation, and only these slices of it count (None: all)."""
        self._turned, self._slices = self._truth.reoriented(orientation), slices
        return self

    def __call__(self, box: Box, foreground_FDHW: Tensor) -> None:
        truth = self._turned.voxels[box]
        known = truth != IGNORE
        if self._slices is not None:
            known &= np.isin(np.arange(box[0].start, box[0].stop), self._slices)[:, None, None]
        for name, counter in self._counters.items():
            values = (
                select_structure_probability(foreground_FDHW, name, self._regions).cpu().numpy()
            )
            counter.add(np.where(known, values, 0), structure_mask(truth, name))

    def counts(self) -> dict[str, Counts]:
        return {name: counter.counts() for name, counter in self._counters.items()}

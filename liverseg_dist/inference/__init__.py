"""From a trained run and a scan to a mask on the scan's own voxels, in bounded memory.

`load_run` -> `predictor_for` -> `segment_scan`; `SlidingWindowPredictor` alone slides a model over any array.
"""

from liverseg_dist.inference.load_run import LoadedRun, load_run, predictor_for
from liverseg_dist.inference.segment_scan import Segmentation, segment_onto, segment_scan
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor

__all__ = [
    "LoadedRun",
    "Segmentation",
    "SlidingWindowPredictor",
    "load_run",
    "predictor_for",
    "segment_onto",
    "segment_scan",
]

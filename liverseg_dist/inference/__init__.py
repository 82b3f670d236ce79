"""From a trained run and a scan to a mask on the scan's own voxels, in bounded memory.

`load_run` -> `build_predictor` -> `segment_scan`; `SlidingWindowPredictor` alone slides a model over any array.
"""

from liverseg_dist.inference.load_run import LoadedRun, build_predictor, load_run
from liverseg_dist.inference.segment_scan import Segmentation, segment_scan, segment_to_grid
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor

__all__ = [
    "LoadedRun",
    "Segmentation",
    "SlidingWindowPredictor",
    "load_run",
    "build_predictor",
    "segment_to_grid",
    "segment_scan",
]

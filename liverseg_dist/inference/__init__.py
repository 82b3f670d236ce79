"""Segment scans with trained runs; the mask has the scan's own grid, and memory is bounded.

Typical use: `load_run` -> `build_predictor` -> `segment_scan`. `SlidingWindowPredictor` applies a
model to any array that is already prepared for the network.
"""

from liverseg_dist.inference.load_run import LoadedRun, build_predictor, load_run
from liverseg_dist.inference.segment_scan import Segmentation, segment_scan, segment_to_grid
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor

__all__ = [
    "LoadedRun",
    "Segmentation",
    "SlidingWindowPredictor",
    "build_predictor",
    "load_run",
    "segment_scan",
    "segment_to_grid",
]

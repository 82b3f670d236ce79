"""Segment a scan in memory.

The mask has the shape and affine of the scan, for any orientation and voxel size. Used by the
commands `predict` and `evaluate`, by the Python interface and by conversion.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from liverseg_dist.config import Settings
from liverseg_dist.config.registry import find_registered
from liverseg_dist.data.preprocessing.pipeline import prepare_scan
from liverseg_dist.inference.postprocess import postprocess_mask
from liverseg_dist.inference.resample_to_scan import Box, resample_to_scan
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor, sum_organ_probability
from liverseg_dist.labels import STRUCTURES
from liverseg_dist.volume import Grid, Volume, plan_reorientation

ProbabilityCallback = Callable[[Box, Tensor], None]
"""Called with each item that `resample_probabilities` yields."""


@dataclass(frozen=True)
class Segmentation:
    """Result on the scan's own grid.

    Attributes:
        mask_zyx: labels, uint8.
        probability_zyx: probability by structure, float32; empty unless requested.
    """

    mask_zyx: np.ndarray
    probability_zyx: dict[str, np.ndarray]


def segment_scan(
    volume: Volume, predictor: SlidingWindowPredictor, settings: Settings
) -> np.ndarray:
    """Labels (z, y, x) uint8 of a scan, on its own voxels.

    Args:
        volume: the scan in HU.
        predictor: the run's predictor.
        settings: the run's resolved settings.
    """
    image = prepare_for_network(volume, settings)
    return segment_to_grid(image, volume.grid, predictor, settings).mask_zyx


def prepare_for_network(volume: Volume, settings: Settings) -> Volume:
    """The scan (HU) as in training: cleaned, in canonical orientation, in the run's voxel size."""
    assert settings.data.spacing_mm is not None
    return prepare_scan(volume, settings.convert, settings.data.spacing_mm)


def segment_to_grid(
    image: Volume,
    target: Grid,
    predictor: SlidingWindowPredictor,
    settings: Settings,
    keep_probabilities: bool = False,
    on_probabilities: ProbabilityCallback | None = None,
    postprocess: bool = True,
) -> Segmentation:
    """Predict a prepared image and resample the result to a grid.

    Apart from the image and the result, memory holds one row of windows (see `sliding_window`).

    Args:
        image: the prepared scan (HU).
        target: grid of the result, in any orientation.
        predictor: the run's predictor.
        settings: the run's resolved settings.
        keep_probabilities: whether the result contains probabilities (8 bytes per voxel more).
        on_probabilities: called for each item of `resample_probabilities`.
        postprocess: whether to post-process the mask; False where the mask is one of several
            parts that are post-processed after they are joined.
    """
    mask = np.zeros(target.shape, dtype=np.uint8)
    probabilities = {}
    if keep_probabilities:
        for name in STRUCTURES:
            probabilities[name] = np.zeros(target.shape, np.float32)
    # Views: values are written in the image's orientation, and stored in the target's.
    orientation = image.grid.orientation
    mask_view = Volume(mask, target).reoriented(orientation).voxels
    probability_views = {}
    for name, values in probabilities.items():
        probability_views[name] = Volume(values, target).reoriented(orientation).voxels
    for box, values_FDHW in resample_probabilities(image, target, predictor, settings):
        mask_view[box] = predictor.assign_labels(values_FDHW)
        for name, view in probability_views.items():
            probability = select_structure_probability(values_FDHW, name, predictor.regions)
            view[box] = probability.cpu().numpy()
        if on_probabilities is not None:
            on_probabilities(box, values_FDHW)
    if postprocess:
        postprocess_mask(mask, target.spacing_mm, predictor.config)
    return Segmentation(mask, probabilities)


def resample_probabilities(
    image: Volume, target: Grid, predictor: SlidingWindowPredictor, settings: Settings
) -> Iterator[tuple[Box, Tensor]]:
    """Predict a prepared image and yield the probabilities on the target's voxels.

    Yields:
        Box of the target, reoriented to the image's orientation, and its foreground probabilities
        (F, D, H, W), from the first slice to the last.
    """
    reoriented, _, _ = plan_reorientation(target, image.grid.orientation)
    slabs = predictor.stream_probabilities(image.voxels, settings.data.intensity)
    return resample_to_scan(slabs, image.grid, reoriented)


def _select_tumour_probability(foreground_FDHW: Tensor, regions: bool) -> Tensor:
    return foreground_FDHW[1]


STRUCTURE_PROBABILITIES: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "liver": sum_organ_probability,
    "tumour": _select_tumour_probability,
}
"""(foreground F D H W, regions) -> probability D H W, for each name of `labels.STRUCTURES`."""


def select_structure_probability(foreground_FDHW: Tensor, structure: str, regions: bool) -> Tensor:
    """Probability (D, H, W) of a structure: `liver` is the organ with its tumours, or `tumour`.

    Raises:
        UserError: unknown structure.
    """
    select = find_registered(STRUCTURE_PROBABILITIES, structure, "structure")
    return select(foreground_FDHW, regions)

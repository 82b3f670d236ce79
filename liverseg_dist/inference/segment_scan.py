"""A scan in, a mask on the scan's own voxels out: same shape, same affine, whatever its orientation and spacing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from liverseg_dist.config import Settings
from liverseg_dist.data.preprocessing.pipeline import prepare_scan
from liverseg_dist.inference.postprocess import postprocess_mask
from liverseg_dist.inference.resample_to_scan import Box, resample_to_scan
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor, sum_organ_probability
from liverseg_dist.labels import STRUCTURES
from liverseg_dist.volume import Grid, Volume, plan_reorientation

ProbabilityCallback = Callable[[Box, Tensor], None]


@dataclass(frozen=True)
class Segmentation:
    """Labels (z, y, x) uint8 on the scan's own grid, and per structure its probability (float32) when asked for."""

    mask_zyx: np.ndarray
    probability_zyx: dict[str, np.ndarray]


def segment_scan(
    volume: Volume, predictor: SlidingWindowPredictor, settings: Settings
) -> np.ndarray:
    """Labels (z, y, x) uint8 of a scan in HU, on its own voxels; `settings` are a run's resolved ones."""
    return segment_to_grid(
        prepare_for_network(volume, settings), volume.grid, predictor, settings
    ).mask_zyx


def prepare_for_network(volume: Volume, settings: Settings) -> Volume:
    """The scan as the network knows it: cleaned, in canonical orientation, in the run's voxel size; still HU."""
    assert settings.data.spacing_mm is not None
    return prepare_scan(volume, settings.convert, settings.data.spacing_mm)


def segment_to_grid(
    image: Volume,
    target: Grid,
    predictor: SlidingWindowPredictor,
    settings: Settings,
    keep_probabilities: bool = False,
    watch: ProbabilityCallback | None = None,
    clean: bool = True,
) -> Segmentation:
    """Predict a prepared image (HU) and bring the answer onto `target`, which may have any orientation.

    Beside the image and the result it holds one row of windows (see `predictor`). Probabilities cost 8 bytes a voxel
    of `target` more. `watch` sees what `resample_probabilities` yields. `clean`: post-process, as is done once with a whole mask.
    """
    mask = np.zeros(target.shape, dtype=np.uint8)
    kept = (
        {name: np.zeros(target.shape, np.float32) for name in STRUCTURES}
        if keep_probabilities
        else {}
    )
    orientation = image.grid.orientation
    view = Volume(mask, target).reoriented(
        orientation
    )  # a view: what is written to it lands in the file's own order
    kept_views = {
        name: Volume(values, target).reoriented(orientation).voxels for name, values in kept.items()
    }
    for box, values_FDHW in resample_probabilities(image, target, predictor, settings):
        view.voxels[box] = predictor.assign_labels(values_FDHW)
        for name, values in kept_views.items():
            values[box] = (
                select_structure_probability(values_FDHW, name, predictor.regions).cpu().numpy()
            )
        if watch is not None:
            watch(box, values_FDHW)
    if clean:
        postprocess_mask(mask, target.spacing_mm, predictor.config)
    return Segmentation(mask, kept)


def resample_probabilities(
    image: Volume, target: Grid, predictor: SlidingWindowPredictor, settings: Settings
) -> Iterator[tuple[Box, Tensor]]:
    """(box of the target turned to the image's orientation, foreground probabilities F D H W there), slice by slice."""
    turned, _, _ = plan_reorientation(target, image.grid.orientation)
    return resample_to_scan(
        predictor.stream_probabilities(image.voxels, settings.data.intensity), image.grid, turned
    )


def select_structure_probability(foreground_FDHW: Tensor, structure: str, regions: bool) -> Tensor:
    """Probability D H W of a structure: `liver` is the organ with its tumours, whose classes exclude each other."""
    return (
        foreground_FDHW[1]
        if structure == "tumour"
        else sum_organ_probability(foreground_FDHW, regions)
    )

"""Segment a scan in memory.

The mask has the shape and affine of the scan, for any orientation and voxel size. Used by the
commands `predict` and `evaluate`, by the Python interface and by conversion.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from liverseg_dist.config import IntensityConfig, Settings
from liverseg_dist.data.preprocessing.scan_channels import PreparedScan, prepare_channels
from liverseg_dist.errors import UserError
from liverseg_dist.inference.label_assignment import sum_structure_probability
from liverseg_dist.inference.postprocess import postprocess_mask
from liverseg_dist.inference.resample_to_scan import Box, resample_to_scan
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.volume import Grid, Volume, plan_reorientation

ProbabilityCallback = Callable[[Box, Tensor], None]
"""Called with each item that `resample_probabilities` yields."""


@dataclass(frozen=True, eq=False)
class NetworkImage:
    """A scan in the voxel size of the network, with what is needed to normalise it.

    Attributes:
        voxels_CZYX: stored voxels of each channel, int16; HU for CT.
        grid: grid of all channels.
        intensities: normalisation of each channel.
        present: whether the scan has the channel; the voxels of an absent one are not used.
    """

    voxels_CZYX: np.ndarray
    grid: Grid
    intensities: tuple[IntensityConfig | None, ...]
    present: tuple[bool, ...]

    @classmethod
    def from_prepared(cls, scan: PreparedScan, settings: Settings) -> "NetworkImage":
        """The image of a prepared scan: the run's normalisation, or that of the scan."""
        intensities = []
        for of_run, of_scan in zip(settings.data.intensities, scan.intensities, strict=True):
            # The run's figures come first; channels without them are normalised by the scan's own.
            intensities.append(of_run if of_run is not None else of_scan)
        return cls(scan.voxels, scan.grid, tuple(intensities), tuple(scan.present))

    @property
    def first_channel(self) -> Volume:
        """The first channel that the scan has, for pictures."""
        return Volume(self.voxels_CZYX[self.present.index(True)], self.grid)


@dataclass(frozen=True)
class Segmentation:
    """Result on the scan's own grid.

    Attributes:
        mask_zyx: class values, uint8.
        probability_zyx: probability by structure, float32; empty unless requested.
    """

    mask_zyx: np.ndarray
    probability_zyx: dict[str, np.ndarray]


def segment_scan(
    scan: Volume | Sequence[Volume | None], predictor: SlidingWindowPredictor, settings: Settings
) -> np.ndarray:
    """Class values (z, y, x) uint8 of a scan, on its own voxels.

    Args:
        scan: the scan (HU for CT), or one volume for each channel of the run; None for a channel
            that the scan lacks. The mask has the grid of the first one.
        predictor: the run's predictor.
        settings: the run's resolved settings.

    Raises:
        UserError: another number of channels than the run has, or a channel that it needs is
            absent.
    """
    volumes = [scan] if isinstance(scan, Volume) else list(scan)
    image = prepare_for_network(volumes, settings)
    return segment_to_grid(image, find_scan_grid(volumes), predictor).mask_zyx


def find_scan_grid(volumes: Sequence[Volume | None]) -> Grid:
    """The grid of the first channel that a scan has: the mask is written on it."""
    return next(volume.grid for volume in volumes if volume is not None)


def prepare_for_network(volumes: Sequence[Volume | None], settings: Settings) -> NetworkImage:
    """The scan as in training: cleaned, in canonical orientation, in the run's voxel size.

    Args:
        volumes: one for each channel of the run; None for a channel that the scan lacks.
        settings: the run's resolved settings.

    Raises:
        UserError: another number of channels than the run has, or a channel that it needs is
            absent.
    """
    assert settings.data.spacing_mm is not None
    check_present_channels([volume is not None for volume in volumes], settings)
    channels = settings.data.image_channels
    prepared = prepare_channels(volumes, settings.convert, channels, settings.data.spacing_mm)
    return NetworkImage.from_prepared(prepared, settings)


def check_present_channels(present: Sequence[bool], settings: Settings) -> None:
    """Refuse a scan without a channel that the run needs.

    Raises:
        UserError: names the channels of both sides.
    """
    channels = settings.data.image_channels
    names = [channel.name for channel in channels]
    # Before the names are paired: `zip` with `strict` would raise an unclear error.
    if len(present) != len(channels):
        raise UserError(
            f"the scan has {len(present)} channel(s), the run needs {len(channels)}: "
            f"{', '.join(names)}"
        )
    has = [name for name, is_present in zip(names, present, strict=True) if is_present]
    optional = list_optional_channels(settings)
    missing = [name for name in names if name not in has and name not in optional]
    # Also where every channel is optional: the network needs one at least.
    if not has or missing:
        lacked = ", ".join(missing or names)
        allowed = f"; it may lack {', '.join(optional)}" if optional else ""
        raise UserError(
            f"the scan has {', '.join(has) or 'no channel'}, the run needs {', '.join(names)}"
            f"{allowed}; add {lacked}, or use a run that was trained without it "
            "(train.modality_dropout)"
        )


def list_optional_channels(settings: Settings) -> tuple[str, ...]:
    """Names of the channels that a scan may lack.

    Those that some training case lacked (the run records them), and all of several channels if
    training dropped channels at random. One channel at least is needed.
    """
    names = tuple(channel.name for channel in settings.data.image_channels)
    if len(names) == 1:
        return ()
    if settings.train.modality_dropout > 0:
        return names
    recorded = settings.data.optional_channels or ()
    return tuple(name for name in names if name in recorded)


def segment_to_grid(
    image: NetworkImage,
    target: Grid,
    predictor: SlidingWindowPredictor,
    keep_probabilities: bool = False,
    on_probabilities: ProbabilityCallback | None = None,
    postprocess: bool = True,
) -> Segmentation:
    """Predict a prepared image and resample the result to a grid.

    Apart from the image and the result, memory holds one row of windows (see `sliding_window`).

    Args:
        image: the prepared scan.
        target: grid of the result, in any orientation.
        predictor: the run's predictor.
        keep_probabilities: whether the result contains probabilities (4 bytes per voxel and structure
            more).
        on_probabilities: called for each item of `resample_probabilities`.
        postprocess: whether to post-process the mask; False where the mask is one of several
            parts that are post-processed after they are joined.
    """
    # Zero is background: what the network does not see stays background.
    mask = np.zeros(target.shape, dtype=np.uint8)
    probabilities = {}
    # Allocated only on request: a scan of 512 x 512 x 700 takes 700 MB for each structure.
    if keep_probabilities:
        for name in predictor.outputs.labels.structure_names:
            probabilities[name] = np.zeros(target.shape, np.float32)
    # Views: values are written in the image's orientation, and stored in the target's.
    orientation = image.grid.orientation
    mask_view = Volume(mask, target).reoriented(orientation).voxels
    probability_views = {}
    for name, values in probabilities.items():
        probability_views[name] = Volume(values, target).reoriented(orientation).voxels
    for box, values_FDHW in resample_probabilities(image, target, predictor):
        mask_view[box] = predictor.assign_labels(values_FDHW)
        for name, view in probability_views.items():
            probability = select_structure_probability(values_FDHW, name, predictor)
            view[box] = probability.cpu().numpy()
        if on_probabilities is not None:
            on_probabilities(box, values_FDHW)
    # On the scan's own voxels, so that volumes and distances in mm mean what they say.
    if postprocess:
        postprocess_mask(mask, target.spacing_mm, predictor.config, predictor.outputs.labels)
    return Segmentation(mask, probabilities)


def resample_probabilities(
    image: NetworkImage, target: Grid, predictor: SlidingWindowPredictor
) -> Iterator[tuple[Box, Tensor]]:
    """Predict a prepared image and yield the probabilities on the target's voxels.

    Yields:
        Box of the target, reoriented to the image's orientation, and its foreground probabilities
        (F, D, H, W), from the first slice to the last.
    """
    reoriented, _, _ = plan_reorientation(target, image.grid.orientation)
    return resample_to_scan(stream_image(image, predictor), image.grid, reoriented)


def stream_image(
    image: NetworkImage, predictor: SlidingWindowPredictor
) -> Iterator[tuple[int, Tensor]]:
    """Yield the probabilities of a prepared image (`stream_probabilities`)."""
    return predictor.stream_probabilities(image.voxels_CZYX, image.intensities, image.present)


def select_structure_probability(
    foreground_FDHW: Tensor, structure: str, predictor: SlidingWindowPredictor
) -> Tensor:
    """Probability (D, H, W) of a structure with everything inside it.

    Raises:
        UserError: unknown structure.
    """
    outputs = predictor.outputs
    return sum_structure_probability(foreground_FDHW, outputs.labels.structure(structure), outputs)

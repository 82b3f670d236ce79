"""The fingerprint of one labelled scan; runs in a worker process."""

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from liverseg_dist.data.io.channel_files import ChannelFiles
from liverseg_dist.data.io.dataset_case import DatasetCase
from liverseg_dist.data.io.nifti import read_nifti, read_scan_channels
from liverseg_dist.data.io.structure_files import read_structure_label
from liverseg_dist.data.label_mapping import LabelMapping
from liverseg_dist.errors import LiversegError, UserError
from liverseg_dist.labels import IGNORE, LabelScheme
from liverseg_dist.planning.fingerprint import (
    QUANTILES,
    CaseFingerprint,
    ForegroundIntensity,
)
from liverseg_dist.volume import Float3, Volume

CONNECTIVITY = 26
"""As in `conversion.foreground_samples`: voxels that touch at a corner are one lesion."""
MIN_LESION_VOXELS = 2
"""A single voxel is an error of annotation more often than a lesion."""


@dataclass(frozen=True)
class LabelledScan:
    """One case, and how its label values become structures."""

    case: DatasetCase
    mapping: LabelMapping

    @property
    def case_id(self) -> str:
        """Id of the case."""
        return self.case.case_id

    def file_states(self) -> tuple[tuple[str, int, int], ...]:
        """Return name, bytes and modification time of each file. Raises `OSError`."""
        states = []
        images = [path for path in self.case.images if path is not None]
        for path in (*images, *self.case.label_files):
            status = path.stat()
            states.append((path.name, status.st_size, status.st_mtime_ns))
        return tuple(states)


@dataclass(frozen=True)
class CaseResult:
    """The fingerprint of a case, or the reason why there is none."""

    case_id: str
    fingerprint: CaseFingerprint | None
    reason: str = ""


def try_case(scan: LabelledScan, channels: int) -> CaseResult:
    """Return the fingerprint of a case, or the reason why the case cannot be read."""
    # Errors are returned, not raised: a worker's exception would end the measurement of all scans.
    try:
        return CaseResult(scan.case_id, measure_case(scan, channels))
    except LiversegError as error:
        return CaseResult(scan.case_id, None, str(error))
    except OSError as error:
        return CaseResult(scan.case_id, None, error.strerror or str(error))
    except MemoryError:
        return CaseResult(scan.case_id, None, "does not fit into memory")


def measure_case(scan: LabelledScan, channels: int) -> CaseFingerprint:
    """Read a case and measure it.

    Args:
        scan: The case.
        channels: Number of channels that the data set has.

    Raises:
        LiversegError: A file cannot be read, or the files do not fit each other.
        OSError: A file is missing.
    """
    states = scan.file_states()
    volumes = _read_images(scan.case.images, channels)
    present = [volume for volume in volumes if volume is not None]
    label = _read_label(scan)
    if present[0].shape != label.shape:
        image_text = "x".join(map(str, present[0].shape))
        label_text = "x".join(map(str, label.shape))
        raise UserError(f"image is {image_text} voxels, label {label_text}")
    scheme = scan.mapping.scheme
    # The ignore value is no structure, so it must not enlarge the box.
    foreground = (label.voxels > 0) & (label.voxels != IGNORE)
    voxels = {}
    for structure in scheme.structures:
        voxels[structure.name] = int(np.count_nonzero(scheme.mask_of(label.voxels, structure)))
    return CaseFingerprint(
        case_id=scan.case_id,
        files=states,
        shape=label.shape,
        content_shape=_box_shape(_content_mask(present)),
        spacing_mm=present[0].spacing_mm,
        foreground_mm=_box_edges_mm(foreground, label.spacing_mm),
        structure_voxels=voxels,
        lesion_diameters_mm=measure_lesions(label, scheme),
        intensities=_summarise_channels(volumes, foreground) if foreground.any() else (),
    )


def _read_images(files: ChannelFiles, channels: int) -> list[Volume | None]:
    """Read the channels in RAS orientation; None for an absent one."""
    # One 4D file holds all channels.
    if len(files) == 1 and channels > 1 and files[0] is not None:
        found = read_scan_channels(files[0], channels)
        return [file.volume.reoriented() for file in found]
    volumes = []
    for path in files:
        volumes.append(None if path is None else read_nifti(path, "image").reoriented())
    return volumes


def _read_label(scan: LabelledScan) -> Volume:
    """Read the label in class values and RAS orientation.

    Raises:
        UserError: It has a value that the labels of the data set do not name.
    """
    case, mapping = scan.case, scan.mapping
    if case.structure_files:
        joined, _ = read_structure_label(case.structure_files, mapping)
        if joined is None:
            raise UserError("no file of any structure")
        return joined.reoriented()
    assert case.label is not None
    label = read_nifti(case.label, "label").reoriented()
    # 256 counters instead of a sort of all voxels: labels are bytes.
    values = np.flatnonzero(np.bincount(label.voxels.reshape(-1), minlength=256))
    unknown = [int(value) for value in values if not mapping.knows(int(value))]
    if unknown:
        raise UserError(
            f"{case.label.name}: label value {unknown[0]} is not one of {mapping.expected}"
        )
    return label.with_voxels(mapping.to_classes(label.voxels))


def _content_mask(volumes: Sequence[Volume]) -> np.ndarray:
    mask = volumes[0].voxels != 0
    for volume in volumes[1:]:
        # Further channels may have grids of their own; conversion resamples them to the first one.
        if volume.shape == mask.shape:
            mask = mask | (volume.voxels != 0)
    return mask


def _summarise_channels(
    volumes: Sequence[Volume | None], foreground: np.ndarray
) -> tuple[ForegroundIntensity | None, ...]:
    """Return the intensities of each channel; None for an absent one."""
    found: list[ForegroundIntensity | None] = []
    for volume in volumes:
        if volume is None:
            found.append(None)
            continue
        # On another grid the foreground is not known without resampling: the body stands for it.
        inside = foreground if volume.shape == foreground.shape else volume.voxels != 0
        found.append(summarise_intensities(volume.voxels[inside]))
    return tuple(found)


def _find_box(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the first and last index of True voxels along each axis; empty for an empty mask."""
    ends = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        if not occupied.size:
            return []
        ends.append((int(occupied[0]), int(occupied[-1])))
    return ends


def _box_shape(mask: np.ndarray) -> tuple[int, int, int]:
    """Return the edges of the box around True voxels; those of the whole array if there is none."""
    ends = _find_box(mask)
    if not ends:
        return mask.shape[0], mask.shape[1], mask.shape[2]
    z, y, x = (last - first + 1 for first, last in ends)
    return z, y, x


def _box_edges_mm(mask: np.ndarray, spacing_mm: Float3) -> Float3:
    if not mask.any():
        return 0.0, 0.0, 0.0
    edges = zip(_box_shape(mask), spacing_mm, strict=True)
    z, y, x = (count * step for count, step in edges)
    return z, y, x


def summarise_intensities(values: np.ndarray) -> ForegroundIntensity:
    """Return mean, standard deviation and quantiles; values that are not finite are left out."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not finite.size:
        return ForegroundIntensity(0.0, 0.0, (0.0,) * len(QUANTILES))
    # float64: the mean of millions of int16 values must not depend on the order of summation.
    quantiles = tuple(float(v) for v in np.quantile(finite, QUANTILES))
    mean, std = finite.mean(dtype=np.float64), finite.std(dtype=np.float64)
    return ForegroundIntensity(float(mean), float(std), quantiles)


def measure_lesions(label: Volume, scheme: LabelScheme) -> dict[str, tuple[float, ...]]:
    """Return the diameters in mm of the components of each lesion structure, ascending."""
    found: dict[str, tuple[float, ...]] = {}
    voxel_mm3 = label.grid.voxel_volume_ml * 1000
    for structure in scheme.lesions:
        mask = scheme.mask_of(label.voxels, structure)
        ends = _find_box(mask)
        if not ends:
            found[structure.name] = ()
            continue
        # The box only: the components of a whole scan take seconds.
        box = tuple(slice(first, last + 1) for first, last in ends)
        components = cc3d.connected_components(  # type: ignore[call-overload]
            np.ascontiguousarray(mask[box]), connectivity=CONNECTIVITY
        )
        sizes = np.bincount(components.reshape(-1))[1:]
        volumes_mm3 = np.sort(sizes[sizes >= MIN_LESION_VOXELS]) * voxel_mm3
        # The diameter of a sphere with the same volume.
        diameters = np.cbrt(6 * volumes_mm3 / np.pi)
        found[structure.name] = tuple(round(float(d), 3) for d in diameters)
    return found

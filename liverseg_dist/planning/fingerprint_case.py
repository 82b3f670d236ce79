"""The fingerprint of one labelled scan; runs in a worker process."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cc3d
import nibabel as nib
import numpy as np

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.io.nifti_header import MAX_VOXELS
from liverseg_dist.errors import LiversegError, UserError
from liverseg_dist.labels import LabelScheme
from liverseg_dist.planning.fingerprint import (
    QUANTILES,
    CaseFingerprint,
    ForegroundIntensity,
)
from liverseg_dist.volume import Float3, Grid, Volume

CONNECTIVITY = 26
"""As in `conversion.foreground_samples`: voxels that touch at a corner are one lesion."""
MIN_LESION_VOXELS = 2
"""A single voxel is an error of annotation more often than a lesion."""


@dataclass(frozen=True)
class LabelledScan:
    """The files of one case."""

    case_id: str
    images: tuple[Path, ...]
    """One file per channel, or one 4D file with all of them."""
    label: Path

    def file_states(self) -> tuple[tuple[str, int, int], ...]:
        """Return name, bytes and modification time of each file. Raises `OSError`."""
        states = []
        for path in (*self.images, self.label):
            status = path.stat()
            states.append((path.name, status.st_size, status.st_mtime_ns))
        return tuple(states)


@dataclass(frozen=True)
class CaseResult:
    """The fingerprint of a case, or the reason why there is none."""

    case_id: str
    fingerprint: CaseFingerprint | None
    reason: str = ""


def try_case(scan: LabelledScan, scheme: LabelScheme, channels: int) -> CaseResult:
    """Return the fingerprint of a case, or the reason why the case cannot be read."""
    try:
        return CaseResult(scan.case_id, measure_case(scan, scheme, channels))
    except LiversegError as error:
        return CaseResult(scan.case_id, None, str(error))
    except OSError as error:
        return CaseResult(scan.case_id, None, error.strerror or str(error))
    except MemoryError:
        return CaseResult(scan.case_id, None, "does not fit into memory")


def measure_case(scan: LabelledScan, scheme: LabelScheme, channels: int) -> CaseFingerprint:
    """Read a case and measure it.

    Args:
        scan: Its files.
        scheme: The label values and structures.
        channels: Number of channels that the data set has.

    Raises:
        LiversegError: A file cannot be read, or the files do not fit each other.
        OSError: A file is missing.
    """
    states = scan.file_states()
    volumes = [volume.reoriented() for volume in read_channels(scan.images, channels)]
    label = read_nifti(scan.label, "label").reoriented()
    _check_shapes(scan, volumes, label)
    if unknown := scheme.unknown_values(label.voxels):
        raise UserError(f"{scan.label.name}: label value {unknown[0]} is not in dataset.json")
    foreground = label.voxels > 0
    if scheme.ignore is not None:
        foreground &= label.voxels != scheme.ignore
    voxels = {}
    for structure in scheme.structures:
        voxels[structure.name] = int(np.count_nonzero(scheme.mask_of(label.voxels, structure)))
    intensities = _summarise_channels(volumes, foreground) if foreground.any() else []
    return CaseFingerprint(
        case_id=scan.case_id,
        files=states,
        shape=label.shape,
        content_shape=_box_shape(_content_mask(volumes)),
        spacing_mm=volumes[0].spacing_mm,
        foreground_mm=_box_edges_mm(foreground, label.spacing_mm),
        structure_voxels=voxels,
        lesion_diameters_mm=measure_lesions(label, scheme),
        intensities=tuple(intensities),
    )


def read_channels(images: Sequence[Path], channels: int) -> list[Volume]:
    """Read the channels of a scan from one file each, or from one 4D file.

    Raises:
        LiversegError: A file cannot be read, or another number of channels is present.
    """
    if len(images) == 1 and channels > 1:
        return _read_4d(images[0], channels)
    if len(images) != channels:
        raise UserError(f"{len(images)} image file(s), but dataset.json names {channels} channels")
    return [read_nifti(path, "image") for path in images]


def _read_4d(path: Path, channels: int) -> list[Volume]:
    """Read the Decathlon's files of several channels (x, y, z, channel)."""
    try:
        # nibabel's own reader: read_nifti reads one volume per file.
        file = nib.Nifti1Image.from_filename(path)
        shape = file.shape
        if len(shape) != 4 or shape[3] != channels:
            sizes = " x ".join(map(str, shape))
            reason = f"{sizes} voxels, but dataset.json names {channels} channels"
            raise ScanFileError(path, "channels", reason)
        # Before memory is allocated: a damaged header may claim any size.
        if int(np.prod(shape, dtype=np.int64)) > MAX_VOXELS:
            raise ScanFileError(path, "too_large", f"more than {MAX_VOXELS:,} voxels")
        values = np.asarray(file.dataobj, dtype=np.float32)
        grid = Grid((shape[2], shape[1], shape[0]), np.asarray(file.affine))
    except ScanFileError:
        raise
    # nibabel raises errors of many kinds for damaged files.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ScanFileError(path, "unreadable", reason) from None
    return [Volume(values[..., channel].T, grid) for channel in range(channels)]


def _check_shapes(scan: LabelledScan, volumes: Sequence[Volume], label: Volume) -> None:
    """Raise `UserError` where the label is not on the grid of the first channel."""
    if volumes[0].shape != label.shape:
        image_text = "x".join(map(str, volumes[0].shape))
        label_text = "x".join(map(str, label.shape))
        raise UserError(f"{scan.label.name}: image is {image_text} voxels, label {label_text}")


def _content_mask(volumes: Sequence[Volume]) -> np.ndarray:
    mask = volumes[0].voxels != 0
    for volume in volumes[1:]:
        # Further channels may have grids of their own; conversion resamples them to the first one.
        if volume.shape == mask.shape:
            mask = mask | (volume.voxels != 0)
    return mask


def _summarise_channels(
    volumes: Sequence[Volume], foreground: np.ndarray
) -> list[ForegroundIntensity]:
    found = []
    for volume in volumes:
        # On another grid the foreground is not known without resampling: the body stands for it.
        inside = foreground if volume.shape == foreground.shape else volume.voxels != 0
        found.append(summarise_intensities(volume.voxels[inside]))
    return found


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
        diameters = np.cbrt(6 * volumes_mm3 / np.pi)
        found[structure.name] = tuple(round(float(d), 3) for d in diameters)
    return found

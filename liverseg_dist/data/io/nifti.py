"""Read and write NIfTI volumes: `read_nifti(path, kind)`, `write_mask(path, mask_zyx, grid)`.

`read_scan_channels(path, count)` reads the channels of a 4D file, one volume after the other.

A file is untrusted. Sizes are checked against the header and the file before memory is allocated.
gzip is recognised by its first bytes, not by the file name, and inflated by isal directly into the
array, with its checksum verified. Scaling (`scl_slope`) is applied. Patient text and extensions of
the header are not read.

Voxels are returned C-contiguous as `z, y, x`: images as int16 if that is lossless, else as float32;
labels as uint8. Every failure is a `ScanFileError`: a `UserError` of one line with a `code`.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import nibabel as nib
import numpy as np
from isal import igzip
from isal.igzip_lib import IsalError

from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io.nifti_header import (
    NIFTI1_BYTES,
    Header,
    detect_header_size,
    parse_header,
)
from liverseg_dist.data.io.voxel_buffer import ImageBuffer
from liverseg_dist.errors import UserError, printable
from liverseg_dist.files import atomic_write
from liverseg_dist.volume import Grid, Volume

Kind = Literal["image", "label"]

SUFFIXES = (".nii.gz", ".nii")
GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 4 << 20
"""Read and converted at once: avoids a second copy of the scan, and a chunk fits into the cache."""
MAX_TRAILING_BYTES = 64 << 10
MAX_GZIP_RATIO = 1032
"""The highest compression ratio of a deflate stream."""
LABEL_TOLERANCE = 1e-3
CORRUPT_DATA_ERRORS = (igzip.BadGzipFile, cast(type[Exception], IsalError))
GZIP_LEVEL = 2
"""isal's level. Masks are about as small as with gzip -6, at 50 times its speed."""


@dataclass(frozen=True)
class ScanFile:
    """The volume in a file, and the findings about its header."""

    volume: Volume
    notes: tuple[Finding, ...]
    stored_type: str = ""
    """Type of the voxels in the file, such as `int16`; `int16, scaled` if scl_slope and scl_inter
    change the values."""
    modality: str = ""
    """`CT` or `MR` where the file states it (DICOM); NIfTI does not."""


def read_nifti(path: Path | str, kind: Kind = "image") -> Volume:
    """Read a scan (`image`: int16 or float32, HU) or a segmentation (`label`: uint8).

    Raises:
        ScanFileError: see `read_scan_file`.
    """
    return read_scan_file(path, kind).volume


def read_scan_file(path: Path | str, kind: Kind = "image") -> ScanFile:
    """Read a NIfTI file with the findings about its header.

    Raises:
        ScanFileError: The file is unreadable, damaged or not a NIfTI volume, its header is not
            usable, or a label has values that are not class numbers.
    """
    return _read_volumes(Path(path), kind, 1)[0]


def read_scan_channels(path: Path | str, count: int) -> list[ScanFile]:
    """Read a file of several channels: NIfTI in 4D, with the channels along the last axis.

    The file is inflated once. Each channel is int16 if that is lossless for this channel; beside
    the results, memory holds one buffer of a few MiB.

    Args:
        path: The file; one volume in 3D for `count` 1.
        count: Number of channels of the data set.

    Raises:
        ScanFileError: See `read_scan_file`; also where the file has another number of volumes.
    """
    return _read_volumes(Path(path), "image", count)


def _read_volumes(path: Path, kind: Kind, count: int) -> list[ScanFile]:
    try:
        with _open_stream(path) as (stream, max_bytes):
            block = stream.read(NIFTI1_BYTES)
            block += stream.read(detect_header_size(block) - NIFTI1_BYTES)
            header = parse_header(block, path, count)
            # Before the voxels are read: a header may claim more than the file can contain.
            _check_file_size(header, max_bytes, path)
            _skip_bytes(stream, header.offset - len(block))
            volumes = []
            for _ in range(count):
                volumes.append(_read_voxels(stream, header, kind, path))
            _check_stream_end(stream, path)
    except EOFError:
        reason = "ends too early (truncated); copy it again"
        raise ScanFileError(path, "truncated", reason) from None
    except CORRUPT_DATA_ERRORS as error:
        reason = f"corrupt gzip data ({error}); copy it again"
        raise ScanFileError(path, "corrupt", reason) from None
    # The scan may be valid but too large for this machine.
    except MemoryError:
        raise ScanFileError(path, "too_large", "does not fit into memory") from None
    except OSError as error:
        raise ScanFileError(path, "unreadable", error.strerror or str(error)) from None
    stored_type = header.dtype.newbyteorder("=").name
    if header.is_scaled:
        stored_type += ", scaled"
    files = []
    for number, voxels in enumerate(volumes):
        # The header is one for all channels: its findings belong to the first.
        notes = header.notes if number == 0 else ()
        files.append(ScanFile(Volume(voxels, header.grid), notes, stored_type))
    return files


@contextmanager
def _open_stream(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The uncompressed byte stream of a regular file, and the most bytes that it can contain."""
    status = path.stat()
    # Opening a pipe would block.
    if not stat.S_ISREG(status.st_mode):
        reason = "a folder, not a NIfTI file" if path.is_dir() else "not a file"
        raise ScanFileError(path, "not_nifti", reason)
    with path.open("rb") as raw:
        is_gzip = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        raw.seek(0)
        if is_gzip:
            with igzip.open(raw, "rb") as stream:
                yield cast(BinaryIO, stream), status.st_size * MAX_GZIP_RATIO
        else:
            yield raw, status.st_size


def _check_file_size(header: Header, max_bytes: int, path: Path) -> None:
    """Compare with the header first: a damaged header must not cause a huge allocation."""
    if header.offset + header.data_bytes > max_bytes:
        reason = (
            f"shorter than its header states ({header.data_bytes:,} bytes of voxels); copy it again"
        )
        raise ScanFileError(path, "truncated", reason)


def _skip_bytes(stream: BinaryIO, count: int) -> None:
    while count > 0:
        skipped = len(stream.read(min(count, CHUNK_BYTES)))
        if not skipped:
            raise EOFError
        count -= skipped


def _check_stream_end(stream: BinaryIO, path: Path) -> None:
    """Read to the end, which also verifies the gzip checksum. A few padding bytes are accepted."""
    if len(stream.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
        reason = "holds more voxels than its header states; the header is damaged"
        raise ScanFileError(path, "header_shape", reason)


def _read_into(stream: BinaryIO, array: np.ndarray) -> None:
    """Fill the whole array with bytes of the stream."""
    view = array.reshape(-1).view(np.uint8)
    position = 0
    while position < len(view):
        chunk = view[position : position + CHUNK_BYTES]
        count = stream.readinto(chunk)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        position += count


def _read_voxels(stream: BinaryIO, header: Header, kind: Kind, path: Path) -> np.ndarray:
    stored = header.dtype
    wanted = np.dtype(np.int16 if kind == "image" else np.uint8)
    # The stored type is the wanted one: no conversion, so no buffer between file and array.
    if not header.is_scaled and (stored.kind, stored.itemsize) == (wanted.kind, wanted.itemsize):
        voxels = np.empty(header.grid.shape, dtype=stored)
        _read_into(stream, voxels)
        if not stored.isnative:
            voxels = voxels.byteswap(inplace=True).view(wanted)
        return voxels
    count = int(np.prod(header.grid.shape, dtype=np.int64))
    target = ImageBuffer(count) if kind == "image" else _LabelBuffer(count, path)
    buffer = np.empty(CHUNK_BYTES // stored.itemsize, dtype=stored)
    while target.position < count:
        chunk = buffer[: count - target.position]
        _read_into(stream, chunk)
        target.append(_apply_scaling(chunk, header) if header.is_scaled else chunk)
    return target.voxels.reshape(header.grid.shape)


def _apply_scaling(values: np.ndarray, header: Header) -> np.ndarray:
    # An overflow becomes infinite, which the audit reports.
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float64) * header.slope + header.inter


class _LabelBuffer:
    """Collects class numbers as uint8. Raises `ScanFileError` for any other value."""

    def __init__(self, count: int, path: Path) -> None:
        self.voxels = np.empty(count, dtype=np.uint8)
        self.position = 0
        self.path = path

    def append(self, values: np.ndarray) -> None:
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            reason = "a label volume with NaN or infinite voxels"
            raise ScanFileError(self.path, "label_not_finite", reason)
        if values.dtype.kind == "f":
            rounded = np.rint(values)
            # The worst voxel is named, as an example for the user.
            worst = int(np.argmax(np.abs(values - rounded)))
            if abs(values[worst] - rounded[worst]) > LABEL_TOLERANCE:
                reason = (
                    f"fractional label {values[worst]:.4g}; labels must be integers "
                    "(was the label interpolated?)"
                )
                raise ScanFileError(self.path, "label_fractional", reason)
            values, low, high = rounded, rounded.min(), rounded.max()
        if low < 0 or high > 255:
            reason = (
                f"label values from {low:g} to {high:g}; expected 0 background, 1 liver, 2 tumour"
            )
            raise ScanFileError(self.path, "label_values", reason)
        self.voxels[self.position : self.position + values.size] = values
        self.position += values.size


def write_mask(path: Path | str, mask_zyx: np.ndarray, grid: Grid) -> None:
    """Write a uint8 mask as .nii or .nii.gz.

    The file is written atomically, and equal masks give equal bytes.

    Raises:
        UserError: The name does not end in .nii.gz or .nii.
        ValueError: Another type than uint8, or another shape than the grid's.
    """
    if mask_zyx.dtype != np.uint8:
        raise ValueError(f"a mask is uint8, not {mask_zyx.dtype}")
    _write_volume(Path(path), mask_zyx, grid)


def write_image(path: Path | str, voxels_zyx: np.ndarray, grid: Grid) -> None:
    """Write an int16 or float32 image (HU) like `write_mask`."""
    if voxels_zyx.dtype not in (np.int16, np.float32):
        raise ValueError(f"an image is int16 or float32, not {voxels_zyx.dtype}")
    _write_volume(Path(path), voxels_zyx, grid)


def _write_volume(path: Path, voxels: np.ndarray, grid: Grid) -> None:
    if voxels.shape != grid.shape:
        raise ValueError(f"voxels have shape {voxels.shape}, their grid {grid.shape}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{printable(path)}: the name of an output must end in .nii.gz or .nii")
    with atomic_write(path) as raw:
        if not path.name.endswith(".gz"):
            _write_stream(raw, voxels, grid)
            return
        # No name and no time in the gzip header, so that equal masks give equal bytes.
        with igzip.IGzipFile(
            filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=raw, mtime=0
        ) as stream:
            _write_stream(cast(BinaryIO, stream), voxels, grid)


def _write_stream(stream: BinaryIO, voxels: np.ndarray, grid: Grid) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(grid.shape[::-1])
    # Both forms, because tools differ in the one they read.
    header.set_qform(grid.affine, code=1)
    header.set_sform(grid.affine, code=1)
    # A quaternion cannot express shear.
    if grid.is_sheared:
        header["qform_code"] = 0
    header.set_xyzt_units("mm")
    header["vox_offset"] = NIFTI1_BYTES + 4
    stream.write(header.binaryblock + bytes(4))
    little_endian = voxels.dtype.newbyteorder("<")
    for slice_yx in voxels:
        stream.write(np.ascontiguousarray(slice_yx, dtype=little_endian).data)

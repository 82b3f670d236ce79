"""Read and write NIfTI volumes: `read_nifti(path, kind)`, `write_mask(path, mask_zyx, grid)`.

A file is untrusted: sizes are checked against the header and the file before memory is taken, gzip is recognised by
its first bytes (whatever the name says) and inflated by isal straight into the array, checksum included; scaling
(`scl_slope`) is applied; patient text and extensions of the header are not even looked at. Voxels come C-contiguous as
`z, y, x`: int16 when that loses nothing, else float32; labels as uint8. Every failure is a `ScanFileError`, a
`UserError` of one line with a `code`.
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
from liverseg_dist.errors import UserError, printable
from liverseg_dist.files import atomic_write
from liverseg_dist.volume import Grid, Volume

Kind = Literal["image", "label"]

SUFFIXES = (".nii.gz", ".nii")
CHUNK_BYTES = 4 << 20
"""Read and converted at a time: no second copy of the scan, and the chunk stays in the cache."""
MAX_TRAILING_BYTES = 64 << 10
MAX_GZIP_RATIO = 1032
"""No deflate stream expands further."""
LABEL_TOLERANCE = 1e-3
CORRUPT_DATA_ERRORS = (EOFError, igzip.BadGzipFile, cast(type[Exception], IsalError))
GZIP_LEVEL = 2
"""isal's; masks come out near gzip -6 at 50 times its speed."""


@dataclass(frozen=True)
class ScanFile:
    """A file's volume and what its header made us notice."""

    volume: Volume
    notes: tuple[Finding, ...]
    stored_type: str = ""
    """Of the voxels in the file: `int16`, `float32` ...; with `, scaled` where scl_slope and scl_inter change them."""


def read_nifti(path: Path | str, kind: Kind = "image") -> Volume:
    """The scan (`image`: int16 or float32, HU) or the segmentation (`label`: uint8) in a NIfTI file."""
    return read_scan_file(path, kind).volume


def read_scan_file(path: Path | str, kind: Kind = "image") -> ScanFile:
    """`read_nifti` with the notes on the header. Raises `ScanFileError`."""
    path = Path(path)
    try:
        with _open_stream(path) as (stream, most_bytes):
            block = stream.read(NIFTI1_BYTES)
            block += stream.read(detect_header_size(block) - NIFTI1_BYTES)
            header = parse_header(block, path)
            if header.offset + header.data_bytes > most_bytes:
                reason = f"shorter than its header says ({header.data_bytes:,} bytes of voxels); copy it again"
                raise ScanFileError(path, "truncated", reason)
            _skip_bytes(stream, header.offset - len(block))
            voxels = _read_voxels(stream, header, kind, path)
            _check_stream_end(stream, path)
    except CORRUPT_DATA_ERRORS as error:
        truncated = isinstance(error, EOFError)
        reason = "ends too early (truncated)" if truncated else f"corrupt gzip data ({error})"
        raise ScanFileError(
            path, "truncated" if truncated else "corrupt", f"{reason}; copy it again"
        ) from None
    except MemoryError:
        raise ScanFileError(path, "too_large", "does not fit into memory") from None
    except OSError as error:
        raise ScanFileError(path, "unreadable", error.strerror or str(error)) from None
    stored_type = header.dtype.newbyteorder("=").name + (", scaled" if header.scaled else "")
    return ScanFile(Volume(voxels, header.grid), header.notes, stored_type)


@contextmanager
def _open_stream(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The uncompressed byte stream of a regular file, and the most bytes it can hold."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ScanFileError(
            path, "not_nifti", "not a file" if not path.is_dir() else "a folder, not a NIfTI file"
        )
    with path.open("rb") as raw:
        if raw.read(2) == b"\x1f\x8b":
            raw.seek(0)
            with igzip.open(raw, "rb") as stream:
                yield cast(BinaryIO, stream), status.st_size * MAX_GZIP_RATIO
        else:
            raw.seek(0)
            yield raw, status.st_size


def _skip_bytes(stream: BinaryIO, count: int) -> None:
    while count > 0:
        got = len(stream.read(min(count, CHUNK_BYTES)))
        if not got:
            raise EOFError
        count -= got


def _check_stream_end(stream: BinaryIO, path: Path) -> None:
    """Read to the end, which also checks the gzip checksum; a few padding bytes are no harm."""
    if len(stream.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
        raise ScanFileError(
            path, "header_shape", "holds more voxels than its header says; the header is damaged"
        )


def _read_into(stream: BinaryIO, array: np.ndarray) -> None:
    """Read a whole array's bytes."""
    view = array.reshape(-1).view(np.uint8)
    at = 0
    while at < len(view):
        got = stream.readinto(view[at : at + CHUNK_BYTES])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        at += got


def _read_voxels(stream: BinaryIO, header: Header, kind: Kind, path: Path) -> np.ndarray:
    stored = header.dtype
    wanted = np.dtype(np.int16 if kind == "image" else np.uint8)
    if not header.scaled and (stored.kind, stored.itemsize) == (wanted.kind, wanted.itemsize):
        voxels = np.empty(header.grid.shape, dtype=stored)
        _read_into(stream, voxels)
        if not stored.isnative:
            voxels = voxels.byteswap(inplace=True).view(wanted)
        return voxels
    count = int(np.prod(header.grid.shape, dtype=np.int64))
    sink = _ImageBuffer(count) if kind == "image" else _LabelBuffer(count, path)
    buffer = np.empty(CHUNK_BYTES // stored.itemsize, dtype=stored)
    while sink.at < count:
        chunk = buffer[: count - sink.at]
        _read_into(stream, chunk)
        sink.add(_apply_scaling(chunk, header) if header.scaled else chunk)
    return sink.voxels.reshape(header.grid.shape)


def _apply_scaling(values: np.ndarray, header: Header) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # infinite then, which the audit reports
        return values.astype(np.float64) * header.slope + header.inter


class _ImageBuffer:
    """Collects values as int16 as long as that loses nothing, as float32 from then on."""

    def __init__(self, count: int) -> None:
        self.voxels: np.ndarray = np.empty(count, dtype=np.int16)
        self.at = 0

    def add(self, values: np.ndarray) -> None:
        part = slice(self.at, self.at + values.size)
        self.at = part.stop
        if self.voxels.dtype == np.int16:
            whole = _convert_to_integers(values, np.int16)
            if whole is not None:
                self.voxels[part] = whole
                return
            wider = np.empty(self.voxels.size, dtype=np.float32)
            wider[: part.start] = self.voxels[: part.start]
            self.voxels = wider
        with np.errstate(over="ignore"):  # beyond float32: infinite too
            self.voxels[part] = values


class _LabelBuffer:
    """Collects class numbers as uint8; refuses what is no class number."""

    def __init__(self, count: int, path: Path) -> None:
        self.voxels = np.empty(count, dtype=np.uint8)
        self.at, self.path = 0, path

    def add(self, values: np.ndarray) -> None:
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ScanFileError(
                self.path, "label_not_finite", "a label volume with NaN or infinite voxels"
            )
        if values.dtype.kind == "f":
            rounded = np.rint(values)
            worst = int(np.argmax(np.abs(values - rounded)))
            if abs(values[worst] - rounded[worst]) > LABEL_TOLERANCE:
                reason = f"fractional label {values[worst]:.4g}; labels are whole numbers (was it interpolated?)"
                raise ScanFileError(self.path, "label_fractional", reason)
            values, low, high = rounded, rounded.min(), rounded.max()
        if low < 0 or high > 255:
            reason = (
                f"label values from {low:g} to {high:g}; expected 0 background, 1 liver, 2 tumour"
            )
            raise ScanFileError(self.path, "label_values", reason)
        self.voxels[self.at : self.at + values.size] = values
        self.at += values.size


def _convert_to_integers(values: np.ndarray, dtype: type[np.int16]) -> np.ndarray | None:
    """The same values as integers, or None where that would change one."""
    limits = np.iinfo(dtype)
    if not (values.min() >= limits.min and values.max() <= limits.max):  # NaN compares false
        return None
    whole = values.astype(dtype)
    return whole if values.dtype.kind != "f" or (whole == values).all() else None


def write_mask(path: Path | str, mask_zyx: np.ndarray, grid: Grid) -> None:
    """Write a uint8 mask on `grid` as .nii or .nii.gz: whole or not at all, the same bytes every time."""
    if mask_zyx.dtype != np.uint8:
        raise ValueError(f"a mask is uint8, not {mask_zyx.dtype}")
    _write_volume(Path(path), mask_zyx, grid)


def write_image(path: Path | str, voxels_zyx: np.ndarray, grid: Grid) -> None:
    """Write an int16 or float32 image (HU) on `grid`, as `write_mask` does."""
    if voxels_zyx.dtype not in (np.int16, np.float32):
        raise ValueError(f"an image is int16 or float32, not {voxels_zyx.dtype}")
    _write_volume(Path(path), voxels_zyx, grid)


def _write_volume(path: Path, voxels: np.ndarray, grid: Grid) -> None:
    if voxels.shape != grid.shape:
        raise ValueError(f"voxels have shape {voxels.shape}, their grid {grid.shape}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{printable(path)}: an output name ends in .nii.gz or .nii")
    with atomic_write(path) as raw:
        if path.name.endswith(".gz"):
            with igzip.IGzipFile(
                filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=raw, mtime=0
            ) as stream:
                _write_stream(cast(BinaryIO, stream), voxels, grid)
        else:
            _write_stream(raw, voxels, grid)


def _write_stream(stream: BinaryIO, voxels: np.ndarray, grid: Grid) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(grid.shape[::-1])
    header.set_qform(grid.affine, code=1)
    header.set_sform(grid.affine, code=1)
    if grid.is_sheared:
        header["qform_code"] = 0  # a quaternion cannot express shear
    header.set_xyzt_units("mm")
    header["vox_offset"] = NIFTI1_BYTES + 4
    stream.write(header.binaryblock + bytes(4))
    little = voxels.dtype.newbyteorder("<")
    for slice_yx in voxels:
        stream.write(np.ascontiguousarray(slice_yx, dtype=little).data)

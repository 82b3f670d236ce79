"""The header of a NIfTI file, checked before memory is allocated for its voxels.

nibabel decodes the fields (both versions, both byte orders, quaternions). This module checks that
the file is usable: three-dimensional scalar voxels (one volume, or one for each channel), of a
plausible number and size, at a known offset. Every refusal is a `ScanFileError`. `nifti_geometry`
determines the position of the voxels.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io.nifti_geometry import read_geometry
from liverseg_dist.volume import Grid, Index3

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
NIFTI2_LINE_ENDS = b"\r\n\x1a\n"
"""Part of the signature of version 2: damaged by transfers that convert line ends."""
MAX_DIMENSIONS = 7
MAX_VOXELS = 2**30
"""Four times the largest scan of LiTS (512 x 512 x 1026)."""
MAX_OFFSET = 2**26
"""Most bytes of header extensions."""

SUPPORTED_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
"""NIfTI data type codes, as numpy type strings without the byte order."""
UNSUPPORTED_TYPES = {
    1: "bits",
    32: "complex",
    128: "RGB",
    1536: "float128",
    1792: "complex",
    2048: "complex",
    2304: "RGBA",
}


@dataclass(frozen=True)
class Header:
    """The fields that are needed to read the voxels, and the findings about the header."""

    grid: Grid
    dtype: np.dtype
    offset: int
    """Bytes before the first voxel."""
    slope: float
    inter: float
    notes: tuple[Finding, ...]
    volumes: int = 1
    """Volumes in the file, one after the other: the channels of a 4D file."""

    @property
    def is_scaled(self) -> bool:
        return (self.slope, self.inter) != (1.0, 0.0)

    @property
    def data_bytes(self) -> int:
        """Of all volumes."""
        return self.volumes * math.prod(self.grid.shape) * self.dtype.itemsize


def detect_header_size(start: bytes) -> int:
    """Bytes of the header that begins with `start` (at least 4 bytes)."""
    version_2 = (struct.pack("<i", NIFTI2_BYTES), struct.pack(">i", NIFTI2_BYTES))
    return NIFTI2_BYTES if start[:4] in version_2 else NIFTI1_BYTES


def parse_header(block: bytes, path: Path, volumes: int = 1) -> Header:
    """Decode and check a header.

    Args:
        block: The first `detect_header_size` bytes of the uncompressed file.
        path: The file, for messages.
        volumes: Number of volumes that the file must hold: more than 1 for the channels of a scan.

    Raises:
        ScanFileError: Not a NIfTI header, or not one of a usable scan.
    """
    fields = _decode_fields(block, path)
    shape_xyz = _read_shape(fields, path, volumes)
    dtype = _read_dtype(fields, path)
    slope, inter = _read_scaling(fields, path)
    grid, notes = read_geometry(fields, shape_xyz, path)
    return Header(
        grid=grid,
        dtype=dtype,
        offset=_read_offset(fields, path),
        slope=slope,
        inter=inter,
        notes=(*_check_scaling(fields), *notes),
        volumes=volumes,
    )


def _decode_fields(block: bytes, path: Path) -> nib.Nifti1Header:
    if len(block) < NIFTI1_BYTES:
        raise ScanFileError(path, "not_nifti", f"only {len(block)} bytes long: not a NIfTI file")
    for order in "<>":
        (size,) = struct.unpack(f"{order}i", block[:4])
        if size == NIFTI1_BYTES and block[344:348] == b"n+1\0":
            return nib.Nifti1Header(block[:NIFTI1_BYTES], endianness=order, check=False)
        if size == NIFTI2_BYTES and block[4:8] == b"n+2\0" and len(block) >= NIFTI2_BYTES:
            # Zeros in place of the line ends are accepted.
            if block[8:12] not in (NIFTI2_LINE_ENDS, bytes(4)):
                reason = "line ends were converted as in a text file; copy it again"
                raise ScanFileError(path, "not_nifti", reason)
            return nib.Nifti2Header(block[:NIFTI2_BYTES], endianness=order, check=False)
        if size == NIFTI1_BYTES and block[344:348] == b"ni1\0":
            reason = "half of an .hdr/.img pair; convert it to a single .nii file"
            raise ScanFileError(path, "not_nifti", reason)
    if block[128:132] == b"DICM":
        reason = "a DICOM file; convert the series to NIfTI first (e.g. with dcm2niix)"
        raise ScanFileError(path, "not_nifti", reason)
    raise ScanFileError(path, "not_nifti", "not a NIfTI file (no NIfTI header)")


def _read_shape(fields: nib.Nifti1Header, path: Path, volumes: int) -> Index3:
    """Number of voxels along x, y and z; the file must hold this many volumes."""
    dim = [int(n) for n in fields["dim"]]
    rank = dim[0]
    if not 1 <= rank <= MAX_DIMENSIONS:
        reason = f"the header claims {rank} dimensions; the file is damaged"
        raise ScanFileError(path, "header_shape", reason)
    sizes = dim[1 : rank + 1]
    shown = " x ".join(map(str, sizes))
    if any(n < 1 for n in sizes):
        reason = f"the header claims {shown} voxels; the file is damaged"
        raise ScanFileError(path, "header_shape", reason)
    if rank < 3:
        reason = f"a picture of {shown} pixels; a scan has three dimensions"
        raise ScanFileError(path, "not_3d", reason)
    _check_volumes(sizes[3:], volumes, shown, path)
    # Limits the memory for a damaged or malicious header.
    if math.prod(sizes[:3]) > MAX_VOXELS:
        reason = f"the header claims {shown} voxels; at most {MAX_VOXELS:,} are read"
        raise ScanFileError(path, "header_shape", reason)
    x, y, z = sizes[:3]
    return x, y, z


def _check_volumes(sizes: list[int], volumes: int, shown: str, path: Path) -> None:
    """Compare the sizes behind z, of which one may be the channels, with the expected number."""
    # Some writers store a volume as 4D with one time step, or channels in the fifth dimension.
    found = math.prod(sizes)
    is_one_axis = sum(n != 1 for n in sizes) <= 1
    if found == volumes and is_one_axis:
        return
    if volumes == 1:
        reason = f"{shown} voxels in {3 + len(sizes)} dimensions; extract one 3D volume first"
        if is_one_axis:
            reason += f", or name its {found} channels (dataset.json or convert.channels)"
        raise ScanFileError(path, "not_3d", reason)
    count = f"{found} volume{'s' if found != 1 else ''}"
    reason = f"{shown} voxels: {count}, but the data set has {volumes} channels"
    raise ScanFileError(path, "channel_count", reason)


def _read_dtype(fields: nib.Nifti1Header, path: Path) -> np.dtype:
    code = int(fields["datatype"])
    if code not in SUPPORTED_TYPES:
        kind = UNSUPPORTED_TYPES.get(code, f"of unknown type {code}")
        reason = f"voxels are {kind}; one integer or float per voxel is needed"
        raise ScanFileError(path, "not_scalar", reason)
    # The byte order is that of the header.
    dtype = np.dtype(SUPPORTED_TYPES[code]).newbyteorder(fields.endianness)
    bits = int(fields["bitpix"])
    if bits != dtype.itemsize * 8:
        reason = f"the header gives {dtype.name} of {bits} bits; it is damaged"
        raise ScanFileError(path, "header_type", reason)
    return dtype


def _read_offset(fields: nib.Nifti1Header, path: Path) -> int:
    """Bytes before the first voxel."""
    offset = float(fields["vox_offset"])
    # The 4 bytes after the header state whether extensions follow.
    min_offset = int(fields["sizeof_hdr"]) + 4
    is_whole = math.isfinite(offset) and offset == int(offset)
    # An offset of 0 is read as: right after the header.
    if not is_whole or offset > MAX_OFFSET or (offset != 0 and offset < min_offset):
        reason = f"the header puts the voxels at byte {offset:g}; it is damaged"
        raise ScanFileError(path, "header_offset", reason)
    return max(int(offset), min_offset)


def _read_scaling(fields: nib.Nifti1Header, path: Path) -> tuple[float, float]:
    """(slope, intercept). The NIfTI standard and nibabel read a slope of 0 or NaN as no scaling."""
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(inter):
        reason = f"scl_slope {slope:g}, scl_inter {inter:g}: no voxel has a value"
        raise ScanFileError(path, "header_scaling", reason)
    return slope, inter


def _check_scaling(fields: nib.Nifti1Header) -> list[Finding]:
    """Report an intercept, such as -1024, that a slope of 0 disables."""
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    is_disabled = slope == 0 or math.isnan(slope)
    if not is_disabled or inter == 0 or math.isnan(inter):
        return []
    message = f"scl_slope {slope:g} switches scaling off: scl_inter {inter:g} is not applied"
    return [Finding("warning", "scaling_ignored", message)]

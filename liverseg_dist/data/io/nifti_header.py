"""The header of a NIfTI file, checked before a byte is allocated for its voxels.

nibabel decodes the fields (both versions, both byte orders, quaternions); this module decides what is fit for use:
three-dimensional scalar voxels of a believable number and size at known places. Every refusal is a `ScanFileError`.
Where the voxels lie is decided in `nifti_geometry`.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io.nifti_geometry import read_geometry
from liverseg_dist.volume import Grid

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
NIFTI2_LINE_ENDS = b"\r\n\x1a\n"
MAX_VOXELS = 2**30
"""Four times the largest scan of LiTS (512 x 512 x 1026)."""
MAX_OFFSET = 2**26
"""Bytes of header extensions."""

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
"""NIfTI data type codes we read, as numpy type strings without the byte order."""
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
    """What is needed to read the voxels, and what was noticed on the way."""

    grid: Grid
    dtype: np.dtype
    offset: int
    """Bytes before the first voxel."""
    slope: float
    inter: float
    notes: tuple[Finding, ...]

    @property
    def scaled(self) -> bool:
        return (self.slope, self.inter) != (1.0, 0.0)

    @property
    def data_bytes(self) -> int:
        return math.prod(self.grid.shape) * self.dtype.itemsize


def detect_header_size(start: bytes) -> int:
    """How long the header is whose first bytes are `start`."""
    version_2 = (struct.pack("<i", NIFTI2_BYTES), struct.pack(">i", NIFTI2_BYTES))
    return NIFTI2_BYTES if start[:4] in version_2 else NIFTI1_BYTES


def parse_header(block: bytes, path: Path) -> Header:
    """Decode and check the first bytes of a file. Raises `ScanFileError`."""
    fields = _decode_fields(block, path)
    shape_xyz = _read_shape(fields, path)
    dtype = _read_dtype(fields, path)
    slope, inter = _read_scaling(fields, path)
    grid, notes = read_geometry(fields, shape_xyz, path)
    notes = [*_check_scaling(fields), *notes]
    offset = float(fields["vox_offset"])
    least = int(fields["sizeof_hdr"]) + 4
    if (
        not math.isfinite(offset)
        or offset > MAX_OFFSET
        or (offset != 0 and offset < least)
        or offset != int(offset)
    ):
        raise ScanFileError(
            path, "header_offset", f"the header puts the voxels at byte {offset:g}; it is damaged"
        )
    return Header(grid, dtype, max(int(offset), least), slope, inter, tuple(notes))


def _decode_fields(block: bytes, path: Path) -> nib.Nifti1Header:
    if len(block) < NIFTI1_BYTES:
        raise ScanFileError(path, "not_nifti", f"only {len(block)} bytes long: not a NIfTI file")
    for order in "<>":
        (size,) = struct.unpack(f"{order}i", block[:4])
        if size == NIFTI1_BYTES and block[344:348] == b"n+1\0":
            return nib.Nifti1Header(block[:NIFTI1_BYTES], endianness=order, check=False)
        if size == NIFTI2_BYTES and block[4:8] == b"n+2\0" and len(block) >= NIFTI2_BYTES:
            if block[8:12] not in (NIFTI2_LINE_ENDS, bytes(4)):
                raise ScanFileError(
                    path, "not_nifti", "line ends were converted, as in a text; copy it again"
                )
            return nib.Nifti2Header(block[:NIFTI2_BYTES], endianness=order, check=False)
        if size == NIFTI1_BYTES and block[344:348] == b"ni1\0":
            raise ScanFileError(
                path, "not_nifti", "half of an .hdr/.img pair; convert it to a single .nii file"
            )
    if block[128:132] == b"DICM":
        raise ScanFileError(
            path,
            "not_nifti",
            "a DICOM file; convert the series to NIfTI first (e.g. with dcm2niix)",
        )
    raise ScanFileError(path, "not_nifti", "not a NIfTI file (no NIfTI header)")


def _read_shape(fields: nib.Nifti1Header, path: Path) -> tuple[int, int, int]:
    dim = [int(n) for n in fields["dim"]]
    rank = dim[0]
    if not 1 <= rank <= 7:
        raise ScanFileError(
            path, "header_shape", f"the header claims {rank} dimensions; the file is damaged"
        )
    sizes = dim[1 : rank + 1]
    named = " x ".join(map(str, sizes))
    if any(n < 1 for n in sizes):
        raise ScanFileError(
            path, "header_shape", f"the header claims {named} voxels; the file is damaged"
        )
    if rank < 3:
        raise ScanFileError(
            path, "not_3d", f"a picture of {named} pixels; a scan has three dimensions"
        )
    if any(n != 1 for n in sizes[3:]):
        raise ScanFileError(
            path, "not_3d", f"{named} voxels in {rank} dimensions; extract one 3D volume first"
        )
    if math.prod(sizes) > MAX_VOXELS:
        raise ScanFileError(
            path,
            "header_shape",
            f"the header claims {named} voxels; at most {MAX_VOXELS:,} are read",
        )
    x, y, z = sizes[:3]
    return x, y, z


def _read_dtype(fields: nib.Nifti1Header, path: Path) -> np.dtype:
    code = int(fields["datatype"])
    if code not in SUPPORTED_TYPES:
        kind = UNSUPPORTED_TYPES.get(code, f"of unknown type {code}")
        raise ScanFileError(
            path, "not_scalar", f"voxels are {kind}; one integer or float per voxel is needed"
        )
    dtype = np.dtype(SUPPORTED_TYPES[code]).newbyteorder(fields.endianness)
    bits = int(fields["bitpix"])
    if bits != dtype.itemsize * 8:
        raise ScanFileError(
            path, "header_type", f"the header says {dtype.name} of {bits} bits; it is damaged"
        )
    return dtype


def _read_scaling(fields: nib.Nifti1Header, path: Path) -> tuple[float, float]:
    """(slope, intercept); a slope of 0 or NaN means: none (NIfTI standard; nibabel reads it so too)."""
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(inter):
        raise ScanFileError(
            path,
            "header_scaling",
            f"scl_slope {slope:g}, scl_inter {inter:g}: no voxel has a value",
        )
    return slope, inter


def _check_scaling(fields: nib.Nifti1Header) -> list[Finding]:
    """A slope of 0 switches scaling off, which also drops an intercept such as -1024."""
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if not (slope == 0 or math.isnan(slope)) or inter == 0 or math.isnan(inter):
        return []
    message = f"scl_slope {slope:g} switches scaling off: scl_inter {inter:g} is not applied"
    return [Finding("warning", "scaling_ignored", message)]

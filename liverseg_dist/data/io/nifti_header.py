"""The header of a NIfTI file, checked before a byte is allocated for its voxels.

nibabel decodes the fields (both versions, both byte orders, quaternions); this module decides what is fit for use:
three-dimensional scalar voxels of a believable number and size at known places. Every refusal is a `ScanFileError`.
The affine is chosen as nibabel and the NIfTI standard do: sform, else qform, else voxel sizes alone; a disagreement of
the two becomes a note.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from liverseg_dist.data.audit.findings import Finding, ScanFileError
from liverseg_dist.volume import Grid

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
NIFTI2_LINE_ENDS = b"\r\n\x1a\n"
MAX_VOXELS = 2**30
"""Four times the largest scan of LiTS (512 x 512 x 1026)."""
MAX_OFFSET = 2**26
"""Bytes of header extensions."""
SPACING_LIMITS_MM = (0.01, 100.0)
MAX_AFFINE_MM = 1e6
FORM_TOLERANCE_MM = 0.1
PIXDIM_TOLERANCE = 0.01

SCALARS = {
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
REFUSED = {
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


def header_bytes(start: bytes) -> int:
    """How long the header is whose first bytes are `start`."""
    version_2 = (struct.pack("<i", NIFTI2_BYTES), struct.pack(">i", NIFTI2_BYTES))
    return NIFTI2_BYTES if start[:4] in version_2 else NIFTI1_BYTES


def parse_header(block: bytes, path: Path) -> Header:
    """Decode and check the first bytes of a file. Raises `ScanFileError`."""
    fields = _decode(block, path)
    shape_xyz = _shape(fields, path)
    dtype = _dtype(fields, path)
    slope, inter = _scaling(fields, path)
    grid, notes = _grid(fields, shape_xyz, path)
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


def _decode(block: bytes, path: Path) -> nib.Nifti1Header:
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


def _shape(fields: nib.Nifti1Header, path: Path) -> tuple[int, int, int]:
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


def _dtype(fields: nib.Nifti1Header, path: Path) -> np.dtype:
    code = int(fields["datatype"])
    if code not in SCALARS:
        kind = REFUSED.get(code, f"of unknown type {code}")
        raise ScanFileError(
            path, "not_scalar", f"voxels are {kind}; one integer or float per voxel is needed"
        )
    dtype = np.dtype(SCALARS[code]).newbyteorder(fields.endianness)
    bits = int(fields["bitpix"])
    if bits != dtype.itemsize * 8:
        raise ScanFileError(
            path, "header_type", f"the header says {dtype.name} of {bits} bits; it is damaged"
        )
    return dtype


def _scaling(fields: nib.Nifti1Header, path: Path) -> tuple[float, float]:
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


def _grid(
    fields: nib.Nifti1Header, shape_xyz: tuple[int, int, int], path: Path
) -> tuple[Grid, list[Finding]]:
    pixdim = np.asarray(fields["pixdim"][1:4], dtype=np.float64)
    low, high = SPACING_LIMITS_MM
    if not ((low <= pixdim) & (pixdim <= high)).all():  # NaN fails too
        reason = f"voxels of {_sizes(pixdim)}; set the header's pixdim to the true size"
        raise ScanFileError(path, "header_spacing", reason)
    notes: list[Finding] = []
    if _has_form(fields, "sform_code"):
        grid = _checked_grid(shape_xyz, fields.get_sform(), path)
        if _has_form(fields, "qform_code"):
            notes += _compare_qform(grid, fields, path)
    elif _has_form(fields, "qform_code"):
        grid = _qform_grid(fields, shape_xyz, path)
    else:
        grid = _checked_grid(shape_xyz, _base_affine(fields, shape_xyz), path)
        message = "neither qform nor sform in the header; left/right is assumed"
        notes.append(Finding("warning", "no_orientation", message))
    if np.abs(np.asarray(grid.spacing_mm[::-1]) / pixdim - 1).max() > PIXDIM_TOLERANCE:
        by_affine = _sizes(grid.spacing_mm[::-1])
        message = (
            f"pixdim says voxels of {_sizes(pixdim)}, the affine {by_affine}; the affine is used"
        )
        notes.append(Finding("warning", "pixdim_disagrees", message))
    if grid.is_sheared:
        notes.append(
            Finding("warning", "sheared", "the axes are not at right angles (gantry tilt?)")
        )
    return grid, notes


def _has_form(fields: nib.Nifti1Header, name: str) -> bool:
    """A code that NIfTI does not define counts as none, as nibabel takes it."""
    code = int(fields[name])
    return code > 0 and code in nib.nifti1.xform_codes.code


def _compare_qform(grid: Grid, fields: nib.Nifti1Header, path: Path) -> list[Finding]:
    """What to say about a qform beside the sform, which is used."""
    try:
        other = _qform_grid(fields, (grid.shape[2], grid.shape[1], grid.shape[0]), path)
    except ScanFileError as error:
        return [Finding("warning", "qform_unusable", f"{error.reason}; the sform is used")]
    apart_mm = float(np.abs(grid.corners_mm() - other.corners_mm()).max())
    if apart_mm <= FORM_TOLERANCE_MM:
        return []
    message = f"qform and sform put voxels up to {apart_mm:.2f} mm apart; the sform is used"
    return [Finding("warning", "qform_sform_disagree", message)]


def _qform_grid(fields: nib.Nifti1Header, shape_xyz: tuple[int, int, int], path: Path) -> Grid:
    try:
        with np.errstate(all="ignore"):  # what overflows is refused right after
            affine = np.asarray(fields.get_qform())
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise ScanFileError(
            path, "header_affine", f"the qform is no rotation ({error}); repair the header"
        ) from None
    return _checked_grid(shape_xyz, affine, path)


def _base_affine(fields: nib.Nifti1Header, shape_xyz: tuple[int, int, int]) -> np.ndarray:
    """nibabel's choice for a header without forms: x to the left, the centre of the scan at the origin."""
    plain = nib.Nifti1Header()
    plain.set_data_shape(shape_xyz)
    plain.set_zooms([float(v) for v in fields["pixdim"][1:4]])
    return np.asarray(plain.get_base_affine())


def _checked_grid(shape_xyz: tuple[int, int, int], affine: np.ndarray, path: Path) -> Grid:
    if (np.abs(affine) > MAX_AFFINE_MM).any():
        raise ScanFileError(
            path, "header_affine", "the affine puts voxels kilometres away; repair qform and sform"
        )
    try:
        grid = Grid(shape_xyz[::-1], affine)
    except ValueError as error:
        raise ScanFileError(
            path, "header_affine", f"{error}; repair qform and sform in the header"
        ) from None
    low, high = SPACING_LIMITS_MM
    if min(grid.spacing_mm) < low or max(grid.spacing_mm) > high:
        sizes = _sizes(grid.spacing_mm[::-1])
        raise ScanFileError(
            path, "header_spacing", f"voxels of {sizes} (x, y, z) are no CT's; sizes must be in mm"
        )
    return grid


def _sizes(values_xyz: "np.ndarray | tuple[float, ...]") -> str:
    return " x ".join(f"{float(v):.4g}" for v in values_xyz) + " mm"

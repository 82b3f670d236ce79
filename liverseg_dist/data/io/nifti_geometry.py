"""Position of the voxels of a NIfTI file: choice of sform, qform or pixdim, and unit of length.

The choice follows the NIfTI standard and nibabel: the sform if its code is set, else the qform,
else the voxel sizes of pixdim alone. It differs from nibabel in two points, each with a finding:

- An unusable form is replaced by the other one. nibabel returns an affine of zeros for a header
  with sform_code 1 and srow of zeros (nibabel#624); ITK refuses a negative pixdim even if the sform
  is good (ITK#1484). Here a damaged field is an error only if nothing else gives the geometry.
- `xyzt_units` is applied. ITK (and SimpleITK, nnU-Net's reader) converts metres and microns to mm;
  nibabel returns the numbers as they are. Masks and tables of this project are in mm, so ITK's
  reading is used. If the unit gives impossible voxels and mm gives possible ones, the unit is
  taken for an error of the writer and the numbers are read as mm.

If both forms are usable and differ, the sform is used. ITK prefers the qform in some of these
cases, so a mask that another tool wrote may be shifted: the finding `qform_sform_disagree` states
the distance. Image and label are compared on the grids that this module returns.
"""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.volume import Grid, Index3

SPACING_LIMITS_MM = (0.01, 100.0)
"""A file with sizes outside these limits is refused; the audit warns of less extreme sizes."""
MAX_AFFINE_MM = 1e6
FORM_TOLERANCE_MM = 0.1
PIXDIM_TOLERANCE = 0.01
"""Relative difference of voxel sizes."""
MIN_SHOWN_DEGREES = 0.5

UNIT_MASK = 7
"""The bits of xyzt_units that hold the unit of length; the others hold the unit of time."""
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI's codes: unknown (read as mm), metre, millimetre, micron."""
UNIT_NAMES = {1: "metres", 3: "microns"}
UNDEFINED_UNIT = "length unit {code} is not defined by NIfTI; the sizes are read as mm"


def read_geometry(
    fields: nib.Nifti1Header, shape_xyz: Index3, path: Path
) -> tuple[Grid, list[Finding]]:
    """Determine the grid of a file in mm, and check its header.

    Args:
        fields: the decoded header; it is not changed.
        shape_xyz: number of voxels along the file's axes.
        path: the file, for messages.

    Returns:
        The grid and the findings.

    Raises:
        ScanFileError: no form of the header gives a usable geometry.
    """
    code = int(fields["xyzt_units"]) & UNIT_MASK
    # An undefined code is read as mm, with a finding.
    scale = MM_PER_UNIT.get(code, 1.0)
    notes: list[Finding] = []
    if code not in MM_PER_UNIT:
        notes.append(Finding("warning", "unit_undefined", UNDEFINED_UNIT.format(code=code)))
    if scale == 1.0:
        grid, found = _choose_form(fields, shape_xyz, path)
        return grid, [*notes, *found]
    unit = UNIT_NAMES[code]
    try:
        grid, found = _choose_form(_convert_to_mm(fields, scale), shape_xyz, path)
        message = f"the header is in {unit} (xyzt_units {code}), converted to mm"
        return grid, [Finding("warning", "unit_not_mm", message), *found]
    except ScanFileError as error:
        try:
            grid, found = _choose_form(fields, shape_xyz, path)
        except ScanFileError:
            raise error from None
        # Impossible sizes in the stated unit, possible ones in mm: the writer set a wrong unit.
        message = f"xyzt_units gives {unit}, which no scan can have ({error.reason}); read as mm"
        return grid, [Finding("warning", "unit_implausible", message), *found]


def _convert_to_mm(fields: nib.Nifti1Header, scale: float) -> nib.Nifti1Header:
    """A copy of the header with all lengths multiplied by `scale`."""
    scaled = fields.copy()
    # Unusable numbers are reported by the functions that use them.
    with np.errstate(all="ignore"):
        for name in ("srow_x", "srow_y", "srow_z"):
            scaled[name] = fields[name] * scale
        for name in ("qoffset_x", "qoffset_y", "qoffset_z"):
            scaled[name] = fields[name] * scale
        pixdim = np.array(fields["pixdim"])
        # pixdim[0] is the handedness of the qform, not a length.
        pixdim[1:4] *= scale
        scaled["pixdim"] = pixdim
    return scaled


def _choose_form(
    fields: nib.Nifti1Header, shape_xyz: Index3, path: Path
) -> tuple[Grid, list[Finding]]:
    has_sform = _has_form(fields, "sform_code")
    has_qform = _has_form(fields, "qform_code")
    if not has_sform and not has_qform:
        return _build_grid_from_pixdim(fields, shape_xyz, path)
    sform = _try_build_grid(_build_sform_grid, fields, shape_xyz, path) if has_sform else None
    qform = _try_build_grid(_build_qform_grid, fields, shape_xyz, path) if has_qform else None
    notes: list[Finding] = []
    if isinstance(sform, Grid):
        grid = sform
        if isinstance(qform, Grid):
            notes += _compare_forms(sform, qform)
        elif qform is not None:
            message = f"{qform.reason}; the sform is used"
            notes.append(Finding("warning", "qform_unusable", message))
    elif isinstance(qform, Grid):
        grid = qform
        if sform is not None:
            message = f"{sform.reason}; the qform is used"
            notes.append(Finding("warning", "sform_unusable", message))
    else:
        raise _merge_form_errors(sform, qform, path)
    # The affine is used in any case; a different pixdim may mislead other tools.
    notes += _compare_pixdim(grid, fields)
    if grid.is_sheared:
        message = "the axes are not at right angles (gantry tilt?)"
        notes.append(Finding("warning", "sheared", message))
    return grid, notes


def _merge_form_errors(
    sform: Grid | ScanFileError | None, qform: Grid | ScanFileError | None, path: Path
) -> ScanFileError:
    errors = [error for error in (sform, qform) if isinstance(error, ScanFileError)]
    if len(errors) == 1:
        return errors[0]
    reason = f"sform: {errors[0].reason}; qform: {errors[1].reason}"
    return ScanFileError(path, errors[0].code, reason)


def _build_grid_from_pixdim(
    fields: nib.Nifti1Header, shape_xyz: Index3, path: Path
) -> tuple[Grid, list[Finding]]:
    """Build the grid as nibabel does: x runs to the left, the origin is the scan's centre."""
    sizes = _read_pixdim(fields, path)
    plain = nib.Nifti1Header()
    plain.set_data_shape(shape_xyz)
    plain.set_zooms(sizes.tolist())
    grid = _build_grid(shape_xyz, np.asarray(plain.get_base_affine()), path)
    message = "neither qform nor sform in the header; left/right is assumed"
    return grid, [Finding("warning", "no_orientation", message)]


def _has_form(fields: nib.Nifti1Header, name: str) -> bool:
    """Whether the header has this form. An undefined code counts as none, as in nibabel."""
    code = int(fields[name])
    return code > 0 and code in nib.nifti1.xform_codes.code


GridBuilder = Callable[[nib.Nifti1Header, Index3, Path], Grid]


def _try_build_grid(
    grid_of: GridBuilder, fields: nib.Nifti1Header, shape_xyz: Index3, path: Path
) -> Grid | ScanFileError:
    try:
        return grid_of(fields, shape_xyz, path)
    except ScanFileError as error:
        return error


def _build_sform_grid(fields: nib.Nifti1Header, shape_xyz: Index3, path: Path) -> Grid:
    return _build_grid(shape_xyz, np.asarray(fields.get_sform()), path)


def _build_qform_grid(fields: nib.Nifti1Header, shape_xyz: Index3, path: Path) -> Grid:
    # The qform holds a rotation only and takes the voxel sizes from pixdim.
    _read_pixdim(fields, path)
    if float(fields["pixdim"][0]) == 0:
        # NIfTI's own library reads a handedness of 0 as 1; nibabel would raise an error.
        fields = fields.copy()
        pixdim = np.array(fields["pixdim"])
        pixdim[0] = 1
        fields["pixdim"] = pixdim
    try:
        # An overflow is refused by `_build_grid`.
        with np.errstate(all="ignore"):
            affine = np.asarray(fields.get_qform())
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        reason = f"the qform is not a rotation ({error}); repair the header"
        raise ScanFileError(path, "header_affine", reason) from None
    return _build_grid(shape_xyz, affine, path)


def _compare_forms(sform: Grid, qform: Grid) -> list[Finding]:
    distance_mm = float(np.abs(sform.corners_mm() - qform.corners_mm()).max())
    if distance_mm <= FORM_TOLERANCE_MM:
        return []
    angle = _measure_angle_degrees(sform, qform)
    rotation = f" and {angle:.1f} degrees against each other" if angle > MIN_SHOWN_DEGREES else ""
    message = (
        f"qform and sform put voxels up to {distance_mm:.2f} mm apart{rotation}; the sform is used"
    )
    return [Finding("warning", "qform_sform_disagree", message)]


def _measure_angle_degrees(one: Grid, other: Grid) -> float:
    """The largest angle between corresponding axes."""
    products = _axis_directions(one) * _axis_directions(other)
    cosines = np.clip(products.sum(axis=0), -1, 1)
    return float(np.degrees(np.arccos(cosines.min())))


def _axis_directions(grid: Grid) -> np.ndarray:
    """Unit vectors of the file's axes, one in each column (3, 3)."""
    directions = grid.affine[:3, :3]
    return directions / np.linalg.norm(directions, axis=0)


def _compare_pixdim(grid: Grid, fields: nib.Nifti1Header) -> list[Finding]:
    pixdim = np.asarray(fields["pixdim"][1:4], dtype=np.float64)
    by_affine = np.asarray(grid.spacing_mm[::-1])
    if not _are_valid_sizes(pixdim):
        message = (
            f"pixdim gives voxels of {_format_sizes(pixdim)}; "
            f"the affine's {_format_sizes(by_affine)} are used"
        )
        return [Finding("warning", "pixdim_unusable", message)]
    if np.abs(by_affine / pixdim - 1).max() <= PIXDIM_TOLERANCE:
        return []
    message = (
        f"pixdim gives voxels of {_format_sizes(pixdim)}, the affine {_format_sizes(by_affine)}; "
        "the affine is used"
    )
    return [Finding("warning", "pixdim_disagrees", message)]


def _read_pixdim(fields: nib.Nifti1Header, path: Path) -> np.ndarray:
    pixdim = np.asarray(fields["pixdim"][1:4], dtype=np.float64)
    if not _are_valid_sizes(pixdim):
        reason = f"voxels of {_format_sizes(pixdim)}; set the header's pixdim to the true size"
        raise ScanFileError(path, "header_spacing", reason)
    return pixdim


def _are_valid_sizes(pixdim: np.ndarray) -> bool:
    low, high = SPACING_LIMITS_MM
    # Comparisons with NaN are false, so NaN is not a valid size.
    return bool(((low <= pixdim) & (pixdim <= high)).all())


def _build_grid(shape_xyz: Index3, affine: np.ndarray, path: Path) -> Grid:
    if (np.abs(affine) > MAX_AFFINE_MM).any():
        reason = "the affine puts voxels kilometres away; repair qform and sform"
        raise ScanFileError(path, "header_affine", reason)
    try:
        grid = Grid(shape_xyz[::-1], affine)
    except ValueError as error:
        reason = f"{error}; repair qform and sform in the header"
        raise ScanFileError(path, "header_affine", reason) from None
    low, high = SPACING_LIMITS_MM
    if min(grid.spacing_mm) < low or max(grid.spacing_mm) > high:
        sizes = _format_sizes(grid.spacing_mm[::-1])
        reason = f"voxels of {sizes} (x, y, z) are not possible in a CT; sizes must be in mm"
        raise ScanFileError(path, "header_spacing", reason)
    return grid


def _format_sizes(values_xyz: "np.ndarray | tuple[float, ...]") -> str:
    return " x ".join(f"{float(v):.4g}" for v in values_xyz) + " mm"

"""Order and grid of the frames of a stack, from their positions alone.

Instance numbers and file names are not used. The position of each frame along the normal of its
plane decides the order. The step between frames is fitted to all positions, so a gantry tilt
becomes a sheared affine. Frames must lie within `MAX_DEVIATION_MM` of the fitted grid; missing
frames and varying distances are refused, or filled by interpolation on request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.dicom_headers import FrameHeader
from liverseg_dist.texts.names import list_some
from liverseg_dist.volume import Grid

MIN_SLICES = 3
MAX_DEVIATION_MM = 0.3
"""Largest distance of a frame from its place in the grid."""
MAX_STEP_RATIO = 1.5
"""A step longer than this many times the usual one is a gap, also where it is within tolerance."""
SAME_POSITION_MM = 0.01
SPACING_LIMITS_MM = (0.01, 100.0)
MAX_POSITION_MM = 1e5
ORIENTATION_TOLERANCE = 1e-2
"""Deviation of row and column direction from unit length and right angle."""
MAX_SHOWN = 6
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


class GeometryError(ValueError):
    """The frames give no grid; the text is the reason, `code` is for scripts."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class SlicePlan:
    """How frames fill the slices of a grid.

    Attributes:
        grid: of the volume, RAS+ mm.
        order: indices of the frames, ascending along the normal.
        sources: for each slice of the grid, the position in `order` of the frame before it, and the
            weight (0 to 1) of the one after it.
        findings: about the geometry.
    """

    grid: Grid
    order: tuple[int, ...]
    sources: tuple[tuple[int, float], ...]
    findings: tuple[Finding, ...]

    @property
    def is_interpolated(self) -> bool:
        return any(weight for _, weight in self.sources)


def plane_normal(orientation: Sequence[float]) -> np.ndarray:
    """Unit normal of a frame's plane. Raises `GeometryError` for axes that are not at right angles."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column), 1 + row @ column])
    if np.abs(lengths - 1).max() > ORIENTATION_TOLERANCE:
        reason = "ImageOrientationPatient is not two unit vectors at right angles"
        raise GeometryError("dicom_orientation", reason)
    normal = np.cross(row, column)
    return np.asarray(normal / np.linalg.norm(normal))


def plan_slices(
    frames: Sequence[FrameHeader], rows: int, columns: int, fill_gaps: bool = False
) -> SlicePlan:
    """Order the frames of a stack and find their grid.

    Args:
        frames: with position, orientation (all the same) and spacing.
        rows, columns: size of a frame.
        fill_gaps: interpolate where frames are missing or their distance varies.

    Raises:
        GeometryError: see the module.
    """
    first = frames[0]
    assert first.orientation is not None
    assert first.spacing_mm is not None
    positions = np.array([frame.position_mm for frame in frames])
    if np.abs(positions).max() > MAX_POSITION_MM:
        raise GeometryError("dicom_position", "ImagePositionPatient is metres away")
    if len(frames) < MIN_SLICES:
        reason = f"{len(frames)} slice(s) are no volume; at least {MIN_SLICES} are needed"
        raise GeometryError("dicom_few_slices", reason)
    normal = plane_normal(first.orientation)
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    positions, along = positions[order], along[order]
    steps = np.diff(along)
    nominal = float(np.median(steps))
    low, high = SPACING_LIMITS_MM
    sizes = (*first.spacing_mm, nominal)
    if min(sizes) < low or max(sizes) > high:
        text = " x ".join(f"{mm:.4g}" for mm in sizes)
        raise GeometryError("dicom_spacing", f"voxels of {text} mm are not possible")
    number = np.arange(len(along))
    findings: list[Finding] = []
    sources = tuple((int(index), 0.0) for index in number)
    if not _is_uniform(positions, number, steps, nominal):
        number = np.rint((along - along[0]) / nominal).astype(int)
        reason = _describe_irregular(along, steps, nominal)
        if not fill_gaps:
            raise GeometryError("dicom_gap", reason)
        findings.append(Finding("warning", "slices_interpolated", f"{reason}; interpolated"))
        sources = tuple(_interpolate_sources(along, nominal))
        step, origin = _fit_between_ends(positions, len(sources))
    else:
        step, origin = _fit_line(positions, number)
    affine = _build_affine(first, step, origin)
    grid = Grid((len(sources), rows, columns), affine)
    if grid.is_sheared:
        message = "the axes are not at right angles (gantry tilt?)"
        findings.append(Finding("warning", "sheared", message))
    return SlicePlan(grid, tuple(int(index) for index in order), sources, tuple(findings))


def _is_uniform(
    positions: np.ndarray, number: np.ndarray, steps: np.ndarray, nominal: float
) -> bool:
    step, origin = _fit_line(positions, number)
    deviation = np.linalg.norm(positions - (origin + number[:, None] * step), axis=1)
    return bool(deviation.max() <= MAX_DEVIATION_MM and steps.max() <= MAX_STEP_RATIO * nominal)


def _fit_line(positions: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step and origin (least squares) of positions at whole numbers of steps."""
    centred = number - number.mean()
    step = centred @ (positions - positions.mean(axis=0)) / (centred @ centred)
    return step, positions.mean(axis=0) - number.mean() * step


def _fit_between_ends(positions: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    step = (positions[-1] - positions[0]) / (count - 1)
    line = positions[0] + (positions - positions[0]) @ step[:, None] / (step @ step) * step
    if np.linalg.norm(positions - line, axis=1).max() > MAX_DEVIATION_MM:
        reason = "the slices do not lie on a line; they cannot be interpolated"
        raise GeometryError("dicom_gap", reason)
    return step, positions[0]


def _describe_irregular(along: np.ndarray, steps: np.ndarray, nominal: float) -> str:
    """Where slices are missing, or the range of distances."""
    whole = np.rint(steps / nominal)
    drift = np.abs(steps - whole * nominal).max()
    gaps = np.flatnonzero(whole > 1)
    if len(gaps) and drift <= max(MAX_DEVIATION_MM, 0.1 * nominal):
        missing = int((whole[gaps] - 1).sum())
        places = [f"{along[at]:.2f} and {along[at + 1]:.2f} mm" for at in gaps]
        return (
            f"{missing} slice(s) of {nominal:.4g} mm are missing, between "
            f"{list_some(places, MAX_SHOWN)} along the normal"
        )
    return f"the distance of the slices varies from {steps.min():.4g} to {steps.max():.4g} mm"


def _interpolate_sources(along: np.ndarray, nominal: float) -> list[tuple[int, float]]:
    """For uniform slices from the first to the last position: frame before, weight of the next."""
    length = along[-1] - along[0]
    count = round(length / nominal) + 1
    if count > 4 * len(along):
        reason = f"{len(along)} slices for {length:.0f} mm are too few to interpolate"
        raise GeometryError("dicom_gap", reason)
    sources = []
    for target in np.linspace(along[0], along[-1], count):
        before = int(np.clip(np.searchsorted(along, target, side="right") - 1, 0, len(along) - 2))
        weight = float((target - along[before]) / (along[before + 1] - along[before]))
        # A slice that is there is taken as it is.
        gap = along[before + 1] - along[before]
        if weight * gap <= MAX_DEVIATION_MM:
            weight = 0.0
        elif (1 - weight) * gap <= MAX_DEVIATION_MM:
            before, weight = before + 1, 0.0
        sources.append((before, weight))
    return sources


def _build_affine(frame: FrameHeader, step_lps: np.ndarray, origin_lps: np.ndarray) -> np.ndarray:
    """Affine in RAS+ for indices (column, row, slice)."""
    assert frame.orientation is not None
    assert frame.spacing_mm is not None
    between_rows, between_columns = frame.spacing_mm
    axes = np.column_stack(
        [
            np.array(frame.orientation[:3]) * between_columns,
            np.array(frame.orientation[3:]) * between_rows,
            step_lps,
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ axes
    affine[:3, 3] = LPS_TO_RAS @ origin_lps
    return affine

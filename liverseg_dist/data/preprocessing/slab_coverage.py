"""What the slabs of a scan contain of its label, as numbers and as findings of the audit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.data.preprocessing.slab import Slab, count_per_slice
from liverseg_dist.labels import TUMOUR
from liverseg_dist.volume import Grid, Volume

FACE_TOLERANCE = 1e-6
"""Slices; rounding of affines must not exclude a slice that touches a slab's face."""


def measure_coverage(
    label: Volume, slabs: Sequence[Slab], stored_labels: Sequence[np.ndarray] = ()
) -> dict[str, Any]:
    """What the slabs contain of a scan's label, as JSON.

    Args:
        label: Label of the scan, RAS.
        slabs: Slabs of the scan.
        stored_labels: Label of each slab as it is stored; without them `tumours_vanished` is 0.

    Returns:
        Voxels of liver (with tumours) and tumour, and how many of them are in the slices of a slab,
        as integers that can be pooled, and as shares of 1 (`liver_inside`, `tumour_inside`).
        Tumours are 26-connected: `tumours_cut` are partly inside, `tumours_missed` outside,
        `tumours_vanished` are inside but have no voxel in any stored label because they are too
        small for its voxels.
    """
    inside = _slices_inside(label.grid, slabs)
    liver, tumour = count_per_slice(label.voxels)
    coverage: dict[str, Any] = {}
    for name, counts in (("liver", liver + tumour), ("tumour", tumour)):
        coverage[f"{name}_voxels"] = int(counts.sum())
        coverage[f"{name}_voxels_inside"] = int(counts[inside].sum())
    # Components are computed in the box around all tumours: the whole scan has many more voxels.
    box = _tumour_box(label.voxels, tumour)
    mask = np.ascontiguousarray(label.voxels[box] == TUMOUR)
    components, number = cc3d.connected_components(mask, connectivity=26, return_N=True)
    bounding_boxes = cc3d.statistics(components)["bounding_boxes"][1:] if number else []
    reached = set()
    cut = 0
    for component, bounds in enumerate(bounding_boxes, start=1):
        slices_inside = inside[box[0]][bounds[0]]
        if slices_inside.any():
            reached.add(component)
            cut += not slices_inside.all()
    start = np.array([part.start for part in box])
    represented: set[int] = set()
    for slab, stored in zip(slabs, stored_labels, strict=False):
        represented |= _components_in_slab(components, start, label.grid, slab.grid, stored)
    coverage["tumours"] = int(number)
    coverage["tumours_cut"] = int(cut)
    coverage["tumours_missed"] = int(number) - len(reached)
    coverage["tumours_vanished"] = len(reached - represented) if stored_labels else 0
    return add_shares(coverage)


def add_shares(coverage: Mapping[str, Any]) -> dict[str, Any]:
    """The coverage with the shares of voxels inside; 1 for a structure without voxels."""
    result = dict(coverage)
    for name in ("liver", "tumour"):
        voxels, inside = coverage[f"{name}_voxels"], coverage[f"{name}_voxels_inside"]
        result[f"{name}_inside"] = inside / voxels if voxels else 1.0
    return result


def pool_coverage(coverages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The coverage of several scans together; empty without scans."""
    total: dict[str, Any] = {}
    for coverage in coverages:
        for key, value in coverage.items():
            # Shares are floats; they are computed again from the summed counts.
            if isinstance(value, int):
                total[key] = total.get(key, 0) + value
    return add_shares(total) if total else {}


def describe_slabs(
    scan: Grid, slabs: Sequence[Slab], coverage: Mapping[str, Any] | None
) -> list[Finding]:
    """Findings of the audit: where the slabs are, and warnings about what they lose."""
    findings = [Finding("info", "slab", _describe_position(scan, slabs))]
    if coverage and coverage["liver_voxels_inside"] < coverage["liver_voxels"]:
        message = (
            f"outside the slab: {100 * (1 - coverage['liver_inside']):.1f} % of the liver, "
            f"{100 * (1 - coverage['tumour_inside']):.1f} % of tumour; "
            f"of {coverage['tumours']} tumours {coverage['tumours_cut']} cut, "
            f"{coverage['tumours_missed']} missed"
        )
        findings.append(Finding("warning", "slab_loss", message))
    if coverage and coverage["tumours_vanished"]:
        message = (
            f"{coverage['tumours_vanished']} of {coverage['tumours']} tumours are too small "
            "for the slab's voxels"
        )
        findings.append(Finding("warning", "tumours_vanished", message))
    return findings


def _describe_position(scan: Grid, slabs: Sequence[Slab]) -> str:
    grid, (first, last) = slabs[0].grid, slabs[0].valid_slices
    slices = grid.shape[0]
    slab_mm, scan_mm = grid.spacing_mm[0], scan.spacing_mm[0]
    thickness = f"slices of {scan_mm:.3g} mm"
    if abs(slab_mm - scan_mm) >= 1e-3:
        thickness += f" as {slices} of {slab_mm:.3g} mm"
    if len(slabs) > 1:
        return f"{len(slabs)} slabs of {slices}, {thickness}"
    if last - first < slices:
        padding = slices - last + first
        return f"slab: all {scan.shape[0]} {thickness}, and {padding} of padding"
    faces = grid.world_mm(np.array([[first - 0.5, 0, 0], [last - 0.5, 0, 0]]))
    bottom, top = (round(float(z)) for z in scan.index_of(faces)[:, 0] + 0.5)
    return (
        f"slab: {top - bottom} of {scan.shape[0]} {thickness} (from {bottom}, counted from below)"
    )


def _slices_inside(grid: Grid, slabs: Sequence[Slab]) -> np.ndarray:
    """Boolean for each slice of `grid`: whether its centre is within a slab."""
    z = np.arange(grid.shape[0])
    inside = np.zeros(grid.shape[0], dtype=bool)
    for slab in slabs:
        faces = np.array([[-0.5, 0, 0], [slab.grid.shape[0] - 0.5, 0, 0]])
        first, last = sorted(grid.index_of(slab.grid.world_mm(faces))[:, 0])
        inside |= (z >= first - FACE_TOLERANCE) & (z <= last + FACE_TOLERANCE)
    return inside


def _tumour_box(label_zyx: np.ndarray, tumour_per_slice: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box around all tumour voxels; one voxel without tumour."""
    occupied = np.flatnonzero(tumour_per_slice)
    if not occupied.size:
        return slice(0, 1), slice(0, 1), slice(0, 1)
    z = slice(int(occupied[0]), int(occupied[-1]) + 1)
    plane = np.logical_or.reduce([slice_yx == TUMOUR for slice_yx in label_zyx[z]])
    y, x = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
    return z, slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)


def _components_in_slab(
    components: np.ndarray, start: np.ndarray, grid: Grid, slab_grid: Grid, stored: np.ndarray
) -> set[int]:
    """Numbers of the components that have a tumour voxel at the same position in a stored label.

    Args:
        components: Component numbers of a box of the scan.
        start: First voxel (z, y, x) of the box in `grid`.
        grid: Grid of the scan.
        slab_grid: Grid of the stored label.
        stored: Stored label.
    """
    voxels = np.stack(np.unravel_index(np.flatnonzero(stored == TUMOUR), stored.shape), axis=1)
    index = np.rint(grid.index_of(slab_grid.world_mm(voxels))).astype(int) - start
    is_in_box = ((index >= 0) & (index < components.shape)).all(axis=1)
    numbers = np.unique(components[tuple(index[is_in_box].T)])
    return set(numbers.tolist()) - {0}

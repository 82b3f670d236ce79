"""What the slabs of a scan contain of its label, as numbers and as findings of the audit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.data.preprocessing.slab import Slab, count_per_slice
from liverseg_dist.errors import printable
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.texts.names import list_some
from liverseg_dist.volume import Grid, Volume

INSIDE = "_voxels_inside"
MAX_LOSSES_SHOWN = 6
COMPLETE = "100.00 %"
MAX_COMPLETE_SHOWN = 3
MAX_SHARES_SHOWN = 16
FACE_TOLERANCE = 1e-6
"""Slices; rounding of affines must not exclude a slice that touches a slab's face."""


def measure_coverage(
    label: Volume,
    slabs: Sequence[Slab],
    stored_labels: Sequence[np.ndarray] = (),
    labels: LabelScheme = LITS_SCHEME,
) -> dict[str, Any]:
    """What the slabs contain of a scan's label, as JSON.

    Args:
        label: Label of the scan, RAS.
        slabs: Slabs of the scan.
        stored_labels: Label of each slab as it is stored; without them `tumours_vanished` is 0.
        labels: Scheme of the label.

    Returns:
        For each structure its voxels (`liver_voxels`; with its lesions), and how many of them are
        in the slices of a slab, as integers that can be pooled, and as a share of 1
        (`liver_inside`). For each lesion structure, here of the name tumour, its 26-connected
        components (`tumours`): `tumours_cut` are partly inside, `tumours_missed` outside,
        `tumours_vanished` are inside but have no voxel in any stored label because they are too
        small for its voxels.
    """
    inside = _slices_inside(label.grid, slabs)
    by_value = count_per_slice(label.voxels)
    coverage: dict[str, Any] = {}
    for structure in labels.structures:
        counts = by_value[:, list(structure.values)].sum(axis=1)
        coverage[f"{structure.name}_voxels"] = int(counts.sum())
        coverage[f"{structure.name}_voxels_inside"] = int(counts[inside].sum())
    for lesion in labels.lesions:
        per_slice = by_value[:, list(lesion.values)].sum(axis=1)
        is_member = labels.membership[labels.structures.index(lesion)]
        coverage |= _count_lesions(
            label, inside, per_slice, is_member, slabs, stored_labels, f"{lesion.name}s"
        )
    return add_shares(coverage)


def _count_lesions(
    label: Volume,
    inside: np.ndarray,
    per_slice: np.ndarray,
    is_member: np.ndarray,
    slabs: Sequence[Slab],
    stored_labels: Sequence[np.ndarray],
    key: str,
) -> dict[str, int]:
    """Components of a lesion structure, and how many are cut, missed and vanished.

    Args:
        label: Label of the scan.
        inside: For each slice, whether it is in a slab.
        per_slice: Voxels of the lesions in each slice.
        is_member: For each label value, whether it is the lesion's.
        slabs: Slabs of the scan.
        stored_labels: Label of each slab.
        key: Plural of the structure's name.
    """
    # Components are computed in the box around all lesions: the whole scan has many more voxels.
    box = _find_box(label.voxels, per_slice, is_member)
    mask = np.ascontiguousarray(is_member[label.voxels[box]])
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
        is_lesion = is_member[stored]
        represented |= _components_in_slab(components, start, label.grid, slab.grid, is_lesion)
    return {
        key: int(number),
        f"{key}_cut": int(cut),
        f"{key}_missed": int(number) - len(reached),
        f"{key}_vanished": len(reached - represented) if stored_labels else 0,
    }


def add_shares(coverage: Mapping[str, Any]) -> dict[str, Any]:
    """The coverage with the shares of voxels inside; 1 for a structure without voxels."""
    result = dict(coverage)
    for key, inside in coverage.items():
        if key.endswith(INSIDE):
            name = key.removesuffix(INSIDE)
            voxels = coverage[f"{name}_voxels"]
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
    scan: Grid,
    slabs: Sequence[Slab],
    coverage: Mapping[str, Any] | None,
    labels: LabelScheme = LITS_SCHEME,
) -> list[Finding]:
    """Findings of the audit: where the slabs are, and warnings about what they lose."""
    findings = [Finding("info", "slab", _describe_position(scan, slabs))]
    if not coverage:
        return findings
    losses = []
    for structure in labels.structures:
        name = structure.name
        is_lost = coverage[f"{name}_voxels_inside"] < coverage[f"{name}_voxels"]
        # Lesions are always listed: that none was lost is good to know.
        if is_lost or structure.kind == "lesion":
            article = "" if structure.kind == "lesion" else "the "
            percent = 100 * (1 - coverage[f"{name}_inside"])
            losses.append((is_lost, f"{percent:.1f} % of {article}{printable(name)}"))
    if any(is_lost for is_lost, _ in losses):
        message = f"outside the slab: {list_some([text for _, text in losses], MAX_LOSSES_SHOWN)}"
        for lesion in labels.lesions:
            key = f"{lesion.name}s"
            message += (
                f"; of {coverage[key]} {printable(key)} {coverage[f'{key}_cut']} cut, "
                f"{coverage[f'{key}_missed']} missed"
            )
        findings.append(Finding("warning", "slab_loss", message))
    for lesion in labels.lesions:
        key = f"{lesion.name}s"
        vanished = coverage[f"{key}_vanished"]
        if vanished:
            message = f"{vanished} of {coverage[key]} {printable(key)} are too small for the slab's voxels"
            code = f"{'_'.join(lesion.name.split())}s_vanished"
            findings.append(Finding("warning", code, message))
    return findings


def describe_coverage(coverage: Mapping[str, Any], labels: LabelScheme) -> str:
    """One line on what the slabs of a data set hold of its labels.

    `99.10 % of the labelled liver, 98.00 % of tumour; of 7 tumours 1 cut, 0 missed, ...`. Of many
    structures only the incomplete ones are listed.
    """
    shares, incomplete = [], []
    for structure in labels.structures:
        article = "" if structure.kind == "lesion" else "the labelled "
        percent = f"{100 * coverage[f'{structure.name}_inside']:.2f} %"
        shares.append(f"{percent} of {article}{printable(structure.name)}")
        if percent != COMPLETE:
            incomplete.append(shares[-1])
    complete = len(shares) - len(incomplete)
    if complete > MAX_COMPLETE_SHOWN:
        others = "the other" if incomplete else "each of the"
        shares = [*incomplete, f"{COMPLETE} of {others} {complete} structures"]
    text = list_some(shares, MAX_SHARES_SHOWN)
    for lesion in labels.lesions:
        key = f"{lesion.name}s"
        text += (
            f"; of {coverage[key]} {printable(key)} {coverage[f'{key}_cut']} cut, "
            f"{coverage[f'{key}_missed']} missed, {coverage[f'{key}_vanished']} too small for the "
            "slab's voxels"
        )
    return text


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


def _find_box(
    label_zyx: np.ndarray, per_slice: np.ndarray, is_member: np.ndarray
) -> tuple[slice, slice, slice]:
    """The smallest box around all voxels of some values; one voxel without any."""
    occupied = np.flatnonzero(per_slice)
    if not occupied.size:
        return slice(0, 1), slice(0, 1), slice(0, 1)
    z = slice(int(occupied[0]), int(occupied[-1]) + 1)
    plane = np.logical_or.reduce([is_member[slice_yx] for slice_yx in label_zyx[z]])
    y, x = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
    return z, slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)


def _components_in_slab(
    components: np.ndarray, start: np.ndarray, grid: Grid, slab_grid: Grid, is_lesion: np.ndarray
) -> set[int]:
    """Numbers of the components that have a lesion voxel at the same position in a stored label.

    Args:
        components: Component numbers of a box of the scan.
        start: First voxel (z, y, x) of the box in `grid`.
        grid: Grid of the scan.
        slab_grid: Grid of the stored label.
        is_lesion: Mask of the lesions in the stored label.
    """
    voxels = np.stack(np.unravel_index(np.flatnonzero(is_lesion), is_lesion.shape), axis=1)
    index = np.rint(grid.index_of(slab_grid.world_mm(voxels))).astype(int) - start
    is_in_box = ((index >= 0) & (index < components.shape)).all(axis=1)
    numbers = np.unique(components[tuple(index[is_in_box].T)])
    return set(numbers.tolist()) - {0}

"""Distances between two surfaces in mm: ASSD, RMSD, MSSD (CHAOS, LiTS) and HD95, NSD (DeepMind).

Two published definitions of a surface are in use, and both are given because tables in papers mix them:

- *Border voxels*: voxels of the mask with a face neighbour outside it; beyond the scan counts as inside
  (CHAOS: scipy's `binary_erosion` with `border_value=1`, https://github.com/emrekavur/CHAOS-evaluation).
  ASSD, RMSD and MSSD are taken over the border voxels of both masks together.
  A mask is thus *open* where it reaches the scan's edge: it has no surface there. A prediction that lacks the last
  slice of such a mask does have one, and its distance to the nearest true border voxel can be half an organ.
  `assd_closed_mm`, `rmsd_closed_mm` and `mssd_closed_mm` are the same figures with beyond the scan counted as
  outside (`border_value=0`): the mask is *closed*. They differ only where a mask reaches the scan's edge.
- *Surface elements*: points between voxels, weighted by the area of the surface there (`surfels`). HD95 and NSD are
  taken over them (https://github.com/google-deepmind/surface-distance), NSD is its "surface Dice". Beyond the scan is
  outside here: masks are always closed.

Distances to the other surface are exact. They are found for the surface points only: points that coincide cost
nothing, near ones are found by looking at the lattice places around a point in order of distance, and the few that are
further away ask a KD-tree (or, where they are many, an exact distance map). All sums run in a fixed order, so a case
always gives the same bits.

Undefined: with either mask empty the distances are None (the LiTS scorer puts 9001, which no mean survives), and so
are those between border voxels where a mask fills the whole scan and has none.
NSD is 1 when both are empty and 0 when one is, as for Dice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from liverseg_dist.evaluation.metrics.boxes import find_joint_box
from liverseg_dist.evaluation.metrics.surfels import compute_surfel_areas_mm2
from liverseg_dist.volume import Float3

TOLERANCES_MM = (1.0, 2.0)
BORDER_KEYS = ("assd", "rmsd", "mssd")
CLOSED_KEYS = tuple(f"{name}_closed_mm" for name in BORDER_KEYS)
"""Distances between border voxels with masks closed at the scan's edge."""
DISTANCE_KEYS = (*(f"{name}_mm" for name in BORDER_KEYS), "hd95_mm", *CLOSED_KEYS)
NEAR_PLACES = 250
"""Lattice places around a point that are tried before the KD-tree."""
MAX_REACH = 8
"""Furthest a tried place may be along one axis, voxels."""
HOPELESS_AFTER = 60
"""Places after which the search stops if it has found less than half of the distances (masks far apart, noise)."""
MAP_FROM_SHARE = 10
MAX_MAP_VOXELS = 40_000_000
"""A whole distance map is cheaper than a tree where more than a tenth of the places ask; it costs 30 bytes a voxel."""


@dataclass(frozen=True)
class BorderDistances:
    """Distance in mm from each border voxel of one mask to the nearest border voxel of the other.

    Whether masks are open or closed at the scan's edge is chosen by `measure_border_distances`.
    """

    from_prediction_mm: np.ndarray
    from_truth_mm: np.ndarray

    def assd_mm(self) -> float:
        """Average symmetric surface distance: the mean over all border voxels of both masks."""
        return float((self.from_prediction_mm.sum() + self.from_truth_mm.sum()) / self._count)

    def rmsd_mm(self) -> float:
        """Root mean square symmetric surface distance."""
        squares = (self.from_prediction_mm**2).sum() + (self.from_truth_mm**2).sum()
        return float(np.sqrt(squares / self._count))

    def mssd_mm(self) -> float:
        """Maximum symmetric surface distance (Hausdorff)."""
        return float(max(self.from_prediction_mm.max(), self.from_truth_mm.max()))

    @property
    def _count(self) -> int:
        return self.from_prediction_mm.size + self.from_truth_mm.size


@dataclass(frozen=True)
class SurfelDistances:
    """Distance in mm from each surface element of one mask to the nearest of the other, and the elements' areas."""

    from_prediction_mm: np.ndarray
    from_truth_mm: np.ndarray
    prediction_areas_mm2: np.ndarray
    truth_areas_mm2: np.ndarray

    def hausdorff_mm(self, percent: float = 95.0) -> float:
        """The distance below which `percent` of the area lies, taken in each direction; the larger of the two."""
        return max(
            _weighted_percentile(self.from_truth_mm, self.truth_areas_mm2, percent),
            _weighted_percentile(self.from_prediction_mm, self.prediction_areas_mm2, percent),
        )

    def surface_dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces' area that lies within `tolerance_mm` of the other surface (NSD)."""
        near = (
            self.truth_areas_mm2[self.from_truth_mm <= tolerance_mm].sum()
            + self.prediction_areas_mm2[self.from_prediction_mm <= tolerance_mm].sum()
        )
        return float(near / (self.truth_areas_mm2.sum() + self.prediction_areas_mm2.sum()))


def score_surface(
    prediction_zyx: np.ndarray, truth_zyx: np.ndarray, spacing_mm: Float3
) -> dict[str, float | None]:
    """All surface metrics of one structure.

    Args:
        prediction_zyx: Boolean or uint8 (0, 1) mask. Its faces are the scan's edge.
        truth_zyx: Mask of the same shape.
        spacing_mm: Voxel size z, y, x.

    Returns:
        `assd_mm rmsd_mm mssd_mm` (masks open at the scan's edge, as CHAOS), `hd95_mm nsd_1mm nsd_2mm`
        (closed, as DeepMind) and `assd_closed_mm rmsd_closed_mm mssd_closed_mm`. Empty masks: see the module.
    """
    box = find_joint_box(prediction_zyx, truth_zyx)
    if box is None:
        return _undefined(nsd=1.0)
    prediction = np.ascontiguousarray(prediction_zyx[box], dtype=np.uint8)
    truth = np.ascontiguousarray(truth_zyx[box], dtype=np.uint8)
    if not prediction.any() or not truth.any():
        return _undefined(nsd=0.0)
    opened = measure_border_distances(prediction, truth, spacing_mm)
    closed = opened
    if _reaches_edge(prediction) or _reaches_edge(truth):  # elsewhere both conventions agree
        closed = measure_border_distances(prediction, truth, spacing_mm, closed=True)
    surfels = measure_surfel_distances(prediction, truth, spacing_mm)
    return {
        **_border_scores(opened, "_mm"),
        "hd95_mm": surfels.hausdorff_mm(95.0),
        **{f"nsd_{tolerance:g}mm": surfels.surface_dice(tolerance) for tolerance in TOLERANCES_MM},
        **_border_scores(closed, "_closed_mm"),
    }


def _border_scores(border: BorderDistances | None, suffix: str) -> dict[str, float | None]:
    if border is None:
        return {f"{name}{suffix}": None for name in BORDER_KEYS}
    values = (border.assd_mm(), border.rmsd_mm(), border.mssd_mm())
    return {f"{name}{suffix}": value for name, value in zip(BORDER_KEYS, values, strict=True)}


def _reaches_edge(mask: np.ndarray) -> bool:
    """Whether a mask has voxels on a face of its array."""
    ends = (0, -1)
    return any(bool(np.take(mask, end, axis=axis).any()) for axis in range(3) for end in ends)


def measure_border_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Float3, closed: bool = False
) -> BorderDistances | None:
    """Both directions between the border voxels of two masks.

    Args:
        prediction: uint8 (0, 1) mask.
        truth: Mask of the same shape.
        spacing_mm: Voxel size z, y, x.
        closed: Beyond the array is outside the mask, so that voxels on its faces are border voxels; by default it
            is inside (CHAOS).

    Returns:
        The distances, or None where a mask has no border voxel.
    """
    lattices = [_border_lattice(mask, beyond=0 if closed else 1) for mask in (prediction, truth)]
    if not all(lattice.any() for lattice in lattices):
        return None
    from_prediction, from_truth = _both_ways(lattices[0], lattices[1], spacing_mm)
    return BorderDistances(from_prediction, from_truth)


def measure_surfel_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Float3
) -> SurfelDistances:
    """Both directions between surface elements. Neither mask may be empty; uint8 (0, 1)."""
    areas = compute_surfel_areas_mm2(spacing_mm)
    codes = [encode_blocks(mask) for mask in (prediction, truth)]
    lattices = [
        ((code + np.uint8(1)) > 1).view(np.uint8) for code in codes
    ]  # neither 0 nor 255: a surface is inside
    from_prediction, from_truth = _both_ways(lattices[0], lattices[1], spacing_mm)
    weights = [
        areas[code.ravel()[np.flatnonzero(lattice)]]
        for code, lattice in zip(codes, lattices, strict=True)
    ]
    return SurfelDistances(from_prediction, from_truth, weights[0], weights[1])


def encode_blocks(mask: np.ndarray) -> np.ndarray:
    """For each point between voxels (shape + 1, beyond the array is empty) the filling of its 2x2x2 block as 8 bits.

    The bits are those of `surfels.CORNERS`: the voxel before the point in all axes is the highest.
    """
    code = np.pad(mask, 1)
    code = (code[:, :, :-1] << 1) | code[:, :, 1:]
    code = (code[:, :-1] << 2) | code[:, 1:]
    return (code[:-1] << 4) | code[1:]


def _border_lattice(mask: np.ndarray, beyond: int) -> np.ndarray:
    """Voxels of the mask with a face neighbour outside it; `beyond` is the value around the array."""
    around = np.pad(mask, 1, constant_values=beyond)
    inside = around[:-2, 1:-1, 1:-1] & around[2:, 1:-1, 1:-1]
    inside &= around[1:-1, :-2, 1:-1]
    inside &= around[1:-1, 2:, 1:-1]
    inside &= around[1:-1, 1:-1, :-2]
    inside &= around[1:-1, 1:-1, 2:]
    return mask & ~inside


def _both_ways(
    first: np.ndarray, second: np.ndarray, spacing_mm: Float3
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the set places of `first` to those of `second`, and back; in the places' C order."""
    places, fractions = _near_places(spacing_mm)
    reach = np.minimum(np.abs(places).max(axis=0), MAX_REACH)
    margin = [(int(r), int(r)) for r in reach]
    padded = [np.pad(lattice, margin) for lattice in (first, second)]
    return (
        _distances(padded[0], padded[1], spacing_mm, places, fractions),
        _distances(padded[1], padded[0], spacing_mm, places, fractions),
    )


def _distances(
    source: np.ndarray,
    target: np.ndarray,
    spacing_mm: Float3,
    places: np.ndarray,
    place_mm: np.ndarray,
) -> np.ndarray:
    strides = np.array([source.shape[1] * source.shape[2], source.shape[2], 1])
    points = np.flatnonzero(source)
    target_flat = target.ravel()
    distances = np.zeros(points.size)
    left = np.arange(points.size)
    offsets = places @ strides
    shells = np.flatnonzero(np.diff(place_mm, prepend=-1.0))
    for start, stop in zip(shells, [*shells[1:], offsets.size], strict=True):
        at = points[left]
        hit = target_flat[at + offsets[start]]
        for offset in offsets[start + 1 : stop]:
            hit |= target_flat[at + offset]
        found = hit.view(bool)
        distances[left[found]] = place_mm[start]
        left = left[~found]
        if left.size == 0:
            return distances
        if stop >= HOPELESS_AFTER and 2 * left.size > points.size:
            break
    if left.size * MAP_FROM_SHARE > target.size and target.size <= MAX_MAP_VOXELS:
        every = ndimage.distance_transform_edt(target == 0, sampling=spacing_mm)
        distances[left] = every.ravel()[points[left]]
    else:
        distances[left] = _tree_distances(points[left], target, spacing_mm)
    return distances


def _tree_distances(points: np.ndarray, target: np.ndarray, spacing_mm: Float3) -> np.ndarray:
    goals = np.stack(np.unravel_index(np.flatnonzero(target), target.shape), axis=1)
    starts = np.stack(np.unravel_index(points, target.shape), axis=1)
    tree = cKDTree(goals * np.asarray(spacing_mm), balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(starts * np.asarray(spacing_mm))
    return _length_mm(starts - goals[nearest], spacing_mm)


@cache
def _near_places(spacing_mm: Float3) -> tuple[np.ndarray, np.ndarray]:
    """Lattice offsets (n, 3) by ascending length in mm, complete up to the last one, and their lengths."""
    axis = np.arange(-MAX_REACH, MAX_REACH + 1)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    length = _length_mm(grid, spacing_mm)
    beyond_mm = (MAX_REACH + 1) * min(spacing_mm)  # the nearest offset that the grid lacks
    order = np.argsort(length, kind="stable")
    order = order[length[order] < beyond_mm]
    last_mm = length[order[min(NEAR_PLACES, order.size) - 1]]
    order = order[length[order] <= last_mm]
    return grid[order], length[order]


def _length_mm(offsets: np.ndarray, spacing_mm: Float3) -> np.ndarray:
    squares = (offsets * np.asarray(spacing_mm, dtype=np.float64)) ** 2
    return np.sqrt(squares[:, 0] + squares[:, 1] + squares[:, 2])


def _weighted_percentile(distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float) -> float:
    order = np.argsort(distances_mm, kind="stable")
    share = np.cumsum(areas_mm2[order]) / np.sum(areas_mm2)
    index = min(int(np.searchsorted(share, percent / 100.0)), order.size - 1)
    return float(distances_mm[order[index]])


def _undefined(nsd: float) -> dict[str, float | None]:
    keys: Sequence[str] = DISTANCE_KEYS
    return {**dict.fromkeys(keys), **{f"nsd_{tolerance:g}mm": nsd for tolerance in TOLERANCES_MM}}

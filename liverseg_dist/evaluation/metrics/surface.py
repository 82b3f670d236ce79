"""Distances between two surfaces in mm: ASSD, RMSD, MSSD (CHAOS, LiTS) and HD95, NSD (DeepMind).

Two published definitions of a surface are in use. Both are given, because tables in papers mix
them:

- *Border voxels*: voxels of the mask with a face neighbour outside it; voxels beyond the scan count
  as inside (CHAOS: scipy's `binary_erosion` with `border_value=1`,
  https://github.com/emrekavur/CHAOS-evaluation). ASSD, RMSD and MSSD are computed over the border
  voxels of both masks together. A mask is thus *open* where it reaches the scan's edge: it has no
  surface there. A prediction that lacks the last slice of such a mask has a surface there, and its
  distance to the nearest true border voxel can be half an organ. `assd_closed_mm`, `rmsd_closed_mm`
  and `mssd_closed_mm` are the same figures with voxels beyond the scan counted as outside
  (`border_value=0`): the mask is *closed*. They differ only where a mask reaches the scan's edge.
- *Surface elements*: points between voxels, weighted by the area of the surface there (`surfels`).
  HD95 and NSD are computed over them (https://github.com/google-deepmind/surface-distance); NSD is
  its "surface Dice". Voxels beyond the scan are outside: masks are always closed.

Distances to the other surface are exact, and computed for surface points only. A point that is on
the other surface has distance 0. For other points the lattice offsets are tried in order of length.
The few points further away use a KD-tree or, where they are many, an exact distance map. All sums
have a fixed order, so the same case always gives the same bits.

Empty masks: with either mask empty the distances are None (the LiTS scorer uses 9001, which
dominates every mean). So are the distances between border voxels where a mask fills the whole scan
and has none. NSD is 1 when both masks are empty and 0 when one is, as for Dice.
"""

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
NUM_NEAR_OFFSETS = 250
"""Lattice offsets that are tried before the KD-tree."""
MAX_OFFSET = 8
"""Longest offset that is tried along one axis, voxels."""
STOP_AFTER = 60
"""Offsets after which the search stops if it found less than half of the distances.

Masks are then far apart or noisy, and further offsets would find little.
"""
MAP_FROM_SHARE = 10
MAX_MAP_VOXELS = 40_000_000
"""A distance map is cheaper than a tree for more than a tenth of the voxels; 30 bytes a voxel."""


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
    """Distance in mm from each surface element of one mask to the nearest of the other.

    Each element has an area, by which it is weighted.
    """

    from_prediction_mm: np.ndarray
    from_truth_mm: np.ndarray
    prediction_areas_mm2: np.ndarray
    truth_areas_mm2: np.ndarray

    def hausdorff_mm(self, percent: float = 95.0) -> float:
        """Percentile of the distances by area, in each direction; the larger of the two.

        Args:
            percent: Share of the area with a smaller distance, 0..100.
        """
        return max(
            _weighted_percentile(self.from_truth_mm, self.truth_areas_mm2, percent),
            _weighted_percentile(self.from_prediction_mm, self.prediction_areas_mm2, percent),
        )

    def surface_dice(self, tolerance_mm: float) -> float:
        """Share of the area of both surfaces within `tolerance_mm` of the other one (NSD)."""
        area_within = (
            self.truth_areas_mm2[self.from_truth_mm <= tolerance_mm].sum()
            + self.prediction_areas_mm2[self.from_prediction_mm <= tolerance_mm].sum()
        )
        return float(area_within / (self.truth_areas_mm2.sum() + self.prediction_areas_mm2.sum()))


def score_surface(
    prediction_zyx: np.ndarray, truth_zyx: np.ndarray, spacing_mm: Float3
) -> dict[str, float | None]:
    """Compute all surface metrics of one structure.

    Args:
        prediction_zyx: Boolean or uint8 (0, 1) mask of the whole scan: its faces are the edge.
        truth_zyx: Mask of the same shape.
        spacing_mm: Voxel size z, y, x.

    Returns:
        `assd_mm rmsd_mm mssd_mm` (masks open at the scan's edge, as CHAOS), `hd95_mm nsd_1mm
        nsd_2mm` (closed, as DeepMind) and `assd_closed_mm rmsd_closed_mm mssd_closed_mm`. For empty
        masks see the module.
    """
    box = find_joint_box(prediction_zyx, truth_zyx)
    if box is None:
        return _make_empty_scores(nsd=1.0)
    prediction = np.ascontiguousarray(prediction_zyx[box], dtype=np.uint8)
    truth = np.ascontiguousarray(truth_zyx[box], dtype=np.uint8)
    if not prediction.any() or not truth.any():
        return _make_empty_scores(nsd=0.0)
    opened = measure_border_distances(prediction, truth, spacing_mm)
    closed = opened
    # Away from the edge of the scan both conventions agree.
    if _reaches_edge(prediction) or _reaches_edge(truth):
        closed = measure_border_distances(prediction, truth, spacing_mm, closed=True)
    surfels = measure_surfel_distances(prediction, truth, spacing_mm)
    scores = _name_border_scores(opened, "_mm")
    scores["hd95_mm"] = surfels.hausdorff_mm(95.0)
    for tolerance in TOLERANCES_MM:
        scores[f"nsd_{tolerance:g}mm"] = surfels.surface_dice(tolerance)
    return scores | _name_border_scores(closed, "_closed_mm")


def _name_border_scores(border: BorderDistances | None, suffix: str) -> dict[str, float | None]:
    if border is None:
        return {f"{name}{suffix}": None for name in BORDER_KEYS}
    values = (border.assd_mm(), border.rmsd_mm(), border.mssd_mm())
    return {f"{name}{suffix}": value for name, value in zip(BORDER_KEYS, values, strict=True)}


def _reaches_edge(mask: np.ndarray) -> bool:
    """Whether a mask has voxels on a face of its array."""
    for axis in range(3):
        first, last = np.take(mask, 0, axis=axis), np.take(mask, -1, axis=axis)
        if first.any() or last.any():
            return True
    return False


def measure_border_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Float3, closed: bool = False
) -> BorderDistances | None:
    """Measure distances between the border voxels of two masks, in both directions.

    Args:
        prediction: uint8 (0, 1) mask.
        truth: Mask of the same shape.
        spacing_mm: Voxel size z, y, x.
        closed: Count voxels beyond the array as outside the mask, so that voxels on its faces are
            border voxels. By default they are inside (CHAOS).

    Returns:
        The distances, or None where a mask has no border voxel.
    """
    beyond = 0 if closed else 1
    predicted_border = _mark_border(prediction, beyond)
    true_border = _mark_border(truth, beyond)
    if not predicted_border.any() or not true_border.any():
        return None
    distances = _measure_both_directions(predicted_border, true_border, spacing_mm)
    return BorderDistances(*distances)


def measure_surfel_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Float3
) -> SurfelDistances:
    """Measure distances between surface elements, in both directions.

    Args:
        prediction: uint8 (0, 1) mask, not empty.
        truth: Mask of the same shape, not empty.
        spacing_mm: Voxel size z, y, x.
    """
    predicted_codes, true_codes = encode_blocks(prediction), encode_blocks(truth)
    predicted_surface, true_surface = _mark_surface(predicted_codes), _mark_surface(true_codes)
    from_prediction, from_truth = _measure_both_directions(
        predicted_surface, true_surface, spacing_mm
    )
    areas_mm2 = compute_surfel_areas_mm2(spacing_mm)
    prediction_areas = areas_mm2[predicted_codes.ravel()[np.flatnonzero(predicted_surface)]]
    truth_areas = areas_mm2[true_codes.ravel()[np.flatnonzero(true_surface)]]
    return SurfelDistances(from_prediction, from_truth, prediction_areas, truth_areas)


def _mark_surface(codes: np.ndarray) -> np.ndarray:
    """1 where a block contains a surface: where it is neither empty (0) nor full (255)."""
    # In uint8 255 + 1 is 0, so one comparison excludes both.
    return ((codes + np.uint8(1)) > 1).view(np.uint8)


def encode_blocks(mask: np.ndarray) -> np.ndarray:
    """Encode the 2x2x2 block of voxels around each point between voxels as 8 bits.

    The bits are those of `surfels.CORNERS`: the voxel before the point along all axes is the
    highest.

    Returns:
        uint8 array of shape + 1; voxels beyond the mask's array are empty.
    """
    # Each line joins the neighbours along one axis: x, then y, then z.
    code = np.pad(mask, 1)
    code = (code[:, :, :-1] << 1) | code[:, :, 1:]
    code = (code[:, :-1] << 2) | code[:, 1:]
    return (code[:-1] << 4) | code[1:]


def _mark_border(mask: np.ndarray, beyond: int) -> np.ndarray:
    """1 at mask voxels with a face neighbour outside; `beyond` is the value past the array."""
    # A voxel is inside if all its six face neighbours are in the mask.
    around = np.pad(mask, 1, constant_values=beyond)
    inside = around[:-2, 1:-1, 1:-1] & around[2:, 1:-1, 1:-1]
    inside &= around[1:-1, :-2, 1:-1]
    inside &= around[1:-1, 2:, 1:-1]
    inside &= around[1:-1, 1:-1, :-2]
    inside &= around[1:-1, 1:-1, 2:]
    return mask & ~inside


def _measure_both_directions(
    first: np.ndarray, second: np.ndarray, spacing_mm: Float3
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from the points of `first` to those of `second`, and back; in C order."""
    offsets_zyx, lengths_mm = _list_near_offsets(spacing_mm)
    reach = np.minimum(np.abs(offsets_zyx).max(axis=0), MAX_OFFSET)
    # With this margin no offset leaves the array, so indices need no check.
    margin = [(int(voxels), int(voxels)) for voxels in reach]
    first, second = np.pad(first, margin), np.pad(second, margin)
    return (
        _measure_distances(first, second, spacing_mm, offsets_zyx, lengths_mm),
        _measure_distances(second, first, spacing_mm, offsets_zyx, lengths_mm),
    )


def _measure_distances(
    source: np.ndarray,
    target: np.ndarray,
    spacing_mm: Float3,
    offsets_zyx: np.ndarray,
    lengths_mm: np.ndarray,
) -> np.ndarray:
    """Distance in mm from each point of `source` to the nearest point of `target`."""
    strides = np.array([source.shape[1] * source.shape[2], source.shape[2], 1])
    points = np.flatnonzero(source)
    target_flat = target.ravel()
    distances = np.zeros(points.size)
    remaining = np.arange(points.size)
    offsets = offsets_zyx @ strides
    # Offsets of one length are tried together: the first group with a hit has the distance.
    group_starts = np.flatnonzero(np.diff(lengths_mm, prepend=-1.0))
    group_stops = [*group_starts[1:], offsets.size]
    for start, stop in zip(group_starts, group_stops, strict=True):
        candidates = points[remaining]
        hit = target_flat[candidates + offsets[start]]
        for offset in offsets[start + 1 : stop]:
            hit |= target_flat[candidates + offset]
        found = hit.view(bool)
        distances[remaining[found]] = lengths_mm[start]
        remaining = remaining[~found]
        if remaining.size == 0:
            return distances
        if stop >= STOP_AFTER and 2 * remaining.size > points.size:
            break
    if remaining.size * MAP_FROM_SHARE > target.size and target.size <= MAX_MAP_VOXELS:
        distance_map = ndimage.distance_transform_edt(target == 0, sampling=spacing_mm)
        distances[remaining] = distance_map.ravel()[points[remaining]]
    else:
        distances[remaining] = _query_tree(points[remaining], target, spacing_mm)
    return distances


def _query_tree(points: np.ndarray, target: np.ndarray, spacing_mm: Float3) -> np.ndarray:
    goals = np.stack(np.unravel_index(np.flatnonzero(target), target.shape), axis=1)
    starts = np.stack(np.unravel_index(points, target.shape), axis=1)
    tree = cKDTree(goals * np.asarray(spacing_mm), balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(starts * np.asarray(spacing_mm))
    # From voxel offsets, as for near points: the tree's own distances differ in the last bits.
    return _length_mm(starts - goals[nearest], spacing_mm)


@cache
def _list_near_offsets(spacing_mm: Float3) -> tuple[np.ndarray, np.ndarray]:
    """Lattice offsets (n, 3) by ascending length, complete up to the last one; lengths in mm."""
    axis = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    length = _length_mm(grid, spacing_mm)
    # Length of the shortest offset that the grid does not contain.
    beyond_mm = (MAX_OFFSET + 1) * min(spacing_mm)
    order = np.argsort(length, kind="stable")
    order = order[length[order] < beyond_mm]
    last_mm = length[order[min(NUM_NEAR_OFFSETS, order.size) - 1]]
    order = order[length[order] <= last_mm]
    return grid[order], length[order]


def _length_mm(offsets: np.ndarray, spacing_mm: Float3) -> np.ndarray:
    squares = (offsets * np.asarray(spacing_mm, dtype=np.float64)) ** 2
    return np.sqrt(squares[:, 0] + squares[:, 1] + squares[:, 2])


def _weighted_percentile(distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float) -> float:
    # A stable sort: equal distances keep their order, so the sum of areas has the same bits.
    order = np.argsort(distances_mm, kind="stable")
    share = np.cumsum(areas_mm2[order]) / np.sum(areas_mm2)
    index = min(int(np.searchsorted(share, percent / 100.0)), order.size - 1)
    return float(distances_mm[order[index]])


def _make_empty_scores(nsd: float) -> dict[str, float | None]:
    """Scores where a mask is empty: NSD is given, distances are undefined."""
    scores: dict[str, float | None] = dict.fromkeys(DISTANCE_KEYS)
    for tolerance in TOLERANCES_MM:
        scores[f"nsd_{tolerance:g}mm"] = nsd
    return scores

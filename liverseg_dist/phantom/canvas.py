"""A slab of a scan while it is painted, tissue over tissue, each only where its body lies."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from liverseg_dist.phantom.shapes import Bounds, Box, Points, Shape
from liverseg_dist.volume import Grid


class Tissue(NamedTuple):
    """HU of a tissue and how uneven it is: `grain` times the scan's texture field (unit variance, a few mm), and spots
    of up to `spot` HU where that field is above `rare` (below, where `rare` is negative)."""

    hu: float
    grain: float = 0.0
    spot: float = 0.0
    rare: float = 1.4

    def at(self, texture: np.ndarray) -> np.ndarray | np.float32:
        if not self.grain and not self.spot:
            return np.float32(self.hu)
        value = texture * np.float32(self.grain)
        value += np.float32(self.hu)
        if self.spot:
            side = np.float32(np.sign(self.rare))
            value += np.clip(
                (texture - np.float32(self.rare)) * side * np.float32(2), 0, 1
            ) * np.float32(self.spot)
        return value


class Stroke(NamedTuple):
    """One body and what it is made of."""

    shape: Shape
    tissue: Tissue
    inset_mm: float = 0.0
    """Only what lies this deep inside the shape: the lumen of a hollow organ."""
    within: str = ""
    """Name of a region that cuts the body, `margin_mm` inside it."""
    margin_mm: float = 0.0
    ripple_mm: float = 0.0
    """How far the texture field pushes the surface."""
    above_y_mm: float | None = None
    """Only in front of this plane: gas over fluid in a patient who lies on the back."""
    edge_mm: float = 0.0
    """Softness of the surface beyond the voxel's own."""


@dataclass
class Canvas:
    """Arrays (planes, rows, columns) over one block: positions, texture, HU, and distances to named regions."""

    points: Points
    texture: np.ndarray
    hu: np.ndarray
    edge_mm: float
    find: Callable[[Bounds], Box | None]
    """Where in the block a body with these bounds can lie; None: nowhere."""
    regions: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, box: Box) -> "Canvas":
        regions = {name: distance[box] for name, distance in self.regions.items()}
        return Canvas(
            self.points[box], self.texture[box], self.hu[box], self.edge_mm, self.find, regions
        )

    def near(self, bounds: Bounds) -> "Canvas | None":
        """The part of the whole block around a body."""
        box = self.find(bounds)
        return None if box is None else self[box]

    def share(self, distance_mm: np.ndarray, edge_mm: float = 0.0) -> np.ndarray:
        """How much of each voxel lies inside, 0 to 1."""
        width = float(np.hypot(self.edge_mm, edge_mm))
        share = distance_mm * np.float32(-1 / width)
        share += np.float32(0.5)
        return np.clip(share, 0, 1, out=share)

    def fill(self, distance_mm: np.ndarray, tissue: Tissue, edge_mm: float = 0.0) -> np.ndarray:
        """Paint a tissue; returns each voxel's share of it."""
        share = self.share(distance_mm, edge_mm)
        self.hu += share * (tissue.at(self.texture) - self.hu)
        return share

    def paint(self, stroke: Stroke) -> None:
        distance = stroke.shape.distance(self.points)
        if stroke.inset_mm:
            distance += np.float32(stroke.inset_mm)
        if stroke.ripple_mm:
            distance += self.texture * np.float32(stroke.ripple_mm)
        if stroke.within:
            np.maximum(
                distance, self.regions[stroke.within] + np.float32(stroke.margin_mm), out=distance
            )
        if stroke.above_y_mm is not None:
            np.maximum(distance, np.float32(stroke.above_y_mm) - self.points.y, out=distance)
        self.fill(distance, stroke.tissue, stroke.edge_mm)


def index_box(grid: Grid, bounds_mm: Bounds, margin_mm: float) -> np.ndarray:
    """The voxels (z, y, x) a body in the world can touch: (2, 3) first and one past the last, cut to the grid."""
    box = np.array(bounds_mm)
    half = (box[1] - box[0]) / 2 + margin_mm
    per_mm = np.abs(np.linalg.inv(grid.affine[:3, :3]))[::-1]
    middle, reach = grid.index_of(box.mean(axis=0)), per_mm @ half
    first, last = np.floor(middle - reach), np.ceil(middle + reach) + 1
    return np.minimum(np.maximum([first, last], 0), grid.shape).astype(int)


def in_slab(box: np.ndarray, planes: slice) -> Box | None:
    """The part of a box in some planes of the grid, counted from the first of them; None where there is none."""
    (z0, y0, x0), (z1, y1, x1) = box
    low, high = max(int(z0), planes.start), min(int(z1), planes.stop)
    if low >= high or y0 >= y1 or x0 >= x1:
        return None
    return (
        slice(low - planes.start, high - planes.start),
        slice(int(y0), int(y1)),
        slice(int(x0), int(x1)),
    )

"""A slab of a scan while it is painted: one tissue over another, each only inside its body.

The same strokes paint a CT and an MR: a `Renderer` turns a tissue into HU or into MR signal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from liverseg_dist.phantom.shapes import Bounds, Box, Points, Shape
from liverseg_dist.volume import Grid


class Tissue(NamedTuple):
    """HU of a tissue and its unevenness, and its name for other modalities."""

    hu: float
    grain: float = 0.0
    """Factor of the scan's texture field (unit variance, a few mm), in HU."""
    spot: float = 0.0
    """HU of spots where the texture field is above `rare` (below, if `rare` is negative)."""
    rare: float = 1.4
    kind: str = ""
    """Name in the table of MR properties (see `mr_tissues`)."""

    def compute_hu(self, texture: np.ndarray) -> np.ndarray | np.float32:
        """Return HU for values of the texture field."""
        if not self.grain and not self.spot:
            return np.float32(self.hu)
        value = texture * np.float32(self.grain)
        value += np.float32(self.hu)
        if self.spot:
            value += self.compute_spot_strength(texture) * np.float32(self.spot)
        return value

    def compute_spot_strength(self, texture: np.ndarray) -> np.ndarray:
        """Return 1 in the spots, 0 elsewhere, and a ramp at their soft edges."""
        side = np.float32(np.sign(self.rare))
        return np.clip((texture - np.float32(self.rare)) * side * np.float32(2), 0, 1)


Renderer = Callable[[Tissue, np.ndarray], np.ndarray | np.float32]
"""Returns the values of a tissue (HU or MR signal) for values of the texture field."""


class Stroke(NamedTuple):
    """One body and its tissue."""

    shape: Shape
    tissue: Tissue
    inset_mm: float = 0.0
    """Depth below the shape's surface at which the tissue begins: the lumen of a hollow organ."""
    within: str = ""
    """Name of a region that limits the body, `margin_mm` inside the region's surface."""
    margin_mm: float = 0.0
    ripple_mm: float = 0.0
    """Shift of the surface by the texture field."""
    above_y_mm: float | None = None
    """Only in front of this plane: gas over fluid in a patient in supine position."""
    edge_mm: float = 0.0
    """Width of the surface in addition to the voxel's."""
    organ: str = ""
    """Organ that the body belongs to, as named in `organ_labels`; empty: not a labelled one."""


@dataclass
class Canvas:
    """Arrays (planes, rows, columns) of one block.

    They are positions, texture, values (HU or MR signal), distances to regions, and organs.
    """

    points: Points
    texture: np.ndarray
    values: np.ndarray
    edge_mm: float
    find_box: Callable[[Bounds], Box | None]
    """Returns the part of the block that a body with these bounds can overlap; None: no part."""
    regions: dict[str, np.ndarray] = field(default_factory=dict)
    render: Renderer = Tissue.compute_hu
    organs: np.ndarray | None = None
    """Label value of the organ that fills most of each voxel; None: organs are not labelled."""
    organ_values: dict[str, int] = field(default_factory=dict)
    """Label value of each organ that is labelled."""

    def __getitem__(self, box: Box) -> "Canvas":
        regions = {name: distance[box] for name, distance in self.regions.items()}
        return replace(
            self,
            points=self.points[box],
            texture=self.texture[box],
            values=self.values[box],
            regions=regions,
            organs=None if self.organs is None else self.organs[box],
        )

    def crop_around(self, bounds: Bounds) -> "Canvas | None":
        """Return the part of the complete block around a body; None: no part."""
        box = self.find_box(bounds)
        return None if box is None else self[box]

    def compute_share(self, distance_mm: np.ndarray, edge_mm: float = 0.0) -> np.ndarray:
        """Return the share of each voxel that is inside, 0 to 1."""
        # Independent blurs add in quadrature.
        width = float(np.hypot(self.edge_mm, edge_mm))
        share = distance_mm * np.float32(-1 / width)
        share += np.float32(0.5)
        return np.clip(share, 0, 1, out=share)

    def fill_tissue(
        self, distance_mm: np.ndarray, tissue: Tissue, edge_mm: float = 0.0, organ: str = ""
    ) -> np.ndarray:
        """Paint a tissue and return each voxel's share of it."""
        share = self.compute_share(distance_mm, edge_mm)
        self.values += share * (self.render(tissue, self.texture) - self.values)
        if self.organs is not None:
            # A tissue that is no part of an organ ends the organ under it.
            self.organs[share >= 0.5] = self.organ_values.get(organ, 0)
        return share

    def paint_stroke(self, stroke: Stroke) -> None:
        """Paint one body."""
        distance = stroke.shape.signed_distance(self.points)
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
        self.fill_tissue(distance, stroke.tissue, stroke.edge_mm, stroke.organ)


def find_voxel_box(grid: Grid, bounds_mm: Bounds, margin_mm: float) -> np.ndarray:
    """Return the voxels that a body in the world can overlap.

    Returns:
        (2, 3): first voxel and one past the last (z, y, x), limited to the grid.
    """
    box = np.array(bounds_mm)
    half = (box[1] - box[0]) / 2 + margin_mm
    # Absolute values: the box of a rotated box is the sum of its projections.
    per_mm = np.abs(np.linalg.inv(grid.affine[:3, :3]))[::-1]
    middle, reach = grid.index_of(box.mean(axis=0)), per_mm @ half
    first, last = np.floor(middle - reach), np.ceil(middle + reach) + 1
    return np.minimum(np.maximum([first, last], 0), grid.shape).astype(int)


def crop_to_slab(box: np.ndarray, planes: slice) -> Box | None:
    """Return the part of a box in some planes, relative to the first plane; None: no part."""
    (z0, y0, x0), (z1, y1, x1) = box
    low, high = max(int(z0), planes.start), min(int(z1), planes.stop)
    if low >= high or y0 >= y1 or x0 >= x1:
        return None
    return (
        slice(low - planes.start, high - planes.start),
        slice(int(y0), int(y1)),
        slice(int(x0), int(x1)),
    )

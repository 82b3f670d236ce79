"""Area of the surface inside a 2x2x2 block of voxels, for each of its 256 fillings.

A surface metric that counts voxels gives oblique surfaces and anisotropic voxels a wrong weight.
DeepMind's definition (Nikolov et al. 2018, https://arxiv.org/abs/1809.04430) therefore weights each
point of the dual lattice by the area of the marching-cubes surface through its block. The areas are
derived here, not tabulated:

- A block edge whose ends differ is cut at its middle. On each face the cuts are joined so that
  filled corners are cut off one by one; a block with more than four filled corners has the surface
  of its complement.
- The joined cuts form closed polygons. A polygon with two cuts opposite each other through the
  block's centre is triangulated from one of them, which matters for bent polygons only. Its area is
  that of its triangles.

The test compares all 256 areas with the `surface-distance` package at several spacings.
"""

from functools import cache
from itertools import pairwise, product

import numpy as np

from liverseg_dist.volume import Float3

Point = tuple[float, float, float]
Corner = tuple[int, int, int]
CORNERS: tuple[Corner, ...] = tuple((z, y, x) for z, y, x in product((0, 1), repeat=3))
"""Block corners (z, y, x). Corner i is bit 7 - i of a block's code: (1, 1, 1) is bit 0."""


@cache
def compute_surfel_areas_mm2(spacing_mm: Float3) -> np.ndarray:
    """Surface area in mm² for each block code 0..255; `spacing_mm` is z, y, x."""
    codes, triangles = _list_triangles()
    corners = triangles * np.asarray(spacing_mm, dtype=np.float64)
    sides = corners[:, 1:] - corners[:, :1]
    triangle_areas = 0.5 * np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    areas = np.bincount(codes, weights=triangle_areas, minlength=256)
    # The array is cached: a caller must not change it.
    areas.setflags(write=False)
    return areas


@cache
def _list_triangles() -> tuple[np.ndarray, np.ndarray]:
    """Block code (n) and corners (n, 3 points, zyx) of all triangles, at unit spacing."""
    codes, triangles = [], []
    for code in range(256):
        filled = {corner for i, corner in enumerate(CORNERS) if code >> (7 - i) & 1}
        # The surface of the complement is the same one.
        if len(filled) > 4:
            filled = set(CORNERS) - filled
        for polygon in _join_polygons(filled):
            start = _choose_fan_start(polygon)
            points = polygon[start:] + polygon[:start]
            for second, third in pairwise(points[1:]):
                triangles.append((points[0], second, third))
                codes.append(code)
    return np.array(codes), np.array(triangles)


def _choose_fan_start(polygon: list[Point]) -> int:
    """Index of the point that all triangles of a polygon have in common."""
    for i, (z, y, x) in enumerate(polygon):
        if (1 - z, 1 - y, 1 - x) in polygon:
            return i
    return 0


def _list_faces() -> list[list[Corner]]:
    """The six faces of a block, each a ring of four corners."""
    faces = []
    for axis, side in product(range(3), (0, 1)):
        ring = []
        for in_plane in ((0, 0), (0, 1), (1, 1), (1, 0)):
            corner = list(in_plane)
            corner.insert(axis, side)
            ring.append((corner[0], corner[1], corner[2]))
        faces.append(ring)
    return faces


def _join_polygons(filled: set[Corner]) -> list[list[Point]]:
    """The closed polygons that separate the filled corners from the others."""
    joined: dict[Point, list[Point]] = {}
    for ring in _list_faces():
        cuts = [k for k in range(4) if (ring[k] in filled) != (ring[(k + 1) % 4] in filled)]
        middles = {k: _find_middle(ring[k], ring[(k + 1) % 4]) for k in cuts}
        # Four cuts: two filled corners on a diagonal, each of which is cut off.
        if len(cuts) == 4:
            pairs = [((k - 1) % 4, k) for k in range(4) if ring[k] in filled]
        else:
            pairs = [(cuts[0], cuts[1])] if cuts else []
        for first, second in pairs:
            joined.setdefault(middles[first], []).append(middles[second])
            joined.setdefault(middles[second], []).append(middles[first])
    # Walk along the joined cuts until each polygon is closed.
    polygons = []
    while joined:
        current = min(joined)
        polygon = []
        while current in joined:
            polygon.append(current)
            neighbours = joined.pop(current)
            current = next((point for point in neighbours if point in joined), current)
        polygons.append(polygon)
    return polygons


def _find_middle(first: Corner, second: Corner) -> Point:
    z, y, x = ((a + b) / 2 for a, b in zip(first, second, strict=True))
    return z, y, x

"""The liver: the room that its neighbours leave it, with portal and hepatic veins. Nominal mm, see `torso`."""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.phantom.organs import vena_cava
from liverseg_dist.phantom.shapes import (
    Cone,
    Ellipsoid,
    Point,
    Points,
    Waves,
    build_tube,
    intersect_shapes,
    unite_shapes,
)

HILUM: Point = (36.0, 26.0, -6.0)
LIVER_BOUNDS: tuple[Point, Point] = ((-112.0, -95.0, -125.0), (140.0, 98.0, 100.0))


@dataclass(frozen=True)
class Liver:
    """Its shape follows the diaphragm and the wall; below, it ends at a plane that rises from the right tip to the
    left; kidney, gallbladder, vena cava and the ligament's fissure leave their marks."""

    tip_z_mm: float
    slope: float
    left_tip_x_mm: float
    surface: Waves
    """Unevenness where no wall shapes it."""
    fissure_x_mm: float
    fissure_mm: float
    kidney: Ellipsoid
    gallbladder: tuple[Cone, ...]
    portal_veins: tuple[Cone, ...]
    hepatic_veins: tuple[Cone, ...]

    def distance(self, p: Points, abdomen_mm: np.ndarray) -> np.ndarray:
        """Signed distance to the liver's surface, given that to the belly's wall and diaphragm."""
        underside = self.tip_z_mm + self.slope * (105 - p.x) - 0.28 * p.y
        below = (underside - p.z) * np.float32(1 / np.sqrt(1 + self.slope**2 + 0.28**2))
        uneven = self.surface.at(p)
        below += uneven
        behind = 13 - 0.1 * (p.x - 10) - p.y
        beside = 40 - 0.35 * np.minimum(p.y + 15, 30) - p.x
        medial = (
            unite_shapes(beside * np.float32(0.94), behind, 26.0) + uneven
        )  # right of the cava, or before the stomach
        shape = intersect_shapes(abdomen_mm + 2.6, below, 16.0)
        shape = intersect_shapes(shape, medial, 16.0)
        shape = intersect_shapes(shape, self.left_tip_x_mm - p.x, 24.0)
        slit = np.maximum(np.abs(p.x - self.fissure_x_mm) - self.fissure_mm, 20 - p.y)
        slit = np.maximum(slit, below + 4)
        slit = np.maximum(slit, p.z - underside - 32)
        shape = np.maximum(shape, -slit)
        shape = intersect_shapes(shape, -(self.kidney.distance(p) - 4), 6.0)
        for piece in (*vena_cava(), *self.gallbladder):
            shape = np.maximum(shape, 0.3 - piece.distance(p))
        return shape


def draw_liver(
    rng: np.random.Generator,
    kidney: Ellipsoid,
    gallbladder: tuple[Cone, ...],
    tops_mm: tuple[float, float],
) -> Liver:
    """`tops_mm`: the right and left dome of the diaphragm, below which the hepatic veins end in the cava."""
    u = rng.uniform
    fissure = float(u(-14, 6))
    return Liver(
        tip_z_mm=float(u(-98, -52)),
        slope=float(u(0.5, 0.74)),
        left_tip_x_mm=float(u(-95, -40)),
        surface=Waves.draw(rng, (45, 110), 4.0, 5),
        fissure_x_mm=fissure,
        fissure_mm=float(u(0.8, 3.0)),
        kidney=kidney,
        gallbladder=gallbladder,
        portal_veins=_portal(rng, fissure),
        hepatic_veins=_hepatic(rng, min(tops_mm) - 8),
    )


def _portal(rng: np.random.Generator, fissure_x_mm: float) -> tuple[Cone, ...]:
    j = lambda reach: float(rng.uniform(-reach, reach))  # noqa: E731
    fork = (64 + j(6), 12 + j(6), 4 + j(6))
    front, back = (88 + j(8), 38 + j(10), 10 + j(14)), (92 + j(8), -22 + j(10), -6 + j(14))
    corner = (fissure_x_mm + 2, 44 + j(5), 22 + j(5))
    pieces = [
        Cone((8.0, 30.0, -38.0), HILUM, 7.0, 7.0),
        Cone(HILUM, fork, 6.5, 5.5),
        Cone(fork, front, 4.6, 3.6),
        Cone(fork, back, 4.6, 3.6),
        Cone(HILUM, (16.0, 34.0, 10.0), 5.0, 4.4),
        Cone((16.0, 34.0, 10.0), corner, 4.4, 3.8),
    ]
    for start, end in ((fork, front), (fork, back), (HILUM, corner), ((16.0, 34.0, 10.0), corner)):
        pieces += _twigs(rng, start, end, 2.9, 32.0, 3)
    return tuple(pieces)


def _hepatic(rng: np.random.Generator, top_mm: float) -> tuple[Cone, ...]:
    j = lambda reach: float(rng.uniform(-reach, reach))  # noqa: E731
    root = (19.0, 15.0, top_mm - 6)
    pieces: list[Cone] = []
    for middle, end in (
        ((60 + j(6), -4 + j(6), top_mm - 14), (98 + j(8), -16 + j(12), top_mm - 46 + j(10))),
        ((42 + j(5), 34 + j(5), top_mm - 16), (64 + j(8), 54 + j(8), top_mm - 54 + j(10))),
        ((0 + j(5), 38 + j(5), top_mm - 12), (-34 + j(10), 48 + j(6), top_mm - 24 + j(8))),
    ):
        pieces += build_tube((*root, 5.6), (*middle, 4.4), (*end, 2.8))
        pieces += _twigs(rng, middle, end, 2.4, 26.0, 2) + _twigs(rng, root, middle, 2.4, 26.0, 1)
    return tuple(pieces)


def _twigs(
    rng: np.random.Generator,
    start: Point,
    end: Point,
    radius: float,
    length_mm: float,
    generations: int,
) -> list[Cone]:
    """Two branches at the end of a vessel, off its direction, that branch again."""
    if generations == 0:
        return []
    ahead = np.subtract(end, start)
    ahead = ahead / max(float(np.linalg.norm(ahead)), 1e-6)
    pieces: list[Cone] = []
    turn = rng.normal(size=3)
    turn -= (turn @ ahead) * ahead
    turn /= max(float(np.linalg.norm(turn)), 1e-6)
    for side in (-1, 1):
        way = ahead + side * float(rng.uniform(0.5, 1.0)) * turn
        way *= length_mm * float(rng.uniform(0.7, 1.2)) / float(np.linalg.norm(way))
        tip = tuple(float(v) for v in np.add(end, way))
        branch = (tip[0], tip[1], tip[2])
        pieces.append(Cone(end, branch, radius, 0.7 * radius))
        pieces += _twigs(rng, end, branch, 0.7 * radius, 0.78 * length_mm, generations - 1)
    return pieces

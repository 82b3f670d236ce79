"""The liver: the space between its neighbours, with portal and hepatic veins.

Coordinates are nominal mm (see `torso`).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from liverseg_dist.phantom.organs import build_vena_cava, jitter
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
    """Shape of a liver.

    It follows the diaphragm and the wall of the abdomen. Its underside is a plane that rises from
    the right tip to the left; kidney, gallbladder, vena cava and the fissure of the ligament are
    cut out.
    """

    tip_z_mm: float
    slope: float
    left_tip_x_mm: float
    surface: Waves
    """Unevenness of the surface where no wall limits it."""
    fissure_x_mm: float
    fissure_mm: float
    kidney: Ellipsoid
    gallbladder: tuple[Cone, ...]
    portal_veins: tuple[Cone, ...]
    hepatic_veins: tuple[Cone, ...]

    def signed_distance(self, p: Points, abdomen_mm: np.ndarray) -> np.ndarray:
        """Return the signed distance to the liver's surface.

        Args:
            p: nominal positions.
            abdomen_mm: signed distance to the abdomen's wall and the diaphragm.
        """
        underside = self.tip_z_mm + self.slope * (105 - p.x) - 0.28 * p.y
        below = (underside - p.z) * np.float32(1 / np.sqrt(1 + self.slope**2 + 0.28**2))
        uneven = self.surface.evaluate_points(p)
        below += uneven
        behind = 13 - 0.1 * (p.x - 10) - p.y
        beside = 40 - 0.35 * np.minimum(p.y + 15, 30) - p.x
        # Right of the vena cava, or in front of the stomach.
        medial = unite_shapes(beside * np.float32(0.94), behind, 26.0) + uneven
        shape = intersect_shapes(abdomen_mm + 2.6, below, 16.0)
        shape = intersect_shapes(shape, medial, 16.0)
        shape = intersect_shapes(shape, self.left_tip_x_mm - p.x, 24.0)
        slit = np.maximum(np.abs(p.x - self.fissure_x_mm) - self.fissure_mm, 20 - p.y)
        slit = np.maximum(slit, below + 4)
        slit = np.maximum(slit, p.z - underside - 32)
        shape = np.maximum(shape, -slit)
        shape = intersect_shapes(shape, -(self.kidney.signed_distance(p) - 4), 6.0)
        for piece in (*build_vena_cava(), *self.gallbladder):
            # A gap of 0.3 mm, so that neighbouring organs do not share voxels completely.
            shape = np.maximum(shape, 0.3 - piece.signed_distance(p))
        return shape


def draw_liver(
    rng: np.random.Generator,
    kidney: Ellipsoid,
    gallbladder: tuple[Cone, ...],
    tops_mm: tuple[float, float],
) -> Liver:
    """Draw a random liver.

    Args:
        rng: random generator.
        kidney: right kidney.
        gallbladder: pieces of the gallbladder.
        tops_mm: height of the right and left dome of the diaphragm, below which the hepatic veins
            end in the vena cava.
    """
    u = rng.uniform
    fissure = float(u(-14, 6))
    return Liver(
        tip_z_mm=float(u(-98, -52)),
        slope=float(u(0.5, 0.74)),
        left_tip_x_mm=float(u(-95, -40)),
        surface=Waves.draw_random(rng, (45, 110), 4.0, 5),
        fissure_x_mm=fissure,
        fissure_mm=float(u(0.8, 3.0)),
        kidney=kidney,
        gallbladder=gallbladder,
        portal_veins=_draw_portal_veins(rng, fissure),
        hepatic_veins=_draw_hepatic_veins(rng, min(tops_mm) - 8),
    )


def _draw_portal_veins(rng: np.random.Generator, fissure_x_mm: float) -> tuple[Cone, ...]:
    j = partial(jitter, rng)
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
        pieces += _draw_branches(rng, start, end, 2.9, 32.0, 3)
    return tuple(pieces)


def _draw_hepatic_veins(rng: np.random.Generator, top_mm: float) -> tuple[Cone, ...]:
    j = partial(jitter, rng)
    root = (19.0, 15.0, top_mm - 6)
    pieces: list[Cone] = []
    for middle, end in (
        ((60 + j(6), -4 + j(6), top_mm - 14), (98 + j(8), -16 + j(12), top_mm - 46 + j(10))),
        ((42 + j(5), 34 + j(5), top_mm - 16), (64 + j(8), 54 + j(8), top_mm - 54 + j(10))),
        ((0 + j(5), 38 + j(5), top_mm - 12), (-34 + j(10), 48 + j(6), top_mm - 24 + j(8))),
    ):
        pieces += build_tube((*root, 5.6), (*middle, 4.4), (*end, 2.8))
        pieces += _draw_branches(rng, middle, end, 2.4, 26.0, 2) + _draw_branches(
            rng, root, middle, 2.4, 26.0, 1
        )
    return tuple(pieces)


def _draw_branches(
    rng: np.random.Generator,
    start: Point,
    end: Point,
    radius: float,
    length_mm: float,
    generations: int,
) -> list[Cone]:
    """Draw two branches at the end of a vessel, which branch again.

    Args:
        rng: random generator.
        start: start of the vessel.
        end: end of the vessel.
        radius: radius of the first branches in mm.
        length_mm: length of the first branches.
        generations: number of branchings.
    """
    # Each branching reduces the radius by 30 %; the rest would be thinner than a voxel.
    if generations == 0:
        return []
    ahead = np.subtract(end, start)
    ahead = ahead / max(float(np.linalg.norm(ahead)), 1e-6)
    pieces: list[Cone] = []
    # A random direction perpendicular to the vessel.
    turn = rng.normal(size=3)
    turn -= (turn @ ahead) * ahead
    turn /= max(float(np.linalg.norm(turn)), 1e-6)
    for side in (-1, 1):
        direction = ahead + side * float(rng.uniform(0.5, 1.0)) * turn
        direction *= length_mm * float(rng.uniform(0.7, 1.2)) / float(np.linalg.norm(direction))
        tip = tuple(float(v) for v in np.add(end, direction))
        branch = (tip[0], tip[1], tip[2])
        pieces.append(Cone(end, branch, radius, 0.7 * radius))
        pieces += _draw_branches(rng, end, branch, 0.7 * radius, 0.78 * length_mm, generations - 1)
    return pieces

"""Tumours of the liver: what they look like, and finding room for them. Nominal mm, see `torso`."""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.phantom.canvas import Canvas, Tissue
from liverseg_dist.phantom.shapes import Ellipsoid, Point, Points, Waves

GAP_MM = 7.0
"""Left between two tumours, so that each is one component."""
MAX_LIVER_SHARE = 0.35
TUMOUR_FREE = 0.12
MOST = 6


@dataclass(frozen=True)
class Tumour:
    """A lumpy ball with a soft edge; HU relative to the liver, the core's absolute."""

    ball: Ellipsoid
    lumps: Waves
    contrast_hu: float
    grain_hu: float
    edge_mm: float
    rim_hu: float
    """Against the tumour, in its outer millimetres: an enhancing margin or capsule; 0: none."""
    core_hu: float | None
    """Of a necrotic centre; None: none."""
    core_share: float

    @property
    def radius_mm(self) -> float:
        return float(np.prod(self.ball.radii)) ** (1 / 3)

    def bounds(self) -> tuple[Point, Point]:
        reach = np.array(self.ball.radii).max() + self.lumps.largest + self.edge_mm
        low, high = (
            np.subtract(self.ball.centre, reach).tolist(),
            np.add(self.ball.centre, reach).tolist(),
        )
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    def distance(self, p: Points) -> np.ndarray:
        return self.ball.distance(p) + self.lumps.at(p)

    def paint(self, canvas: Canvas, distance: np.ndarray, liver_hu: float) -> None:
        """`distance` is the tumour's, already cut by the liver's surface."""
        hu = liver_hu + self.contrast_hu
        canvas.fill(distance, Tissue(hu, self.grain_hu), self.edge_mm)
        if self.rim_hu:
            inner = distance + min(3.5, 0.3 * self.radius_mm)
            rim = np.maximum(distance, -inner)
            canvas.fill(rim, Tissue(hu + self.rim_hu, self.grain_hu), 1.5)
        if self.core_hu is not None:
            core = distance + (1 - self.core_share) * self.radius_mm
            canvas.fill(core + self.grain_hu * 0.3 * canvas.texture, Tissue(self.core_hu, 5.0), 4.0)


def draw_tumour(rng: np.random.Generator, centre: Point, radius_mm: float, hard: bool) -> Tumour:
    u = rng.uniform
    kind = rng.random()
    if hard and kind < 0.3:
        contrast = float(rng.choice([-1, 1]) * u(9, 17))  # nearly isodense
    elif kind < 0.82:
        contrast = -float(u(24, 55) if hard else u(34, 62))
    else:
        contrast = float(u(24, 48) if hard else u(32, 52))
    stretch = u(0.8, 1.25, 3)
    radii = (radius_mm * stretch / stretch.prod() ** (1 / 3)).tolist()
    ball = Ellipsoid(centre, (radii[0], radii[1], radii[2]), float(u(0, 180)), float(u(-60, 60)))
    rim = core = None
    if radius_mm > 9:
        look = rng.random()
        rim = float(u(14, 34)) if look < 0.3 else None
        core = float(u(12, 34)) if 0.2 < look < 0.5 else None
    return Tumour(
        ball=ball,
        lumps=Waves.draw(
            rng, (1.0 * radius_mm, 2.4 * radius_mm), float(u(0.03, 0.1)) * radius_mm, 5
        ),
        contrast_hu=contrast,
        grain_hu=float(u(2, 8)),
        edge_mm=float(u(0.5, min(5.0, 0.5 * radius_mm))),
        rim_hu=rim or 0.0,
        core_hu=core,
        core_share=float(u(0.4, 0.65)),
    )


@dataclass(frozen=True)
class Room:
    """Samples of the liver's inside: nominal positions (n, 3) and depth below the surface (n), each for `sample_ml`."""

    places: np.ndarray
    depth_mm: np.ndarray
    sample_ml: float


def how_many(fraction: float) -> int:
    """Tumours of the patient at this place (0 to 1) of the population: none, or 1 to 6 with equal chances."""
    return (
        0
        if fraction < TUMOUR_FREE
        else 1 + int((fraction - TUMOUR_FREE) / (1 - TUMOUR_FREE) * MOST)
    )


def place_tumours(
    rng: np.random.Generator, room: Room, wanted: int, diameter_mm: tuple[float, float], hard: bool
) -> tuple[Tumour, ...]:
    """Up to `wanted`, apart from each other, for the most part inside the liver."""
    left_ml = MAX_LIVER_SHARE * room.sample_ml * len(room.places)
    found: list[Tumour] = []
    for _ in range(400):
        if len(found) == wanted:
            break
        radius = _diameter_mm(rng, *diameter_mm) / 2
        volume_ml = 4 / 3 * np.pi * radius**3 / 1000
        which = int(rng.integers(len(room.places)))
        if room.depth_mm[which] < 0.5 * radius or volume_ml > left_ml:
            continue
        x, y, z = (float(v) for v in room.places[which])
        away = [
            np.linalg.norm(np.subtract((x, y, z), t.ball.centre)) - 1.3 * (radius + t.radius_mm)
            for t in found
        ]
        if away and min(away) < GAP_MM:
            continue
        found.append(draw_tumour(rng, (x, y, z), radius, hard))
        left_ml -= volume_ml
    return tuple(found)


def _diameter_mm(rng: np.random.Generator, least_mm: float, most_mm: float) -> float:
    """More small ones than large ones: uniform in the square root."""
    return float(rng.uniform(np.sqrt(least_mm), np.sqrt(most_mm))) ** 2

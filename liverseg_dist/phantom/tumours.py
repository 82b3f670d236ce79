"""Tumours of the liver: their appearance and their positions.

Coordinates are nominal mm (see `torso`).
"""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.phantom.canvas import Canvas, Tissue
from liverseg_dist.phantom.shapes import Ellipsoid, Point, Points, Waves

GAP_MM = 7.0
"""Smallest distance between two tumours, so that each is one component."""
MAX_LIVER_SHARE = 0.35
"""Largest share of the liver's volume that tumours may have."""
TUMOUR_FREE = 0.12
"""Share of patients without a tumour."""
MAX_TUMOURS = 6


@dataclass(frozen=True)
class Tumour:
    """An irregular ellipsoid with a soft edge.

    HU are relative to the liver; those of the core are absolute.
    """

    ball: Ellipsoid
    lumps: Waves
    contrast_hu: float
    grain_hu: float
    edge_mm: float
    rim_hu: float
    """HU of an enhancing margin or capsule, relative to the tumour; 0: none."""
    core_hu: float | None
    """HU of a necrotic centre; None: no such centre."""
    core_share: float
    kind: str = "metastasis"
    """Name in the table of MR properties (see `mr_tissues`)."""

    @property
    def radius_mm(self) -> float:
        """Radius of a sphere of the same volume."""
        return float(np.prod(self.ball.radii)) ** (1 / 3)

    def bounding_box(self) -> tuple[Point, Point]:
        reach = np.array(self.ball.radii).max() + self.lumps.largest + self.edge_mm
        low, high = (
            np.subtract(self.ball.centre, reach).tolist(),
            np.add(self.ball.centre, reach).tolist(),
        )
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    def signed_distance(self, p: Points) -> np.ndarray:
        return self.ball.signed_distance(p) + self.lumps.evaluate_points(p)

    def paint_tumour(self, canvas: Canvas, distance: np.ndarray, liver_hu: float) -> None:
        """Paint the tumour.

        Args:
            canvas: block around the tumour.
            distance: signed distance to the part of the tumour inside the liver.
            liver_hu: HU of the liver.
        """
        hu = liver_hu + self.contrast_hu
        canvas.fill_tissue(distance, Tissue(hu, self.grain_hu, kind=self.kind), self.edge_mm)
        if self.rim_hu:
            inner = distance + min(3.5, 0.3 * self.radius_mm)
            rim = np.maximum(distance, -inner)
            capsule = Tissue(hu + self.rim_hu, self.grain_hu, kind="capsule")
            canvas.fill_tissue(rim, capsule, 1.5)
        if self.core_hu is not None:
            core = distance + (1 - self.core_share) * self.radius_mm
            necrosis = Tissue(self.core_hu, 5.0, kind="necrosis")
            canvas.fill_tissue(core + self.grain_hu * 0.3 * canvas.texture, necrosis, 4.0)


def draw_tumour(rng: np.random.Generator, centre: Point, radius_mm: float, hard: bool) -> Tumour:
    """Draw a random tumour; `hard`: with low contrast."""
    u = rng.uniform
    kind = rng.random()
    if hard and kind < 0.3:
        # Almost isodense.
        contrast = float(rng.choice([-1, 1]) * u(9, 17))
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
        lumps=Waves.draw_random(
            rng, (1.0 * radius_mm, 2.4 * radius_mm), float(u(0.03, 0.1)) * radius_mm, 5
        ),
        contrast_hu=contrast,
        grain_hu=float(u(2, 8)),
        edge_mm=float(u(0.5, min(5.0, 0.5 * radius_mm))),
        rim_hu=rim or 0.0,
        core_hu=core,
        core_share=float(u(0.4, 0.65)),
        # Hypovascular metastases are dark in the portal-venous phase.
        kind="metastasis" if contrast < 0 else "hcc",
    )


@dataclass(frozen=True)
class LiverSamples:
    """Sample positions inside the liver."""

    positions: np.ndarray
    """(n, 3): nominal mm."""
    depth_mm: np.ndarray
    """(n): depth below the surface."""
    sample_ml: float
    """Volume that one sample represents."""


def tumour_count(fraction: float) -> int:
    """Return the number of tumours of a patient: none, or 1 to 6 with equal probabilities.

    Args:
        fraction: rank of the patient in the population, 0 to 1.
    """
    if fraction < TUMOUR_FREE:
        return 0
    return 1 + int((fraction - TUMOUR_FREE) / (1 - TUMOUR_FREE) * MAX_TUMOURS)


def place_tumours(
    rng: np.random.Generator,
    samples: LiverSamples,
    wanted: int,
    diameter_mm: tuple[float, float],
    hard: bool,
) -> tuple[Tumour, ...]:
    """Draw up to `wanted` tumours, separate from each other and mostly inside the liver."""
    # The number of attempts is limited, because a small liver may have no space for all.
    left_ml = MAX_LIVER_SHARE * samples.sample_ml * len(samples.positions)
    found: list[Tumour] = []
    for _ in range(400):
        if len(found) == wanted:
            break
        radius = _draw_diameter_mm(rng, *diameter_mm) / 2
        volume_ml = 4 / 3 * np.pi * radius**3 / 1000
        which = int(rng.integers(len(samples.positions)))
        # At most half of the radius may be outside of the liver.
        if samples.depth_mm[which] < 0.5 * radius or volume_ml > left_ml:
            continue
        x, y, z = (float(v) for v in samples.positions[which])
        gaps = []
        for other in found:
            centre_distance = np.linalg.norm(np.subtract((x, y, z), other.ball.centre))
            # 1.3: the largest radius of an ellipsoid relative to its mean radius.
            gaps.append(centre_distance - 1.3 * (radius + other.radius_mm))
        if gaps and min(gaps) < GAP_MM:
            continue
        found.append(draw_tumour(rng, (x, y, z), radius, hard))
        left_ml -= volume_ml
    return tuple(found)


def _draw_diameter_mm(rng: np.random.Generator, least_mm: float, most_mm: float) -> float:
    """Draw a diameter; the square root is uniform, so that small tumours are more frequent."""
    return float(rng.uniform(np.sqrt(least_mm), np.sqrt(most_mm))) ** 2

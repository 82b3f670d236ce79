"""Soft-edged bodies in patient space (x right, y anterior, z superior; mm): a value of 1 inside, 0 outside, and a ramp of
one voxel's width between, which is the partial volume."""

from dataclasses import dataclass

import numpy as np

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Points:
    """World positions of a block of voxels, mm, and the width of the soft edge."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    edge_mm: float

    def occupancy(self, signed_distance_mm: np.ndarray, edge_mm: float | None = None) -> np.ndarray:
        """Share of each voxel inside, from a distance that is negative inside."""
        width = self.edge_mm if edge_mm is None else max(edge_mm, self.edge_mm)
        return np.clip(0.5 - signed_distance_mm / width, 0.0, 1.0)


def ellipsoid(p: Points, centre: Point, radii: Point, turn_deg: float = 0.0) -> np.ndarray:
    """Signed distance (approximate, exact at the surface's zero); `turn_deg` about the body's long axis."""
    c, s = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    dx, dy, dz = p.x - centre[0], p.y - centre[1], p.z - centre[2]
    u, v = (c * dx + s * dy) / radii[0], (-s * dx + c * dy) / radii[1]
    return (np.sqrt(u * u + v * v + (dz / radii[2]) ** 2) - 1) * np.float32(min(radii))


def tube(p: Points, start: Point, end: Point, radius_mm: float) -> np.ndarray:
    """Signed distance to a straight vessel with round ends."""
    a, b = np.array(start, np.float32), np.array(end, np.float32)
    d = b - a
    t = ((p.x - a[0]) * d[0] + (p.y - a[1]) * d[1] + (p.z - a[2]) * d[2]) / float(d @ d)
    t = np.clip(t, 0, 1)
    away = (p.x - a[0] - t * d[0]) ** 2 + (p.y - a[1] - t * d[1]) ** 2 + (p.z - a[2] - t * d[2]) ** 2
    return np.sqrt(away) - radius_mm


def smooth_union(one: np.ndarray, other: np.ndarray, blend_mm: float) -> np.ndarray:
    """Union of two bodies whose seam is rounded over `blend_mm` (polynomial smooth minimum)."""
    h = np.clip(0.5 + 0.5 * (other - one) / blend_mm, 0, 1)
    return other * (1 - h) + one * h - blend_mm * h * (1 - h)


@dataclass(frozen=True)
class Waves:
    """A smooth random field: a few plane waves. Gives organs their irregular surface."""

    directions: np.ndarray
    phases: np.ndarray
    amplitude_mm: float

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelength_mm: float, amplitude_mm: float, count: int = 6) -> "Waves":
        unit = rng.normal(size=(count, 3))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        lengths = wavelength_mm * rng.uniform(0.7, 1.6, size=(count, 1))
        return cls(2 * np.pi * unit / lengths, rng.uniform(0, 2 * np.pi, count), amplitude_mm)

    def at(self, p: Points) -> np.ndarray:
        total = np.zeros(np.broadcast_shapes(p.x.shape, p.y.shape, p.z.shape), np.float32)
        for (kx, ky, kz), phase in zip(self.directions.astype(np.float32), self.phases, strict=True):
            total += np.sin(kx * p.x + ky * p.y + kz * p.z + np.float32(phase))
        return total * np.float32(self.amplitude_mm / np.sqrt(len(self.phases)))

"""Bodies as signed distances (mm, negative inside), and smooth random fields.

Coordinates are the patient's: x to the right, y to the front, z to the head. Distances need not be
exact away from the surface: a voxel's share of a body is a ramp over one voxel across the surface,
which is the partial-volume effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np

from liverseg_dist.volume import Grid

Point = tuple[float, float, float]
Bounds = tuple[Point, Point]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Points:
    """Positions of a block of voxels in mm: float32 arrays (planes, rows, columns)."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    def __getitem__(self, box: Box) -> "Points":
        return Points(self.x[box], self.y[box], self.z[box])


class Shape(Protocol):
    """A body with a bounding box."""

    def signed_distance(self, p: Points) -> np.ndarray:
        """Return the distance of each position to the surface in mm, negative inside."""

    def bounding_box(self) -> Bounds:
        """Return the lowest and the highest corner in mm."""


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid."""

    centre: Point
    radii: Point
    turn_deg: float = 0.0
    """Rotation about the body's long axis (z)."""
    tilt_deg: float = 0.0
    """Rotation about y after that (to the side)."""

    @cached_property
    def _rows(self) -> np.ndarray:
        a, b = np.deg2rad([self.turn_deg, self.tilt_deg])
        turn = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])
        tilt = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
        return ((turn @ tilt) / np.array(self.radii)[:, None]).astype(np.float32)

    def signed_distance(self, p: Points) -> np.ndarray:
        cx, cy, cz = np.asarray(self.centre, np.float32)
        dx, dy, dz = p.x - cx, p.y - cy, p.z - cz
        # Not 0, so that the square root is smooth at the centre.
        squares = np.full_like(dx, 1e-9)
        part = np.empty_like(dx)
        for rx, ry, rz in self._rows:
            along = rx * dx
            along += np.multiply(dy, ry, out=part)
            along += np.multiply(dz, rz, out=part)
            squares += np.multiply(along, along, out=along)
        np.sqrt(squares, out=squares)
        squares -= 1
        squares *= np.float32(min(self.radii))
        return squares

    def bounding_box(self) -> Bounds:
        # The support of an ellipsoid along an axis; rows @ offset has length 1 on the surface.
        reach = np.linalg.norm(np.linalg.inv(self._rows.astype(np.float64)), axis=1)
        return _to_point(np.subtract(self.centre, reach)), _to_point(np.add(self.centre, reach))


@dataclass(frozen=True)
class Cone:
    """A piece of a tube with round ends, whose radius changes linearly from `start` to `end`."""

    start: Point
    end: Point
    start_radius: float
    end_radius: float

    def signed_distance(self, p: Points) -> np.ndarray:
        a = np.asarray(self.start, np.float32)
        d = np.asarray(self.end, np.float32) - a
        step = d / np.float32(max(float(d @ d), 1e-6))
        dx, dy, dz = p.x - a[0], p.y - a[1], p.z - a[2]
        t = dx * step[0]
        part = dy * step[1]
        t += part
        t += np.multiply(dz, step[2], out=part)
        np.clip(t, 0, 1, out=t)
        for offset, along in ((dx, d[0]), (dy, d[1]), (dz, d[2])):
            offset -= np.multiply(t, along, out=part)
            offset *= offset
        dx += dy
        dx += dz
        np.sqrt(dx, out=dx)
        t *= np.float32(self.end_radius - self.start_radius)
        t += np.float32(self.start_radius)
        dx -= t
        return dx

    def bounding_box(self) -> Bounds:
        # The box of two spheres contains the cone between them.
        radii = np.array([[self.start_radius], [self.end_radius]])
        ends = np.array([self.start, self.end])
        return _to_point((ends - radii).min(axis=0)), _to_point((ends + radii).max(axis=0))


def build_tube(*knots: tuple[float, float, float, float]) -> tuple[Cone, ...]:
    """Return a chain of cones through the knots (x, y, z, radius)."""
    return tuple(Cone(a[:3], b[:3], a[3], b[3]) for a, b in pairwise(knots))


def unite_shapes(one: np.ndarray, other: np.ndarray, blend_mm: float) -> np.ndarray:
    """Return the union of two bodies with a seam that is rounded over `blend_mm`.

    It is the polynomial smooth minimum of https://iquilezles.org/articles/smin/.
    """
    # Not zero only where both surfaces are close to each other.
    near = np.maximum(np.float32(blend_mm) - np.abs(one - other), 0)
    return np.minimum(one, other) - near * near * np.float32(0.25 / blend_mm)


def intersect_shapes(one: np.ndarray, other: np.ndarray, blend_mm: float) -> np.ndarray:
    """Return the intersection of two bodies with an edge that is rounded over `blend_mm`."""
    return -unite_shapes(-one, -other, blend_mm)


@dataclass(frozen=True)
class Waves:
    """A smooth random field: a sum of plane waves of random direction, length and phase."""

    vectors: np.ndarray
    """(count, 3): radians per mm along x, y, z."""
    phases: np.ndarray
    amplitude: float
    """Standard deviation of the field."""

    @classmethod
    def draw_random(
        cls, rng: np.random.Generator, lengths_mm: tuple[float, float], amplitude: float, count: int
    ) -> "Waves":
        # Normal numbers give a uniform direction.
        unit = rng.normal(size=(count, 3))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        lengths = np.exp(rng.uniform(np.log(lengths_mm[0]), np.log(lengths_mm[1]), size=(count, 1)))
        return cls(2 * np.pi * unit / lengths, rng.uniform(0, 2 * np.pi, count), amplitude)

    @property
    def largest(self) -> float:
        """Upper bound of the field's magnitude."""
        return self._each * len(self.phases)

    @property
    def _each(self) -> float:
        return self.amplitude * float(np.sqrt(2 / len(self.phases)))

    def evaluate_points(self, p: Points) -> np.ndarray:
        """Return the field at positions in mm."""
        total = np.zeros(p.x.shape, np.float32)
        for (kx, ky, kz), phase in zip(
            self.vectors.astype(np.float32), self.phases.astype(np.float32), strict=True
        ):
            total += np.sin(kx * p.x + ky * p.y + kz * p.z + phase)
        return total * np.float32(self._each)

    def evaluate_planes(self, grid: Grid, planes: slice) -> np.ndarray:
        """Return the field on some planes of a grid.

        A wave is a product along the grid's axes, so no sine is computed per voxel:
        sin(a + b) = sin a cos b + cos a sin b with a per row and b per column.
        """
        count = planes.stop - planes.start
        total = np.zeros((count, *grid.shape[1:]), np.float32)
        part = np.empty_like(total)
        # Phase per voxel step.
        steps_xyz = grid.affine[:3, :3].T @ self.vectors.T
        origin = self.vectors @ grid.affine[:3, 3] + self.phases
        for (step_x, step_y, step_z), start in zip(steps_xyz.T, origin, strict=True):
            z = start + step_z * np.arange(planes.start, planes.stop)[:, None, None]
            rows = z + step_y * np.arange(grid.shape[1])[:, None]
            columns = step_x * np.arange(grid.shape[2])
            total += np.multiply(
                np.sin(rows).astype(np.float32), np.cos(columns).astype(np.float32), out=part
            )
            total += np.multiply(
                np.cos(rows).astype(np.float32), np.sin(columns).astype(np.float32), out=part
            )
        total *= np.float32(self._each)
        return total


def _to_point(values: Sequence[float] | np.ndarray) -> Point:
    x, y, z = (float(v) for v in values)
    return x, y, z

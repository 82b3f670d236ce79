"""A patient: anatomy drawn at random, and painted on any grid.

A nominal adult is described in millimetres (x right, y front, z head; origin near the liver's hilum). A patient is
the nominal adult scaled along the axes and warped by a smooth field, so no two organs have the same outline, and body,
bones and organs stay consistent. HU are those of the portal-venous phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from liverseg_dist.phantom.canvas import Canvas, Stroke, Tissue, in_slab, index_box
from liverseg_dist.phantom.liver import LIVER_BOUNDS, Liver, draw_liver
from liverseg_dist.phantom.organs import Contrast, build_gallbladder, build_kidneys, draw_organs
from liverseg_dist.phantom.shapes import Bounds, Box, Cone, Ellipsoid, Point, Points, Shape, Waves
from liverseg_dist.phantom.torso import Torso
from liverseg_dist.phantom.tumours import Room, Tumour, place_tumours
from liverseg_dist.volume import Grid

LIVER_ML = (950.0, 2250.0)
COARSE_MM = 6.0
AIR_HU = -1000.0
SHIFT_MM, SHIFT_SLACK_MM = 8.0, 1.0
SHIFT_SHAPE = (60, 40, 50)


@dataclass(frozen=True)
class Patient:
    """Everything `Painter` needs. World = patient's millimetres, RAS+."""

    scale: Point
    warp: tuple[Waves, Waves, Waves]
    torso: Torso
    contrast: Contrast
    organs: tuple[Stroke, ...]
    liver: Liver
    inside_liver: tuple[Stroke, ...]
    tumours: tuple[Tumour, ...] = ()
    liver_ml: float = 0.0
    liver_z_mm: tuple[float, float] = (0.0, 0.0)
    """Lowest and highest point of the liver in the world, to a few mm."""

    @cached_property
    def reach_mm(self) -> float:
        """The furthest the warp can move a point, along one axis."""
        return max(self.scale) * max(field.largest for field in self.warp)

    @cached_property
    def _shifts(self) -> tuple[Grid, tuple[np.ndarray, ...]]:
        """The warp on a coarse grid, to tell how far a body is moved."""
        affine = np.diag([SHIFT_MM] * 3 + [1.0])
        affine[:3, 3] = -SHIFT_MM * (np.array(SHIFT_SHAPE[::-1]) - 1) / 2
        grid = Grid(SHIFT_SHAPE, affine)
        return grid, tuple(field.on(grid, slice(0, SHIFT_SHAPE[0])) for field in self.warp)

    def world_bounds(self, bounds: Bounds) -> Bounds:
        """A box in the world around a nominal one."""
        grid, shifts = self._shifts
        scale = np.array(self.scale)
        inner = np.array(bounds)
        outer = inner * scale + [[-self.reach_mm], [self.reach_mm]]
        for _ in range(
            2
        ):  # where it can be tells how it is shifted, which tells better where it can be
            box = index_box(grid, _bounds(outer), SHIFT_MM)
            if not (box[0] < box[1]).all():
                return _bounds(outer)
            cut = tuple(slice(first, last) for first, last in zip(*box.tolist(), strict=True))
            low = np.array([shift[cut].min() for shift in shifts]) - SHIFT_SLACK_MM
            high = np.array([shift[cut].max() for shift in shifts]) + SHIFT_SLACK_MM
            outer = np.stack([(inner[0] - high) * scale, (inner[1] - low) * scale])
        return _bounds(outer)

    @property
    def body_mm(self) -> tuple[float, float]:
        """Half width (x) and half depth (y) of the body."""
        thick = self.torso.fat_mm + self.torso.wall_mm
        return self.scale[0] * (128 + 1.1 * thick), self.scale[1] * (90 + thick)

    def points(self, grid: Grid, planes: slice) -> Points:
        """Nominal positions of a grid's voxels: scaled and warped."""
        step_x, step_y, step_z = grid.affine[:3, :3].T
        z = np.arange(planes.start, planes.stop)[:, None, None]
        y, x = np.arange(grid.shape[1])[:, None], np.arange(grid.shape[2])
        parts = []
        for axis in range(3):
            rows = grid.affine[axis, 3] + step_z[axis] * z + step_y[axis] * y
            value = self.warp[axis].on(grid, planes)
            value += (rows / self.scale[axis]).astype(np.float32)
            value += (step_x[axis] * x / self.scale[axis]).astype(np.float32)
            parts.append(value)
        return Points(*parts)

    def box(self, grid: Grid, bounds: Bounds, margin_mm: float = 0.0) -> np.ndarray:
        """Voxels that a body given in nominal coordinates can touch."""
        return index_box(grid, self.world_bounds(bounds), 1.2 * max(grid.spacing_mm) + margin_mm)


def _bounds(box: np.ndarray) -> Bounds:
    (x0, y0, z0), (x1, y1, z1) = box.tolist()
    return (x0, y0, z0), (x1, y1, z1)


def draw_patient(
    rng: np.random.Generator, tumours: int, tumour_mm: tuple[float, float], hard: bool
) -> Patient:
    """A random patient with a liver of ordinary size; `tumour_mm`: smallest and largest diameter."""
    while True:
        patient = _draw_body(rng)
        patient, room = _measured(patient)
        if LIVER_ML[0] < patient.liver_ml < LIVER_ML[1]:
            break
    patient = replace(patient, tumours=place_tumours(rng, room, tumours, tumour_mm, hard))
    if hard:
        patient = replace(
            patient, inside_liver=(*patient.inside_liver, *_confounders(rng, patient, room))
        )
    return patient


def _draw_body(rng: np.random.Generator) -> Patient:
    u = rng.uniform
    size = float(u(0.92, 1.08))
    contrast = Contrast.draw(rng)
    top = float(u(64, 86))
    torso = Torso(
        fat_mm=float(np.exp(u(np.log(6), np.log(34)))),
        wall_mm=float(u(10, 14)),
        muscle=Tissue(float(u(52, 72)), grain=5.0, spot=-75.0, rare=-float(u(1.2, 2.4))),
        marrow=Tissue(float(u(130, 230)), grain=26.0),
        blood=Tissue(0.95 * contrast.aorta, 3.0),
        right_top_mm=top,
        left_top_mm=top - float(u(8, 18)),
        phase_mm=float(u(0, 60)),
    )
    bladder = build_gallbladder(rng)
    both_kidneys = build_kidneys(rng)
    organs = draw_organs(rng, contrast, both_kidneys)
    liver = draw_liver(rng, both_kidneys[0], bladder, (torso.right_top_mm, torso.left_top_mm))
    bile = Tissue(float(u(4, 20)), 2.0)
    organs += [Stroke(c, Tissue(70.0)) for c in bladder] + [
        Stroke(c, bile, inset_mm=1.8) for c in bladder
    ]
    return Patient(
        scale=(
            size * float(u(0.97, 1.05)),
            size * float(u(0.94, 1.1)),
            size * float(u(0.95, 1.05)),
        ),
        warp=tuple(Waves.draw(rng, (70, 170), 3.2, 6) for _ in range(3)),  # type: ignore[arg-type]
        torso=torso,
        contrast=contrast,
        organs=tuple(organs),
        liver=liver,
        inside_liver=(
            *_vessels(liver.hepatic_veins, contrast.hepatic),
            *_vessels(liver.portal_veins, contrast.portal),
        ),
    )


def _vessels(pieces: Sequence[Cone], hu: float) -> list[Stroke]:
    return [Stroke(piece, Tissue(hu), within="liver", margin_mm=2.0) for piece in pieces]


def _measured(patient: Patient) -> tuple[Patient, Room]:
    """The liver's volume, its extent, and places in it, from a coarse grid."""
    low, high = np.array(patient.world_bounds(LIVER_BOUNDS))
    shape = np.ceil((high - low)[::-1] / COARSE_MM).astype(int).tolist()
    affine = np.diag([COARSE_MM] * 3 + [1.0])
    affine[:3, 3] = low
    grid = Grid((shape[0], shape[1], shape[2]), affine)
    p = patient.points(grid, slice(0, shape[0]))
    abdomen = np.maximum(patient.torso.dome_mm(p), patient.torso.cavity_mm(p))
    distance = patient.liver.distance(p, abdomen)
    inside = np.argwhere(distance < 0)
    if not len(inside):
        return patient, Room(np.empty((0, 3)), np.empty(0), grid.voxel_volume_ml)
    z = grid.world_mm(inside)[:, 2]
    mask = distance < 0
    room = Room(
        np.stack([p.x[mask], p.y[mask], p.z[mask]], axis=1), -distance[mask], grid.voxel_volume_ml
    )
    volume = len(inside) * grid.voxel_volume_ml
    return replace(patient, liver_ml=volume, liver_z_mm=(float(z.min()), float(z.max()))), room


def _confounders(rng: np.random.Generator, patient: Patient, room: Room) -> list[Stroke]:
    """What is in a liver and is no tumour: simple cysts, and fat along the ligament."""
    strokes = []
    for _ in range(int(rng.integers(0, 4))):
        size = float(rng.uniform(2, 6))
        place = room.places[int(rng.integers(len(room.places)))]
        centre = (float(place[0]), float(place[1]), float(place[2]))
        if any(t.ball.distance(_at(centre))[0] < size + 4 for t in patient.tumours):
            continue
        strokes.append(
            Stroke(
                Ellipsoid(centre, (size, size, size)), Tissue(6.0), within="liver", margin_mm=1.0
            )
        )
    if rng.random() < 0.4:
        x = patient.liver.fissure_x_mm
        patch = Ellipsoid((x - 9, 62.0, float(rng.uniform(-5, 20))), (10.0, 16.0, 12.0))
        dark = Tissue(patient.contrast.liver - float(rng.uniform(20, 40)), 4.0)
        strokes.append(
            Stroke(patch, dark, within="liver", margin_mm=1.0, ripple_mm=3.0, edge_mm=6.0)
        )
    return strokes


def _at(point: Point) -> Points:
    x, y, z = (np.array([v], np.float32) for v in point)
    return Points(x, y, z)


class Painter:
    """Paints a patient on a grid, some planes at a time."""

    def __init__(self, patient: Patient, grid: Grid) -> None:
        self.patient, self.grid = patient, grid
        spacing_z, spacing_y, _ = grid.spacing_mm
        self.edge_mm = 1.15 * max(spacing_y, 0.6 * spacing_z)
        self._organs = [self._located(stroke.shape, stroke) for stroke in patient.organs]
        self._inside = [self._located(stroke.shape, stroke) for stroke in patient.inside_liver]
        self._tumours = [(patient.box(grid, tumour.bounds()), tumour) for tumour in patient.tumours]
        self._liver = patient.box(grid, LIVER_BOUNDS)
        self._boxes: dict[Bounds, np.ndarray] = {}

    def _boxed(self, bounds: Bounds) -> np.ndarray:
        if bounds not in self._boxes:
            self._boxes[bounds] = self.patient.box(self.grid, bounds)
        return self._boxes[bounds]

    def _located(self, shape: Shape, stroke: Stroke) -> tuple[np.ndarray, Stroke]:
        return self.patient.box(
            self.grid, shape.bounds(), 2.5 * stroke.ripple_mm + stroke.edge_mm
        ), stroke

    def paint(
        self, planes: slice, texture: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """HU (float32), the share of liver (with tumours) and the share of tumour in every voxel of some planes."""
        patient = self.patient
        points = patient.points(self.grid, planes)

        def find(bounds: Bounds) -> Box | None:
            return in_slab(self._boxed(bounds), planes)

        canvas = Canvas(
            points, texture, np.full(points.x.shape, AIR_HU, np.float32), self.edge_mm, find
        )
        patient.torso.paint(canvas)
        self._strokes(canvas, self._organs, planes)
        liver, tumours = np.zeros_like(canvas.hu), np.zeros_like(canvas.hu)
        distance = np.full(canvas.hu.shape, 1e3, np.float32)
        box = in_slab(self._liver, planes)
        if box is None:
            return canvas.hu, liver, tumours
        part = canvas[box]
        distance[box] = patient.liver.distance(part.points, part.regions["abdomen"])
        liver[box] = part.fill(distance[box], Tissue(patient.contrast.liver, 3.0))
        canvas.regions["liver"] = distance
        self._strokes(canvas, self._inside, planes)
        for where, tumour in self._tumours:
            inner = in_slab(where, planes)
            if inner is not None:
                part = canvas[inner]
                ball = np.maximum(tumour.distance(part.points), part.regions["liver"])
                tumour.paint(part, ball, patient.contrast.liver)
                np.maximum(tumours[inner], part.share(ball), out=tumours[inner])
        return canvas.hu, liver, tumours

    def _strokes(
        self, canvas: Canvas, strokes: list[tuple[np.ndarray, Stroke]], planes: slice
    ) -> None:
        for where, stroke in strokes:
            box = in_slab(where, planes)
            if box is not None:
                canvas[box].paint(stroke)

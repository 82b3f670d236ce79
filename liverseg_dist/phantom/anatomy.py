"""A patient: random anatomy that is painted on any grid (see `painter`).

A nominal adult is described in millimetres (x right, y front, z head; origin near the liver's
hilum). A patient is the nominal adult scaled along the axes and warped by a smooth field. No two
organs have the same outline, and body, bones and organs stay consistent. HU are those of the
portal-venous phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from liverseg_dist.phantom.canvas import Stroke, Tissue, find_voxel_box
from liverseg_dist.phantom.liver import LIVER_BOUNDS, Liver, draw_liver
from liverseg_dist.phantom.organs import Contrast, build_gallbladder, build_kidneys, draw_organs
from liverseg_dist.phantom.shapes import Bounds, Cone, Ellipsoid, Point, Points, Waves
from liverseg_dist.phantom.torso import Torso
from liverseg_dist.phantom.tumours import LiverSamples, Tumour, place_tumours
from liverseg_dist.volume import Grid

LIVER_ML = (950.0, 2250.0)
"""Range of liver volumes; other patients are drawn again."""
COARSE_MM = 6.0
"""Voxel size for the measurement of the liver."""
SHIFT_MM, SHIFT_SLACK_MM = 8.0, 1.0
SHIFT_SHAPE = (60, 40, 50)


@dataclass(frozen=True)
class Patient:
    """Anatomy of a patient. World coordinates are millimetres, RAS+."""

    scale: Point
    warp: tuple[Waves, Waves, Waves]
    torso: Torso
    contrast: Contrast
    organs: tuple[Stroke, ...]
    liver: Liver
    inside_liver: tuple[Stroke, ...]
    tumours: tuple[Tumour, ...] = ()
    benign: tuple[Tumour, ...] = ()
    """Benign lesions: painted like tumours, but part of the liver in the label."""
    liver_ml: float = 0.0
    liver_z_mm: tuple[float, float] = (0.0, 0.0)
    """Lowest and highest point of the liver in the world, to a few mm."""

    @cached_property
    def reach_mm(self) -> float:
        """Upper bound of the warp's shift along one axis."""
        return max(self.scale) * max(field.largest for field in self.warp)

    @cached_property
    def _shifts(self) -> tuple[Grid, tuple[np.ndarray, ...]]:
        """The warp on a coarse grid, for the shift of a body."""
        affine = np.diag([SHIFT_MM] * 3 + [1.0])
        affine[:3, 3] = -SHIFT_MM * (np.array(SHIFT_SHAPE[::-1]) - 1) / 2
        grid = Grid(SHIFT_SHAPE, affine)
        return grid, tuple(
            field.evaluate_planes(grid, slice(0, SHIFT_SHAPE[0])) for field in self.warp
        )

    def world_bounds(self, bounds: Bounds) -> Bounds:
        """Return a box in the world around a box in nominal coordinates."""
        grid, shifts = self._shifts
        scale = np.array(self.scale)
        inner = np.array(bounds)
        outer = inner * scale + [[-self.reach_mm], [self.reach_mm]]
        # The position gives the shift and the shift a better position: two iterations suffice.
        for _ in range(2):
            box = find_voxel_box(grid, _to_bounds(outer), SHIFT_MM)
            if not (box[0] < box[1]).all():
                return _to_bounds(outer)
            cut = tuple(slice(first, last) for first, last in zip(*box.tolist(), strict=True))
            low = np.array([shift[cut].min() for shift in shifts]) - SHIFT_SLACK_MM
            high = np.array([shift[cut].max() for shift in shifts]) + SHIFT_SLACK_MM
            outer = np.stack([(inner[0] - high) * scale, (inner[1] - low) * scale])
        return _to_bounds(outer)

    @property
    def body_mm(self) -> tuple[float, float]:
        """Half width (x) and half depth (y) of the body."""
        thick = self.torso.fat_mm + self.torso.wall_mm
        return self.scale[0] * (128 + 1.1 * thick), self.scale[1] * (90 + thick)

    def map_voxels(self, grid: Grid, planes: slice) -> Points:
        """Return the nominal positions of the voxels in some planes of a grid."""
        step_x, step_y, step_z = grid.affine[:3, :3].T
        z = np.arange(planes.start, planes.stop)[:, None, None]
        y, x = np.arange(grid.shape[1])[:, None], np.arange(grid.shape[2])
        parts = []
        for axis in range(3):
            rows = grid.affine[axis, 3] + step_z[axis] * z + step_y[axis] * y
            # Rows and columns are added by broadcasting, without a temporary array of the full
            # size.
            value = self.warp[axis].evaluate_planes(grid, planes)
            value += (rows / self.scale[axis]).astype(np.float32)
            value += (step_x[axis] * x / self.scale[axis]).astype(np.float32)
            parts.append(value)
        return Points(*parts)

    def find_voxel_box(self, grid: Grid, bounds: Bounds, margin_mm: float = 0.0) -> np.ndarray:
        """Return the voxels that a body in nominal coordinates can overlap."""
        return find_voxel_box(
            grid, self.world_bounds(bounds), 1.2 * max(grid.spacing_mm) + margin_mm
        )


def nominal_to_world(patient: Patient, nominal: Point) -> np.ndarray:
    """Where a nominal position lies in the patient's world: the inverse of `Patient.map_voxels`, by
    iteration."""
    scale = np.array(patient.scale)
    world = np.array(nominal) * scale
    for _ in range(60):
        at = Points(*(np.array([v], np.float32) for v in world))
        shift = np.array([float(waves.evaluate_points(at)[0]) for waves in patient.warp])
        world = 0.5 * world + 0.5 * scale * (np.array(nominal) - shift)
    return world


def _to_bounds(box: np.ndarray) -> Bounds:
    (x0, y0, z0), (x1, y1, z1) = box.tolist()
    return (x0, y0, z0), (x1, y1, z1)


def draw_patient(
    rng: np.random.Generator, tumours: int, tumour_mm: tuple[float, float], hard: bool
) -> Patient:
    """Draw a random patient with a liver of normal size.

    Args:
        rng: random generator.
        tumours: number of tumours; fewer if the liver has no space for them.
        tumour_mm: smallest and largest diameter of a tumour.
        hard: whether tumours have low contrast and there are cysts and focal fat.
    """
    while True:
        patient = _draw_body(rng)
        patient, samples = measure_liver(patient)
        # Random organs may leave the liver too much or too little space.
        if LIVER_ML[0] < patient.liver_ml < LIVER_ML[1]:
            break
    patient = replace(patient, tumours=place_tumours(rng, samples, tumours, tumour_mm, hard))
    if hard:
        confounders = _draw_confounders(rng, patient, samples)
        patient = replace(patient, inside_liver=(*patient.inside_liver, *confounders))
    return patient


def _draw_body(rng: np.random.Generator) -> Patient:
    u = rng.uniform
    size = float(u(0.92, 1.08))
    contrast = Contrast.draw_random(rng)
    top = float(u(64, 86))
    torso = Torso(
        fat_mm=float(np.exp(u(np.log(6), np.log(34)))),
        wall_mm=float(u(10, 14)),
        muscle=Tissue(
            float(u(52, 72)), grain=5.0, spot=-75.0, rare=-float(u(1.2, 2.4)), kind="muscle"
        ),
        marrow=Tissue(float(u(130, 230)), grain=26.0, kind="marrow"),
        blood=Tissue(0.95 * contrast.aorta, 3.0, kind="blood"),
        right_top_mm=top,
        left_top_mm=top - float(u(8, 18)),
        phase_mm=float(u(0, 60)),
    )
    bladder = build_gallbladder(rng)
    both_kidneys = build_kidneys(rng)
    organs = draw_organs(rng, contrast, both_kidneys)
    liver = draw_liver(rng, both_kidneys[0], bladder, (torso.right_top_mm, torso.left_top_mm))
    bile, wall = Tissue(float(u(4, 20)), 2.0, kind="bile"), Tissue(70.0, kind="gut_wall")
    organs += [Stroke(piece, wall, organ="gallbladder") for piece in bladder]
    organs += [Stroke(piece, bile, inset_mm=1.8, organ="gallbladder") for piece in bladder]
    scale = (
        size * float(u(0.97, 1.05)),
        size * float(u(0.94, 1.1)),
        size * float(u(0.95, 1.05)),
    )
    warp_x, warp_y, warp_z = (Waves.draw_random(rng, (70, 170), 3.2, 6) for _ in range(3))
    return Patient(
        scale=scale,
        warp=(warp_x, warp_y, warp_z),
        torso=torso,
        contrast=contrast,
        organs=tuple(organs),
        liver=liver,
        inside_liver=(
            *_vessel_strokes(liver.hepatic_veins, contrast.hepatic),
            *_vessel_strokes(liver.portal_veins, contrast.portal),
        ),
    )


def _vessel_strokes(pieces: Sequence[Cone], hu: float) -> list[Stroke]:
    blood = Tissue(hu, kind="blood")
    return [Stroke(piece, blood, within="liver", margin_mm=2.0) for piece in pieces]


def measure_liver(patient: Patient) -> tuple[Patient, LiverSamples]:
    """Measure the liver's volume and extent on a coarse grid, and sample positions in it."""
    low, high = np.array(patient.world_bounds(LIVER_BOUNDS))
    shape = np.ceil((high - low)[::-1] / COARSE_MM).astype(int).tolist()
    affine = np.diag([COARSE_MM] * 3 + [1.0])
    affine[:3, 3] = low
    grid = Grid((shape[0], shape[1], shape[2]), affine)
    p = patient.map_voxels(grid, slice(0, shape[0]))
    abdomen = np.maximum(patient.torso.dome_mm(p), patient.torso.cavity_mm(p))
    distance = patient.liver.signed_distance(p, abdomen)
    inside = np.argwhere(distance < 0)
    if not len(inside):
        return patient, LiverSamples(np.empty((0, 3)), np.empty(0), grid.voxel_volume_ml)
    z = grid.world_mm(inside)[:, 2]
    mask = distance < 0
    samples = LiverSamples(
        np.stack([p.x[mask], p.y[mask], p.z[mask]], axis=1), -distance[mask], grid.voxel_volume_ml
    )
    volume = len(inside) * grid.voxel_volume_ml
    return replace(patient, liver_ml=volume, liver_z_mm=(float(z.min()), float(z.max()))), samples


def _draw_confounders(
    rng: np.random.Generator, patient: Patient, samples: LiverSamples
) -> list[Stroke]:
    """Draw structures that resemble tumours: simple cysts, and fat along the ligament."""
    strokes = []
    for _ in range(int(rng.integers(0, 4))):
        size = float(rng.uniform(2, 6))
        position = samples.positions[int(rng.integers(len(samples.positions)))]
        centre = (float(position[0]), float(position[1]), float(position[2]))
        point = _single_point(centre)
        # A cyst at a tumour would change the tumour's label.
        if any(t.ball.signed_distance(point)[0] < size + 4 for t in patient.tumours):
            continue
        strokes.append(
            Stroke(
                Ellipsoid(centre, (size, size, size)),
                Tissue(6.0, kind="cyst"),
                within="liver",
                margin_mm=1.0,
            )
        )
    if rng.random() < 0.4:
        x = patient.liver.fissure_x_mm
        patch = Ellipsoid((x - 9, 62.0, float(rng.uniform(-5, 20))), (10.0, 16.0, 12.0))
        dark = Tissue(patient.contrast.liver - float(rng.uniform(20, 40)), 4.0, kind="fatty_liver")
        strokes.append(
            Stroke(patch, dark, within="liver", margin_mm=1.0, ripple_mm=3.0, edge_mm=6.0)
        )
    return strokes


def _single_point(point: Point) -> Points:
    x, y, z = (np.array([v], np.float32) for v in point)
    return Points(x, y, z)

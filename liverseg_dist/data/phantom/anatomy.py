"""A patient: random but plausible anatomy, evaluated at any points in mm. Portal-venous contrast, HU values as in the
literature's tables for that phase (liver about 100, spleen 115, kidney 160, aorta 150, muscle 60, fat -100)."""

from dataclasses import dataclass, field

import numpy as np

from liverseg_dist.data.phantom.shapes import Point, Points, Waves, ellipsoid, smooth_union, tube
from liverseg_dist.labels import LIVER, TUMOUR


@dataclass(frozen=True)
class Tumour:
    centre: Point
    radii: Point
    turn_deg: float
    contrast_hu: float
    """Against the liver around it."""
    core_hu: float | None
    """Of a necrotic core; None: none."""
    edge_mm: float


@dataclass(frozen=True)
class Organ:
    centre: Point
    radii: Point
    hu: float
    turn_deg: float = 0.0


@dataclass(frozen=True)
class Patient:
    """Everything that `render` needs. The origin lies in the middle of the abdomen at the height of the liver."""

    body: Point
    fat_mm: float
    liver_hu: float
    liver_lobes: tuple[Organ, ...]
    liver_waves: Waves
    bumps: Waves
    organs: tuple[Organ, ...]
    vessels: tuple[tuple[Point, Point, float], ...]
    tumours: tuple[Tumour, ...] = field(default=())
    rib_phase: float = 0.0

    def liver_mm(self, p: Points) -> np.ndarray:
        """Signed distance to the liver's surface."""
        distance = None
        for lobe in self.liver_lobes:
            part = ellipsoid(p, lobe.centre, lobe.radii, lobe.turn_deg)
            distance = part if distance is None else smooth_union(distance, part, 18.0)
        assert distance is not None
        hollow = ellipsoid(p, (18.0, -30.0, -45.0), (48.0, 40.0, 60.0))  # the visceral surface is concave
        return np.maximum(distance + self.liver_waves.at(p), -hollow)


def draw_patient(rng: np.random.Generator, tumour_mm: tuple[float, float], hard: bool) -> Patient:
    """A random patient; `tumour_mm`: smallest and largest tumour diameter."""
    u = rng.uniform
    size = u(0.92, 1.08)
    body = (u(150, 180) * size, u(105, 130) * size, 1e6)
    liver_hu = u(88, 116)
    right = Organ((62 * size, 8, 0), (72 * size, 78 * size, u(78, 92) * size), liver_hu, u(-15, 15))
    left = Organ((-12 * size, 42 * size, u(12, 30)), (74 * size, u(30, 40) * size, u(34, 46) * size), liver_hu, u(-25, 0))
    patient = Patient(
        body=body,
        fat_mm=u(8, 26),
        liver_hu=liver_hu,
        liver_lobes=(right, left),
        liver_waves=Waves.draw(rng, 75, 4.5),
        bumps=Waves.draw(rng, 60, 1.0),
        organs=_organs(rng, size),
        vessels=_vessels(rng, size),
        rib_phase=u(0, 30),
    )
    return Patient(**{**patient.__dict__, "tumours": _tumours(rng, patient, tumour_mm, hard)})


def _organs(rng: np.random.Generator, size: float) -> tuple[Organ, ...]:
    u = rng.uniform
    kidney = u(135, 175)
    organs = [
        Organ((-98 * size, -28 * size, u(5, 30)), (30 * size, 46 * size, u(40, 58)), u(96, 130), u(-20, 20)),  # spleen
        Organ((58 * size, -58 * size, u(-80, -60)), (26, 28, 52), kidney),
        Organ((-58 * size, -58 * size, u(-65, -45)), (26, 28, 52), kidney),
        Organ((-55 * size, 40 * size, u(0, 20)), (46, 42, 50), u(25, 60)),  # stomach
        Organ((-30, 5, u(-45, -30)), (60, 14, 14), u(80, 100), u(-20, 20)),  # pancreas
        Organ((42 * size, 46 * size, u(-60, -45)), (15, 18, 26), u(5, 20)),  # gallbladder, dark beside the liver
    ]
    for _ in range(9):  # bowel
        centre = (u(-95, 95), u(0, 70), u(-190, -95))
        organs.append(Organ(centre, (u(15, 30), u(15, 26), u(15, 34)), u(20, 75)))
    return tuple(organs)


def _vessels(rng: np.random.Generator, size: float) -> tuple[tuple[Point, Point, float], ...]:
    """Portal and hepatic branches inside the liver: a trunk that forks twice."""
    hilum: Point = (25 * size, 10.0, -15.0)
    found = []
    for _ in range(2):
        branch = hilum
        end = (rng.uniform(40, 90), rng.uniform(-30, 45), rng.uniform(-35, 45))
        found.append((branch, end, rng.uniform(3.5, 5.5)))
        for _ in range(2):
            tip = tuple(np.array(end) + rng.uniform(-38, 38, 3))
            found.append((end, (float(tip[0]), float(tip[1]), float(tip[2])), rng.uniform(2.0, 3.2)))
    found.append((hilum, (-45 * size, 40.0, 20.0), 3.5))
    return tuple(found)


def _tumours(
    rng: np.random.Generator, patient: Patient, diameter_mm: tuple[float, float], hard: bool
) -> tuple[Tumour, ...]:
    wanted = 0 if rng.random() < 0.08 else int(rng.integers(1, 7))
    found: list[Tumour] = []
    for _ in range(400):
        if len(found) == wanted:
            break
        low, high = np.log(diameter_mm)
        radius = float(np.exp(rng.uniform(low, high))) / 2
        centre = (rng.uniform(-60, 130), rng.uniform(-75, 80), rng.uniform(-80, 80))
        spot = Points(*(np.array([c], np.float32) for c in centre), edge_mm=1.0)
        if patient.liver_mm(spot)[0] > -0.6 * radius:
            continue
        if any(np.linalg.norm(np.subtract(centre, t.centre)) < radius + max(t.radii) + 4 for t in found):
            continue
        found.append(_tumour(rng, centre, radius, hard))
    return tuple(found)


def _tumour(rng: np.random.Generator, centre: Point, radius: float, hard: bool) -> Tumour:
    kind = rng.random()
    if hard and kind < 0.25:
        contrast = float(rng.choice([-1, 1]) * rng.uniform(10, 18))  # nearly isodense
    elif kind < 0.75:
        contrast = -float(rng.uniform(25, 60))
    else:
        contrast = float(rng.uniform(28, 55))
    stretch = rng.uniform(0.8, 1.25, 3)
    stretch /= stretch.prod() ** (1 / 3)
    core = float(rng.uniform(15, 35)) if radius > 12 and rng.random() < 0.35 else None
    radii = (float(radius * stretch[0]), float(radius * stretch[1]), float(radius * stretch[2]))
    return Tumour(centre, radii, float(rng.uniform(0, 180)), contrast, core, float(rng.uniform(1.0, 3.5)))


def render(patient: Patient, p: Points) -> tuple[np.ndarray, np.ndarray]:
    """HU (float32, no noise) and label (uint8) at the points."""
    hu = np.full(np.broadcast_shapes(p.x.shape, p.y.shape, p.z.shape), -1000.0, np.float32)

    def paint(distance_mm: np.ndarray, value: float | np.ndarray) -> None:
        share = p.occupancy(distance_mm)
        hu[...] = hu * (1 - share) + value * share

    bumps = patient.bumps.at(p)
    skin = ellipsoid(p, (0, 0, 0), patient.body) + 3 * bumps
    paint(skin, -100.0)
    paint(skin + patient.fat_mm, 58.0 + 4 * bumps)
    cavity = skin + patient.fat_mm + 14
    paint(cavity, -95.0 + 8 * bumps)
    _paint_bones(patient, p, skin + patient.fat_mm + 8, paint)
    for side in (-1, 1):
        paint(ellipsoid(p, (side * 78, -5, 150), (66, 84, 108)), -860.0 + 25 * bumps)
    paint(ellipsoid(p, (-22, 28, 140), (52, 46, 58)), 120.0)
    for organ in patient.organs:
        paint(ellipsoid(p, organ.centre, organ.radii, organ.turn_deg) + 1.5 * bumps, organ.hu)
    _paint_gas_and_trunks(patient, p, paint)
    liver = np.maximum(patient.liver_mm(p), cavity)
    paint(liver, patient.liver_hu + 2.5 * bumps)
    for start, end, radius in patient.vessels:
        paint(np.maximum(tube(p, start, end, radius), liver + 4), patient.liver_hu + 48.0)
    label = np.where(liver < 0, LIVER, 0).astype(np.uint8)
    for tumour in patient.tumours:
        distance = ellipsoid(p, tumour.centre, tumour.radii, tumour.turn_deg) + 0.06 * max(tumour.radii) * bumps
        _paint_tumour(patient, p, tumour, np.maximum(distance, liver), hu)
        label[(distance < 0) & (liver < 0)] = TUMOUR
    return hu, label


def _paint_tumour(patient: Patient, p: Points, tumour: Tumour, distance: np.ndarray, hu: np.ndarray) -> None:
    share = p.occupancy(distance, tumour.edge_mm)
    hu[...] = hu * (1 - share) + (patient.liver_hu + tumour.contrast_hu) * share
    if tumour.core_hu is not None:
        core = p.occupancy(distance + 0.5 * min(tumour.radii), 6.0)
        hu[...] = hu * (1 - core) + tumour.core_hu * core


def _paint_bones(patient: Patient, p: Points, wall: np.ndarray, paint) -> None:  # noqa: ANN001
    column = np.sqrt(p.x**2 + ((p.y + 0.58 * patient.body[1]) / 0.85) ** 2) - 21
    disc = 0.5 + 0.5 * np.sin(2 * np.pi * p.z / 32)
    paint(column, 330.0 - 190 * (disc > 0.85))
    paint(column + 4, 190.0 - 90 * (disc > 0.85))
    canal = np.sqrt(p.x**2 + (p.y + 0.58 * patient.body[1] + 26) ** 2) - 9
    paint(canal - 5, 280.0)
    paint(canal, 25.0)
    angle = np.arctan2(p.y, p.x)
    slope = p.z + 26 * np.cos(angle + np.pi / 2) + patient.rib_phase  # ribs fall from the spine to the front
    along = np.abs((slope % 34) - 17) - 5.0
    rib = np.maximum(np.maximum(np.abs(wall) - 4.0, along), -60.0 - p.z)
    paint(rib, 380.0)
    paint(rib + 2.2, 160.0)


def _paint_gas_and_trunks(patient: Patient, p: Points, paint) -> None:  # noqa: ANN001
    stomach = patient.organs[3]
    x, y, z = stomach.centre
    paint(ellipsoid(p, (x, y + 24, z + 6), (28, 14, 26)), -920.0)
    for organ in patient.organs[6::3]:
        paint(ellipsoid(p, (organ.centre[0], organ.centre[1] + 4, organ.centre[2]), (9, 7, 11)), -900.0)
    back = -0.58 * patient.body[1] + 34
    paint(np.sqrt((p.x + 12) ** 2 + (p.y - back) ** 2) - 10.5 + 0 * p.z, 152.0)
    paint(np.sqrt((p.x - 18) ** 2 + (p.y - back - 2) ** 2) - 11.5 + 0 * p.z, 128.0)
    for side in (-1, 1):  # renal pelvis
        kidney = patient.organs[1 if side > 0 else 2]
        paint(ellipsoid(p, kidney.centre, (9, 10, 24)), -20.0)

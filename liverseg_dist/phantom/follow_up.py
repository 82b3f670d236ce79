"""One phantom patient at several dates: lesions that change by known laws, breathing, another
position and slice.

At each date the liver is deformed by an additional smooth field (breathing), the patient lies
elsewhere on the table (a rigid motion of the world), and the scanner draws its own slice thickness,
orientation and noise. `follow_up.json` holds the truth: which lesion is which, its law, its size,
and its centre in each scan's world.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy.spatial.transform import Rotation

from liverseg_dist.phantom.anatomy import Patient, draw_patient, nominal_to_world
from liverseg_dist.phantom.grids import Size, draw_grid
from liverseg_dist.phantom.scan import TUMOUR_MM, PhantomScan, scan_patient
from liverseg_dist.phantom.shapes import Ellipsoid, Point, Points, Waves
from liverseg_dist.phantom.tumours import Tumour
from liverseg_dist.volume import Grid, Volume

Law = Literal["grow", "shrink", "stable", "vanish", "appear", "merge", "split"]
LAWS: tuple[Law, ...] = ("grow", "shrink", "stable", "vanish", "appear", "merge", "split")
BREATHING_MM = 3.0
"""Standard deviation of the additional field along each axis."""
BREATHING_LENGTH_MM = (130.0, 260.0)
TURN_DEG, SHIFT_MM = 5.0, 12.0
INTERVAL_DAYS = (45, 120)
MOST_LESIONS = 5
LEAST_RADIUS_MM = 8.0
SPLIT_RADIUS_MM = 13.0
PAIR_RADIUS = 0.62
"""Of two lesions that take the place of one and will merge, in its radius."""
PIECE_RADIUS, PIECE_OFFSET = 0.42, 0.66
"""Of the radius before the split."""
GAP_MM = 9.0
# Separate random streams for the parts of a patient.
_PATIENT, _LAWS, _GRID, _SCAN = range(20, 24)


@dataclass(frozen=True)
class SummedWaves(Waves):
    """A field with others on top of it."""

    others: tuple[Waves, ...] = ()

    @property
    def largest(self) -> float:
        return super().largest + sum(other.largest for other in self.others)

    def evaluate_points(self, p: Points) -> np.ndarray:
        total = super().evaluate_points(p)
        for other in self.others:
            total += other.evaluate_points(p)
        return total

    def evaluate_planes(self, grid: Grid, planes: slice) -> np.ndarray:
        total = super().evaluate_planes(grid, planes)
        for other in self.others:
            total += other.evaluate_planes(grid, planes)
        return total


@dataclass(frozen=True)
class TrueLesion:
    """What is known of a lesion.

    Attributes:
        identity: From 1.
        law: How it changes.
        radius_mm: Of the ball of its volume at each date, in nominal mm; 0 where it is not there.
        centre_mm: In each scan's world (RAS+); also where the lesion is not there.
        merged_into: Identity of the lesion it is one with from the second date on.
        split_from: Identity of the lesion it is a piece of.
    """

    identity: int
    law: Law
    radius_mm: list[float]
    centre_mm: list[list[float]] = field(default_factory=list)
    merged_into: int | None = None
    split_from: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FollowedPhantom:
    """Scans of one patient, the days they were made on, and the truth about the lesions."""

    scans: tuple[PhantomScan, ...]
    days: tuple[int, ...]
    lesions: tuple[TrueLesion, ...]

    def truth(self, names: list[str]) -> dict[str, Any]:
        """JSON-able; `names` are those of the scans' files."""
        return {
            "scans": names,
            "days": list(self.days),
            "lesions": [lesion.to_json() for lesion in self.lesions],
        }


def make_follow_up(seed: int, case: int, dates: int, size: Size, hard: bool) -> FollowedPhantom:
    """Patient number `case` at `dates` dates: a pure function of the arguments."""
    key = (seed, case, int(size == "full"), int(hard))
    patient = draw_patient(
        np.random.default_rng([*key, _PATIENT]), MOST_LESIONS, TUMOUR_MM[size], hard
    )
    rng = np.random.default_rng([*key, _LAWS])
    by_date, lesions = _plan_lesions(rng, patient.tumours, dates)
    days = [0, *np.cumsum(rng.integers(*INTERVAL_DAYS, size=dates - 1)).tolist()]
    scans = []
    for date in range(dates):
        # The baseline has no additional motion: it is the reference of the later dates.
        breathing = _breathe(rng, patient) if date else patient
        present = replace(breathing, tumours=tuple(by_date[date]))
        motion = _draw_motion(rng) if date else np.eye(4)
        grid = draw_grid(np.random.default_rng([*key, _GRID, date]), present, size)
        orientation = ("LPS", "RAS", "LAS")[int(rng.integers(3))]
        scan = scan_patient(present, grid, orientation, (*key, _SCAN, date), hard)
        scans.append(
            replace(scan, image=_moved(scan.image, motion), label=_moved(scan.label, motion))
        )
        for lesion, centre in zip(lesions, _nominal_centres(by_date, lesions, date), strict=True):
            world = motion[:3, :3] @ nominal_to_world(present, centre) + motion[:3, 3]
            lesion.centre_mm.append([round(float(v), 3) for v in world])
    return FollowedPhantom(tuple(scans), tuple(days), tuple(lesions))


def _plan_lesions(
    rng: np.random.Generator, tumours: tuple[Tumour, ...], dates: int
) -> tuple[list[list[Tumour]], list[TrueLesion]]:
    """(tumours of each date, the truth). Each tumour that the patient was drawn with gets a law."""
    by_date: list[list[Tumour]] = [[] for _ in range(dates)]
    lesions: list[TrueLesion] = []
    laws = rng.permutation(np.array(LAWS)).tolist()
    for tumour in tumours:
        law: Law = laws.pop() if laws else "stable"
        if law == "split" and tumour.radius_mm < SPLIT_RADIUS_MM:
            law = "grow"
        if law == "merge" and not _has_room(tumour, tumours):
            law = "shrink"
        if law == "merge":
            _add_merging(rng, tumour, by_date, lesions)
        elif law == "split":
            _add_splitting(rng, tumour, by_date, lesions)
        else:
            _add_single(rng, law, tumour, by_date, lesions)
    return by_date, lesions


def _add_single(
    rng: np.random.Generator,
    law: Law,
    tumour: Tumour,
    by_date: list[list[Tumour]],
    lesions: list[TrueLesion],
) -> None:
    dates = len(by_date)
    rate = {"grow": float(rng.uniform(1.1, 1.3)), "shrink": float(rng.uniform(0.72, 0.88))}.get(
        law, 1.0
    )
    first = int(rng.integers(1, dates)) if law == "appear" else 0
    last = int(rng.integers(1, dates)) if law == "vanish" else dates
    radii = []
    for date in range(dates):
        factor = rate**date
        if law == "grow":
            # Stay apart from neighbours, which were placed with a gap for the size at baseline.
            factor = min(factor, 1 + 0.4 * GAP_MM / tumour.radius_mm)
        is_there = first <= date < last
        radii.append(round(tumour.radius_mm * factor, 3) if is_there else 0.0)
        if is_there:
            by_date[date].append(_resized(tumour, factor))
    lesions.append(TrueLesion(len(lesions) + 1, law, radii))


def _add_merging(
    rng: np.random.Generator, tumour: Tumour, by_date: list[list[Tumour]], lesions: list[TrueLesion]
) -> None:
    """Two lesions that lie apart at baseline and are one from the second date on."""
    radius = PAIR_RADIUS * tumour.radius_mm
    offset = 1.45 * radius + 2.5
    direction = rng.normal(size=3)
    direction *= offset / np.linalg.norm(direction)
    small = _resized(tumour, PAIR_RADIUS)
    pair = [_at(small, np.add(tumour.ball.centre, sign * direction)) for sign in (1, -1)]
    radii = []
    for date in range(len(by_date)):
        # Later radii exceed the offset of each centre from the middle, so the two balls overlap.
        factor = 1.0 if date == 0 else (offset + 3.0) / radius
        by_date[date] += [_resized(one, factor) for one in pair]
        radii.append(round(radius * factor, 3))
    first = len(lesions) + 1
    lesions.append(TrueLesion(first, "merge", radii))
    lesions.append(
        TrueLesion(first + 1, "merge", [radii[0], *([0.0] * (len(radii) - 1))], merged_into=first)
    )


def _add_splitting(
    rng: np.random.Generator, tumour: Tumour, by_date: list[list[Tumour]], lesions: list[TrueLesion]
) -> None:
    """One lesion that is two pieces from the second date on."""
    direction = rng.normal(size=3)
    direction *= PIECE_OFFSET * tumour.radius_mm / np.linalg.norm(direction)
    # A ball, as the pieces are: distances then hold in any direction.
    ball = replace(tumour, ball=replace(tumour.ball, radii=(tumour.radius_mm,) * 3))
    pieces = [
        _at(_resized(ball, PIECE_RADIUS), np.add(tumour.ball.centre, sign * direction))
        for sign in (1, -1)
    ]
    by_date[0].append(ball)
    for date in range(1, len(by_date)):
        by_date[date] += pieces
    radius, piece = round(tumour.radius_mm, 3), round(PIECE_RADIUS * tumour.radius_mm, 3)
    later = [piece] * (len(by_date) - 1)
    first = len(lesions) + 1
    lesions.append(TrueLesion(first, "split", [radius, *later]))
    lesions.append(TrueLesion(first + 1, "split", [0.0, *later], split_from=first))


def _has_room(tumour: Tumour, tumours: tuple[Tumour, ...]) -> bool:
    """Whether a pair in place of a tumour stays clear of all others."""
    if tumour.radius_mm < LEAST_RADIUS_MM / PAIR_RADIUS:
        return False
    reach = 2.0 * tumour.radius_mm + GAP_MM
    for other in tumours:
        apart = float(np.linalg.norm(np.subtract(other.ball.centre, tumour.ball.centre)))
        if other is not tumour and apart < reach + 1.4 * other.radius_mm:
            return False
    return True


def _nominal_centres(
    by_date: list[list[Tumour]], lesions: list[TrueLesion], date: int
) -> list[Point]:
    """Of each lesion; where it is not there, its place at the nearest date that has it."""
    centres: list[Point] = []
    for lesion in lesions:
        known = [d for d, radius in enumerate(lesion.radius_mm) if radius > 0]
        # The truth states a place also at dates without the lesion.
        nearest = min(known, key=lambda d: abs(d - date))
        centres.append(_tumour_of(by_date[nearest], lesions, lesion, nearest).ball.centre)
    return centres


def _tumour_of(
    tumours: list[Tumour], lesions: list[TrueLesion], lesion: TrueLesion, date: int
) -> Tumour:
    """Tumours of a date stand in the order of the lesions that have a radius, merged ones
    included."""
    position = 0
    for other in lesions:
        is_painted = other.radius_mm[date] > 0 or other.merged_into is not None
        if other.identity == lesion.identity:
            return tumours[position]
        position += is_painted
    raise AssertionError("a lesion without a tumour")


def _resized(tumour: Tumour, factor: float) -> Tumour:
    x, y, z = (float(radius * factor) for radius in tumour.ball.radii)
    lumps = replace(tumour.lumps, amplitude=tumour.lumps.amplitude * factor)
    edge = min(tumour.edge_mm, 0.4 * tumour.radius_mm * factor)
    return replace(tumour, ball=replace(tumour.ball, radii=(x, y, z)), lumps=lumps, edge_mm=edge)


def _at(tumour: Tumour, centre: np.ndarray) -> Tumour:
    """The tumour at another place, as a ball: pairs and pieces keep their distance for any
    stretch."""
    x, y, z = (float(v) for v in centre)
    radius = tumour.radius_mm
    return replace(tumour, ball=Ellipsoid((x, y, z), (radius, radius, radius)))


def _breathe(rng: np.random.Generator, patient: Patient) -> Patient:
    """The patient with an additional smooth field along each axis."""
    warp = []
    for waves in patient.warp:
        extra = Waves.draw_random(rng, BREATHING_LENGTH_MM, BREATHING_MM, 4)
        warp.append(SummedWaves(waves.vectors, waves.phases, waves.amplitude, (extra,)))
    return replace(patient, warp=(warp[0], warp[1], warp[2]))


def _draw_motion(rng: np.random.Generator) -> np.ndarray:
    """A rigid motion of the world (4, 4)."""
    motion = np.eye(4)
    angles = rng.uniform(-TURN_DEG, TURN_DEG, 3)
    motion[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    motion[:3, 3] = rng.uniform(-SHIFT_MM, SHIFT_MM, 3)
    return motion


def _moved(volume: Volume, motion: np.ndarray) -> Volume:
    return Volume(volume.voxels, Grid(volume.shape, motion @ volume.affine))

"""One patient at several dates: registration to the baseline, lesions matched, growth, response.

All sizes are measured on each scan's own voxels; the registration decides which lesion is which and
nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from liverseg_dist.clinical.components import find_components
from liverseg_dist.clinical.growth import (
    diameter_sd_mm,
    exceeds_error,
    fit_growth,
    volume_sd_ml,
)
from liverseg_dist.clinical.matching import Spot, Track, match_dates
from liverseg_dist.clinical.organ_registrations import DateRegistrations, register_dates
from liverseg_dist.clinical.quantify import CaseQuantities, LesionQuantities, StructureQuantities
from liverseg_dist.clinical.registration import Registration
from liverseg_dist.clinical.registration_backends import BackendName
from liverseg_dist.clinical.response import assess_response
from liverseg_dist.clinical.scan_checks import GOOD_DICE, describe_organ_changes
from liverseg_dist.errors import UserError
from liverseg_dist.labels import LabelScheme
from liverseg_dist.volume import Volume

FOLLOW_VERSION = 2


@dataclass(frozen=True)
class TimePoint:
    """One scan of the patient.

    Attributes:
        name: Of its file.
        mask: Labels in canonical orientation.
        image: The scan on the same grid, or None.
        quantities: Measured on this mask.
    """

    name: str
    mask: Volume
    image: Volume | None
    quantities: CaseQuantities


@dataclass(frozen=True)
class FollowUp:
    """What was found; `content` is JSON-able, the rest serves the pictures."""

    content: dict[str, Any]
    tracks: list[Track]
    registrations: list[DateRegistrations]


def choose_organ(scheme: LabelScheme, name: str | None) -> str:
    """The organ to register by: the given one, the one that holds a lesion structure, or the only
    one.

    Raises:
        UserError: There is no such organ, or several and none is named.
    """
    if name is not None:
        return scheme.structure(name).name
    # The first lesion structure decides: with several organs the order of the scheme is the
    # choice of its author.
    holders = [lesion.inside for lesion in scheme.lesions if lesion.inside is not None]
    if holders:
        return holders[0]
    if len(scheme.organs) == 1:
        return scheme.organs[0].name
    names = ", ".join(organ.name for organ in scheme.organs) or "none"
    raise UserError(
        f"no structure holds the lesions; name the organ to register by with --organ ({names})"
    )


def follow_patient(
    points: Sequence[TimePoint],
    scheme: LabelScheme,
    organ: str,
    days: Sequence[float] | None,
    connectivity: int,
    backend: BackendName = "auto",
    allow_mismatch: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> FollowUp:
    """Follow all lesions over the dates.

    Args:
        points: The scans, baseline first.
        scheme: What their labels mean.
        organ: The structure to register by.
        days: Days since the baseline, ascending; None where dates are unknown.
        connectivity: That of the quantities.
        backend: The deformable step.
        allow_mismatch: Go on although the scans look like two patients'.
        note: Called with what is being done.

    Raises:
        UserError: A mask has no organ, or the scans are not of one patient.
    """
    registrations, warnings = register_dates(points, scheme, organ, backend, allow_mismatch, note)
    dates = []
    for point, registration in zip(points, registrations, strict=True):
        dates.append(_spots(point, scheme, connectivity, registration))

    def covers(date: int, spot: Spot) -> bool:
        return _covers(
            points[date],
            registrations[date].of_structure(spot.structure),
            spot.centre_mm,
            scheme.ignore,
        )

    quality = [_match_quality(registration) for registration in registrations]
    tracks = match_dates(dates, covers, quality)
    lesions = [_describe_track(track, points, days, registrations) for track in tracks]
    warnings += describe_organ_changes(
        [point.name for point in points],
        [_structure(point.quantities, organ) for point in points],
    )
    content = {
        "version": FOLLOW_VERSION,
        "scans": [point.name for point in points],
        "days": None if days is None else list(days),
        "organ": organ,
        "registration": [asdict(one.main.quality) for one in registrations[1:]],
        "other_registrations": _describe_other_registrations(registrations),
        "organ_ml": [_structure(point.quantities, organ).volume_ml for point in points],
        "total": _describe_total(points, days, organ),
        "lesions": lesions,
        "response": assess_response(tracks, points, organ, scheme),
        "warnings": warnings,
    }
    return FollowUp(content, tracks, registrations)


def _spots(
    point: TimePoint, scheme: LabelScheme, connectivity: int, registrations: DateRegistrations
) -> list[Spot]:
    """The lesions of a scan as points in the baseline's space, in the order of its quantities."""
    spots: list[Spot] = []
    # Voxels of two scans never coincide: this tolerance decides whether a point lies in a lesion.
    half_diagonal = float(np.linalg.norm(point.mask.spacing_mm)) / 2
    lesions = point.quantities.lesions
    for structure in scheme.lesions:
        whole = scheme.mask_of(point.mask.voxels, structure)
        registration = registrations.of_structure(structure.name)
        for component in find_components(whole, connectivity):
            corner = [axis.start for axis in component.box]
            world = point.mask.grid.world_mm(np.argwhere(component.mask_zyx) + corner)
            # The quantities list the same components in the same order: the index identifies them.
            lesion = lesions[len(spots)]
            spots.append(
                Spot(
                    len(spots),
                    structure.name,
                    registration.to_fixed(world),
                    half_diagonal,
                    lesion.long_axis_mm,
                )
            )
    return spots


def _covers(
    point: TimePoint, registration: Registration, position_mm: np.ndarray, ignore: int | None
) -> bool:
    """Whether a position of the baseline's space lies inside a scan, and was annotated there."""
    index = np.rint(point.mask.grid.index_of(registration.to_moving(position_mm[None])[0])).astype(
        int
    )
    if (index < 0).any() or (index >= point.mask.shape).any():
        return False
    # A lesion cannot be new or gone where the annotator did not look.
    return ignore is None or point.mask.voxels[tuple(index)] != ignore


def _match_quality(registrations: DateRegistrations) -> float:
    """0 to 1, for the confidence in matches: full from `GOOD_DICE` on, half where organs hardly
    overlap; that of the organ that fits worst."""
    every = (registrations.main, *registrations.others.values())
    dice = min(one.quality.dice for one in every)
    return float(np.clip(0.5 + 0.5 * (dice - 0.6) / (GOOD_DICE - 0.6), 0.5, 1.0))


def _describe_other_registrations(registrations: Sequence[DateRegistrations]) -> list[dict]:
    """Quality of the registrations of further organs, with their organ and scan."""
    found = []
    for date, registration in enumerate(registrations):
        for organ, other in registration.others.items():
            found.append({"organ": organ, "scan": date, **asdict(other.quality)})
    return found


def lesion_at(track: Track, date: int, points: Sequence[TimePoint]) -> LesionQuantities | None:
    """What was measured of a track at a date."""
    number = track.numbers[date]
    return None if number is None else points[date].quantities.lesions[number]


def _describe_track(
    track: Track,
    points: Sequence[TimePoint],
    days: Sequence[float] | None,
    registrations: Sequence[DateRegistrations],
) -> dict[str, Any]:
    volumes: list[float | None] = []
    lengths: list[float | None] = []
    shorts: list[float | None] = []
    cut: list[bool] = []
    for date in range(len(points)):
        lesion = lesion_at(track, date, points)
        gone = track.states[date] == "gone"
        # A lesion that is gone has the size 0; one that was not measured has no size.
        volumes.append(0.0 if gone else None if lesion is None else lesion.volume_ml)
        lengths.append(0.0 if gone else None if lesion is None else lesion.long_axis_mm)
        shorts.append(0.0 if gone else None if lesion is None else lesion.short_axis_mm)
        cut.append(lesion is not None and bool(lesion.cut_by))
    first = next(date for date, number in enumerate(track.numbers) if number is not None)
    lesion = lesion_at(track, first, points)
    assert lesion is not None
    # In the space of the baseline, so that a reader finds the place of a later lesion there.
    to_baseline = registrations[first].of_structure(track.structure)
    centre = to_baseline.to_fixed(np.array([lesion.centroid_mm]))[0]
    sds = [_volume_sd(volume, point) for volume, point in zip(volumes, points, strict=True)]
    return {
        "id": track.identity,
        "structure": track.structure,
        "status": track.status,
        "confidence": round(track.confidence, 3),
        "states": track.states,
        "merged_into": track.merged_into,
        "split_from": track.split_from,
        "is_covered": track.is_covered,
        "events": [{"date": date, "what": what} for date, what in track.events],
        "lesion_numbers": [
            None if n is None else points[d].quantities.lesions[n].number
            for d, n in enumerate(track.numbers)
        ],
        "centroid_mm": [round(float(v), 2) for v in centre],
        "baseline_mm": _positions_at_baseline(track, points, registrations),
        "volume_ml": volumes,
        "long_axis_mm": lengths,
        "short_axis_mm": shorts,
        # A size from a scan that cuts the lesion must not be compared as if it were complete.
        "is_lower_bound": cut,
        "volume_sd_ml": sds,
        "change": _change(volumes, lengths, points),
        "growth": _growth(days, volumes, sds, cut),
    }


def _positions_at_baseline(
    track: Track, points: Sequence[TimePoint], registrations: Sequence[DateRegistrations]
) -> list[list[float] | None]:
    """The centroid of each date in the baseline's space, None where the lesion was not measured."""
    positions: list[list[float] | None] = []
    for date, registration in enumerate(registrations):
        lesion = lesion_at(track, date, points)
        if lesion is None:
            positions.append(None)
        else:
            to_baseline = registration.of_structure(track.structure)
            mapped = to_baseline.to_fixed(np.array([lesion.centroid_mm]))[0]
            positions.append([round(float(v), 2) for v in mapped])
    return positions


def _change(
    volumes: Sequence[float | None], lengths: Sequence[float | None], points: Sequence[TimePoint]
) -> dict[str, Any] | None:
    """From the first to the last date at which the lesion has a size."""
    known = [date for date, volume in enumerate(volumes) if volume is not None]
    if len(known) < 2:
        return None
    first, last = known[0], known[-1]
    v1, v2, d1, d2 = volumes[first], volumes[last], lengths[first], lengths[last]
    assert v1 is not None and v2 is not None and d1 is not None and d2 is not None  # noqa: PT018
    volume_error = [
        _volume_sd(volume, points[date]) or 0.0 for volume, date in ((v1, first), (v2, last))
    ]
    length_error = [_length_sd(length, points[date]) for length, date in ((d1, first), (d2, last))]
    return {
        "from": first,
        "to": last,
        "volume": v2 / v1 - 1 if v1 > 0 else None,
        "long_axis": d2 / d1 - 1 if d1 > 0 else None,
        "volume_exceeds_error": exceeds_error(v2 - v1, volume_error[0], volume_error[1]),
        "long_axis_exceeds_error": exceeds_error(d2 - d1, length_error[0], length_error[1]),
    }


def _growth(
    days: Sequence[float] | None,
    volumes: Sequence[float | None],
    sds: Sequence[float | None],
    cut: Sequence[bool],
) -> dict[str, Any] | None:
    """Without dates, or where the scan cuts the lesion, there is no rate."""
    if days is None:
        return None
    # A cut lesion is a lower bound, which would look like growth or shrinkage.
    usable = [i for i, volume in enumerate(volumes) if volume is not None and not cut[i]]
    fitted = fit_growth(
        [days[i] for i in usable],
        [volumes[i] or 0.0 for i in usable],
        [sds[i] or 0.0 for i in usable],
    )
    return None if fitted is None else fitted.to_json()


def _describe_total(
    points: Sequence[TimePoint], days: Sequence[float] | None, organ: str
) -> dict[str, Any]:
    """All lesions together; the burden is the share of the organ that its own lesions take."""
    volumes: list[float | None] = []
    cut = []
    for point in points:
        volumes.append(sum(lesion.volume_ml for lesion in point.quantities.lesions))
        cut.append(any(lesion.cut_by for lesion in point.quantities.lesions))
    sds: list[float | None] = []
    for point in points:
        parts = [
            volume_sd_ml(lesion.volume_ml, point.mask.spacing_mm[0])
            for lesion in point.quantities.lesions
        ]
        # The errors of lesions are independent, so their variances add.
        sds.append(float(np.linalg.norm(parts)) if parts else 0.0)
    first, last = volumes[0] or 0.0, volumes[-1] or 0.0
    burdens = []
    for point in points:
        burdens.append(_structure(point.quantities, organ).burden)
    return {
        "lesions": [len(point.quantities.lesions) for point in points],
        "volume_ml": volumes,
        "burden": burdens,
        "is_lower_bound": cut,
        "change": last / first - 1 if first > 0 else None,
        "exceeds_error": exceeds_error(last - first, sds[0] or 0.0, sds[-1] or 0.0),
        "growth": _growth(days, volumes, sds, cut),
    }


def _structure(quantities: CaseQuantities, name: str) -> StructureQuantities:
    return next(s for s in quantities.structures if s.structure == name)


def _volume_sd(volume: float | None, point: TimePoint) -> float | None:
    return None if volume is None else volume_sd_ml(volume, point.mask.spacing_mm[0])


def _length_sd(length: float, point: TimePoint) -> float:
    return diameter_sd_mm(length, point.mask.spacing_mm[1], point.mask.spacing_mm[0])

"""Response of a followed patient: RECIST 1.1 by diameters and its equivalent by volumes, at every
date."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from liverseg_dist.clinical.growth import diameter_sd_mm, exceeds_error
from liverseg_dist.clinical.matching import Track
from liverseg_dist.clinical.quantify import CaseQuantities
from liverseg_dist.clinical.recist import (
    Assessment,
    BaselineLesion,
    best_response,
    choose_targets,
    is_new_lesion,
    measurable_mm,
    non_target_response,
    overall_response,
    target_response,
    volume_response,
)
from liverseg_dist.labels import LabelScheme
from liverseg_dist.volume import Volume


class MeasuredScan(Protocol):
    """What an assessment asks of a scan."""

    @property
    def mask(self) -> Volume: ...

    @property
    def quantities(self) -> CaseQuantities: ...


@dataclass(frozen=True)
class _Burden:
    """A group of lesions at one date."""

    length_mm: float
    volume_ml: float
    all_measured: bool
    all_gone: bool
    sd_mm: float


def assess_response(
    tracks: Sequence[Track], scans: Sequence[MeasuredScan], organ: str, scheme: LabelScheme
) -> dict[str, Any]:
    """RECIST 1.1 of all dates after the baseline.

    Args:
        tracks: The matched lesions.
        scans: The scans in order.
        organ: Named for lesion structures that lie in no organ.
        scheme: In which organ each lesion structure lies.

    Returns:
        JSON-able: `recist` and `rule` of the last date, `volumetric`, `targets`, `sums_mm`, the
        category of each date (`dates`), the best one until progression (`best`), and `warning`
        where the change is within the measurement error.
    """
    # RECIST fixes what is measurable at baseline; later scans may have other slices.
    slice_mm = scans[0].mask.spacing_mm[0]
    targets = choose_targets(_baseline_lesions(tracks, scans[0], organ, scheme), slice_mm)
    chosen = [track for track in tracks if str(track.identity) in targets]
    others = [track for track in tracks if track.numbers[0] is not None and track not in chosen]
    target_burdens = [_burden(tracks, chosen, scans, date) for date in range(len(scans))]
    # A lesion that merged with a target is measured with it.
    alone = [track for track in others if not _shares_family(track, chosen, tracks)]
    other_burdens = [_burden(tracks, alone, scans, date) for date in range(len(scans))]
    new_by_date = [_new_lesions(tracks, scans, date) for date in range(len(scans))]
    dates = []
    for date in range(1, len(scans)):
        # A new lesion stays progression at all later dates.
        new = sorted({name for earlier in new_by_date[1 : date + 1] for name in earlier})
        dates.append(
            _assess_date(target_burdens, other_burdens, len(chosen), len(alone), new, date)
        )
    last = dates[-1]
    best, number = best_response([one["recist"] for one in dates])
    return {
        "recist": last["recist"],
        "rule": last["rule"],
        "volumetric": last["volumetric"],
        "volumetric_rule": last["volumetric_rule"],
        "targets": [int(name) for name in targets],
        "measurable_mm": measurable_mm(slice_mm),
        "sums_mm": [burden.length_mm for burden in target_burdens] if chosen else [],
        "sums_ml": [burden.volume_ml for burden in target_burdens] if chosen else [],
        "dates": dates,
        "best": {"recist": best, "date": dates[number]["date"]},
        "warning": last["warning"],
    }


def _baseline_lesions(
    tracks: Sequence[Track], scan: MeasuredScan, organ: str, scheme: LabelScheme
) -> list[BaselineLesion]:
    lesions = []
    for track in tracks:
        number = track.numbers[0]
        if number is None:
            continue
        lesion = scan.quantities.lesions[number]
        inside = scheme.structure(track.structure).inside or organ
        lesions.append(
            BaselineLesion(str(track.identity), inside, lesion.long_axis_mm, not lesion.cut_by)
        )
    return lesions


def _assess_date(
    targets: Sequence[_Burden],
    others: Sequence[_Burden],
    num_targets: int,
    num_others: int,
    new: Sequence[int],
    date: int,
) -> dict[str, Any]:
    now, other = targets[date], others[date]
    category, rule, volumetric, volumetric_rule = None, "no measurable lesion at baseline", None, ""
    if num_targets:
        # An incomplete sum is too small and would become a false nadir.
        before = [burden for burden in targets[:date] if burden.all_measured]
        nadir_mm = min(burden.length_mm for burden in before) if before else targets[0].length_mm
        nadir_ml = min(burden.volume_ml for burden in before) if before else targets[0].volume_ml
        category, rule = target_response(
            targets[0].length_mm, nadir_mm, now.length_mm, now.all_measured, now.all_gone
        )
        volumetric, volumetric_rule = volume_response(
            targets[0].volume_ml, nadir_ml, now.volume_ml, now.all_measured, now.all_gone
        )
    seen = [burden for burden in others[:date] if burden.all_measured] or list(others[:1])
    non_target, other_rule = non_target_response(
        others[0].volume_ml,
        min(burden.volume_ml for burden in seen),
        other.volume_ml,
        other.all_measured,
        num_others,
    )
    overall, overall_rule = overall_response(category, non_target, bool(new))
    by_volume, volume_overall_rule = overall_response(volumetric, non_target, bool(new))
    assessment = Assessment(
        category, non_target, bool(new), overall, _full_rule(overall_rule, rule, other_rule, new)
    )
    warning = None
    if num_targets and now.all_measured and not now.all_gone:
        change = now.length_mm - targets[0].length_mm
        if not exceeds_error(change, targets[0].sd_mm, now.sd_mm):
            warning = f"the change of the sum ({change:+.1f} mm) is within the measurement error"
    return {
        "date": date,
        "recist": assessment.overall,
        "target": assessment.target,
        "non_target": assessment.non_target,
        "new_lesions": list(new),
        "rule": assessment.rule,
        "volumetric": by_volume,
        "volumetric_rule": _full_rule(volume_overall_rule, volumetric_rule, other_rule, new),
        "warning": warning,
    }


def _full_rule(overall: str, target: str, other: str, new: Sequence[int]) -> str:
    parts = [overall]
    if new:
        parts.append(f"new: lesion {', '.join(map(str, new))}")
    parts.append(f"targets: {target}")
    parts.append(f"others: {other}")
    return "; ".join(part for part in parts if part)


def _family(track: Track, tracks: Sequence[Track]) -> list[Track]:
    """The tracks that carry a lesion on: itself, the one it merged into, and its pieces."""
    by_identity = {other.identity: other for other in tracks}
    found: dict[int, Track] = {}
    waiting = [track]
    while waiting:
        one = waiting.pop()
        if one.identity in found:
            continue
        found[one.identity] = one
        if one.merged_into is not None:
            waiting.append(by_identity[one.merged_into])
        waiting += [other for other in tracks if other.split_from == one.identity]
    return list(found.values())


def _shares_family(track: Track, chosen: Sequence[Track], tracks: Sequence[Track]) -> bool:
    """Whether a track merged into a target's."""
    families = {member.identity for target in chosen for member in _family(target, tracks)}
    return track.identity in families or (
        track.merged_into is not None and track.merged_into in families
    )


def _burden(
    tracks: Sequence[Track], chosen: Sequence[Track], scans: Sequence[MeasuredScan], date: int
) -> _Burden:
    """Sums over lesions at a date; pieces are added, a merged lesion counts once (RECIST 1.1,
    4.3.2)."""
    members: dict[int, Track] = {}
    for track in chosen:
        members |= {member.identity: member for member in _family(track, tracks)}
    length = volume = variance = 0.0
    all_measured = all_gone = True
    spacing = scans[date].mask.spacing_mm
    for member in members.values():
        number, state = member.numbers[date], member.states[date]
        if number is None:
            all_measured &= state != "uncovered"
            all_gone &= state != "uncovered"
            continue
        # A lesion that joins a target later is not a part of it before.
        if member not in chosen and not _belongs(member, chosen, tracks, date):
            continue
        lesion = scans[date].quantities.lesions[number]
        all_gone = False
        all_measured &= not lesion.cut_by
        length += lesion.long_axis_mm
        volume += lesion.volume_ml
        variance += diameter_sd_mm(lesion.long_axis_mm, spacing[1], spacing[0]) ** 2
    return _Burden(length, volume, all_measured, all_gone, variance**0.5)


def _belongs(member: Track, chosen: Sequence[Track], tracks: Sequence[Track], date: int) -> bool:
    """Whether a track carries a chosen lesion at this date: a piece of it, or one it has merged
    into by now."""
    for track in chosen:
        if track.merged_into == member.identity and track.states[date] == "merged":
            return True
        ancestor = member
        by_identity = {other.identity: other for other in tracks}
        while ancestor.split_from is not None:
            ancestor = by_identity[ancestor.split_from]
            if ancestor is track:
                return True
    return False


def _new_lesions(tracks: Sequence[Track], scans: Sequence[MeasuredScan], date: int) -> list[int]:
    """Tracks that begin at a date, where an earlier scan would have shown them, and are large
    enough to count."""
    found = []
    for track in tracks:
        number = track.numbers[date]
        if number is None or (date, "new") not in track.events or not track.is_covered:
            continue
        if is_new_lesion(scans[date].quantities.lesions[number].long_axis_mm):
            found.append(track.identity)
    return found

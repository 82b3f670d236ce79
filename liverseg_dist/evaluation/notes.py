"""Notes on figures that are easily misread: tolerances below the voxel size, masks at the scan's edge."""

from collections.abc import Sequence
from typing import Any

from liverseg_dist.evaluation.metrics.surface import BORDER_KEYS, TOLERANCES_MM
from liverseg_dist.labels import STRUCTURES

Case = dict[str, Any]


def list_distance_notes(cases: Sequence[Case]) -> list[str]:
    """What a reader of the distances must know about these cases; empty where there is nothing to say."""
    return [*list_resolution_notes(cases), *list_edge_notes(cases)]


def list_resolution_notes(cases: Sequence[Case]) -> list[str]:
    """Where voxels are larger than the tolerance of a normalised surface distance (NSD).

    Two surface elements lie on one lattice, so their distance is 0 or at least the shortest voxel side. A tolerance
    below that side counts coinciding elements only, and two such tolerances give the same NSD.
    """
    notes = []
    fine, coarse = TOLERANCES_MM
    both = [case for case in cases if min(case["spacing_mm"]) > coarse]
    one = [case for case in cases if fine < min(case["spacing_mm"]) <= coarse]
    thick = [case for case in cases if min(case["spacing_mm"]) <= fine < max(case["spacing_mm"])]
    if both:
        notes.append(
            f"NSD: in {_count(both, cases)} every voxel side is longer than {coarse:g} mm "
            f"({_largest_voxel(both)}). NSD at {fine:g} mm and at {coarse:g} mm are equal there: only "
            "surfaces that coincide are within either tolerance."
        )
    if one:
        notes.append(
            f"NSD: in {_count(one, cases)} every voxel side is longer than {fine:g} mm "
            f"({_largest_voxel(one)}). NSD at {fine:g} mm counts only surfaces that coincide there."
        )
    if thick:
        notes.append(
            f"NSD: in {_count(thick, cases)} voxels are longer than {fine:g} mm along an axis "
            f"({_largest_voxel(thick)}). A shift by one voxel along it exceeds that tolerance."
        )
    return notes


def list_edge_notes(cases: Sequence[Case]) -> list[str]:
    """Where a mask reaches the scan's edge, so that the conventions of the distances differ."""
    differing = [case for case in cases if has_edge_difference(case)]
    if not differing:
        return []
    found = [
        (_difference(case, structure), case, structure)
        for case in differing
        for structure in STRUCTURES
    ]
    _, case, structure = max(found, key=lambda item: item[0])
    scores = case[structure]
    return [
        f"Distances: in {_count(differing, cases)} a mask reaches the scan's edge. ASSD, RMSD and MSSD take masks "
        "as open there (CHAOS: no surface at the edge); HD95 and NSD take them as closed (DeepMind: the edge is "
        "surface). The closed ASSD, RMSD and MSSD are given too. Largest difference: "
        f"{case['case_id']}, {structure}: MSSD {_mm(scores['mssd_mm'])} open, {_mm(scores['mssd_closed_mm'])} closed."
    ]


def has_edge_difference(case: Case) -> bool:
    """Whether a border distance of a case depends on whether masks are closed at the scan's edge."""
    for structure in STRUCTURES:
        scores = case[structure]
        for name in BORDER_KEYS:
            closed = f"{name}_closed_mm"
            if closed in scores and scores[closed] != scores[f"{name}_mm"]:
                return True
    return False


def _difference(case: Case, structure: str) -> float:
    scores = case[structure]
    opened, closed = scores["mssd_mm"], scores.get("mssd_closed_mm")
    return abs(opened - closed) if opened is not None and closed is not None else -1.0


def _count(some: Sequence[Case], cases: Sequence[Case]) -> str:
    return f"{len(some)} of {len(cases)} case{'' if len(cases) == 1 else 's'}"


def _largest_voxel(cases: Sequence[Case]) -> str:
    largest = max(cases, key=lambda case: max(case["spacing_mm"]))
    return "up to " + " x ".join(f"{mm:.3g}" for mm in largest["spacing_mm"]) + " mm"


def _mm(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1f} mm"

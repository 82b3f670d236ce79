"""Notes on figures that are easily misread: tolerances below the voxel size, masks at the edge.

The report and the terminal output of `evaluate` and `score` show them below the figures.
"""

from collections.abc import Sequence
from typing import Any

from liverseg_dist.evaluation.case_scores import list_scored
from liverseg_dist.evaluation.metrics.surface import BORDER_KEYS, TOLERANCES_MM

Case = dict[str, Any]


def list_distance_notes(cases: Sequence[Case]) -> list[str]:
    """List the limits of the distances in these cases; empty where there are none."""
    return [*list_resolution_notes(cases), *list_edge_notes(cases)]


def list_resolution_notes(cases: Sequence[Case]) -> list[str]:
    """Notes on voxels that are larger than a tolerance of the normalised surface distance (NSD).

    The surface elements of both masks are points of one lattice, so their distance is 0 or at least
    the shortest voxel side. A tolerance below that side counts coinciding elements only, and two
    such tolerances give the same NSD.
    """
    notes = []
    fine, coarse = TOLERANCES_MM
    above_coarse: list[Case] = []
    above_fine: list[Case] = []
    anisotropic: list[Case] = []
    for case in cases:
        shortest_mm, longest_mm = min(case["spacing_mm"]), max(case["spacing_mm"])
        # One note per case: the strongest limit that applies to its voxels.
        if shortest_mm > coarse:
            above_coarse.append(case)
        elif shortest_mm > fine:
            above_fine.append(case)
        elif longest_mm > fine:
            anisotropic.append(case)
    if above_coarse:
        notes.append(
            f"NSD: in {_count_cases(above_coarse, cases)} every voxel side is longer than "
            f"{coarse:g} mm ({_describe_largest_voxel(above_coarse)}). NSD at {fine:g} mm and at "
            f"{coarse:g} mm are equal there: only surfaces that coincide are within either "
            "tolerance."
        )
    if above_fine:
        notes.append(
            f"NSD: in {_count_cases(above_fine, cases)} every voxel side is longer than "
            f"{fine:g} mm ({_describe_largest_voxel(above_fine)}). NSD at {fine:g} mm counts only "
            "surfaces that coincide there."
        )
    if anisotropic:
        notes.append(
            f"NSD: in {_count_cases(anisotropic, cases)} voxels are longer than {fine:g} mm along "
            f"an axis ({_describe_largest_voxel(anisotropic)}). A shift by one voxel along it "
            "exceeds that tolerance."
        )
    return notes


def list_edge_notes(cases: Sequence[Case]) -> list[str]:
    """Notes on masks that reach the edge of the scan, where the distance conventions differ."""
    differing = [case for case in cases if has_edge_difference(case)]
    if not differing:
        return []
    candidates = []
    for case in differing:
        candidates += [(case, structure) for structure in list_scored(case)]
    case, structure = max(candidates, key=lambda item: _edge_difference_mm(*item))
    scores = case[structure]
    opened, closed = _format_mm(scores["mssd_mm"]), _format_mm(scores["mssd_closed_mm"])
    return [
        f"Distances: in {_count_cases(differing, cases)} a mask reaches the scan's edge. "
        "ASSD, RMSD and MSSD take masks as open there (CHAOS: no surface at the edge); HD95 and "
        "NSD take them as closed (DeepMind: the edge is surface). The closed ASSD, RMSD and MSSD "
        f"are given too. Largest difference: {case['case_id']}, {structure}: "
        f"MSSD {opened} open, {closed} closed."
    ]


def has_edge_difference(case: Case) -> bool:
    """Whether the open and the closed border distances of a case differ."""
    for structure in list_scored(case):
        scores = case[structure]
        for name in BORDER_KEYS:
            closed = f"{name}_closed_mm"
            if closed in scores and scores[closed] != scores[f"{name}_mm"]:
                return True
    return False


def _edge_difference_mm(case: Case, structure: str) -> float:
    """Difference of the open and the closed MSSD; -1 where one of them is undefined."""
    scores = case[structure]
    opened, closed = scores["mssd_mm"], scores.get("mssd_closed_mm")
    return abs(opened - closed) if opened is not None and closed is not None else -1.0


def _count_cases(some: Sequence[Case], cases: Sequence[Case]) -> str:
    return f"{len(some)} of {len(cases)} case{'' if len(cases) == 1 else 's'}"


def _describe_largest_voxel(cases: Sequence[Case]) -> str:
    largest = max(cases, key=lambda case: max(case["spacing_mm"]))
    return "up to " + " x ".join(f"{mm:.3g}" for mm in largest["spacing_mm"]) + " mm"


def _format_mm(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1f} mm"

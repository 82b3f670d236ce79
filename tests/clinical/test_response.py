"""Response of matched lesions: merged and split targets, new lesions, places that a scan does not
show, the nadir."""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.clinical.matching import State, Status, Track
from liverseg_dist.clinical.quantify import CaseQuantities, LesionQuantities
from liverseg_dist.clinical.response import assess_response
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.volume import Grid, Volume

GRID = Grid((4, 4, 4), np.diag([0.8, 0.8, 1.0, 1.0]))


@dataclass(frozen=True)
class Scan:
    mask: Volume
    quantities: CaseQuantities


def scan_with(*diameters_mm: float, cut: tuple[int, ...] = ()) -> Scan:
    lesions = []
    for number, diameter in enumerate(diameters_mm):
        volume = np.pi / 6 * diameter**3 / 1000
        faces = ("superior",) if number in cut else ()
        lesions.append(
            LesionQuantities(
                "tumour", number + 1, 10, volume, diameter, diameter, diameter, 1.0, (0.0, 0.0, 0.0), 1.0, faces, None,
                (), None, ((0, 1),) * 3, ((0.0, 0.0, 0.0),) * 4,
            )
        )  # fmt: skip
    mask = Volume(np.zeros(GRID.shape, np.uint8), GRID)
    return Scan(mask, CaseQuantities((), tuple(lesions), GRID.spacing_mm, GRID.shape))


def track(
    identity: int, numbers: list[int | None], states: list[State] | None = None, **more: object
) -> Track:
    if states is None:
        states = ["gone" if number is None else "seen" for number in numbers]
    return Track(identity, "tumour", numbers, states, **more)  # type: ignore[arg-type]


def assess(tracks: list[Track], *scans: Scan) -> dict:
    return assess_response(tracks, scans, "liver", LITS_SCHEME)


def event(date: int, what: Status) -> list[tuple[int, Status]]:
    return [(date, what)]


def test_partial_response_and_its_rule() -> None:
    result = assess([track(1, [0, 0]), track(2, [1, 1])], scan_with(30, 20), scan_with(20, 14))
    assert (result["recist"], result["volumetric"]) == ("PR", "PR")
    assert result["sums_mm"] == [50, 34]
    assert "-32 %" in result["rule"]


def test_everything_gone() -> None:
    result = assess([track(1, [0, None]), track(2, [1, None])], scan_with(30, 6), scan_with())
    assert (result["recist"], result["volumetric"]) == ("CR", "CR")
    # A small lesion that is left makes it a partial response.
    result = assess([track(1, [0, None]), track(2, [1, 0])], scan_with(30, 6), scan_with(6))
    assert result["recist"] == "PR"


def test_the_nadir_decides_progression() -> None:
    scans = (scan_with(50), scan_with(20), scan_with(27))
    result = assess([track(1, [0, 0, 0])], *scans)
    assert [date["recist"] for date in result["dates"]] == ["PR", "PD"]
    assert "smallest" in result["rule"]


def test_merged_targets_count_once() -> None:
    tracks = [
        track(1, [0, 0], events=event(1, "merged")),
        track(2, [1, None], ["seen", "merged"], merged_into=1, events=event(1, "merged")),
    ]
    result = assess(tracks, scan_with(20, 18), scan_with(37))
    assert result["sums_mm"] == [38, 37]
    assert result["recist"] == "SD"


def test_pieces_of_a_target_are_added_and_are_not_new() -> None:
    tracks = [
        track(1, [0, 0], events=event(1, "split")),
        track(2, [None, 1], ["before", "seen"], split_from=1, events=event(1, "split")),
    ]
    result = assess(tracks, scan_with(30), scan_with(12, 10))
    assert result["sums_mm"] == [30, 22]
    assert result["dates"][0]["new_lesions"] == []
    assert result["recist"] == "SD"


def test_a_new_lesion_is_progression_and_stays_so() -> None:
    new = track(2, [None, 1, 1], ["before", "seen", "seen"], events=event(1, "new"))
    result = assess([track(1, [0, 0, 0]), new], scan_with(30), scan_with(20, 8), scan_with(20, 8))
    assert [date["recist"] for date in result["dates"]] == ["PD", "PD"]
    assert result["dates"][1]["new_lesions"] == [2]
    # Neither a speck nor a lesion that the baseline did not show counts.
    speck = track(2, [None, 1], ["before", "seen"], events=event(1, "new"))
    assert assess([track(1, [0, 0]), speck], scan_with(30), scan_with(20, 4))["recist"] == "PR"
    beyond = track(2, [None, 1], ["uncovered", "seen"], events=event(1, "new"), is_covered=False)
    assert assess([track(1, [0, 0]), beyond], scan_with(30), scan_with(20, 15))["recist"] == "PR"


def test_what_is_not_in_the_scan_is_not_evaluable() -> None:
    outside = track(1, [0, None], ["seen", "uncovered"])
    assert assess([outside], scan_with(30), scan_with())["recist"] == "NE"
    cut = assess([track(1, [0, 0])], scan_with(30), scan_with(20, cut=(0,)))
    assert cut["recist"] == "NE"
    grown = assess([track(1, [0, 0])], scan_with(30), scan_with(40, cut=(0,)))
    assert grown["recist"] == "PD"


def test_patients_without_targets() -> None:
    small = assess([track(1, [0, 0])], scan_with(7), scan_with(7))
    assert (small["recist"], small["targets"]) == ("non-CR/non-PD", [])
    assert assess([], scan_with(), scan_with())["recist"] == "ND"
    assert assess([track(1, [0, 0])], scan_with(7), scan_with(9))["recist"] == "PD"


def test_a_change_within_the_error_is_said() -> None:
    result = assess([track(1, [0, 0])], scan_with(30.0), scan_with(30.5))
    assert "measurement error" in result["warning"]
    assert assess([track(1, [0, 0])], scan_with(30.0), scan_with(20.0))["warning"] is None

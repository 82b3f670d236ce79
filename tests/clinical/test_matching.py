"""Matching lesions over dates: each kind of change, several dates, and places that a scan does not
show."""

from collections.abc import Callable, Sequence

import numpy as np

from liverseg_dist.clinical.matching import Spot, Track, match_dates

Ball = tuple[float, float, float, float]
"""x, y, z and radius in mm."""


def spots(balls: Sequence[Ball], structure: str = "tumour") -> list[Spot]:
    found = []
    axis = np.arange(-30.0, 31.0, 1.5)
    offsets = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    for number, (x, y, z, radius) in enumerate(balls):
        inside = offsets[np.linalg.norm(offsets, axis=1) <= radius]
        found.append(Spot(number, structure, inside + np.array([x, y, z]), 1.3, 2 * radius))
    return found


def everywhere(date: int, spot: Spot) -> bool:
    return True


def match(*dates: Sequence[Ball], covers: Callable[[int, Spot], bool] = everywhere) -> list[Track]:
    return match_dates([spots(balls) for balls in dates], covers, [1.0] * len(dates))


def test_persistent_new_and_vanished() -> None:
    tracks = match(
        [(0, 0, 0, 8), (60, 0, 0, 6), (0, 60, 0, 10)],
        [(61, 2, 0, 9), (2, 1, 1, 7), (-60, 0, 0, 8)],
    )
    assert [track.status for track in tracks] == ["persistent", "persistent", "vanished", "new"]
    assert [track.numbers for track in tracks] == [[0, 1], [1, 0], [2, None], [None, 2]]
    assert all(track.confidence >= 0.7 for track in tracks)


def test_small_lesions_moved_by_an_imperfect_registration() -> None:
    tracks = match([(0, 0, 0, 3), (25, 0, 0, 3)], [(5, 4, 0, 3), (29, 4, 3, 3)])
    assert [track.numbers for track in tracks] == [[0, 0], [1, 1]]
    assert [track.status for track in tracks] == ["persistent", "persistent"]


def test_a_large_neighbour_does_not_take_the_match() -> None:
    tracks = match([(0, 0, 0, 5), (16, 0, 0, 10)], [(0, 1, 0, 5), (15, 0, 0, 10)])
    assert [track.numbers for track in tracks] == [[0, 0], [1, 1]]


def test_merged() -> None:
    tracks = match([(-9, 0, 0, 7), (9, 0, 0, 6)], [(0, 0, 0, 16)])
    assert [track.status for track in tracks] == ["merged", "merged"]
    assert tracks[0].numbers == [0, 0]
    assert tracks[1].merged_into == 1
    assert tracks[1].states == ["seen", "merged"]


def test_split() -> None:
    tracks = match([(0, 0, 0, 16)], [(-9, 0, 0, 6), (9, 0, 0, 5)])
    assert [track.status for track in tracks] == ["split", "split"]
    assert tracks[0].numbers == [0, 0]
    assert tracks[1].split_from == 1


def test_a_lesion_that_comes_back_is_the_same() -> None:
    tracks = match([(0, 0, 0, 8)], [], [(1, 0, 0, 7)])
    assert [track.numbers for track in tracks] == [[0, None, 0]]
    assert tracks[0].status == "persistent"
    assert tracks[0].states == ["seen", "gone", "seen"]


def test_several_dates_keep_identities() -> None:
    tracks = match(
        [(0, 0, 0, 6), (50, 0, 0, 6)],
        [(0, 0, 0, 8), (50, 0, 0, 5), (0, 50, 0, 5)],
        [(0, 0, 0, 10), (0, 50, 0, 9)],
    )
    assert [track.numbers for track in tracks] == [[0, 0, 0], [1, 1, None], [None, 2, 1]]
    assert [track.status for track in tracks] == ["persistent", "vanished", "new"]


def test_nothing_is_concluded_outside_a_scan() -> None:
    def covers(date: int, spot: Spot) -> bool:
        return date == 0 or float(spot.centre_mm[2]) < 20.0

    tracks = match([(0, 0, 40, 8), (0, 0, 0, 8)], [(0, 0, 0, 8)], covers=covers)
    assert tracks[0].states == ["seen", "uncovered"]
    assert tracks[0].status == "persistent"

    def covers_later(date: int, spot: Spot) -> bool:
        return date == 1 or float(spot.centre_mm[2]) < 20.0

    tracks = match([(0, 0, 0, 8)], [(0, 0, 0, 8), (0, 0, 40, 8)], covers=covers_later)
    assert tracks[1].status == "new"
    assert not tracks[1].is_covered


def test_structures_are_not_mixed() -> None:
    first = [*spots([(0, 0, 0, 8)], "tumour"), *spots([(30, 0, 0, 8)], "cyst")]
    second = [*spots([(0, 0, 0, 8)], "cyst")]
    tracks = match_dates([first, second], everywhere, [1.0, 1.0])
    assert [track.status for track in tracks] == ["vanished", "vanished", "new"]


def test_confidence_falls_with_distance_and_rivals() -> None:
    near = match([(0, 0, 0, 5)], [(1, 0, 0, 5)])[0].confidence
    far = match([(0, 0, 0, 5)], [(14, 0, 0, 5)])[0].confidence
    assert far < 0.6 < near
    contested = match([(0, 0, 0, 5)], [(8, 0, 0, 5), (-9, 0, 0, 5)])
    assert contested[0].confidence < near


def test_a_speck_at_the_edge_does_not_change_what_a_lesion_is() -> None:
    tracks = match([(0, 0, 0, 14), (17, 0, 0, 2)], [(0, 0, 0, 20)])
    assert [track.status for track in tracks] == ["persistent", "merged"]
    tracks = match([(0, 0, 0, 20)], [(0, 0, 0, 14), (17, 0, 0, 2)])
    assert [track.status for track in tracks] == ["persistent", "split"]

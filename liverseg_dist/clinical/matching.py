"""Which lesion of one date is which of another: persistent, new, vanished, merged, split.

Lesions of all dates are clouds of points (their voxels) in the baseline's space. Dates are linked
one after the other: an assignment that pairs each lesion with at most one other maximises the
overlap; what is left over is merged into a lesion that now covers it, is a piece of one that
covered it, has vanished, or is new. Where a scan does not cover the place, nothing is concluded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

Status = Literal["persistent", "new", "vanished", "merged", "split"]
State = Literal["seen", "gone", "merged", "uncovered", "before"]
"""At one date: measured; not there; part of another track; outside the scan; not there yet."""

REACH_MM = 25.0
"""Lesions further apart than this, from surface to surface, are not compared."""
GAP_MM = 5.0
"""At this distance between surfaces a match without overlap is worth 1/e of one that touches."""
LEAST_SCORE = 0.15
COVERED_SHARE = 0.5
"""A lesion of which this share lies in another one is a part of it."""
MAX_POINTS = 1500
"""Of a lesion that are looked up in another one."""
SPECK_MM = 5.0
"""Lesions below this long axis count for less: masks have single voxels beside lesions."""


@dataclass(frozen=True)
class Spot:
    """A lesion in the baseline's space.

    Attributes:
        number: Index into the lesions of its date.
        structure: Its lesion structure; only lesions of one structure are matched.
        points_mm: Its voxels' centres, (n, 3).
        voxel_mm: Half of a voxel's diagonal: points this near are in one place.
        long_axis_mm: For the confidence in small ones.
    """

    number: int
    structure: str
    points_mm: np.ndarray
    voxel_mm: float
    long_axis_mm: float
    tree: cKDTree = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The tree keeps all points: with fewer, its own gaps would look like gaps between lesions.
        object.__setattr__(self, "tree", cKDTree(self.points_mm))
        # Every n-th point, not a random choice: the result must be the same each time.
        step = -(-len(self.points_mm) // MAX_POINTS)
        object.__setattr__(self, "points_mm", self.points_mm[::step])

    @property
    def centre_mm(self) -> np.ndarray:
        return self.points_mm.mean(axis=0)

    @property
    def reach_mm(self) -> float:
        """Radius of the ball around the centre that holds all points."""
        return float(np.linalg.norm(self.points_mm - self.centre_mm, axis=1).max())


@dataclass
class Track:
    """A lesion over the dates.

    Attributes:
        identity: From 1, in the order in which lesions appear.
        structure: Its lesion structure.
        numbers: Index into the lesions of each date, None where it was not measured.
        states: What is known at each date.
        merged_into: The track that covers it since it merged.
        split_from: The track it is a piece of.
        events: (index of the date, what happened).
        confidence: Of the least certain link, 0 to 1.
        is_covered: False where an earlier scan did not cover the place of a lesion that appears.
    """

    identity: int
    structure: str
    numbers: list[int | None]
    states: list[State]
    merged_into: int | None = None
    split_from: int | None = None
    events: list[tuple[int, Status]] = field(default_factory=list)
    confidence: float = 1.0
    is_covered: bool = True
    last: Spot | None = None

    @property
    def status(self) -> Status:
        """What characterises the track: that it merged or split, else how it ended or began."""
        kinds = [kind for _, kind in self.events]
        if "merged" in kinds:
            return "merged"
        if "split" in kinds:
            return "split"
        if self.states[-1] == "gone":
            return "vanished"
        return "new" if "new" in kinds else "persistent"


@dataclass(frozen=True)
class Link:
    """How two lesions correspond: shares of points in the other one, distance of their surfaces,
    and the score."""

    first_in_second: float
    second_in_first: float
    gap_mm: float

    @property
    def score(self) -> float:
        """0 to 1: at least 0.5 with overlap, less the further they are apart."""
        shares = self.first_in_second, self.second_in_first
        # Overlap always beats nearness: a small lesion inside a large one is the same place.
        if max(shares) > 0:
            return 0.5 + 0.3 * max(shares) + 0.2 * min(shares)
        return 0.5 * float(np.exp(-((self.gap_mm / GAP_MM) ** 2)))


def compare_spots(first: Spot, second: Spot) -> Link:
    """How far two lesions lie in each other, each point with a tolerance of half a voxel's
    diagonal."""
    to_second, _ = second.tree.query(first.points_mm)
    to_first, _ = first.tree.query(second.points_mm)
    return Link(
        float((to_second <= second.voxel_mm).mean()),
        float((to_first <= first.voxel_mm).mean()),
        max(0.0, float(to_second.min()) - first.voxel_mm - second.voxel_mm),
    )


def match_dates(
    dates: Sequence[Sequence[Spot]],
    covers: Callable[[int, Spot], bool],
    quality: Sequence[float],
) -> list[Track]:
    """The tracks of all lesions over the dates.

    Args:
        dates: The lesions of each date, in the baseline's space.
        covers: Whether the scan of a date covers the place of a lesion of another date.
        quality: Of each date's registration, 0 to 1; it scales the confidence.
    """
    tracks = [_begin(number, spot, 0, len(dates)) for number, spot in enumerate(dates[0], start=1)]
    for date in range(1, len(dates)):
        _link_date(tracks, dates[date], date, len(dates), covers, quality[date])
    return tracks


def _begin(identity: int, spot: Spot, date: int, count: int) -> Track:
    numbers: list[int | None] = [None] * count
    states: list[State] = ["gone"] * count
    for earlier in range(date):
        states[earlier] = "before"
    numbers[date], states[date] = spot.number, "seen"
    return Track(identity, spot.structure, numbers, states, last=spot)


def _link_date(
    tracks: list[Track],
    spots: Sequence[Spot],
    date: int,
    count: int,
    covers: Callable[[int, Spot], bool],
    quality: float,
) -> None:
    """Extend the tracks by one date."""
    # A track that has merged is continued by the track that covers it.
    open_tracks = [track for track in tracks if track.merged_into is None]
    links = _all_links(open_tracks, spots)
    pairs = _assign(len(open_tracks), len(spots), links)
    taken = {second: first for first, second in pairs.items()}
    # _extend replaces `last`; parents are judged by what they were at the date before.
    before = {id(track): track.last for track in open_tracks}
    for first, second in pairs.items():
        _extend(open_tracks[first], spots[second], date)
        _doubt(open_tracks[first], _link_confidence(first, second, links) * quality)
    for first, track in enumerate(open_tracks):
        if first not in pairs:
            _end(
                track,
                first,
                date,
                links,
                {s: open_tracks[f] for s, f in taken.items()},
                covers,
                quality,
            )
    for second, spot in enumerate(spots):
        if second in taken:
            continue
        new = _begin(len(tracks) + 1, spot, date, count)
        parent = _parent_of(second, open_tracks, links, before)
        if parent is not None:
            new.split_from = parent.identity
            new.events.append((date, "split"))
            # A speck that breaks off does not make a lesion a split one.
            if spot.long_axis_mm >= SPECK_MM and (date, "split") not in parent.events:
                parent.events.append((date, "split"))
        else:
            new.events.append((date, "new"))
            # Without an earlier look at the place, "new" would be progression without evidence.
            new.is_covered = any(covers(earlier, spot) for earlier in range(date))
            if not new.is_covered:
                for earlier in range(date):
                    new.states[earlier] = "uncovered"
        nearest = max((link.score for (_, s), link in links.items() if s == second), default=0.0)
        _doubt(new, (nearest if parent is not None else _surprise(spot, nearest)) * quality)
        tracks.append(new)


def _all_links(tracks: Sequence[Track], spots: Sequence[Spot]) -> dict[tuple[int, int], Link]:
    links = {}
    for first, track in enumerate(tracks):
        assert track.last is not None
        for second, spot in enumerate(spots):
            # A metastasis does not become a cyst: structures are matched separately.
            if spot.structure != track.structure:
                continue
            # Comparing clouds of points is slow; spheres around them exclude most pairs.
            apart = float(np.linalg.norm(spot.centre_mm - track.last.centre_mm))
            if apart - spot.reach_mm - track.last.reach_mm <= REACH_MM:
                links[first, second] = compare_spots(track.last, spot)
    return links


def _assign(rows: int, columns: int, links: dict[tuple[int, int], Link]) -> dict[int, int]:
    """The one-to-one assignment with the largest sum of scores; weak links are left out."""
    if not links:
        return {}
    # 0 also for weak links: such a pair is dropped below, so that it does not displace a good one.
    scores = np.zeros((rows, columns))
    for (first, second), link in links.items():
        if link.score >= LEAST_SCORE:
            scores[first, second] = link.score
    chosen = zip(*linear_sum_assignment(-scores), strict=True)
    return {int(first): int(second) for first, second in chosen if scores[first, second] > 0}


def _extend(track: Track, spot: Spot, date: int) -> None:
    track.numbers[date], track.states[date] = spot.number, "seen"
    track.last = spot


def _end(
    track: Track,
    first: int,
    date: int,
    links: dict[tuple[int, int], Link],
    taken: dict[int, Track],
    covers: Callable[[int, Spot], bool],
    quality: float,
) -> None:
    """A lesion without successor: merged, outside the scan, or gone."""
    around = [(link, s) for (f, s), link in links.items() if f == first and s in taken]
    covering = [
        (link.first_in_second, s) for link, s in around if link.first_in_second >= COVERED_SHARE
    ]
    if covering:
        share, second = max(covering)
        target = taken[second]
        track.merged_into = target.identity
        track.states[date:] = ["merged"] * (len(track.states) - date)
        track.events.append((date, "merged"))
        # A speck at its edge does not make a lesion a merged one.
        if track.last is not None and track.last.long_axis_mm >= SPECK_MM:
            target.events.append((date, "merged"))
        _doubt(track, share * quality)
        return
    assert track.last is not None
    # Nothing is concluded where the scan does not show the place.
    if not covers(date, track.last):
        track.states[date] = "uncovered"
        return
    # Once per disappearance, not at each later date.
    if track.states[date - 1] in ("seen", "uncovered"):
        track.events.append((date, "vanished"))
        nearest = max((link.score for link, _ in around), default=0.0)
        _doubt(track, _surprise(track.last, nearest) * quality)


def _parent_of(
    second: int,
    tracks: Sequence[Track],
    links: dict[tuple[int, int], Link],
    before: dict[int, Spot | None],
) -> Track | None:
    """The lesion that covered this one at the date before and goes on, if any."""
    best: tuple[float, Track] | None = None
    for (first, other), link in links.items():
        if (
            other != second
            or link.second_in_first < COVERED_SHARE
            or tracks[first].merged_into is not None
        ):
            continue
        # A parent that has no successor itself would have been assigned to this lesion.
        goes_on = tracks[first].last is not before[id(tracks[first])]
        if goes_on and (best is None or link.second_in_first > best[0]):
            best = link.second_in_first, tracks[first]
    return None if best is None else best[1]


def _link_confidence(first: int, second: int, links: dict[tuple[int, int], Link]) -> float:
    """The score, less where another lesion fits nearly as well."""
    own = links[first, second].score
    # All other links of either lesion, but not those between third ones.
    rivals = [link.score for (f, s), link in links.items() if (f == first) != (s == second)]
    rival = max(rivals, default=0.0)
    return own * min(1.0, 0.5 + (own - rival)) if rival > own - 0.5 else own


def _surprise(spot: Spot, nearest: float) -> float:
    """Confidence that a lesion is new or gone: less where another one is near, and for specks."""
    size = min(1.0, spot.long_axis_mm / SPECK_MM)
    return (1.0 - nearest) * (0.5 + 0.5 * size)


def _doubt(track: Track, confidence: float) -> None:
    track.confidence = float(min(track.confidence, max(0.0, min(1.0, confidence))))

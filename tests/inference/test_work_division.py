"""Division of cases among processes, and one-line failures."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.inference.case_inputs import assign_slices_to_slabs
from liverseg_dist.inference.work_division import (
    SERIAL_SHARE,
    divide_work,
    format_failure,
    shard_cases,
)
from liverseg_dist.volume import Grid

SIZES = st.dictionaries(
    st.text("abc123_", min_size=1, max_size=6), st.integers(0, 10**9), max_size=40
)


@given(SIZES, st.integers(1, 9))
def test_each_case_goes_to_one_shard(voxels: dict[str, int], shards: int) -> None:
    parts = [shard_cases(voxels, shard, shards) for shard in range(shards)]
    assert sorted(name for part in parts for name in part) == sorted(voxels)
    for part in parts:
        sizes = [voxels[name] for name in part]
        assert sizes == sorted(sizes, reverse=True)


@given(SIZES, st.integers(1, 9))
def test_no_shard_is_much_larger_than_in_the_best_division(
    voxels: dict[str, int], shards: int
) -> None:
    """Graham 1969: at most 4/3 of the optimum, which is at least the mean and the largest case."""
    loads = [
        sum(voxels[name] for name in shard_cases(voxels, shard, shards)) for shard in range(shards)
    ]
    least = max(sum(voxels.values()) / shards, max(voxels.values(), default=0))
    assert max(loads) <= least + max(voxels.values(), default=0)
    if len(voxels) <= shards:
        assert max(loads) == max(voxels.values(), default=0)


@given(SIZES, st.integers(1, 9))
def test_a_division_covers_each_case_once_and_is_never_slower_than_whole_cases(
    voxels: dict[str, int], shards: int
) -> None:
    plans = [divide_work(voxels, shard, shards) for shard in range(shards)]
    shared = plans[0].shared
    assert all(one.shared == shared for one in plans)
    assert sorted([*shared, *(name for one in plans for name in one.whole)]) == sorted(voxels)
    assert all(
        voxels[name] >= voxels[other] for name in shared for one in plans for other in one.whole
    )
    shared = sum(voxels[name] for name in shared) * (SERIAL_SHARE + (1 - SERIAL_SHARE) / shards)
    whole = [
        sum(voxels[name] for name in shard_cases(voxels, shard, shards)) for shard in range(shards)
    ]
    assert shared + max(sum(voxels[name] for name in one.whole) for one in plans) <= max(whole) * (
        1 + 1e-12
    )


def divide_by_trying_all(voxels: dict[str, int], shards: int) -> float:
    """The shortest time over all numbers of shared cases, with a quadratic search."""
    order = sorted(voxels, key=lambda name: (-voxels[name], name))
    durations = []
    for number in range(len(order) + 1 if shards > 1 else 1):
        loads = [0] * shards
        for name in order[number:]:
            loads[loads.index(min(loads))] += voxels[name]
        shared = sum(voxels[name] for name in order[:number])
        durations.append(shared * (SERIAL_SHARE + (1 - SERIAL_SHARE) / shards) + max(loads))
    return min(durations)


def duration_of_division(voxels: dict[str, int], shards: int) -> float:
    plans = [divide_work(voxels, shard, shards) for shard in range(shards)]
    shared = sum(voxels[name] for name in plans[0].shared)
    whole = max(sum(voxels[name] for name in one.whole) for one in plans)
    return shared * (SERIAL_SHARE + (1 - SERIAL_SHARE) / shards) + whole


@given(SIZES, st.integers(1, 9))
def test_the_division_is_as_good_as_that_of_an_exhaustive_search(
    voxels: dict[str, int], shards: int
) -> None:
    best = divide_by_trying_all(voxels, shards)
    assert duration_of_division(voxels, shards) <= best * (1 + 1e-12)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("shards", [8, 32])
def test_the_division_of_hundreds_of_cases_is_as_good(spread: float, shards: int) -> None:
    sizes = np.random.default_rng(4).lognormal(17, spread, 300).astype(int).tolist()
    voxels = {f"case_{number}": size for number, size in enumerate(sizes)}
    best = divide_by_trying_all(voxels, shards)
    assert duration_of_division(voxels, shards) <= best * 1.02


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_the_division_of_many_cases_takes_seconds(spread: float) -> None:
    """The time of a search that is quadratic in the cases would be hours."""
    sizes = np.random.default_rng(4).lognormal(17, spread, 50_000).astype(int).tolist()
    voxels = {f"case_{number}": size for number, size in enumerate(sizes)}
    begun = time.process_time()
    divide_work(voxels, 3, 64)
    assert time.process_time() - begun < 10


def test_only_cases_that_would_leave_processes_idle_are_shared() -> None:
    assert divide_work({"a": 9}, 0, 1).shared == ()
    assert divide_work({"a": 9}, 1, 4).shared == ("a",)
    assert divide_work(dict.fromkeys("abcd", 5), 0, 4).shared == ()
    assert divide_work(dict.fromkeys("abcde", 5), 0, 4).shared == ("a",)
    assert divide_work({"huge": 100, "a": 2, "b": 2}, 0, 2).shared == ("huge",)


def test_failure_is_one_line_with_the_name_of_the_case() -> None:
    assert format_failure("liver_3", UserError("liver_3: no label")) == "liver_3: no label"
    assert format_failure("liver_3", RunFailed("disk gone")) == "liver_3: disk gone"
    assert format_failure("liver_3", ValueError("two\nlines")) == "liver_3: ValueError: two lines"
    assert "batch_size" in format_failure(
        "liver_3", RuntimeError("CUDA out of memory. Tried to allocate")
    )
    assert (
        format_failure("a.nii", PermissionError(13, "Permission denied", "a.nii"))
        == "a.nii: Permission denied"
    )


def test_slices_are_assigned_to_the_slab_with_the_nearest_centre() -> None:
    scan = Grid((100, 8, 8), np.diag([1.0, 1.0, 2.0, 1.0]))
    slabs = [scan.cropped((start, 0, 0), (40, 8, 8)) for start in (0, 30, 60)]
    first, second, third = assign_slices_to_slabs(slabs, scan)
    assert first.tolist() == list(range(0, 35))
    assert second.tolist() == list(range(35, 65))
    assert third.tolist() == list(range(65, 100))
    flipped = Grid(
        (100, 8, 8), np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -2, 198], [0, 0, 0, 1.0]])
    )
    assert [part.tolist() for part in assign_slices_to_slabs(slabs, flipped)] == [
        part.tolist() for part in (first, second, third)
    ]  # numbered in the slabs' orientation

"""The order of samples: a function of (seed, n), with nnU-Net's share of foreground."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.data.loading.sampling import Centre, ForegroundIndex, SampleOrder, patch_start

CASES = tuple(f"case_{i}" for i in range(7))


def test_counter_random_is_numpys_philox() -> None:
    random = CounterRandom(seed=3, index=9, purpose=2, attempt=1)
    key, counter = np.array([3, 9], dtype=np.uint64), np.array([0, 1, 2, 0], dtype=np.uint64)
    assert [random.draw_uint64() for _ in range(40)] == np.random.Philox(
        key=key, counter=counter
    ).random_raw(40).tolist()


def test_counter_random_distributions() -> None:
    random = CounterRandom(0, 0)
    assert (
        stats.kstest(
            [random.draw_uniform(-2, 3) for _ in range(4000)], stats.uniform(-2, 5).cdf
        ).pvalue
        > 0.01
    )
    assert stats.kstest([random.draw_normal() for _ in range(4000)], stats.norm.cdf).pvalue > 0.01
    counts = Counter(random.draw_below(5) for _ in range(5000))
    assert stats.chisquare([counts[i] for i in range(5)]).pvalue > 0.01
    assert sorted(CounterRandom(1, 2).draw_permutation(50)) == list(range(50))


def test_neighbouring_streams_differ() -> None:
    first = {
        CounterRandom(s, i, p, a).draw_uint64()
        for s in range(4)
        for i in range(4)
        for p in range(4)
        for a in range(4)
    }
    assert len(first) == 256


def test_each_pass_contains_every_case_once_in_a_new_order() -> None:
    order = SampleOrder(CASES, seed=5, global_batch_size=4, oversample_foreground=0.33)
    passes = [tuple(order.draw_sample(e * 7 + i).case_id for i in range(7)) for e in range(6)]
    assert all(sorted(one) == sorted(CASES) for one in passes)
    assert len(set(passes)) == 6


def test_stream_from_any_position_gives_the_same_samples() -> None:
    def stream(first: int) -> list[tuple]:
        order = SampleOrder(CASES, 11, 3, 0.5)  # a new one, as after a restart
        draws = [order.draw_sample(n) for n in range(first, 40)]
        return [
            (d.case_id, d.wants_foreground, order.augment_seed(d.index), d.random.draw_uint64())
            for d in draws
        ]

    whole = stream(0)
    for first in (1, 13, 39):
        assert stream(first) == whole[first:]


def test_seed_changes_everything() -> None:
    a, b = (SampleOrder(CASES, seed, 2, 0.33) for seed in (1, 2))
    assert [a.draw_sample(n).case_id for n in range(14)] != [
        b.draw_sample(n).case_id for n in range(14)
    ]
    assert not {a.augment_seed(n) for n in range(50)} & {b.augment_seed(n) for n in range(50)}


@pytest.mark.parametrize(
    ("batch", "share", "expected"),
    [  # nnU-Net's `_oversample_last_XX_percent`
        (2, 0.33, "-f"),
        (3, 0.33, "--f"),
        (4, 0.33, "---f"),
        (8, 0.33, "-----fff"),
        (2, 0.0, "--"),
        (2, 1.0, "ff"),
        (5, 0.5, "--fff"),
    ],
)
def test_guaranteed_share_of_foreground(batch: int, share: float, expected: str) -> None:
    order = SampleOrder(CASES, 0, batch, share)
    for step in range(5):
        got = "".join(
            "f" if order.draw_sample(step * batch + i).wants_foreground else "-"
            for i in range(batch)
        )
        assert got == expected


def test_batch_of_one_draws_foreground_with_that_probability() -> None:
    order = SampleOrder(CASES, 0, 1, 0.33)
    hits = sum(order.draw_sample(n).wants_foreground for n in range(3000))
    assert stats.binomtest(hits, 3000, 0.33).pvalue > 0.01


def _foreground() -> np.ndarray:
    """Liver of 1000 voxels, tumours of 500, 20 and 3; x is different for each component."""
    rows = [(1, 0, i % 10, i // 10, 0) for i in range(1000)]
    for component, count in ((1, 500), (2, 20), (3, 3)):
        rows += [(2, component, i % 10, i // 10, component) for i in range(count)]
    return np.array(rows, dtype=np.int16)


def test_tumours_of_all_sizes_are_equally_likely() -> None:
    index, rows = ForegroundIndex(_foreground()), {tuple(row) for row in _foreground().tolist()}
    centres = [index.draw_centre(CounterRandom(0, n)) for n in range(3000)]
    assert all(c is not None and (c.label, c.component, *c.voxel_zyx) in rows for c in centres)
    classes = Counter(c.label for c in centres if c)
    assert stats.binomtest(classes[2], 3000, 0.5).pvalue > 0.01
    tumours = Counter(c.component for c in centres if c and c.label == 2)
    assert set(tumours) == {1, 2, 3}
    assert stats.chisquare(list(tumours.values())).pvalue > 0.01
    assert len({c.voxel_zyx for c in centres if c and c.component == 3}) == 3


def test_centre_without_tumour_or_without_liver() -> None:
    liver_only = ForegroundIndex(_foreground()[:1000])
    assert {c.label for n in range(50) if (c := liver_only.draw_centre(CounterRandom(0, n)))} == {1}
    assert ForegroundIndex(np.empty((0, 5), np.int16)).draw_centre(CounterRandom(0, 0)) is None


sizes = st.tuples(*[st.integers(1, 40)] * 3)


@settings(max_examples=200, deadline=None)
@given(image=sizes, patch=sizes, n=st.integers(0, 10**6), centred=st.booleans(), data=st.data())
def test_patches_are_inside_where_they_fit(image, patch, n, centred, data) -> None:  # type: ignore[no-untyped-def]
    low = data.draw(st.integers(0, image[0] - 1))
    valid = (low, data.draw(st.integers(low + 1, image[0])))
    voxel = tuple(
        data.draw(st.integers(*bounds))
        for bounds in ((low, valid[1] - 1), (0, image[1] - 1), (0, image[2] - 1))
    )
    centre = Centre(1, 0, voxel) if centred else None
    start = patch_start(CounterRandom(0, n), centre, image, valid, patch)
    for axis, (bounds, size) in enumerate(
        zip((valid, (0, image[1]), (0, image[2])), patch, strict=True)
    ):
        begin, end = start[axis], start[axis] + size
        if size <= bounds[1] - bounds[0]:
            assert bounds[0] <= begin
            assert end <= bounds[1]
        elif size <= image[axis]:
            assert begin >= 0
            assert end <= image[axis]
            assert begin <= bounds[0]
            assert end >= bounds[1]
        else:
            assert begin <= 0
            assert end >= image[axis]
        if centred:
            assert begin <= voxel[axis] < end


def test_random_patches_reach_every_position() -> None:
    starts = {
        patch_start(CounterRandom(0, n), None, (4, 9, 9), (0, 4), (4, 6, 9)) for n in range(200)
    }
    assert starts == {(0, y, 0) for y in range(4)}

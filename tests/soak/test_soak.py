"""The short version of `tools/soak`, and that it sees what grows."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from liverseg_dist.data.store.case_store import CaseStore
from tests.soak.run import Held, Verdict, judge, samples, soak_here, soak_training


@pytest.mark.long
@pytest.mark.distributed
def test_a_run_of_four_simulated_hours_does_not_grow(phantom_store: Path, tmp_path: Path) -> None:
    """240 steps, 8 checkpoints, 4 validations, in one process; two ranks and 48 hours are `tools/soak`'s."""
    (verdict,) = soak_training(phantom_store, tmp_path / "run", hours=4, every_s=0.25)
    assert verdict.last.step > 120, "it was looked at to its end"
    assert verdict.grew == ()
    assert verdict.last.event_files == 1
    assert verdict.last.checkpoints <= 4


def test_loaders_that_are_closed_leave_nothing(phantom_store: Path) -> None:
    store = CaseStore.open(phantom_store)
    verdict = soak_here("loader", lambda: samples(store), 400)
    assert verdict.grew == ()


def leaking() -> Iterator[object]:
    kept: list[object] = []
    while True:
        kept.append(bytearray(b"x" * (1 << 20)))
        kept.append(open("/dev/null"))  # noqa: SIM115 - left open, which is the point
        yield None


def leak() -> Verdict:
    return soak_here("leak", leaking, 60)


def test_what_grows_is_seen() -> None:
    """In a process of its own: where other tests have run, freed memory may be had again unseen."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        verdict = fresh.submit(leak).result()
    assert set(verdict.grew) == {"files", "rss_mib"}
    assert verdict.mib_per_1000 == pytest.approx(1000, rel=0.3)


def test_what_comes_and_goes_is_no_growth() -> None:
    looks = [Held(step, 300 + 5 * (step % 3), 20 + step % 2, 1, 6) for step in range(1, 100)]
    assert judge("steady", looks, 100).grew == ()

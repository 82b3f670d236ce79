"""A short, fixed campaign of every target (`tools/fuzz` is the long one), and the campaign's own eyes."""

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liverseg_dist.errors import UserError
from tests.fuzz import judge as judging
from tests.fuzz.judge import Verdict, Wrong, judge
from tests.fuzz.run import one
from tests.fuzz.targets import PLACES, PROCESSES, Target, target

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

INPUTS = {
    "store": 8,
    "ledger": 12,
    "nifti": 80,
    "index": 60,
    "config": 25,
    "tables": 40,
    "csv": 80,
    "names": 60,
}
"""What some seconds have room for; 30 of the others."""


@pytest.fixture(params=sorted(set(PLACES) - set(PROCESSES)))
def chosen(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    (tmp_path / "ready").mkdir()
    return target(request.param, tmp_path / "ready")


def test_damaged_inputs_are_read_rightly_or_refused_in_a_line(
    chosen: Target, tmp_path: Path
) -> None:
    verdicts = [one(chosen, tmp_path / "input", 0, n) for n in range(INPUTS.get(chosen.name, 30))]
    failed = {n: verdict for n, verdict in enumerate(verdicts) if verdict.failed}
    assert not failed
    assert {"accepted", "refused"} == {verdict.outcome for verdict in verdicts}, (
        "one of them alone tests nothing"
    )


@given(st.randoms(use_true_random=False), st.sampled_from(["nifti", "index"]))
@settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
def test_hypothesis_finds_none_either(tmp_path: Path, chance: Random, name: str) -> None:
    """Its draws make the input, so that one that fails is shrunk."""
    folder = tmp_path / str(time.monotonic_ns())
    folder.mkdir()
    chosen = target(name, tmp_path)
    chosen.make(folder, chance)
    assert not judge(chosen.check, folder).failed


def refuse(text: str) -> None:
    raise UserError(text)


def allocate(case: Path) -> None:
    mib = 350
    bytearray(mib << 20)[::4096] = bytes((mib << 20) // 4096)


def differ() -> None:
    raise Wrong("zarr-python reads other voxels")


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (lambda: None, "accepted"),
        (lambda: refuse("a.nii: not a NIfTI file"), "refused"),
        (lambda: {}["key"], "traceback"),
        (differ, "wrong"),
        (spin, "hang"),
    ],
    ids=["fine", "refused", "KeyError", "wrong", "endless"],
)
def test_the_judge_sees_each_kind(
    act: object, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if outcome == "hang":
        monkeypatch.setattr(judging, "PATIENCE_S", 0.2)
    verdict = judge(lambda case: act(), tmp_path)  # type: ignore[operator]
    assert verdict.outcome == outcome, verdict
    assert verdict.failed == (outcome not in ("accepted", "refused"))
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_the_judge_sees_a_blow_up(tmp_path: Path) -> None:
    """In a process of its own, as in a campaign: where other tests have run, freed memory may be had again unseen."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        assert fresh.submit(judge, allocate, tmp_path).result().outcome == "memory"


def test_an_input_is_a_function_of_its_number(tmp_path: Path) -> None:
    chosen = target("nifti", tmp_path)
    made = []
    for number in (5, 5, 6):
        verdict = one(chosen, tmp_path / "input", 1, number)
        assert isinstance(verdict, Verdict)
        made.append([path.read_bytes() for path in sorted((tmp_path / "input").iterdir())])
    assert made[0] == made[1] != made[2]

"""`liverseg predict --stages parallel`: the same results, stages at the same time, bounded memory."""

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.inference.predict_scans import ScanInWork, ScanPredictor
from liverseg_dist.inference.scan_files import ScanFiles
from liverseg_dist.inference.scan_stages import segment_in_stages
from tests.inference.small_run import SmallRun

WAIT_S = 60


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name.startswith(("liverseg-reader", "liverseg-writer"))] == []


def test_masks_records_and_table_are_the_same_bytes(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of good scans, a damaged one and a missing one; and again, when all are done."""
    scans = sorted((small_run.source / "imagesTr").glob("*.nii.gz"))[:2]
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(scans[0].read_bytes()[:5000])
    inputs = [str(path) for path in (scans[0], broken, tmp_path / "absent.nii", scans[1])]
    found: dict[str, Any] = {}
    for stages in ("serial", "parallel"):
        out = tmp_path / stages
        options = ["--out", str(out), "--device", "cpu", "--threads", "1", "--stages", stages]
        code = main(["predict", str(small_run.run), *inputs, *options])
        printed = capsys.readouterr()
        assert main(["predict", str(small_run.run), *inputs, *options]) == code == 1
        assert capsys.readouterr().out.count("done before") == 2
        files = {}
        for path in sorted(out.rglob("*")):
            if path.is_file():
                files[path.relative_to(out).as_posix()] = path.read_bytes()
        lines = [text.replace(stages, "OUT") for text in printed.out.splitlines()]
        found[stages] = (files, lines)
    assert found["parallel"] == found["serial"]
    assert len(found["serial"][0]) >= 7


class Stub:
    """Stages without a network; `on_stage` is called at the beginning of each."""

    def __init__(self, on_stage: Callable[[str, int], None]) -> None:
        self.on_stage = on_stage
        self.alive: weakref.WeakSet[ScanInWork] = weakref.WeakSet()
        self.most_alive = 0
        self.begun: list[tuple[str, int]] = []

    def _begin(self, stage: str, work: ScanInWork) -> None:
        self.alive.add(work)
        self.most_alive = max(self.most_alive, len(self.alive))
        number = int(work.files.scan_id)
        self.begun.append((stage, number))
        self.on_stage(stage, number)

    def read_scan(self, work: ScanInWork) -> None:
        self._begin("read", work)

    def compute_mask(self, work: ScanInWork) -> None:
        self._begin("compute", work)

    def finish_scan(self, work: ScanInWork) -> dict[str, Any]:
        self._begin("finish", work)
        return {"case_id": work.files.scan_id}


def segment(stub: Stub, count: int) -> list[tuple[str, Any]]:
    scans = [ScanFiles(str(n), (Path(f"{n}.nii"),), 1) for n in range(count)]
    outcomes = segment_in_stages(cast(ScanPredictor, stub), scans)
    return [(scan.scan_id, outcome) for scan, outcome in outcomes]


def test_stages_run_at_the_same_time_with_three_scans_at_most() -> None:
    """Scan n is computed only after n + 1 is being read, and written only while n + 1 is computed."""
    count = 6
    begun = {(stage, n): threading.Event() for stage in ("read", "compute") for n in range(count)}

    def on_stage(stage: str, number: int) -> None:
        if (stage, number) in begun:
            begun[stage, number].set()
        later = {"compute": ("read", number + 1), "finish": ("compute", number + 1)}.get(stage)
        if later is not None and number + 1 < count:
            assert begun[later].wait(WAIT_S), f"{stage} {number} runs without {later}"

    stub = Stub(on_stage)
    assert segment(stub, count) == [(str(n), ({"case_id": str(n)}, False)) for n in range(count)]
    assert stub.most_alive <= 3


@pytest.mark.parametrize("stage", ["read", "compute", "finish"])
@pytest.mark.parametrize("failing", [0, 2, 4])
def test_a_failing_stage_fails_its_scan_only(stage: str, failing: int) -> None:
    def on_stage(at: str, number: int) -> None:
        if (at, number) == (stage, failing):
            raise (UserError if stage == "read" else RunFailed)(f"{number}.nii: damaged")

    outcomes = dict(segment(Stub(on_stage), 5))
    assert list(outcomes) == ["0", "1", "2", "3", "4"]
    assert str(outcomes.pop(str(failing))) == f"{failing}.nii: damaged"
    assert all(outcome[0] == {"case_id": name} for name, outcome in outcomes.items())


@pytest.mark.parametrize("stage", ["read", "finish"])
def test_a_failure_that_concerns_all_scans_is_raised(stage: str) -> None:
    def on_stage(at: str, number: int) -> None:
        if (at, number) == (stage, 1):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        segment(Stub(on_stage), 5)


def test_an_interrupt_begins_no_other_scan() -> None:
    """The scan being written is finished; of the others none is written or read."""

    def on_stage(stage: str, number: int) -> None:
        if (stage, number) == ("compute", 2):
            raise KeyboardInterrupt

    stub = Stub(on_stage)
    with pytest.raises(KeyboardInterrupt):
        segment(stub, 9)
    assert max(number for _, number in stub.begun) <= 3
    assert [number for stage, number in stub.begun if stage == "finish"] == [0, 1]

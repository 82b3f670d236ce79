"""`liverseg evaluate` in real processes: the same bytes from any number of ranks, and after a kill at any point."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.store import CaseStore
from tests.distributed.launch import clean_environment, torchrun, torchrun_command
from tests.inference.small_run import SmallRun, shared_small_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return shared_small_run(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Result files of one process."""
    out = tmp_path_factory.mktemp("reference")
    assert main([*arguments(small_run, out), "--threads", "1"]) == 0
    return results(out)


def arguments(run: SmallRun, out: Path) -> list[str]:
    ids = ",".join(CaseStore.open(run.store).case_ids)
    return ["evaluate", str(run.run), "--store", str(run.store), "--cases", ids, "--out", str(out), "--device", "cpu"]


def results(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


def ledger(out: Path) -> list[str]:
    folder = out / "ledger"
    return sorted(file.stem for file in folder.glob("*.json")) if folder.is_dir() else []


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bytes(
    ranks: int, small_run: SmallRun, reference: dict[str, bytes], tmp_path: Path
) -> None:
    done = torchrun(ranks, "-m", "liverseg_dist", *arguments(small_run, tmp_path), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "tensorboard").is_dir()
    assert {"summary.json", "cases.csv", "lesions.csv", "report.html"} <= results(tmp_path).keys()
    assert results(tmp_path) == reference
    last = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(last) == 1  # one rank speaks
    assert json.loads(last[0])["n_cases"] == 5


def test_one_scan_shared_by_all_ranks_gives_the_same_bytes(small_run: SmallRun, tmp_path: Path) -> None:
    """Fewer scans than ranks: their windows are divided; masks and reports stay what one process makes."""
    run = ["--store", str(small_run.store), "--cases", "liver_1", "--device", "cpu", "--save-masks", "--source"]
    line = ["evaluate", str(small_run.run), *run, str(small_run.source), "inference.overlap=0.5"]
    assert main([*line, "--out", str(tmp_path / "one"), "--threads", "1"]) == 0
    done = torchrun(4, "-m", "liverseg_dist", *line, "--out", str(tmp_path / "four"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path / "four") == results(tmp_path / "one")
    mask = Path("masks") / "liver_1.nii.gz"
    assert (tmp_path / "four" / mask).read_bytes() == (tmp_path / "one" / mask).read_bytes()


@contextmanager
def running(ranks: int, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        torchrun_command(ranks, "-m", "liverseg_dist", *command),
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(30)


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs (torchrun puts each worker into a session of its own)."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


def test_killed_and_continued_gives_the_same_bytes(
    small_run: SmallRun, reference: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(2, *arguments(small_run, tmp_path)) as process:
        end = time.monotonic() + 120
        while not ledger(tmp_path) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
    finished = ledger(tmp_path)
    assert 0 < len(finished) < 5
    assert not (tmp_path / "summary.json").exists()
    stamps = {name: (tmp_path / "ledger" / f"{name}.json").stat().st_mtime_ns for name in finished}
    assert main([*arguments(small_run, tmp_path), "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reused"] == len(finished)
    assert results(tmp_path) == reference
    for name, stamp in stamps.items():
        assert (tmp_path / "ledger" / f"{name}.json").stat().st_mtime_ns == stamp


def test_a_damaged_case_is_reported_and_the_others_are_scored(
    small_run: SmallRun, reference: dict[str, bytes], tmp_path: Path
) -> None:
    broken = SmallRun(small_run.source, tmp_path / "store.zarr", small_run.run)
    shutil.copytree(small_run.store, broken.store)
    shard = max((broken.store / "cases" / "liver_2" / "image").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    out = tmp_path / "out"
    done = torchrun(2, "-m", "liverseg_dist", *arguments(broken, out))
    assert done.returncode != 0
    assert "liver_2" in done.stderr
    assert "liverseg verify" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_cases"] == 4
    assert list(summary["failed"]) == ["liver_2"]
    shard.unlink()  # mended by converting again; here: the good copy
    shutil.copy2(small_run.store / shard.relative_to(broken.store), shard)
    assert main([*arguments(broken, out), "--threads", "1"]) == 0
    assert results(out) == reference


def test_whole_scans_masks_and_parts(small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run.run, run)
    store = CaseStore.open(small_run.store)
    common = ["evaluate", str(run), "--device", "cpu", "--threads", "1"]  # the store is the one of the run's config
    assert main([*common, "--source", str(small_run.source), "--save-masks", "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["out"] == str(run / "evaluation")
    assert str(run / "evaluation" / "report.html") in printed
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary["details"]["input"] == "scan"
    assert summary["calibration"]["liver"]["n_cases"] == summary["calibration"]["tumour"]["n_cases"] == 2
    assert summary["n_cases"] == len(store.ids("test"))
    assert sorted(p.name for p in (run / "evaluation" / "masks").iterdir()) == [
        f"{i}.nii.gz" for i in store.ids("test")
    ]
    assert main([*common, "--part", "validation"]) == 0
    summary = json.loads((run / "evaluation" / "validation" / "summary.json").read_text())
    assert summary["details"]["input"] == "slab"
    assert "help of the truth" in summary["details"]["note"]
    # masks of the evaluation score the same through `liverseg score`
    truth = tmp_path / "truth"
    truth.mkdir()
    for case_id in store.ids("test"):
        shutil.copy2(small_run.source / "labelsTr" / f"{case_id}.nii.gz", truth)
    assert (
        main(["score", str(run / "evaluation" / "masks"), str(truth), "--out", str(tmp_path / "s"), "--workers", "1"])
        == 0
    )
    ours = json.loads((run / "evaluation" / "summary.json").read_text())
    theirs = json.loads((tmp_path / "s" / "summary.json").read_text())
    for key in ("dice_per_case", "dice_global", "assd_mm", "hd95_mm"):
        assert ours["liver"][key] == pytest.approx(theirs["liver"][key], rel=1e-6)


def test_mistakes_are_one_line(small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, store = str(small_run.run), str(small_run.store)
    for words, message in (
        ((run, "--store", str(tmp_path / "none")), "no Zarr store"),
        ((str(tmp_path), "--store", store), "no run folder"),
        ((run, "--store", store, "--cases", "liver_77"), "liver_77 is not in"),
        ((run, "--store", store, "--source", str(tmp_path)), "Task03_Liver"),
    ):
        assert main(["evaluate", *words, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

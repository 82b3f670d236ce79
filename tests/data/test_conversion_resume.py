"""Conversions that are interrupted, repeated, changed or run twice end with the same store."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.locks import hold_lock
from tests.data.mini_store import ct_like
from tests.data.sources import (
    convert,
    convert_command,
    run,
    tree,
    write_index,
    write_nifti,
    write_source,
)

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_source(tmp_path_factory.mktemp("source"), cases=4, shape=(70, 96, 96))


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of an undisturbed conversion of `source`."""
    folder = tmp_path_factory.mktemp("store") / "s"
    assert convert(source, folder)[0] == 0
    return dict(tree(folder))


def start(source: Path, store: Path, *more: str) -> subprocess.Popen:
    command = convert_command(source, store, "convert.workers=2", *more)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        # A shell starts background jobs with Ctrl-C ignored, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def workers_of(process: subprocess.Popen) -> list[int]:
    """Child processes at all levels."""
    found, new = [], [process.pid]
    while new:
        listed = [Path(f"/proc/{pid}/task/{pid}/children") for pid in new]
        new = [int(child) for path in listed if path.exists() for child in path.read_text().split()]
        found += new
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < until, "the moment to kill never came"
        time.sleep(0.001)


def records(store: Path) -> int:
    return len(list((store / ".liverseg/records").glob("*.json")))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before anything": lambda store: (store / ".liverseg").is_dir(),
    "a case half written": lambda store: any(
        (store / ".liverseg/aside").glob("*/*/image/c/0/0/0/0")
    ),
    "a case in place, not yet recorded": lambda store: any((store / "cases").glob("liver_*")),
    "a case recorded": lambda store: records(store) >= 1,
    "all recorded": lambda store: records(store) >= 4,
    "the root under way": lambda store: (store / "SHA256SUMS").exists(),
}


def test_a_killed_conversion_continues_to_the_same_store(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "s"
    for moment in MOMENTS:
        process = start(source, store)
        wait_for(lambda: MOMENTS[moment](store), process)  # noqa: B023 - called before the next turn
        workers = workers_of(process)
        process.kill()
        process.communicate()
        wait_for_end(workers)
        if (store / "zarr.json").exists():
            assert run("verify", store)[0] == 0, moment
            shutil.rmtree(store)  # it was quicker than we; again from the start
        elif store.exists():
            with pytest.raises(UserError, match="has not finished; run it again"):
                CaseStore.open(store)
    assert convert(source, store)[0] == 0
    assert tree(store) == expected


def wait_for_end(pids: list[int]) -> None:
    """Workers end when their parent was killed."""
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in pids):
        assert time.monotonic() < until, "a worker outlives its killed parent"
        time.sleep(0.01)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_a_killed_worker_is_reported(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "s"
    process = start(source, store)
    wait_for(lambda: MOMENTS["a case half written"](store), process)
    owner = next((store / ".liverseg/aside").glob("liver_*/*")).name.split(".")[0]
    os.kill(int(owner), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a conversion worker died" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert convert(source, store)[0] == 0
    assert tree(store) == expected


def test_an_interrupted_conversion_reports_how_to_continue(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "s"
    process = start(source, store)
    wait_for(lambda: MOMENTS["a case half written"](store), process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    line, *rest = stderr.splitlines()
    assert line == "liverseg: interrupted; run the same line again to continue"
    # On a busy machine a worker may be interrupted in Python's own exit, which then writes this.
    assert not rest or rest[0].startswith("Exception ignored in: <module 'threading'"), rest
    assert convert(source, store)[0] == 0
    assert tree(store) == expected


def test_two_conversions_at_once_share_the_work(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "s"
    both = [start(source, store) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(result["converted"] for result in results) == 4
    assert tree(store) == expected


def test_a_conversion_with_other_settings_must_wait(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s"
    assert convert(source, store, "--shard", "0/4")[0] == 0
    with hold_lock(
        StoreLocks(store / ".liverseg").sessions, shared=True
    ):  # as a running conversion does
        assert convert(source, store, "--force", "convert.slab.policy=window")[0] == 2
    assert "another conversion writes it" in capsys.readouterr().err


def test_a_full_disk_gives_one_line_and_no_partial_case(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """A limit on file sizes replaces the full disk: writing fails in the middle of a case."""
    store = tmp_path / "s"
    done = subprocess.run(
        convert_command(source, store, "convert.workers=1"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"liverseg: {store}: File too large"
    assert not any((store / "cases").glob("liver_*"))
    assert convert(source, store)[0] == 0
    assert tree(store) == expected


# --- what changed is converted again, and nothing else ----------------------------------------------------------------


@pytest.fixture
def done(tmp_path: Path) -> tuple[Path, Path]:
    """A data set of three scans and its store, for tests that change them."""
    folder = write_source(tmp_path / "src", cases=3)
    assert convert(folder, tmp_path / "s")[0] == 0
    return folder, tmp_path / "s"


def converted(source: Path, store: Path, *more: str) -> int:
    code, result = convert(source, store, *more)
    assert code == 0
    return int(result["converted"])


def test_a_changed_scan_is_converted_again(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, store = done
    before = tree(store)
    assert converted(source, store) == 0
    assert tree(store) == before
    image, label = ct_like((70, 40, 44), seed=77)
    write_nifti(source / "imagesTr/liver_1.nii.gz", image)
    write_nifti(source / "labelsTr/liver_1.nii.gz", label)
    assert converted(source, store) == 1
    assert converted(source, tmp_path / "fresh") == 3
    assert tree(store) == tree(tmp_path / "fresh")


def test_the_root_is_removed_before_a_case_changes(done: tuple[Path, Path]) -> None:
    """A shard that replaces its case must not leave a root that describes the old case."""
    source, store = done
    image, label = ct_like((70, 40, 44), seed=78)
    for scan in ("liver_0", "liver_1"):
        write_nifti(source / f"imagesTr/{scan}.nii.gz", image)
        write_nifti(source / f"labelsTr/{scan}.nii.gz", label)
    process = start(source, store)
    wait_for(lambda: any((store / ".liverseg/aside").glob("*/*")), process)
    process.kill()
    process.communicate()
    with pytest.raises(UserError, match="has not finished"):
        CaseStore.open(store)


def test_a_damaged_record_is_not_used(done: tuple[Path, Path]) -> None:
    """The root is made from records: a changed digit would change the data set."""
    source, store = done
    before = tree(store)
    for number, change in enumerate(
        (lambda text: text.replace('"tumours": 2', '"tumours": 7'), lambda _: "[" * 100_000)
    ):
        record = store / f".liverseg/records/liver_{number}.json"
        changed = change(record.read_text())
        assert changed != record.read_text()
        record.write_text(changed)
    assert converted(source, store) == 2
    assert tree(store) == before


def test_a_missing_file_or_old_record_leads_to_conversion(done: tuple[Path, Path]) -> None:
    source, store = done
    before = tree(store)
    (store / "cases/liver_2/label/c/0/0/0").unlink()
    record = store / ".liverseg/records/liver_0.json"
    record.write_text(record.read_text().replace('"schema": ', '"schema": 99'))
    (store / ".liverseg/thumbnails/liver_1.png").unlink()
    assert converted(source, store) == 3
    assert tree(store) == before


def test_the_error_names_the_setting_that_differs(
    done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, store = done
    before = tree(store)
    assert convert(source, store, "convert.slab.policy=window", "convert.cleaning.order=1")[0] == 2
    stderr = capsys.readouterr().err
    assert 'convert.slab.policy was "fit", is "window"' in stderr
    assert "convert.cleaning.order was 3, is 1" in stderr
    assert convert(source, store, "convert.cleaning.standardise=false")[0] == 2
    assert "convert.cleaning.standardise was true, is false" in capsys.readouterr().err
    assert "--force" in stderr
    assert tree(store) == before


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("convert.cleaning.outliers=window", 0),  # clip and splits are in the root only
        ("convert.cleaning.standardise=false", 0),
        ("convert.splits.folds=2", 0),
        ("convert.cleaning.missing_label=unlabelled", 0),  # all have labels
        ("convert.slab.policy=window", 3),
        ("convert.cleaning.spacing_mm=[4,4,4]", 3),
    ],
)
def test_force_converts_the_affected_scans_only(
    done: tuple[Path, Path], tmp_path: Path, setting: str, expected: int
) -> None:
    source, store = done
    assert converted(source, store, "--force", setting) == expected
    assert converted(source, tmp_path / "fresh", setting) == 3
    assert tree(store) == tree(tmp_path / "fresh")


def test_a_spacing_table_affects_its_scans_only(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", cases=3)
    table = tmp_path / "spacing.csv"
    setting = f"convert.cleaning.spacing_table={table}"
    table.write_text("case,z_mm,y_mm,x_mm\nliver_0,2.5,1,1\n")
    assert converted(source, tmp_path / "s", setting) == 3
    assert CaseStore.open(tmp_path / "s").meta("liver_0").grid.spacing_mm == pytest.approx(
        (2.5, 1, 1)
    )
    table.write_text("case,z_mm,y_mm,x_mm\nliver_0,2.5,1,1\nliver_1,3,1,1\n")
    assert convert(source, tmp_path / "s", setting)[0] == 2  # the table has changed
    assert converted(source, tmp_path / "s", setting, "--force") == 1


def test_removed_scans_stay_in_the_store_without_force(
    done: tuple[Path, Path], tmp_path: Path
) -> None:
    source, store = done
    write_index(source, ["liver_0", "liver_2"])
    assert convert(source, store)[0] == 2
    assert CaseStore.open(store).case_ids == ("liver_0", "liver_1", "liver_2")
    assert converted(source, store, "--force") == 0
    assert converted(source, tmp_path / "fresh") == 2
    assert tree(store) == tree(tmp_path / "fresh")


def test_a_scan_that_ran_out_of_memory_is_converted_again(done: tuple[Path, Path]) -> None:
    source, store = done
    before = tree(store)
    record = store / ".liverseg/records/liver_0.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "final": False}))
    assert converted(source, store) == 1
    assert tree(store) == before


def test_a_split_file_is_read_before_the_first_scan(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = done
    settings = ["convert.splits.kind=file", f"convert.splits.file={tmp_path}/none.json"]
    assert main(["convert", str(source), str(tmp_path / "new"), *settings]) == 2
    (tmp_path / "p.csv").write_text("case,patient\nvolume-0,x\n")
    assert (
        main(
            [
                "convert",
                str(source),
                str(tmp_path / "new"),
                f"convert.splits.patients={tmp_path}/p.csv",
            ]
        )
        == 2
    )
    assert "no row names a scan of this data set" in capsys.readouterr().err
    assert not (tmp_path / "new" / "cases").exists()


def test_conversion_does_not_change_the_source(done: tuple[Path, Path]) -> None:
    source, _ = done
    assert sorted(p.name for p in source.iterdir()) == ["dataset.json", "imagesTr", "labelsTr"]
    assert np.array_equal(np.unique([p.suffix for p in (source / "imagesTr").iterdir()]), [".gz"])

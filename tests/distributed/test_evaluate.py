"""`liverseg evaluate` in real processes: the same bytes from any number of ranks, and after a kill at any point."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.volume import CANONICAL_ORIENTATION, Grid, Volume, plan_reorientation
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
    return [
        "evaluate",
        str(run.run),
        "--store",
        str(run.store),
        "--cases",
        ids,
        "--out",
        str(out),
        "--device",
        "cpu",
    ]


def results(out: Path) -> dict[str, bytes]:
    """Result files by name, without date and commit: both may change while the tests run."""
    environment = json.loads((out / "environment.json").read_text())
    found = {}
    for file in sorted(out.iterdir()):
        if file.is_file():
            content = file.read_bytes()
            for key in ("date", "commit"):
                content = content.replace(environment[key].encode(), key.encode())
            found[file.name] = content
    return found


def test_results_of_another_day_and_commit_are_the_same(tmp_path: Path) -> None:
    days = ("2026-01-31", "1" * 40), ("2026-02-01", "2" * 40 + "+")
    for number, (date, commit) in enumerate(days):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "environment.json").write_text(json.dumps({"date": date, "commit": commit}))
        (out / "report.html").write_text(f"<td>{date}</td><td>{commit}</td>")
    assert results(tmp_path / "0") == results(tmp_path / "1")
    (tmp_path / "1" / "report.html").write_text("<td>another score</td>")
    assert results(tmp_path / "0") != results(tmp_path / "1")


def ledger(out: Path) -> list[str]:
    folder = out / "ledger"
    return sorted(file.stem for file in folder.glob("*.json")) if folder.is_dir() else []


# 5 cases cannot be divided by 3. Other tests run 2 ranks (killed, damaged case) and 4 (one scan).
@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)]
)
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
    assert "evaluate: 5/5, " in done.stderr  # the cases of all ranks
    assert json.loads(last[0])["n_cases"] == 5


def test_one_scan_shared_by_all_ranks_gives_the_same_bytes(
    small_run: SmallRun, tmp_path: Path
) -> None:
    """Fewer scans than ranks: their windows are divided; masks and reports stay what one process makes."""
    run = [
        "--store",
        str(small_run.store),
        "--cases",
        "liver_1",
        "--device",
        "cpu",
        "--save-masks",
        "--source",
    ]
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
    """All descendants of a process (torchrun starts each worker in its own session)."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


def test_killed_and_continued_gives_the_same_bytes(
    small_run: SmallRun,
    reference: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
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
    shard = max(
        (broken.store / "cases" / "liver_2" / "image").rglob("*"), key=lambda p: p.stat().st_size
    )
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
    shard.unlink()  # users would convert the case again; here the intact copy is restored
    shutil.copy2(small_run.store / shard.relative_to(broken.store), shard)
    assert main([*arguments(broken, out), "--threads", "1"]) == 0
    assert results(out) == reference


def test_whole_scans_masks_and_parts(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run.run, run)
    store = CaseStore.open(small_run.store)
    common = [
        "evaluate",
        str(run),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]  # the store is the one of the run's config
    assert main([*common, "--source", str(small_run.source), "--save-masks", "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["out"] == str(run / "evaluation")
    assert str(run / "evaluation" / "report.html") in printed
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary["details"]["input"] == "scan"
    assert (
        summary["calibration"]["liver"]["n_cases"]
        == summary["calibration"]["tumour"]["n_cases"]
        == 2
    )
    assert summary["n_cases"] == len(store.ids("test"))
    masks = (run / "evaluation" / "masks").glob("*.nii.gz")
    assert sorted(p.name for p in masks) == [f"{i}.nii.gz" for i in store.ids("test")]
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
        main(
            [
                "score",
                str(run / "evaluation" / "masks"),
                str(truth),
                "--out",
                str(tmp_path / "s"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    evaluated = json.loads((run / "evaluation" / "summary.json").read_text())
    scored = json.loads((tmp_path / "s" / "summary.json").read_text())
    for key in ("dice_per_case", "dice_global", "assd_mm", "hd95_mm"):
        assert evaluated["liver"][key] == pytest.approx(scored["liver"][key], rel=1e-6)


def test_masks_are_those_of_the_scores_beside_them(small_run: SmallRun, tmp_path: Path) -> None:
    """Also where an evaluation without masks stood between."""
    common = ["evaluate", str(small_run.run), "--device", "cpu", "--threads", "1", "--part", "test"]
    low, high = "inference.tumour_threshold=0.05", "inference.tumour_threshold=0.9"
    for out, *words in (
        ("a", low, "--save-masks"),
        ("a", high),
        ("a", high, "--save-masks"),
        ("b", high, "--save-masks"),
    ):
        assert main([*common, *words, "--out", str(tmp_path / out)]) == 0
    repeated, fresh = (sorted((tmp_path / out / "masks").glob("*.nii.gz")) for out in ("a", "b"))
    assert repeated
    assert [mask.read_bytes() for mask in repeated] == [mask.read_bytes() for mask in fresh]


def test_slabs_of_a_scan_are_post_processed_together(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lobe may hang on the rest of the liver in the next slab only."""

    grids: list[Grid] = []

    def lobes(target: Grid) -> np.ndarray:
        """Two columns through all slices, which meet in some that only the first slab has."""
        slices = np.zeros((target.shape[0], 3))
        slices[:, 0] = np.arange(target.shape[0])
        at = grids[0].index_of(target.world_mm(slices))[:, 0]
        mask = np.zeros(target.shape, bool)
        mask[:, 10:30, 10:30] = mask[:, 40:50, 10:30] = True
        mask[(at > 5) & (at < 15), 10:50, 10:30] = True
        return mask

    def restored(
        image: Volume, target: Grid, *_: object
    ) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
        grids.append(image.grid)
        turned, _, _ = plan_reorientation(target, image.grid.orientation)
        slices = np.zeros((turned.shape[0], 3))
        slices[:, 0] = np.arange(turned.shape[0])
        at = image.grid.index_of(turned.world_mm(slices))[:, 0]
        liver = lobes(turned) & ((at > -0.5) & (at < image.grid.shape[0] - 0.5))[:, None, None]
        whole = tuple(slice(0, edge) for edge in turned.shape)
        yield whole, torch.from_numpy(np.stack([0.9 * liver, 0.0 * liver]).astype(np.float32))

    store = tmp_path / "tiles.zarr"
    coarse = [
        "convert.cleaning.spacing_mm=[1.5,8,8]",
        "convert.splits.test_fraction=0.4",
        "convert.splits.folds=2",
    ]
    tiled = ["convert.slab.policy=tile", "convert.workers=1"]
    assert main(["convert", str(small_run.source), str(store), *coarse, *tiled]) == 0
    # By import_module: the package exports a function with the name of the module.
    module = importlib.import_module("liverseg_dist.inference.segment_scan")
    monkeypatch.setattr(module, "resample_probabilities", restored)
    tiles, out = ",".join(f"liver_2_tile{n}" for n in range(3)), tmp_path / "out"
    words = [
        "--store",
        str(store),
        "--cases",
        tiles,
        "--out",
        str(out),
        "--save-masks",
        "--device",
        "cpu",
    ]
    assert main(["evaluate", str(small_run.run), *words, "inference.largest_component=true"]) == 0
    assert len(grids) == 3
    mask = read_nifti(out / "masks" / "liver_2.nii.gz").reoriented(CANONICAL_ORIENTATION)
    covered = np.flatnonzero((mask.voxels > 0).any((1, 2)))
    tall = (slice(covered.min(), covered.max() + 1), ...)
    assert np.array_equal(mask.voxels[tall] > 0, lobes(mask.grid)[tall])


def test_an_ensemble_is_not_scored_on_its_training_cases(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.zarr"
    coarse = [
        "convert.cleaning.spacing_mm=[5,8,8]",
        "convert.splits.test_fraction=0",
        "convert.splits.folds=2",
    ]
    assert main(["convert", str(small_run.source), str(store), *coarse, "convert.workers=1"]) == 0
    runs = [tmp_path / f"fold_{fold}" for fold in (0, 1)]
    for fold, run in enumerate(runs):
        shutil.copytree(small_run.run, run)
        config = yaml.safe_load((run / "config.yaml").read_text())
        intensity = CaseStore.open(store).intensity.model_dump()
        config["data"] |= {"fold": fold, "store": str(store), "intensity": intensity}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = [str(runs[0]), "--ensemble", str(runs[1]), "--store", str(store), "--device", "cpu"]
    for command in ("evaluate", "postprocess"):
        capsys.readouterr()
        assert main([command, *words]) == 2
        assert "fold_1 was trained on liver_" in capsys.readouterr().err
    assert main(["evaluate", *words, "--part", "validation"]) == 0
    assert "warning: fold_1 was trained on" in capsys.readouterr().err
    (summary,) = (runs[0] / "evaluation").rglob("summary.json")
    assert str(tmp_path) not in json.loads(summary.read_text())["details"]["note"]
    assert "fold_1 was trained on" in json.loads(summary.read_text())["details"]["note"]
    elsewhere = [word if word != str(store) else str(small_run.store) for word in words]
    ids = ",".join(CaseStore.open(small_run.store).case_ids[:1])
    assert main(["evaluate", *elsewhere, "--cases", ids, "--out", str(tmp_path / "elsewhere")]) == 0
    assert "was trained on" not in capsys.readouterr().err, (
        "its training cases in another store are unknown"
    )


def test_mistakes_are_reported_in_one_line(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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

"""Unsuitable scans are refused, or segmented with a warning."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.config import load_settings
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.inference.scan_checks import Overview, check_mask, compare_with_training
from liverseg_dist.volume import Grid, Volume
from tests.distributed.launch import torchrun
from tests.inference.small_run import SmallRun

ONE_THREAD = ("--device", "cpu", "--threads", "1")
Change = Callable[[np.ndarray, nib.Nifti1Header, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(voxels x y z, header to change, affine) -> (voxels, affine)."""


def with_values(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda voxels, header, affine: (change(voxels.astype(np.float32)), affine)


def mostly_nan(voxels: np.ndarray) -> np.ndarray:
    voxels[:, :, : int(0.45 * voxels.shape[2])] = np.nan
    return voxels


def mr_like(voxels: np.ndarray) -> np.ndarray:
    return np.clip(voxels + 200, 0, 600).round()


REFUSED: dict[str, tuple[Change, str]] = {
    "offset": (with_values(lambda v: v + 1024), "hu_offset_missing"),
    "mr": (with_values(mr_like), "not_ct_like"),
    "unit_range": (with_values(lambda v: (np.clip(v, -1000, 1000) + 1000) / 2000), "not_ct_like"),
    "grey": (with_values(lambda v: (np.clip(v, -160, 240) + 160) * 255 / 400), "not_ct_like"),
    "constant": (with_values(lambda v: v * 0 + 7), "constant_image"),
    "nan": (with_values(mostly_nan), "too_many_broken_voxels"),
    "three_slices": (lambda v, h, a: (v[:, :, 20:23], a), "very_few_slices"),
}


def shrunk(
    voxels: np.ndarray, header: nib.Nifti1Header, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Like a header in a wrong unit. In cm, the 58 slices would become 3 and be refused."""
    return voxels, np.diag([0.15, 0.15, 0.15, 1]) @ affine


def identity(
    voxels: np.ndarray, header: nib.Nifti1Header, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return voxels, np.diag([-1.0, -1, 1, 1])


def mirrored(
    voxels: np.ndarray, header: nib.Nifti1Header, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return voxels, np.diag([-1.0, 1, 1, 1]) @ affine


WARNED: dict[str, tuple[Change, str]] = {
    "shrunk": (shrunk, "implausible_voxel_size"),
    "identity": (identity, "identity_affine"),
    "mirrored": (mirrored, "liver_on_the_left"),
    "air": (
        with_values(lambda v: np.where(np.indices(v.shape)[0] % 7 == 0, -990, -1000)),
        "intensity_unlike_training",
    ),
    "padded": (with_values(lambda v: np.where(v < -900, -3024, v)), "padding_values"),
}


@pytest.fixture(scope="module")
def scans(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good scan and one of each kind above."""
    folder = tmp_path_factory.mktemp("scans")
    good = small_run.source / "imagesTr" / "liver_1.nii.gz"
    (folder / "good.nii.gz").write_bytes(good.read_bytes())
    for name, (change, _) in (REFUSED | WARNED).items():
        image = nib.as_closest_canonical(nib.load(good))
        voxels, affine = change(np.asarray(image.dataobj), image.header, image.affine)
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), folder / f"{name}.nii.gz")
    image = nib.load(good)
    moved = image.affine.copy()
    moved[:3, 3] += 30
    image.set_qform(moved, code=1)
    nib.save(image, folder / "moved.nii.gz")
    return folder


def predict(run: Path, *arguments: object, out: Path) -> int:
    return main(["predict", str(run), *map(str, arguments), "--out", str(out), *ONE_THREAD])


def read_table(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "volumes.csv", newline="") as stream:
        return {row["scan"]: row for row in csv.DictReader(stream)}


def test_each_kind_of_unsuitable_scan_is_refused_or_warned_about(
    small_run: SmallRun, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scans that conversion excludes are refused; warnings are printed and stored."""
    assert predict(small_run.run, scans, "--json", out=tmp_path) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    table = read_table(tmp_path)
    assert set(result["refused"]) == set(REFUSED)
    assert set(result["failed"]) == set(REFUSED)
    for name, (_, code) in REFUSED.items():
        assert table[name]["status"] == "refused"
        assert code in table[name]["warnings"]
        assert table[name]["liver_ml"] == table[name]["mask"] == ""
        assert not (tmp_path / f"{name}.nii.gz").exists()
        assert f"{name}.nii.gz: refused:" in printed.err
        assert "--force" in table[name]["error"]
        entry = json.loads((tmp_path / "ledger" / f"{name}.json").read_text())
        assert code in [finding["code"] for finding in entry["details"]["findings"]]
    for name, code in {
        **{n: c for n, (_, c) in WARNED.items()},
        "moved": "qform_sform_disagree",
    }.items():
        assert table[name]["status"] == "done"
        assert code in table[name]["warnings"], name
        assert code in result["warnings"][name]
        assert f"warning: {name}: " in printed.err
        assert (tmp_path / f"{name}.nii.gz").is_file()
        entry = json.loads((tmp_path / "ledger" / f"{name}.json").read_text())
        assert code in [finding["code"] for finding in entry["scores"]["findings"]]
        assert not entry["scores"]["forced"]
    assert table["good"]["status"] == "done"
    assert table["good"]["error"] == ""
    assert "Traceback" not in printed.err
    assert not (tmp_path / "errors").exists()


def test_a_forced_scan_is_marked_and_never_reused_without_force(
    small_run: SmallRun, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, mask = scans / "offset.nii.gz", tmp_path / "offset.nii.gz"
    # All scans are refused, but the call itself is correct: 1, not 2.
    assert predict(small_run.run, scan, out=tmp_path) == 1
    assert not mask.exists()
    assert predict(small_run.run, scan, "--force", "--json", out=tmp_path) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["forced"] == ["offset"]
    assert "(forced)" in printed.out
    assert "because of --force" in printed.err
    row = read_table(tmp_path)["offset"]
    assert (row["status"], row["mask"]) == ("forced", "offset.nii.gz")
    assert "hu_offset_missing" in row["warnings"]
    written = mask.stat().st_mtime_ns
    assert predict(small_run.run, scan, "--force", out=tmp_path) == 0
    assert "done before" in capsys.readouterr().out
    assert mask.stat().st_mtime_ns == written
    assert predict(small_run.run, scan, out=tmp_path) == 1
    assert read_table(tmp_path)["offset"]["status"] == "refused"


def test_warnings_are_repeated_for_finished_scans(
    small_run: SmallRun, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert predict(small_run.run, scans / "shrunk.nii.gz", out=tmp_path) == 0
        printed = capsys.readouterr()
        assert "warning: shrunk: voxels of" in printed.err
    assert "done before" in printed.out


def test_the_table_is_in_natural_order(small_run: SmallRun, tmp_path: Path) -> None:
    content = (small_run.source / "imagesTr" / "liver_1.nii.gz").read_bytes()
    # One good scan: without any, no table is written.
    (tmp_path / "liver_1.nii.gz").write_bytes(content)
    for number in (2, 10):
        (tmp_path / f"liver_{number}.nii.gz").write_bytes(content[:3000])
    predict(small_run.run, tmp_path, out=tmp_path / "out")
    assert list(read_table(tmp_path / "out")) == ["liver_1", "liver_2", "liver_10"]


@pytest.mark.distributed
def test_all_ranks_refuse_a_scan_that_they_share(small_run: SmallRun, tmp_path: Path) -> None:
    """Both ranks share the large file: both refuse it, one prints why, and the next is done."""
    good = small_run.source / "imagesTr" / "liver_1.nii.gz"
    image = nib.load(good)
    large = tmp_path / "large.nii"
    nib.save(
        nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float32) + 1024, image.affine), large
    )
    out, line = tmp_path / "out", ("-m", "liverseg_dist", "predict", str(small_run.run))
    done = torchrun(
        2, *line, str(large), str(good), "--out", str(out), "--device", "cpu", "--threads", "1"
    )
    assert done.returncode == 1
    table = read_table(out)
    assert (table["large"]["status"], table["liver_1"]["status"]) == ("refused", "done")
    assert done.stderr.count("large.nii: refused:") == 1
    assert not (out / "errors").exists()
    forced = torchrun(
        2,
        *line,
        str(large),
        str(good),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--force",
    )
    assert forced.returncode == 0, forced.stderr
    assert read_table(out)["large"]["status"] == "forced"


# --- evaluate and postprocess ---------------------------------------------------------------------


def make_source_with_offset(small_run: SmallRun, folder: Path) -> tuple[Path, list[str]]:
    """The data set with a wrong HU offset in all scans but the first of the validation set."""
    source = folder / "source"
    (source / "imagesTr").mkdir(parents=True)
    (source / "dataset.json").write_text((small_run.source / "dataset.json").read_text())
    ids = list(CaseStore.open(small_run.store).ids("validation", 0))
    for name in ("labelsTr", "imagesTs"):
        if (small_run.source / name).exists():
            (source / name).symlink_to(small_run.source / name)
    for file in (small_run.source / "imagesTr").glob("*.nii.gz"):
        image = nib.load(file)
        offset = 0 if file.name == f"{ids[0]}.nii.gz" else 1024
        voxels = (np.asarray(image.dataobj) + offset).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, image.affine), source / "imagesTr" / file.name)
    return source, ids


def test_evaluate_refuses_scans_that_convert_excludes(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, ids = make_source_with_offset(small_run, tmp_path)
    store, out = str(small_run.store), str(tmp_path / "out")
    parts = [
        "--source",
        str(source),
        "--cases",
        ",".join(ids),
        "--store",
        store,
        "--out",
        out,
        "--json",
        *ONE_THREAD,
    ]
    assert len(ids) > 1
    assert main(["evaluate", str(small_run.run), *parts]) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["n_cases"] == 1
    assert sorted(result["failed"]) == sorted(ids[1:])
    assert all("1024 was not subtracted" in reason for reason in result["failed"].values())
    assert main(["evaluate", str(small_run.run), *parts, "--force"]) == 0
    printed = capsys.readouterr()
    assert "because of --force" in printed.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert f"{ids[1]} (hu_offset_missing" in summary["details"]["note"]
    # A forced score is not reused without --force.
    assert main(["evaluate", str(small_run.run), *parts]) == 1


# --- comparison with the training data, and checks of the mask ------------------------------------


def settings_of(**data: object) -> object:
    intensity = "data.intensity={lower_hu: -20, upper_hu: 200, mean: 0.5, std: 0.2}"
    return load_settings([], ["data.spacing_mm=[3,1,1]", intensity])


GRID = Grid((40, 50, 60), np.diag([5.0, 5.0, 5.0, 1.0]))


def codes(findings: list) -> list[str]:
    return [finding.code for finding in findings]


def test_scans_that_differ_from_the_training_data_give_warnings() -> None:
    tissue = Volume(
        np.full(GRID.shape, 50, np.int16), Grid(GRID.shape, np.diag([2.0, 2.0, 5.0, 1.0]))
    )
    assert codes(compare_with_training(tissue, settings_of())) == []  # type: ignore[arg-type]
    assert codes(compare_with_training(Volume(tissue.voxels, GRID), settings_of())) == [  # type: ignore[arg-type]
        "coarser_than_training"
    ]
    bone = tissue.with_voxels(tissue.voxels + np.int16(700))
    assert codes(compare_with_training(bone, settings_of())) == ["intensity_unlike_training"]  # type: ignore[arg-type]


def check_box_mask(box: tuple[slice, slice, slice], hu: int = 60, label: int = 1) -> list[str]:
    image, mask = np.full(GRID.shape, -1000, np.int16), np.zeros(GRID.shape, np.uint8)
    image[:, 5:45, 5:55] = 0
    image[box], mask[box] = hu, label
    scan = Volume(image, GRID)
    return codes(check_mask(Volume(mask, GRID), Overview.from_scan(scan), settings_of()))  # type: ignore[arg-type]


def test_implausible_masks_give_warnings() -> None:
    """RAS voxels: x runs to the right of the patient; 125 mm edges are 1950 ml."""
    liver = (slice(8, 33), slice(12, 37), slice(30, 55))
    assert check_box_mask(liver) == []
    assert check_box_mask((slice(0, 0), slice(0, 0), slice(0, 0))) == ["liver_volume"]
    assert check_box_mask((slice(8, 12), slice(12, 16), slice(50, 54))) == ["liver_volume"]
    assert check_box_mask((slice(0, 25), slice(12, 37), slice(30, 55))) == ["liver_cut"]
    assert check_box_mask((slice(15, 40), slice(12, 37), slice(30, 55))) == ["liver_cut"]
    assert check_box_mask((slice(8, 33), slice(12, 37), slice(5, 28))) == ["liver_on_the_left"]
    assert check_box_mask(liver, hu=250) == ["liver_hu_unlike_training"]
    assert check_box_mask(liver, hu=900) == ["liver_hu_implausible"]
    assert check_box_mask(liver, label=2) == ["tumour_outside_liver"]


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PIR"])
def test_overview_is_canonical_for_any_orientation(orientation: str) -> None:
    shape = (300, 20, 260)
    voxels = np.arange(np.prod(shape)).reshape(shape) % 30_000
    scan = Volume(voxels.astype(np.int16), Grid(shape, np.diag([0.7, 0.7, 2.0, 1.0]))).reoriented(
        orientation
    )
    overview = Overview.from_scan(scan)
    assert max(overview.image.shape) <= 256
    np.testing.assert_array_equal(overview.subsample_mask(scan).voxels, overview.image.voxels)
    canonical = scan.reoriented("RAS")
    z, y, x = overview.steps
    np.testing.assert_allclose(
        overview.image.grid.world_mm(np.array([1, 1, 1])), canonical.grid.world_mm([z, y, x])
    )


@pytest.mark.real_mini
def test_real_scans(small_run: SmallRun, real_mini: Path, tmp_path: Path) -> None:
    """The 3-slice scan is refused; a real CT is segmented with warnings (phantom training)."""
    scans = [real_mini / "imagesTr" / f"{name}.nii.gz" for name in ("liver_902", "liver_900")]
    assert predict(small_run.run, *scans, out=tmp_path) == 1
    table = read_table(tmp_path)
    assert table["liver_902"]["status"] == "refused"
    assert table["liver_900"]["status"] == "done"
    assert read_nifti(tmp_path / "liver_900.nii.gz", "label").shape == read_nifti(scans[1]).shape

"""Conversion end to end: stored voxels, findings, and independence of workers and executors."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.commands.main import main
from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.audit import audit_page
from liverseg_dist.data.conversion.case_records import CaseRecord
from liverseg_dist.data.conversion.foreground_samples import sample_foreground
from liverseg_dist.data.conversion.root_metadata import group_patients
from liverseg_dist.data.preprocessing.intensity_statistics import HuHistogram
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.labels import LITS_SCHEME
from tests.data.mini_store import ct_like
from tests.data.sources import (
    RAS,
    SHAPE,
    convert,
    convert_command,
    run,
    tree,
    write_index,
    write_nifti,
    write_source,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labelled scans and one without label. Read only."""
    return write_source(tmp_path_factory.mktemp("source"), cases=4, test=1)


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, converted undisturbed by one worker. Read only."""
    folder = tmp_path_factory.mktemp("store") / "store.zarr"
    assert convert(source, folder)[0] == 0
    return folder


def canonical(path: Path) -> np.ndarray:
    """A file's voxels in RAS as z, y, x, by nibabel."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj).T


def codes(store: Path, scan: str) -> set[str]:
    return {finding["code"] for finding in CaseStore.open(store).audit[scan]["findings"]}


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_the_slab_is_the_scan_voxel_for_voxel(source: Path, store: Path) -> None:
    opened = CaseStore.open(store)
    assert opened.case_ids == ("liver_0", "liver_1", "liver_2", "liver_3")
    for case_id in opened.case_ids:
        meta, image, label = opened.meta(case_id), opened.image(case_id), opened.label(case_id)
        assert (image.dtype, label.dtype, image.shape) == (np.int16, np.uint8, (1, 64, *SHAPE[1:]))
        first = round((meta.grid.affine[2, 3] - meta.source_grid.affine[2, 3]) / 2.0)
        scan, truth = (
            canonical(source / f"{part}Tr" / f"{case_id}.nii.gz") for part in ("images", "labels")
        )
        assert np.array_equal(image[0], scan[first : first + 64])
        assert np.array_equal(label, truth[first : first + 64])
        assert meta.class_voxels == tuple(np.bincount(label.ravel(), minlength=3))
        assert meta.lesions["tumour"] == ndimage.label(label == 2, np.ones((3, 3, 3)))[1] == 2
        assert (meta.labelled, meta.parent, meta.patient, meta.valid_slices) == (
            True,
            case_id,
            case_id,
            (0, 64),
        )


def test_the_source_label_is_stored_on_the_scans_grid(source: Path, store: Path) -> None:
    opened = CaseStore.open(store)
    file = nib.load(source / "labelsTr" / "liver_1.nii.gz")
    assert np.array_equal(opened.source_label("liver_1"), np.asarray(file.dataobj).T)
    assert np.array_equal(opened.meta("liver_1").source_grid.affine, file.affine)


def test_a_fitted_slab_has_the_right_world_position(tmp_path: Path) -> None:
    """A liver taller than 64 slices: a ramp in HU along z shows where each new slice was taken."""
    label = np.zeros((130, 24, 24), np.uint8)
    label[20:120, 6:18, 6:18] = 1
    image = np.broadcast_to(
        (np.arange(130, dtype=np.int16) * 4 - 300)[:, None, None], label.shape
    ).copy()
    write_nifti(tmp_path / "imagesTr/liver_0.nii.gz", image, RAS)
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label, RAS)
    write_index(tmp_path, ["liver_0"])
    assert convert(tmp_path, tmp_path / "s", "convert.slab.margin_mm=10")[0] == 0
    opened = CaseStore.open(tmp_path / "s")
    grid = opened.meta("liver_0").grid
    z_mm = grid.world_mm(np.stack([np.arange(64), np.zeros(64), np.zeros(64)], axis=1))[:, 2]
    assert grid.spacing_mm[0] == pytest.approx(110 * 2 / 64)  # liver and 10 mm on each side
    np.testing.assert_allclose(opened.image("liver_0")[0, :, 12, 12], z_mm / 2 * 4 - 300, atol=0.51)


@pytest.mark.parametrize("policy", ["fit", "tile"])
def test_a_label_stays_on_its_liver_when_scans_are_cropped(
    source: Path, tmp_path: Path, policy: str
) -> None:
    """Cropped to the body and filled with air outside, the store shows the same voxels at the same places."""
    body = [
        "convert.cleaning.body_margin_mm=0",
        "convert.cleaning.outside_body=air",
        f"convert.slab.policy={policy}",
    ]
    assert convert(source, tmp_path / "cropped", *body)[0] == 0
    assert convert(source, tmp_path / "whole", f"convert.slab.policy={policy}")[0] == 0
    cropped, whole = CaseStore.open(tmp_path / "cropped"), CaseStore.open(tmp_path / "whole")
    for case_id in whole.case_ids:
        few, all_ = cropped.meta(case_id).grid, whole.meta(case_id).grid
        start = np.rint(all_.index_of(few.world_mm(np.zeros(3)))).astype(int)
        box = tuple(slice(s, s + n) for s, n in zip(start, few.shape, strict=True))
        assert few.shape[1] < all_.shape[1]
        assert np.array_equal(cropped.label(case_id), whole.label(case_id)[box])
        liver = cropped.label(case_id) > 0
        assert np.array_equal(cropped.image(case_id)[0][liver], whole.image(case_id)[0][box][liver])


def test_intensity_statistics_exclude_the_test_set(source: Path, tmp_path: Path) -> None:
    """nnU-Net's percentiles of liver voxels, computed by numpy from the files."""
    assert (
        convert(
            source, tmp_path / "s", "convert.splits.folds=2", "convert.splits.test_fraction=0.25"
        )[0]
        == 0
    )
    opened = CaseStore.open(tmp_path / "s")
    (held_out,) = opened.ids("test")
    values = []
    for case_id in set(opened.case_ids) - {held_out}:
        image, label = (
            canonical(source / f"{p}Tr" / f"{case_id}.nii.gz") for p in ("images", "labels")
        )
        values.append(image[label > 0])
    foreground = np.concatenate(values).astype(float)
    lower, upper = np.percentile(foreground, [0.5, 99.5])
    scaled = (np.clip(foreground, lower, upper) - lower) / (upper - lower)
    intensity = opened.intensity
    assert (intensity.lower_hu, intensity.upper_hu) == pytest.approx((lower, upper))
    assert (intensity.mean, intensity.std) == pytest.approx((scaled.mean(), scaled.std()))
    assert opened.root["fingerprint"]["voxels"] == len(foreground)


def test_foreground_samples_match_the_label(store: Path) -> None:
    opened = CaseStore.open(store)
    for case_id in opened.case_ids:
        rows, label = opened.foreground(case_id), opened.label(case_id)
        assert rows.dtype == np.int16
        assert (label[tuple(rows[:, 2:].T)] == rows[:, 0]).all()
        assert rows[:, :2].tolist() == sorted(rows[:, :2].tolist())
        components, _ = ndimage.label(label == 2, np.ones((3, 3, 3)))
        tumour = rows[rows[:, 0] == 2]
        at = components[tuple(tumour[:, 2:].T)]
        assert (
            len({(number, component) for number, component in zip(tumour[:, 1], at, strict=True)})
            == 2
        )  # one to one


def test_foreground_samples_are_bounded_and_leave_no_tumour_out() -> None:
    label = np.ones((64, 60, 60), np.uint8)
    label[2:40, 2:40, 2:40] = 2  # touches all others only by a corner, or not at all
    label[50, 50, 50] = 2
    label[50, 10, 10:20] = 2
    rows, lesions = sample_foreground(label, LITS_SCHEME, 1000)
    per_tumour = [int((rows[:, 1] == n).sum()) for n in (1, 2, 3)]
    assert lesions == {"tumour": 3}
    assert (rows[:, 0] == 1).sum() == 1000
    assert sorted(per_tumour)[:2] == [1, 10]
    assert 990 <= sorted(per_tumour)[2] <= 1000
    spread = rows[rows[:, 0] == 1][:, 2]
    assert spread.min() == 0
    assert spread.max() == 63
    empty, none = sample_foreground(np.zeros((64, 4, 4), np.uint8), LITS_SCHEME, 10)
    assert (empty.shape, none) == ((0, 5), {"tumour": 0})


def test_no_patient_data_and_no_path_is_stored(tmp_path: Path) -> None:
    image, label = ct_like(SHAPE, 0)
    secret = {"descrip": b"DOE^JANE 19700101", "db_name": b"MRN0815", "intent_name": b"Dr Who"}
    for part, voxels in (("images", image), ("labels", label)):
        write_nifti(tmp_path / "hospital_7" / f"{part}Tr" / "liver_0.nii.gz", voxels, **secret)
    write_index(tmp_path / "hospital_7", ["liver_0"])
    (tmp_path / "who.csv").write_text("case,patient\nliver_0,DOE^JANE\n")
    code, _ = convert(
        tmp_path / "hospital_7", tmp_path / "s", f"convert.splits.patients={tmp_path}/who.csv"
    )
    assert code == 0
    for path in (p for p in (tmp_path / "s").rglob("*") if p.is_file()):
        content = path.read_bytes()
        for word in (b"DOE", b"JANE", b"MRN0815", b"Dr Who", b"hospital_7", str(tmp_path).encode()):
            assert word not in content, f"{path} tells {word!r}"


# --- odd scans --------------------------------------------------------------------------------------------------------


def test_without_a_label_tiles_are_kept_and_never_trained_on(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "s", "convert.cleaning.missing_label=unlabelled")[0] == 0
    opened = CaseStore.open(tmp_path / "s")
    tiles = [case_id for case_id in opened.case_ids if opened.meta(case_id).parent == "liver_4"]
    assert tiles == ["liver_4_tile0", "liver_4_tile1"]  # 70 slices
    assert not any(opened.meta(tile).labelled for tile in tiles)
    assert (opened.label("liver_4_tile0") == 255).all()
    assert not {*opened.ids("train", "all"), *opened.ids("test")} & set(tiles)
    assert run("verify", tmp_path / "s")[0] == 0


def test_tiles_together_contain_the_scan(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "s", "convert.slab.policy=tile")[0] == 0
    opened = CaseStore.open(tmp_path / "s")
    label = canonical(source / "labelsTr" / "liver_0.nii.gz")
    seen = np.zeros_like(label)
    for tile in (c for c in opened.case_ids if opened.meta(c).parent == "liver_0"):
        meta = opened.meta(tile)
        first = round(float(meta.source_grid.index_of(meta.grid.world_mm(np.zeros(3)))[0]))
        seen[first : first + 64] = opened.label(tile)
        assert opened.source_label(tile).shape == label.shape
    assert np.array_equal(seen, label)


def test_infinite_voxels_reach_neither_the_store_nor_its_json(tmp_path: Path) -> None:
    image, label = ct_like(SHAPE, 0)
    broken = image.astype(np.float32)
    broken[10, 5, 5:9] = [np.nan, np.inf, -np.inf, 0.4]
    write_nifti(tmp_path / "imagesTr/liver_0.nii.gz", broken)
    write_nifti(tmp_path / "labelsTr/liver_0.nii.gz", label)
    write_index(tmp_path, ["liver_0"])
    assert convert(tmp_path, tmp_path / "s")[0] == 0

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for path in (tmp_path / "s").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    assert {"broken_voxels", "stored_type"} <= codes(tmp_path / "s", "liver_0")
    stored = CaseStore.open(tmp_path / "s").image("liver_0")
    assert stored.min() >= -1024


def test_a_corrupt_scan_is_quarantined_and_others_are_converted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_source(tmp_path / "bad", cases=3)
    good = (folder / "imagesTr/liver_1.nii.gz").read_bytes()
    (folder / "imagesTr/liver_1.nii.gz").write_bytes(good[: len(good) // 2])
    code, result = convert(folder, tmp_path / "s")
    assert code == 1
    assert "could not be converted: liver_1; the rest is done" in capsys.readouterr().err
    assert result["counts"] == {"kept": 2, "quarantined": 1}
    assert "truncated" in codes(tmp_path / "s", "liver_1")
    opened = CaseStore.open(tmp_path / "s")
    assert opened.case_ids == ("liver_0", "liver_2")
    (folder / "imagesTr/liver_1.nii.gz").write_bytes(good)  # mended: only that scan is converted
    code, result = convert(folder, tmp_path / "s")
    assert (code, result["converted"]) == (0, 1)
    assert convert(folder, tmp_path / "fresh")[0] == 0
    assert tree(tmp_path / "s") == tree(tmp_path / "fresh")


def test_a_stored_file_that_has_changed_is_converted_again(
    source: Path, store: Path, tmp_path: Path
) -> None:
    """A failing disk or a crash can change a stored file."""
    damaged = tmp_path / "s"
    shutil.copytree(store, damaged)
    shard = damaged / "cases/liver_2/image/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.truncate(damaged / "cases/liver_1/label/c/0/0/0", 100)
    code, result = convert(source, damaged)
    assert (code, result["converted"]) == (0, 2)
    assert tree(damaged) == tree(store)


def test_duplicates_belong_to_one_patient() -> None:
    def record(scan: str, voxels: str) -> CaseRecord:
        return CaseRecord(scan, True, "", "", "kept", [], voxel_sha256=voxels)

    records = [
        record("liver_0", "aa"),
        record("liver_1", "bb"),
        record("liver_2", "aa"),
        record("liver_28", "cc"),
    ]
    assert group_patients(records, ConvertConfig())["liver_2"] == "liver_0"
    records.append(record("3Dircadb1.1", "dd"))  # known to be the patient of liver_28
    patients = group_patients(records, ConvertConfig())
    assert patients["liver_28"] == patients["3Dircadb1.1"]
    assert len(set(patients.values())) == 3


def test_a_chain_of_duplicates_and_names_is_one_patient(tmp_path: Path) -> None:
    """a and b by name, b and c by their voxels: all three."""
    (tmp_path / "p.csv").write_text("case,patient\na,Jane\nb,Jane\nc,Joan\nd,Joan\ne,Jim\n")
    records = [
        CaseRecord(n, True, "", "", "kept", [], voxel_sha256=v)
        for n, v in zip("abcde", "12234", strict=True)
    ]
    config = ConvertConfig.model_validate({"splits": {"patients": tmp_path / "p.csv"}})
    assert group_patients(records, config) == {"a": "a", "b": "a", "c": "a", "d": "a", "e": "e"}


def test_labelled_scans_of_the_given_test_set_stay_in_it(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", cases=4)
    index = json.loads((source / "dataset.json").read_text())
    index["test"] = [index["training"].pop(1)]
    (source / "dataset.json").write_text(json.dumps(index))
    for splits in ([], ["--splits", "nnunet"]):
        code, _ = convert(source, tmp_path / f"s{len(splits)}", *splits)
        if splits:
            assert code == 2  # three are too few for five folds
            continue
        opened = CaseStore.open(tmp_path / "s0")
        assert opened.ids("test") == ("liver_1",)
        assert opened.ids("train", "all") == ("liver_0", "liver_2", "liver_3")


def test_splits_by_name_or_by_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(
        '{"test": ["liver_3"], "folds": [["liver_0"], ["liver_1", "liver_2"]]}'
    )
    assert convert(source, tmp_path / "s", "--splits", str(tmp_path / "mine.json"))[0] == 0
    opened = CaseStore.open(tmp_path / "s")
    assert (opened.ids("test"), opened.ids("validation", 1)) == (
        ("liver_3",),
        ("liver_1", "liver_2"),
    )
    assert convert(source, tmp_path / "other", "--splits", "random")[0] == 2


@pytest.mark.parametrize("name", ["<b onload=alert(1)>&amp;", "x" * 200, 'liver 0 ünd \'"1"'])
def test_unusual_scan_names_are_handled(tmp_path: Path, name: str) -> None:
    image, label = ct_like(SHAPE, 0)
    write_nifti(tmp_path / f"imagesTr/{name}.nii.gz", image)
    write_nifti(tmp_path / f"labelsTr/{name}.nii.gz", label)
    write_index(tmp_path, [name])
    assert convert(tmp_path, tmp_path / "s")[0] == 0
    assert CaseStore.open(tmp_path / "s").case_ids == (name,)
    assert "<b onload" not in (tmp_path / "s" / "audit.html").read_text()
    assert run("verify", tmp_path / "s")[0] == 0


# --- who does it does not matter --------------------------------------------------------------------------------------


def test_any_number_of_workers_and_shards_writes_the_same_bytes(
    source: Path, store: Path, tmp_path: Path
) -> None:
    expected = tree(store)
    assert convert(source, tmp_path / "two", "convert.workers=2")[0] == 0
    assert tree(tmp_path / "two") == expected
    finished = []
    for shard in ("2/3", "0/3", "1/3"):
        assert not (tmp_path / "parts" / "zarr.json").exists()
        code, result = convert(source, tmp_path / "parts", "--shard", shard)
        assert code == 0
        finished.append(result["finished"])
    assert finished == [False, False, True]
    assert tree(tmp_path / "parts") == expected


@pytest.mark.ray
def test_a_ray_cluster_writes_the_same_bytes(source: Path, store: Path, tmp_path: Path) -> None:
    import ray

    short = tempfile.mkdtemp(prefix="ray")  # the cluster's sockets do not like long paths
    cluster = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=short)
    try:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address_info["gcs_address"]}
        command = convert_command(source, tmp_path / "s", "--executor", "ray")
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
    finally:
        ray.shutdown()
        shutil.rmtree(short, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "s") == tree(store)


@pytest.mark.ray
def test_a_missing_ray_cluster_is_reported(source: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = convert_command(source, tmp_path / "s", "--executor", "ray")
    done = subprocess.run(
        command,
        env={**environment, "RAY_TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2
    assert "no Ray cluster found" in done.stderr.splitlines()[-1]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_dry_run_reports_all_scans_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["convert", str(source), str(tmp_path / "s"), "--dry-run", "convert.workers=1"]) == 0
    )
    message = capsys.readouterr().out
    assert all(f"liver_{n}" in message for n in range(5))
    assert "nothing was written" in message
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no dataset.json"),
        (lambda folder: folder.write_text("x"), "not a folder"),
    ],
)
def test_a_wrong_source_gives_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "src")
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_folder_that_is_not_a_store_is_not_changed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert main(["convert", str(source), str(tmp_path / "thesis"), "--force"]) == 2
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    assert main(["convert", str(source), str(tmp_path / "thesis" / "chapter.txt")]) == 2


@pytest.mark.parametrize("shard", ["3/3", "x/2", "1", "-1/2"])
def test_a_wrong_shard_is_refused(source: Path, tmp_path: Path, shard: str) -> None:
    assert main(["convert", str(source), str(tmp_path / "s"), f"--shard={shard}"]) == 2


def test_histograms_add_up_to_the_same_numbers_in_any_order() -> None:
    rng = np.random.default_rng(0)
    parts = [
        HuHistogram.from_voxels(rng.integers(-100, 200, 500).astype(np.int16)) for _ in range(5)
    ]
    assert sum(parts[1:], parts[0]) == sum(parts[-2::-1], parts[-1])


# --- real scans -------------------------------------------------------------------------------------------------------


@pytest.mark.real_mini
def test_faults_of_real_scans_are_reported(real_mini: Path, tmp_path: Path) -> None:
    # liver_902 has 3 slices: by default it is excluded
    code, result = convert(
        real_mini, tmp_path / "s", "convert.workers=2", "convert.cleaning.min_slices=3"
    )
    assert code == 0
    assert {scan: entry["status"] for scan, entry in result["audit"].items()} == {
        "liver_28": "kept",
        "liver_900": "kept",
        "liver_901": "repaired",
        "liver_902": "kept",
        "liver_903": "excluded",
        "liver_950": "unlabelled",
    }
    found_codes = {
        scan: {f["code"] for f in entry["findings"]} for scan, entry in result["audit"].items()
    }
    assert "stored_type" in found_codes["liver_900"]
    assert {"label_reoriented", "few_slices"} <= found_codes["liver_901"]
    assert {"very_few_slices", "padding_values"} <= found_codes["liver_902"]
    assert {"label_missing", "stored_type"} <= found_codes["liver_903"]
    opened = CaseStore.open(tmp_path / "s")
    source = np.asarray(nib.load(real_mini / "labelsTr" / "liver_28.nii.gz").dataobj).T
    assert np.array_equal(opened.source_label("liver_28"), source)
    assert np.bincount(source.ravel()).tolist() == [30_951_445, 2_650_863, 214_268]
    assert (
        opened.root["coverage"]["liver_inside"] == opened.root["coverage"]["tumour_inside"] == 1.0
    )
    assert opened.root["coverage"]["tumours"] == 7
    turned = opened.label("liver_901")
    first, last = opened.meta("liver_901").valid_slices
    assert (first, last) == (22, 42)
    assert np.array_equal(
        turned[first:last], canonical(real_mini / "labelsTr" / "liver_901.nii.gz")
    )
    assert opened.image("liver_902")[0, 30:33].min() == -1024
    assert run("verify", tmp_path / "s")[0] == 0


def test_a_page_of_many_scans_embeds_the_pictures_of_the_worst(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_page, "MAX_PICTURES", 2)
    assert convert(source, tmp_path / "s")[0] == 0
    page = (tmp_path / "s" / "audit.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Only the first 2 scans, worst first, have a picture here" in page

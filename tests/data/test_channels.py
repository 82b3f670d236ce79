"""Data sets of several channels: read in each layout, brought onto one grid, normalised by scan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from liverseg_dist.config import ChannelConfig, ConvertConfig, IntensityConfig
from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.nifti import read_nifti, read_scan_channels
from liverseg_dist.data.preprocessing.body_mask import find_body
from liverseg_dist.data.preprocessing.invalid_voxels import Scale, store_voxels
from liverseg_dist.data.preprocessing.pipeline import clean_scan, prepare_scan
from liverseg_dist.data.preprocessing.scan_channels import prepare_channels
from liverseg_dist.data.preprocessing.scan_intensity import scan_intensity
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Grid, Volume
from tests.data.channel_sources import (
    CT,
    CT_GRID,
    MR,
    draw,
    positions_mm,
    shifted_grid,
    write_4d,
    write_channel,
    write_dataset_json,
    write_two_channels,
)
from tests.data.sources import convert, write_nifti, write_source

BRATS = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
T2 = ChannelConfig(name="T2", modality="MR")
ROOT = Path(__file__).resolve().parents[2]
CT_AND_MR = (ChannelConfig(name="CT"), T2)


def codes(result: dict[str, Any], case_id: str) -> set[str]:
    return {finding["code"] for finding in result["audit"][case_id]["findings"]}


def message(result: dict[str, Any], case_id: str, code: str) -> str:
    found = [f["message"] for f in result["audit"][case_id]["findings"] if f["code"] == code]
    assert len(found) == 1, result["audit"][case_id]
    return found[0]


# --- layouts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CaseStore]:
    folder = tmp_path_factory.mktemp("two")
    source = write_two_channels(folder / "source", mr_grid=shifted_grid((4.0, -3.0, 2.0)))
    code, _ = convert(source, folder / "store.zarr")
    assert code == 0
    return source, CaseStore.open(folder / "store.zarr")


def test_channels_in_files_of_their_own_are_stored_on_the_first_ones_grid(
    two_channels: tuple[Path, CaseStore],
) -> None:
    _, store = two_channels
    assert [(c.name, c.modality, c.intensity) for c in store.channels] == [
        ("CT", "CT", "ct"),
        ("T2", "MR", "zscore"),
    ]
    assert store.intensities[0] is not None
    assert store.intensities[1] is None
    for case_id in store.case_ids:
        meta = store.meta(case_id)
        assert meta.present == (True, True)
        image = store.image(case_id)
        assert image.shape == (2, 64, 60, 64)
        first, last = meta.valid_slices
        world = positions_mm(meta.grid)[first:last]
        # Within the field of view of both, each channel has the values of its formula.
        inside = np.linalg.norm(world - np.array([80, 75, 80]), axis=-1) < 55
        for channel, values, tolerance in ((0, CT, 8.0), (1, MR, 12.0)):
            difference = image[channel, first:last] - draw(world, values)
            assert np.abs(difference[inside]).mean() < tolerance / 4
            assert np.percentile(np.abs(difference[inside]), 99) < tolerance


def test_a_case_group_states_the_channel_axis(two_channels: tuple[Path, CaseStore]) -> None:
    _, store = two_channels
    group = zarr.open_group(f"{store.path}/cases/case_0", mode="r")
    scales: Any = group.attrs["ome"]
    assert [axis["name"] for axis in scales["multiscales"][0]["axes"]] == ["c", "z", "y", "x"]
    image: Any = group["image"]
    assert image.metadata.dimension_names == ("c", "z", "y", "x")
    # One channel costs what it did: chunks hold a single channel.
    assert image.chunks[0] == 1


def test_stored_and_prepared_scans_have_the_same_normalisation(
    two_channels: tuple[Path, CaseStore],
) -> None:
    """Conversion and inference must agree, whatever slab and voxel size are used."""
    source, store = two_channels
    images = source / "imagesTr"
    volumes = [read_nifti(images / f"case_1_000{n}.nii.gz") for n in (0, 1)]
    prepared = prepare_channels(volumes, store.convert, store.channels, (5.0, 4.0, 4.0))
    assert prepared.intensities[0] is None
    assert prepared.intensities[1] == store.meta("case_1").intensities[1]
    assert prepared.voxels.shape == (2, *prepared.grid.shape)
    alone = prepare_scan(volumes[0], store.convert, (5.0, 4.0, 4.0))
    np.testing.assert_array_equal(prepared.voxels[0], alone.voxels)
    assert prepared.grid == alone.grid


def test_channels_of_a_4d_file(tmp_path: Path) -> None:
    source = write_4d(tmp_path / "source", BRATS, 4)
    code, result = convert(source, tmp_path / "store.zarr")
    assert code == 0
    store = CaseStore.open(tmp_path / "store.zarr")
    assert [c.name for c in store.channels] == list(BRATS.values())
    assert store.intensities == (None,) * 4
    path = source / "imagesTr/BRATS_001.nii.gz"
    meta, image = store.meta("BRATS_001"), store.image("BRATS_001")
    first, last = meta.valid_slices
    voxels = [file.volume.voxels for file in read_scan_channels(path, 4)]
    for number in range(3):
        np.testing.assert_array_equal(image[number, first:last], voxels[number])
    # Fractions are scaled to int16; slope and intercept are recorded.
    case: Any = zarr.open_group(f"{store.path}/cases/BRATS_001", mode="r").attrs["liverseg"]
    scale = Scale(**case["cleaning"]["channels"]["T2w"]["scale"])
    restored = scale.slope * image[3, first:last] + scale.intercept
    assert np.abs(restored - voxels[3]).max() <= scale.slope / 2 + 1e-7
    assert "scaled_values" in codes(result, "BRATS_001")


def test_a_4d_file_is_read_one_channel_at_a_time(tmp_path: Path) -> None:
    source = write_4d(tmp_path, BRATS, 4, cases=1)
    files = read_scan_channels(source / "imagesTr/BRATS_000.nii.gz", 4)
    # Each channel has the narrowest type that is lossless for it alone.
    assert [file.volume.voxels.dtype.name for file in files] == ["int16"] * 3 + ["float32"]
    assert all(file.volume.voxels.flags.c_contiguous for file in files)


def test_a_listed_case_finds_its_numbered_files(tmp_path: Path) -> None:
    """nnU-Net 1 lists `case.nii.gz`, although the files are `case_0000.nii.gz` and so on."""
    source = write_two_channels(tmp_path, cases=1)
    entry = {"image": "./imagesTr/case_0.nii.gz", "label": "./labelsTr/case_0.nii.gz"}
    write_dataset_json(source, modality={"0": "CT", "1": "MRI"}, training=[entry])
    (case,) = read_dataset(source).training
    assert case.case_id == "case_0"
    assert [path.name for path in case.files] == ["case_0_0000.nii.gz", "case_0_0001.nii.gz"]


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_an_entry_may_list_one_file_per_channel(tmp_path: Path, form: str) -> None:
    source = write_two_channels(tmp_path, cases=1)
    files = {"t2": "imagesTr/case_0_0001.nii.gz", "CT": "imagesTr/case_0_0000.nii.gz"}
    image: object = files if form == "mapping" else [files["CT"], files["t2"]]
    entry = {"image": image, "label": "labelsTr/case_0.nii.gz"}
    write_dataset_json(source, channel_names={"0": "CT", "1": "T2"}, training=[entry])
    (case,) = read_dataset(source).training
    assert [path.name for path in case.files] == ["case_0_0000.nii.gz", "case_0_0001.nii.gz"]


def test_the_settings_override_the_names(tmp_path: Path) -> None:
    source = write_two_channels(tmp_path / "source", cases=3)
    (source / "dataset.json").unlink()
    channels = '[{"name": "ct"}, {"name": "mr", "modality": "MR", "intensity": "percentiles"}]'
    code, _ = convert(source, tmp_path / "store.zarr", f"convert.channels={channels}")
    assert code == 0
    store = CaseStore.open(tmp_path / "store.zarr")
    assert [(c.name, c.intensity) for c in store.channels] == [("ct", "ct"), ("mr", "percentiles")]
    intensity = store.meta("case_0").intensities[1]
    assert (intensity.mean, intensity.std) == (0.0, 1.0)


# --- absent channels ------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [0, 1])
def test_an_absent_channel_is_zero(tmp_path: Path, absent: int) -> None:
    grid = Grid(CT_GRID.shape, CT_GRID.affine)
    source = write_two_channels(tmp_path / "source", cases=4, mr_grid=grid)
    (source / f"imagesTr/case_2_000{absent}.nii.gz").unlink()
    code, result = convert(source, tmp_path / "store.zarr")
    assert code == 0
    store = CaseStore.open(tmp_path / "store.zarr")
    meta, image = store.meta("case_2"), store.image("case_2")
    assert meta.present == (absent != 0, absent != 1)
    assert not image[absent].any()
    assert image[1 - absent].any()
    assert store.channels[absent].name in message(result, "case_2", "channel_missing")
    assert result["audit"]["case_2"]["status"] == "kept"
    assert store.meta("case_1").present == (True, True)


def test_a_channel_that_appears_later_is_converted(tmp_path: Path) -> None:
    source = write_two_channels(tmp_path / "source", cases=3)
    path = source / "imagesTr/case_2_0001.nii.gz"
    content = path.read_bytes()
    path.unlink()
    assert convert(source, tmp_path / "store.zarr")[0] == 0
    path.write_bytes(content)
    code, result = convert(source, tmp_path / "store.zarr")
    assert (code, result["converted"]) == (0, 1)
    assert CaseStore.open(tmp_path / "store.zarr").meta("case_2").present == (True, True)


# --- normalisation --------------------------------------------------------------------------------


def mr_volume(factor: float = 1.0, dtype: type = np.int16) -> Volume:
    noise = np.random.default_rng(3).normal(0, 3, CT_GRID.shape)
    voxels = np.maximum(draw(positions_mm(CT_GRID), MR) + noise, 0) * factor
    return Volume(np.rint(voxels).astype(dtype) if dtype is np.int16 else voxels, CT_GRID)


def test_zscore_is_that_of_numpy() -> None:
    volume = mr_volume()
    clean = clean_scan(volume, ConvertConfig().cleaning, T2)
    body = clean.volume.voxels[find_body(clean.volume, T2)].astype(float)
    lower, upper = np.percentile(body, (0.5, 99.5))
    clipped = np.clip(body, lower, upper)
    found = scan_intensity(clean.volume, T2)
    assert found is not None
    width = upper - lower
    assert (found.lower_hu, found.upper_hu) == pytest.approx((lower, upper))
    assert found.mean == pytest.approx((clipped.mean() - lower) / width)
    assert found.std == pytest.approx(clipped.std() / width)
    # What the network receives: zero mean and unit variance within the body.
    values = ((clipped - lower) / width - found.mean) / found.std
    assert (values.mean(), values.std()) == pytest.approx((0, 1), abs=1e-6)


def test_the_gain_of_a_scanner_does_not_change_the_network_input() -> None:
    """MR has arbitrary units: 0.001 times the values is the same image."""
    inputs = []
    for factor in (1.0, 0.001, 500.0):
        volume = mr_volume(factor, np.float32)
        prepared = prepare_channels([volume], ConvertConfig(), [T2], volume.spacing_mm)
        (intensity,) = prepared.intensities
        assert intensity is not None
        inputs.append(normalise(prepared.voxels[0], intensity))
    np.testing.assert_allclose(inputs[1], inputs[0], atol=0.02)
    np.testing.assert_allclose(inputs[2], inputs[0], atol=0.02)


def normalise(voxels: np.ndarray, intensity: IntensityConfig) -> np.ndarray:
    clipped = np.clip(voxels.astype(float), intensity.lower_hu, intensity.upper_hu)
    share = (clipped - intensity.lower_hu) / (intensity.upper_hu - intensity.lower_hu)
    return (share - intensity.mean) / intensity.std


def test_a_fixed_range_is_in_the_scans_own_units() -> None:
    channel = ChannelConfig(name="map", modality="other", lower=0.0, upper=0.5)
    assert channel.intensity == "range"
    volume = mr_volume(0.001, np.float32)
    prepared = prepare_channels([volume], ConvertConfig(), [channel], volume.spacing_mm)
    (intensity,) = prepared.intensities
    assert intensity is not None
    expected = np.clip(volume.voxels / 0.5, 0, 1)
    np.testing.assert_allclose(normalise(prepared.voxels[0], intensity), expected, atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        np.array([0.25, 3.5, -7.125]),
        np.array([1e6, 1e6 + 1, 1e6 + 40]),
        np.array([0.0, np.nan, np.inf, 1e-12]),
        np.array([0.0, 40_000.0, 65_535.0]),
        np.full(3, 0.5),
        np.full(3, np.nan),
    ],
)
def test_arbitrary_units_fit_into_int16(values: np.ndarray) -> None:
    voxels = np.resize(values, (4, 5, 7)).astype(np.float32)
    stored, invalid, scale = store_voxels(voxels, T2)
    assert stored.dtype == np.int16
    assert stored.min() > -32768, "the store's mark of a missing file"
    finite = np.isfinite(voxels)
    assert invalid.nonfinite_voxels == np.count_nonzero(~finite)
    restored = scale.slope * stored.astype(float) + scale.intercept
    assert np.abs(restored[finite] - voxels[finite]).max(initial=0) <= scale.slope * 0.501
    assert not stored[~finite].any()


def test_a_single_spike_does_not_cost_the_precision_of_the_rest() -> None:
    volume = mr_volume(0.01, np.float32)
    volume.voxels[3, 4, 5] = 1e9
    _, invalid, scale = store_voxels(volume.voxels, T2)
    assert invalid.saturated_voxels == 1
    assert scale.slope < 0.01


def test_outside_values_of_mr_are_zero() -> None:
    """-1024 HU is air of a CT; in MR it would be far below every value."""
    volume = mr_volume()
    cleaning = ConvertConfig().cleaning.model_copy(update={"outside_body": "air"})
    clean = clean_scan(volume, cleaning, T2).volume.voxels
    assert clean.min() == 0
    low = Volume(volume.voxels - np.int16(2000), CT_GRID)
    # No rule of HU applies: values below -1024 are not padding.
    assert clean_scan(low, ConvertConfig().cleaning, T2).volume.voxels.min() < -1900


# --- audit by modality ----------------------------------------------------------------------------


def write_single(folder: Path, modality: str, values: tuple[float, ...]) -> Path:
    write_two_channels(folder, cases=3)
    for case in range(3):
        (folder / f"imagesTr/case_{case}_0001.nii.gz").unlink()
        write_channel(folder, f"case_{case}_0000", CT_GRID, values, case)  # type: ignore[arg-type]
    write_dataset_json(folder, channel_names={"0": modality})
    return folder


def test_an_mr_set_is_not_accused_of_not_being_ct(tmp_path: Path) -> None:
    code, result = convert(write_single(tmp_path / "source", "T2", MR), tmp_path / "store.zarr")
    assert (code, result["counts"]) == (0, {"kept": 3})
    store = CaseStore.open(tmp_path / "store.zarr")
    assert store.intensities == (None,)
    means = [store.meta(case_id).intensities[0].mean for case_id in store.case_ids]
    assert len(set(means)) == 3, "each scan has its own"
    assert "value_range" in result["audit"]["case_0"]["facts"]
    assert (tmp_path / "store.zarr/audit.html").read_text().count("T2") >= 1


def test_an_mr_declared_as_ct_is_refused(tmp_path: Path) -> None:
    code, result = convert(
        write_single(tmp_path / "source", "CT", MR), tmp_path / "store.zarr", "--dry-run"
    )
    assert code == 0
    assert result["counts"] == {"excluded": 3}
    assert "not_ct_like" in codes(result, "case_0")


def test_a_ct_declared_as_mr_is_noticed(tmp_path: Path) -> None:
    source = write_single(tmp_path / "source", "MR", CT)
    _, result = convert(source, tmp_path / "store.zarr", "--dry-run")
    assert "looks_like_ct" in codes(result, "case_0")
    mr = write_single(tmp_path / "mr", "MR", MR)
    _, result = convert(mr, tmp_path / "store.zarr", "--dry-run")
    assert "looks_like_ct" not in codes(result, "case_0")


@pytest.mark.parametrize(("declared", "code"), [("CT", "not_ct_like"), ("MR", "looks_like_ct")])
def test_each_channel_is_judged_by_its_own_modality(
    tmp_path: Path, declared: str, code: str
) -> None:
    """The second channel is MR declared as CT, or CT declared as MR."""
    source = write_two_channels(tmp_path / "source", cases=1)
    write_dataset_json(source, channel_names={"0": "CT", "1": f"{declared} two"})
    if declared == "MR":
        write_channel(source, "case_0_0001", CT_GRID, CT)
    _, result = convert(source, tmp_path / "store.zarr", "--dry-run")
    assert f"channel {declared} two: " in message(result, "case_0", code)
    assert result["audit"]["case_0"]["facts"]["channels"][1]["name"] == f"{declared} two"


# --- position of the channels ---------------------------------------------------------------------


def test_channels_of_another_patient_are_one_error(tmp_path: Path) -> None:
    def far_in_case_1(case: int) -> Grid:
        return shifted_grid((900.0 if case == 1 else 0.0, 0.0, 0.0))

    source = write_two_channels(tmp_path / "source", mr_grid=far_in_case_1, cases=3)
    code, result = convert(source, tmp_path / "store.zarr")
    assert code == 0
    assert result["counts"] == {"kept": 2, "excluded": 1}
    text = message(result, "case_1", "channel_no_overlap")
    assert "channel T2 does not overlap channel CT" in text
    volumes = [read_nifti(source / f"imagesTr/case_1_000{n}.nii.gz") for n in (0, 1)]
    with pytest.raises(UserError, match="does not overlap"):
        prepare_channels(volumes, ConvertConfig(), CT_AND_MR, (4.0, 2.5, 2.5))


def test_a_small_overlap_is_a_warning(tmp_path: Path) -> None:
    grid = shifted_grid((0.0, 0.0, 110.0))
    source = write_two_channels(tmp_path / "source", mr_grid=grid, cases=1)
    _, result = convert(source, tmp_path / "store.zarr", "--dry-run")
    assert "covers" in message(result, "case_0", "channel_overlap")
    assert 0 < result["audit"]["case_0"]["facts"]["channels"][1]["overlap"] < 0.5


def moved(grid: Grid, degrees: float, shift_mm: tuple[float, float, float]) -> Grid:
    """The grid as a header would have it if the patient had moved before this series."""
    angle = np.radians(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    centre = np.array([80.0, 75.0, 80.0])
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + np.array(shift_mm)
    return Grid(grid.shape, matrix @ grid.affine)


def test_a_rigid_movement_is_found_and_recorded(tmp_path: Path) -> None:
    volumes = []
    for grid, values, seed in ((CT_GRID, CT, 1), (shifted_grid((0, 0, 0)), MR, 2)):
        voxels = draw(positions_mm(grid), values)
        voxels = voxels + np.random.default_rng(seed).normal(0, 3, grid.shape)
        volumes.append(Volume(np.rint(voxels).astype(np.int16), grid))
    shift_mm = (7.0, -5.0, 4.0)
    wrong = Volume(volumes[1].voxels, moved(volumes[1].grid, 6.0, shift_mm))
    spacing_mm = (4.0, 2.5, 2.5)
    truth = prepare_channels(volumes, ConvertConfig(), CT_AND_MR, spacing_mm)
    unregistered = prepare_channels([volumes[0], wrong], ConvertConfig(), CT_AND_MR, spacing_mm)
    convert_settings = ConvertConfig(register_channels="rigid")
    found = prepare_channels([volumes[0], wrong], convert_settings, CT_AND_MR, spacing_mm)
    again = prepare_channels([volumes[0], wrong], convert_settings, CT_AND_MR, spacing_mm)
    np.testing.assert_array_equal(found.voxels, again.voxels)
    errors = []
    for prepared in (unregistered, found):
        errors.append(np.abs(prepared.voxels[1].astype(float) - truth.voxels[1]).mean())
    assert errors[1] < 0.25 * errors[0]
    (finding,) = found.findings
    assert finding.code == "channel_registered"
    assert "was moved by" in finding.message


# --- wrong input ----------------------------------------------------------------------------------


def test_a_file_of_an_unknown_channel_is_refused(tmp_path: Path) -> None:
    source = write_two_channels(tmp_path, cases=1)
    write_channel(source, "case_0_0002", CT_GRID, MR)
    with pytest.raises(UserError, match=r"case_0_0002.* is channel 2, but .* 2 channels"):
        read_dataset(source)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"0": "MR", "1": "mr"}, "two channels are called mr"),
        ({"0": "CT", "2": "MR"}, "expected 0 to 1"),
        ({"x": "CT"}, "not the number of a channel"),
        ({}, "names 0 channels"),
    ],
)
def test_wrong_names_of_channels_are_one_line(tmp_path: Path, names: object, text: str) -> None:
    source = write_two_channels(tmp_path, cases=1)
    write_dataset_json(source, channel_names=names)
    with pytest.raises(UserError, match=text) as caught:
        read_dataset(source)
    assert "\n" not in str(caught.value)


def test_a_mapping_of_an_unknown_channel_is_refused(tmp_path: Path) -> None:
    source = write_two_channels(tmp_path, cases=1)
    entry = {"image": {"PET": "imagesTr/case_0_0000.nii.gz"}}
    write_dataset_json(source, channel_names={"0": "CT", "1": "T2"}, training=[entry])
    with pytest.raises(UserError, match="of channel PET; the channels are CT, T2"):
        read_dataset(source)


def test_a_list_of_more_files_than_channels_is_refused(tmp_path: Path) -> None:
    source = write_two_channels(tmp_path, cases=1)
    files = ["imagesTr/case_0_0000.nii.gz", "imagesTr/case_0_0001.nii.gz"]
    write_dataset_json(source, modality={"0": "CT"}, training=[{"image": files}])
    with pytest.raises(UserError, match=r"one of 2 files of a scan, but the data set has 1"):
        read_dataset(source)


@pytest.mark.parametrize("volumes", [1, 3])
def test_a_file_with_another_number_of_channels_is_left_out(tmp_path: Path, volumes: int) -> None:
    source = write_4d(tmp_path / "source", BRATS, 4)
    voxels = np.ones((volumes, *CT_GRID.shape), np.float32)
    path = source / "imagesTr/BRATS_001.nii.gz"
    write_nifti(path, voxels[0] if volumes == 1 else voxels, CT_GRID.affine)
    code, result = convert(source, tmp_path / "store.zarr")
    assert code == 1
    assert result["counts"] == {"kept": 2, "quarantined": 1}
    text = message(result, "BRATS_001", "channel_count")
    assert f"{volumes} volume" in text
    assert "4 channels" in text


def test_a_4d_file_of_a_data_set_of_one_channel_names_the_way_out(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", cases=1)
    write_nifti(source / "imagesTr/liver_0.nii.gz", np.ones((2, 9, 9, 9), np.int16))
    _, result = convert(source, tmp_path / "store.zarr", "--dry-run")
    assert "name its 2 channels" in message(result, "liver_0", "not_3d")


def test_other_channels_than_those_of_the_store_are_refused(tmp_path: Path) -> None:
    source = write_two_channels(tmp_path / "source", cases=3)
    assert convert(source, tmp_path / "store.zarr")[0] == 0
    index = json.loads((source / "dataset.json").read_text())
    index["channel_names"]["1"] = "PET"
    (source / "dataset.json").write_text(json.dumps(index))
    assert convert(source, tmp_path / "store.zarr")[0] == 2


def test_settings_of_channels_are_checked() -> None:
    with pytest.raises(ValueError, match="two channels are called ct"):
        ConvertConfig(channels=(ChannelConfig(name="CT"), ChannelConfig(name="ct")))
    with pytest.raises(ValueError, match="at least one channel"):
        ConvertConfig(channels=())
    assert ChannelConfig(name="a", modality="MR").intensity == "zscore"


# --- real data ------------------------------------------------------------------------------------


def test_real_mr_converts_without_an_exclusion(tmp_path: Path) -> None:
    source = ROOT.parent / "shared" / "data" / "real_mr"
    if not source.is_dir():
        pytest.skip("the real MR scans (../shared/data/real_mr) are not here")
    code, result = convert(source, tmp_path / "store.zarr")
    assert (code, result["counts"]) == (0, {"kept": 6})
    store = CaseStore.open(tmp_path / "store.zarr")
    assert [(c.modality, c.intensity) for c in store.channels] == [("MR", "zscore")]
    for case_id in store.case_ids:
        found = {finding["code"] for finding in result["audit"][case_id]["findings"]}
        assert not found & {"not_ct_like", "looks_like_ct", "hu_offset_missing"}
        image, label = store.image(case_id)[0], store.label(case_id)
        values = normalise(image, store.meta(case_id).intensities[0])
        # The organs are tissue: within the range of the network, not at its lower end.
        assert -0.5 < np.median(values[label == 1]) < 2

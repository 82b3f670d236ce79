"""The modality of a channel follows from its name; runs are used for their own channels."""

import json
from pathlib import Path

import pytest

from liverseg_dist.config import ChannelConfig
from liverseg_dist.data.io.modality import check_same_channels, read_channels
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from tests.data.sources import convert, write_source

CT = [
    "CT",
    "ct",
    " Ct ",
    "computed tomography",
    "Computed-Tomography",
    "CT scan",
    "contrast_CT",
    "CECT",
    "HU",
]
MR = [
    "MR",
    "MRI",
    "mri",
    "T1",
    "T2",
    "T1w",
    "t1ce",
    "FLAIR",
    "T2_FLAIR",
    "T2-SPIR MR",
    "magnetic resonance imaging",
    "DWI",
]
OTHER = ["PET", "FDG-PET", "US", "X-ray", "SPECT", "ultrasound"]
UNKNOWN = ["", "zscore", "noNorm", "PET/CT", "x", "scan", "0", "Bild"]


@pytest.mark.parametrize(
    ("name", "modality", "found"),
    [
        *((name, "CT", []) for name in CT),
        *((name, "MR", ["not_ct"]) for name in MR),
        *((name, "other", ["not_ct"]) for name in OTHER),
        *((name, "other", ["modality_unknown"]) for name in UNKNOWN),
    ],
)
def test_modality_names(name: str, modality: str, found: list[str]) -> None:
    """nnU-Net's rule: a CT is clipped by its HU, everything else is normalised by scan."""
    (channel,), findings = read_channels("dataset.json", {"0": name})
    assert (channel.modality, channel.intensity) == (
        modality,
        "ct" if modality == "CT" else "zscore",
    )
    assert [finding.code for finding in findings] == found
    assert all(("info" if f.code == "not_ct" else "warning") == f.severity for f in findings)


def test_a_run_is_used_for_its_own_channels() -> None:
    ct, mr = ChannelConfig(name="CT"), ChannelConfig(name="T2", modality="MR")
    check_same_channels("data", [ct, mr], [ct, mr])
    # One channel may be called differently, as long as the modality is the same.
    check_same_channels("data", [ChannelConfig(name="portal venous")], [ct])
    other_modality = mr.model_copy(update={"modality": "other"})
    for found in ([ct], [mr], [mr, ct], [ct, other_modality], [ct, mr, mr]):
        with pytest.raises(UserError, match=r"data: has the channels .* trained on CT, T2 \(MR\)"):
            check_same_channels("data", found, [ct, mr])
    with pytest.raises(UserError, match=r"T2 \(MR\); the run was trained on CT"):
        check_same_channels("data", [mr], [ct])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("modality") / "source", cases=3)


def name_modality(source: Path, key: str, value: object) -> None:
    index = json.loads((source / "dataset.json").read_text())
    index.pop("modality", None)
    index.pop("channel_names", None)
    (source / "dataset.json").write_text(json.dumps({**index, key: value}))


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("modality", {"0": "MRI"}, "MRI"),
        ("channel_names", {"0": "T2"}, "T2"),
        ("modality", "PET", "PET"),
        ("modality", ["MR"], "MR"),
    ],
)
def test_another_modality_is_read_in_arbitrary_units(
    source: Path, tmp_path: Path, key: str, value: object, name: str
) -> None:
    name_modality(source, key, value)
    code, result = convert(source, tmp_path / "s.zarr")
    assert code == 0
    assert CaseStore.open(tmp_path / "s.zarr").channels[0].name == name
    # The voxels are those of a CT, which the audit notices in each scan.
    found = [f["code"] for f in result["audit"]["liver_0"]["findings"]]
    assert "looks_like_ct" in found


def test_the_earlier_setting_of_the_modality_still_loads(source: Path, tmp_path: Path) -> None:
    name_modality(source, "modality", {"0": "MRI"})
    assert convert(source, tmp_path / "s.zarr", "convert.modality=any")[0] == 0
    assert CaseStore.open(tmp_path / "s.zarr").channels[0].modality == "MR"


def test_default_settings_are_not_stored(source: Path, tmp_path: Path) -> None:
    """Defaults are not stored, so that stores of earlier versions can be continued."""
    name_modality(source, "modality", {"0": "ct"})
    assert convert(source, tmp_path / "s.zarr")[0] == 0
    shown = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())["attributes"]["liverseg"][
        "convert"
    ]
    assert "modality" not in shown
    assert "min_slices" not in shown["cleaning"]

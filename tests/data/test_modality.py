"""Data sets of another modality than CT are recognised by name and refused, unless allowed."""

import json
from pathlib import Path

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.modality import check_modality
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
OTHER = [
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
    "PET",
    "FDG-PET",
    "US",
]
OTHER += ["magnetic resonance imaging", "X-ray", "SPECT", "ultrasound", "DWI"]
UNKNOWN = ["", "zscore", "noNorm", "PET/CT", "x", "scan", "0", "Bild"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((n, []) for n in CT),
        *((n, ["not_ct"]) for n in OTHER),
        *((n, ["modality_unknown"]) for n in UNKNOWN),
    ],
)
def test_modality_names(name: str, found: list[str]) -> None:
    findings = check_modality("dataset.json", [name])
    assert [finding.code for finding in findings] == found
    assert all(("error" if f.code == "not_ct" else "warning") == f.severity for f in findings)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("modality") / "source", cases=3)


def name_modality(source: Path, key: str, value: object) -> None:
    index = json.loads((source / "dataset.json").read_text())
    index.pop("modality", None)
    index.pop("channel_names", None)
    (source / "dataset.json").write_text(json.dumps({**index, key: value}))


@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["convert", "dry run"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modality", {"0": "MRI"}),
        ("channel_names", {"0": "T2"}),
        ("modality", "PET"),
        ("modality", ["MR"]),
    ],
)
def test_other_modality_is_refused(
    source: Path,
    tmp_path: Path,
    key: str,
    value: object,
    how: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name_modality(source, key, value)
    assert main(["convert", str(source), str(tmp_path / "s.zarr"), *how]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (str(source), "dataset.json", "not CT", "convert.modality=any"):
        assert part in error
    assert not (tmp_path / "s.zarr").exists()


def test_setting_allows_other_modality_with_warning(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_modality(source, "modality", {"0": "MRI"})
    assert (
        main(
            [
                "convert",
                str(source),
                str(tmp_path / "s.zarr"),
                "convert.modality=any",
                "convert.workers=1",
            ]
        )
        == 0
    )
    assert "warning: dataset.json names modality MRI, not CT" in capsys.readouterr().out
    root = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())
    assert root["attributes"]["liverseg"]["convert"]["modality"] == "any"
    name_modality(source, "modality", {"0": "CT"})
    code, _ = convert(source, tmp_path / "s.zarr")
    assert code == 2  # the store has another setting
    assert "convert.modality was" in capsys.readouterr().err


def test_default_settings_are_not_stored(source: Path, tmp_path: Path) -> None:
    """Defaults are not stored, so that stores of earlier versions can be continued."""
    name_modality(source, "modality", {"0": "ct"})
    assert convert(source, tmp_path / "s.zarr")[0] == 0
    shown = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())["attributes"]["liverseg"][
        "convert"
    ]
    assert "modality" not in shown
    assert "min_slices" not in shown["cleaning"]

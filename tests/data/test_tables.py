"""Tables of users: rows are matched with scans, unmatched rows and scans are reported."""

import json
from pathlib import Path

import pytest

from liverseg_dist.config import SplitConfig
from liverseg_dist.data.io.spacing_table import describe_unmatched, read_spacing_table
from liverseg_dist.data.patients import read_patients
from liverseg_dist.data.splits import check_split_files, count_folds, make_splits
from liverseg_dist.errors import UserError

SCANS = ["liver_1", "liver_2", "liver_3"]


def patients(tmp_path: Path, text: str, scans: list[str] = SCANS) -> dict[str, str]:
    (tmp_path / "p.csv").write_bytes(text.encode())
    return read_patients(tmp_path / "p.csv", scans)


@pytest.mark.parametrize(
    "text",
    [
        "case,patient\nliver_1 ,A\nliver_2,A\nliver_3,B\n",
        "case,patient\nliver_1,A\nliver_2, A\nliver_3,B\n",
        "case,patient\nliver_1,A\nliver_2,a\nliver_3,B\n",
        "\ufeffcase;patient\r\nliver_1;A\r\nliver_2;A\r\nliver_3;B\r\n",
        "case,patient\nliver_1.nii.gz,A\nimagesTr\\liver_2_0000.NII.GZ,A\nliver_3,B\n",
        "case,patient\nliver_1,A B\nliver_2,A\u00a0B\nliver_3,B\n",
        "case,patient\nliver_1,M\u00fc\nliver_2,Mu\u0308\nliver_3,B\n",
        "case,patient\nliver_1,A  B\nliver_2,A B\nliver_3,B\n",
        "case,patient\nLiver_1,A\nLIVER_2,A\nliver_3,B\n",
        "case,patient\nliver_1\u200b,A\nliver_2,A\u200b\nliver_3,B\n",
    ],
    ids=[
        "space",
        "space before",
        "case",
        "Excel",
        "files",
        "no-break space",
        "NFD",
        "two spaces",
        "case of scans",
        "zero width",
    ],
)
def test_spellings_of_patient_are_one_patient(tmp_path: Path, text: str) -> None:
    assert patients(tmp_path, text) == {
        "liver_1": "liver_1",
        "liver_2": "liver_1",
        "liver_3": "liver_3",
    }


def test_patient_ids_are_text(tmp_path: Path) -> None:
    found = patients(tmp_path, "case,patient\nliver_1,001\nliver_2,1\nliver_3,1.0\n")
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "case,patient\nliver_1,A\nliver_2,B\nliver_1,B\n",
            "liver_1 occurs twice, in line 2 and line 4",
        ),
        ("case,patient\nliver_1,A\nliver_1.nii.gz,B\n", "occurs twice, in line 2 and line 3"),
        ("case,patient\nother,A\nother,B\nliver_1,C\n", "other occurs twice, in line 2 and line 3"),
        (
            "case,patient\nx_1,A\nx_2,B\n",
            "no row names a scan of this data set; its names begin with x_1",
        ),
        ("case,patient\n", "has no rows"),
    ],
)
def test_invalid_patients_table_is_user_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        patients(tmp_path, text)


def test_unmatched_rows_and_scans_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"other_{n},Jane Doe\n" for n in range(12))
    (tmp_path / "p.csv").write_text(f"case,patient\nliver_1,a\nliver_2,A\n{rows}")
    check_split_files(SplitConfig(patients=tmp_path / "p.csv"), SCANS)
    assert "12 row(s) name no scan of this data set: other_0, other_1," in caplog.text
    assert "and 2 more" in caplog.text
    assert "1 scan(s) have no row, so each counts as a patient of its own: liver_3" in caplog.text
    assert "line 2, line 3: spellings of one patient" in caplog.text
    assert "Jane" not in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.yaml", "001: [5, 4, 4]\n1e3: [2, 1, 1]\n"),
        ("t.YML", '"001": [5, 4, 4]\n1e3.nii.gz: [2, 1, 1]\n'),
        ("t.json", '{"001": [5, 4, 4], "1e3": [2, 1, 1]}'),
        ("t.csv", "case,z_mm,y_mm,x_mm\n001,5,4,4\n1e3,2,1,1\n"),
        ("t.csv", "Case;Z mm;Y mm;X mm\r\n001;5,0;4,0;4,0\r\n1e3;2;1;1\r\n"),
        ("t.tsv", "case\tz_mm\ty_mm\tx_mm\n001\t5\t4\t4\n1e3\t2\t1\t1\n"),
    ],
)
def test_spacing_table_ids_are_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    expected = {"001": (5, 4, 4), "1e3": (2, 1, 1)}
    assert read_spacing_table(tmp_path / name, ["001", "1e3", "7"]) == expected
    lines = describe_unmatched(tmp_path / name, ["001", "7"])
    assert "1 row(s) name no scan of this data set: 1e3" in lines[0]
    assert "keep the voxel size of their header: 7" in lines[1]
    with pytest.raises(UserError, match="no row names a scan"):
        read_spacing_table(tmp_path / name, ["liver_1"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "t.csv",
            "case,z_mm,y_mm,x_mm\na,5,4,4\na,2,1,1\n",
            "a occurs twice, in line 2 and line 3",
        ),
        ("t.yaml", "a: [5, 4, 4]\na: [2, 1, 1]\n", "occurs twice, in lines 1 and 2"),
        ("t.yaml", "a: [5, 4, 4]\na.nii: [2, 1, 1]\n", "a.nii occurs twice"),
    ],
)
def test_repeated_scan_in_spacing_table_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_spacing_table(tmp_path / name, ["a"])


@pytest.mark.parametrize(
    "content",
    [
        {"test": ["liver_3"], "folds": [["liver_1"], ["liver_2"]]},
        {
            "test": ["liver_3.nii.gz"],
            "folds": [["imagesTr/liver_1.nii.gz"], [r".\imagesTr\liver_2_0000.nii.gz"]],
        },
        {"test": [" liver_3"], "folds": [["LIVER_1"], ["liver_2.NII.GZ"]]},
        {
            "training": [
                {"image": "imagesTr/liver_2.nii.gz", "label": "x", "fold": 1},
                {"image": "liver_1", "fold": 0},
            ],
            "testing": [{"image": "imagesTs/liver_3.nii.gz"}],
        },
    ],
    ids=["plain", "files", "spelling", "MONAI"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_split_file_forms_and_spellings(tmp_path: Path, content: object, encoding: str) -> None:
    (tmp_path / "s.json").write_text(json.dumps(content), encoding=encoding)
    config = SplitConfig(kind="file", file=tmp_path / "s.json")
    check_split_files(config, SCANS)
    splits = make_splits(dict.fromkeys(SCANS, 0.1), {scan: scan for scan in SCANS}, config)
    assert (splits.test, splits.folds, count_folds(config)) == (
        ("liver_3",),
        (("liver_1",), ("liver_2",)),
        2,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"folds": [["liver_1"], ["liver_1.nii.gz"]]}', "liver_1 occurs in more than one part"),
        ('{"folds": [["liver_1"]],\n "folds": [["liver_2"]]}', "occurs twice, in lines 1 and 2"),
        ('{"training": [{"image": "liver_1", "fold": "x"}]}', "fold must be an integer"),
    ],
)
def test_invalid_split_file_is_user_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=message):
        check_split_files(SplitConfig(kind="file", file=tmp_path / "s.json"), SCANS)


def test_spellings_in_two_parts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"folds": [["liver_1"], ["LIVER_1_0000"]]}))
    config = SplitConfig(kind="file", file=tmp_path / "s.json")
    with pytest.raises(UserError, match="liver_1"):
        make_splits(dict.fromkeys(SCANS, 0.1), {scan: scan for scan in SCANS}, config)

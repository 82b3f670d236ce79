"""Dates, tables of patients and lists of folders, as they are typed."""

import datetime
from pathlib import Path

import pytest

from liverseg_dist.commands.compare import parse_folders
from liverseg_dist.commands.follow import parse_dates
from liverseg_dist.commands.follow_cohort import read_patients
from liverseg_dist.errors import UserError

MARCH, JUNE = datetime.date(2024, 3, 1), datetime.date(2024, 6, 10)


def test_dates_are_read_with_spaces_around_them() -> None:
    assert parse_dates("2024-03-01, 2024-06-10", 2) == [MARCH, JUNE]
    assert parse_dates(None, 2) is None


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("2024-03-01", 2, "1 dates for 2 scans"),
        ("2024-03-01,june", 2, "'june' is no date such as 2024-03-01"),
        ("2024-03-01,2024-02-30", 2, "is no date"),
        ("2024-03-01,2024-03-01", 2, "2024-03-01 stands for two scans"),
        ("2024-06-10,2024-03-01", 2, "2024-03-01 comes before 2024-06-10"),
    ],
)
def test_wrong_dates_are_one_line(text: str, count: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_dates(text, count)
    assert message in str(caught.value)


def write_table(folder: Path, *rows: str, heading: str = "patient,date,scan,image") -> Path:
    file = folder / "patients.csv"
    file.write_text("\n".join([heading, *rows]) + "\n")
    return file


def test_scans_of_a_patient_are_ordered_by_date(tmp_path: Path) -> None:
    file = write_table(
        tmp_path,
        "b,2024-06-10,b2.nii.gz,",
        "a,2024-03-01,a1.nii.gz,ct/a1.nii.gz",
        "b,2024-03-01,b1.nii.gz,",
        "a,2024-06-10,a2.nii.gz,",
    )
    first, second = read_patients(file)
    assert (first.patient, second.patient) == ("b", "a"), "patients in the order of the table"
    assert first.dates == second.dates == (MARCH, JUNE)
    assert first.masks == (tmp_path / "b1.nii.gz", tmp_path / "b2.nii.gz")
    assert second.images == (tmp_path / "ct" / "a1.nii.gz", None)


def test_the_column_of_images_may_be_missing(tmp_path: Path) -> None:
    rows = ("a,2024-03-01,a1.nii.gz", "a,2024-06-10,a2.nii.gz")
    (patient,) = read_patients(write_table(tmp_path, *rows, heading="patient,date,scan"))
    assert patient.images == (None, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("a,2024-03-01,a1.nii.gz,",), "patient a has one scan"),
        (("a,2024-03-01,x,", "a,2024-03-01,y,"), "patient a has two scans of one date"),
        (("a,01.03.2024,x,", "a,2024-06-10,y,"), "line 2: '01.03.2024' is no date"),
        (("a,2024-03-01,,", "a,2024-06-10,y,"), "line 2: column scan is empty"),
        ((",2024-03-01,x,", "a,2024-06-10,y,"), "line 2: column patient is empty"),
    ],
)
def test_a_wrong_table_names_the_line(rows: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_patients(write_table(tmp_path, *rows))
    assert message in str(caught.value)


def test_folders_are_split_at_commas(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert parse_folders(f"{one},{two}") == [one, two]


def test_a_folder_with_a_comma_in_its_name_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "fold 0, wide"
    folder.mkdir()
    assert parse_folders(str(folder)) == [folder]

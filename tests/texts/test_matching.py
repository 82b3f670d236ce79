"""Rows of a user's table and scans of a data set: what does not match is reported by name."""

from pathlib import Path

import pytest

from liverseg_dist.errors import UserError
from liverseg_dist.texts.matching import TableEntry, match_entries

TABLE = Path("patients.csv")


def make_entries(*names: str) -> list[TableEntry[int]]:
    entries = []
    for number, name in enumerate(names):
        entries.append(TableEntry(f"line {number + 2}", name, number))
    return entries


def test_rows_find_their_scans_and_both_rests_are_named() -> None:
    found = match_entries(TABLE, make_entries("liver_1", "liver_7"), ["liver_1", "liver_2"])
    assert {scan: entry.value for scan, entry in found.by_scan.items()} == {"liver_1": 0}
    assert (found.unknown, found.missing) == (("liver_7",), ("liver_2",))
    rows, scans = found.describe(TABLE, "which are patients of their own")
    assert rows == "patients.csv: 1 row(s) name no scan of this data set: liver_7"
    assert scans.startswith("patients.csv: 1 scan(s) have no row, which are patients of their own:")
    assert scans.endswith("liver_2")


def test_a_complete_table_has_nothing_to_describe() -> None:
    found = match_entries(TABLE, make_entries("a", "b"), ["b", "a"])
    assert found.describe(TABLE, "") == []


@pytest.mark.parametrize("name", ["liver_1.nii.gz", "imagesTr/liver_1.nii.gz", "LIVER_1"])
def test_names_of_files_stand_for_their_scans(name: str) -> None:
    found = match_entries(TABLE, make_entries(name), ["liver_1", "liver_2"])
    assert list(found.by_scan) == ["liver_1"]


@pytest.mark.parametrize(
    "names", [("liver_1", "liver_1.nii.gz"), ("liver_1", "other", "other.nii.gz")]
)
def test_a_scan_with_two_rows_is_refused_with_both_lines(names: tuple[str, ...]) -> None:
    second = len(names) + 1
    with pytest.raises(UserError, match=rf"occurs twice, in line {second - 1} and line {second}"):
        match_entries(TABLE, make_entries(*names), ["liver_1", "liver_2"])


def test_a_table_of_another_data_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"no row names a scan .* begin with case_1, .* liver_1"):
        match_entries(TABLE, make_entries("case_1", "case_2"), ["liver_2", "liver_1"])


def test_names_cannot_write_to_the_terminal() -> None:
    found = match_entries(TABLE, make_entries("a", "\x1b[2J"), ["a"])
    (line,) = found.describe(TABLE, "")
    assert line.isprintable()

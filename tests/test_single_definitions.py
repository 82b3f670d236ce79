"""Facts with one home: the hash of a file, and CSV text with its guard against formulas."""

import hashlib
from pathlib import Path

import pytest

import liverseg_dist
from liverseg_dist.files import file_sha256
from liverseg_dist.texts.csv_output import escape_cell, format_csv

PACKAGE = Path(liverseg_dist.__file__).parent


@pytest.mark.parametrize(
    ("call", "home"),
    [
        ("hashlib.file_digest", ["files.py"]),
        ("csv.writer(", []),
        ("csv.DictWriter(", ["texts/csv_output.py"]),
        ("csv.reader(", ["texts/tables.py"]),
        ("type=Path,", []),
        ("def natural_key(", ["files.py"]),
        ("FORMULA_STARTS =", ["texts/csv_output.py"]),
    ],
)
def test_only_one_module_calls(call: str, home: list[str]) -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if call in file.read_text(encoding="utf-8"):
            found.append(file.relative_to(PACKAGE).as_posix())
    assert found == home


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 3_000_000)
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "absent")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_formulas_become_text(start: str) -> None:
    assert escape_cell(f"{start}1+1") == f"'{start}1+1"
    assert escape_cell(f"a{start}") == f"a{start}"


def test_other_cells_keep_their_value() -> None:
    assert [escape_cell(value) for value in (None, True, False, "", -1.5, 3)] == [
        "", 1, 0, "", -1.5, 3,
    ]  # fmt: skip


def test_rows_become_lines_in_the_order_of_the_columns() -> None:
    rows = [{"b": -0.5, "a": "=x", "other": 1}, {"a": 'say "a, b"'}]
    assert format_csv(["b"], [{"b": -1 / 3}], float_digits=3) == "b\n-0.333\n"
    assert format_csv(["a", "b"], rows) == 'a,b\n\'=x,-0.5\n"say ""a, b""",\n'

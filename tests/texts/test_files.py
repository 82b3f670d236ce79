"""Text files of users: encodings, repeated keys, tables."""

from pathlib import Path

import pytest
import yaml

from liverseg_dist.config import load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.texts.decode import read_text
from liverseg_dist.texts.structured import (
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
    read_yaml_as_text,
)
from liverseg_dist.texts.tables import read_table

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
LINE_ENDS = ("\n", "\r\n", "\r")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line_end", LINE_ENDS, ids=["LF", "CRLF", "CR"])
def test_readers_accept_byte_order_marks_and_line_ends(
    tmp_path: Path, encoding: str, line_end: str
) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(text.replace("\n", line_end).encode(encoding))
        return tmp_path / name

    assert read_text(write("t.txt", "ä\nb\n")) == "ä\nb\n"
    assert read_yaml(write("t.yaml", "a: 1\nb: ü\n")) == {"a": 1, "b": "ü"}
    assert read_json(write("t.json", '{"a":\n1}')) == {"a": 1}
    table = read_table(write("t.csv", "case,patient\nä,1\n"), ("case", "patient"))
    assert [row.cells for row in table.rows] == [{"case": "ä", "patient": "1"}]
    assert load_settings([write("c.yaml", "seed: 4\n")]).seed == 4


@pytest.mark.parametrize("name", ["t.csv", "t.yaml", "t.json"])
def test_other_encoding_error_names_line_and_remedy(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("a\r\nb\r\nä\r\n".encode("cp1252"))
    readers = {
        "t.csv": lambda: read_table(path, ("a",)),
        "t.yaml": lambda: read_yaml(path),
        "t.json": lambda: read_json(path),
    }
    with pytest.raises(
        UserError, match=r"line 3: byte 0xE4 is not UTF-8 .*save it as UTF-8"
    ) as caught:
        readers[name]()
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("train:\n  a: 1\ntrain:\n  b: 1\n", "1 and 3"),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 3\n", "3 and 5"),
        ("a:\n- x: 1\n- {y: 1, y: 2}\n", "3 and 3"),
        ("a: &m {x: 1}\nb:\n  <<: *m\n  y: 1\n  y: 2\n", "4 and 5"),
        ("a: &m {x: 1}\nb:\n  <<: *m\n  <<: *m\n", "3 and 4"),
        ('a: 1\n"a": 2\n', "1 and 2"),
    ],
    ids=["top", "nested", "in a list", "beside a merge", "two merges", "quoted"],
)
def test_repeated_yaml_key_error_names_both_lines(tmp_path: Path, text: str, lines: str) -> None:
    assert yaml.safe_load(text), "PyYAML accepts it"
    with pytest.raises(ValueError, match=f"occurs twice, in lines {lines}"):
        parse_yaml(text)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"a\.yaml: .*lines {lines}"):
        load_settings([tmp_path / "a.yaml"])


def test_key_may_override_merged_key() -> None:
    assert parse_yaml("a: &m {x: 1, y: 2}\nb:\n  <<: *m\n  x: 3\n")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": 1,\n "b": 2,\n "a": 3}', "1 and 3"),
        ('{"o": {"a": 1},\n "l": [{"a": "a:"},\n {"b": 1,\n "b"\n: 2}]}', "3 and 4"),
        ('{"\\u0061": "{",\n "a": 3}', "1 and 2"),
    ],
    ids=["top", "nested", "escaped"],
)
def test_repeated_json_key_error_names_both_lines(text: str, lines: str) -> None:
    with pytest.raises(ValueError, match=f"occurs twice, in lines {lines}"):
        parse_json(text)


IDS = ("001", "1e3", "0x10", "1_000", "no", "2024-11-30", "~", "null", "1:30", "Off", "0o7", ".5")


@pytest.mark.parametrize("written", IDS)
def test_ids_stay_text(tmp_path: Path, written: str) -> None:
    (tmp_path / "a.yaml").write_text(f"{written}: {written}\n")
    assert list(read_yaml(tmp_path / "a.yaml")) == [written]
    expected = None if written in ("~", "null") else written
    assert read_yaml_as_text(tmp_path / "a.yaml") == {written: expected}
    (tmp_path / "a.csv").write_text(f"case,patient\n{written},{written}\n")
    assert read_table(tmp_path / "a.csv", ("case", "patient")).rows[0].cells == {
        "case": written,
        "patient": written,
    }


@pytest.mark.parametrize(
    "text",
    [
        "case,patient\na b,p\n",
        "case;patient\na b;p\n",
        "case\tpatient\na b\tp\n",
        "sep=;\ncase;patient\na b;p\n",
        " Case , PATIENT \n a b , p \n",
        '"case","patient"\n"a b","p"\n',
        "# from the register\n\ncase,patient\n\n , \n# a comment\na b,p\n\n",
        "case,patient,,\na b,p,,\n",
        "patient,note,case\np,x,a b\n",
        "case,patient\na\u00a0b,\u200bp\ufeff\n",
        'case,patient\n="a b",="p"\n',
        "case,patient\na b,p",
    ],
    ids=[
        "comma",
        "semicolon",
        "tab",
        "sep=",
        "spaces and case",
        "quotes",
        "blank and comments",
        "trailing separators",
        "order",
        "invisible",
        "Excel's text",
        "no line end",
    ],
)
def test_table_dialects(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    rows = read_table(tmp_path / "t.csv", ("case", "patient")).rows
    assert [row.cells for row in rows] == [{"case": "a b", "patient": "p"}]


def test_rows_have_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('sep=,\n#\ncase,patient\n\n"a\nb",p\nc,q\n')
    rows = read_table(tmp_path / "t.csv", ("case", "patient")).rows
    assert [(row.line, row["case"]) for row in rows] == [(5, "a b"), (7, "c")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty table"),
        (
            "fall,patient\n",
            "column case is missing; expected case,patient, line 1 is 'fall,patient'",
        ),
        ("case,patient,Case\n", "column case occurs twice, as numbers 1 and 3"),
        ("case,patient\na,b,c\n", "line 2 has 3 cells, the header has 2"),
        ('case,patient\n"a,b\nc,d\n', "line 2: .*a quote that is not closed"),
        ("case,patient\na,\0\n", "holds zero bytes"),
    ],
)
def test_invalid_table_is_user_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / "t.csv", ("case", "patient"))
    assert str(caught.value).startswith(str(tmp_path / "t.csv"))

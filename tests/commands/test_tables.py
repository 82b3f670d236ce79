"""Tables on terminals of any width: no text is cut and no line is wider than the terminal.

Without a terminal each row is one line.
"""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from liverseg_dist.tracking.terminal_table import format_table
from tests.data.sources import write_source
from tests.distributed.launch import clean_environment

HEADINGS = ("case", "status", "axes", "findings")
ROWS = [
    (
        "liver_1",
        "kept",
        "LPS",
        "117,120 voxels below -1024 HU (padding, or noise in air) become air\nno tumour",
    ),
    ("a" * 70, "quarantined", "", "the file ends early"),
    ("liver_2", "kept", "RAS", "日本語のテキスト" * 5),
]


def letters(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 100, 160])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    lines = format_table(HEADINGS, ROWS, width)
    if width > 1:  # a wide character needs two columns
        assert max(line.cell_len for line in lines) <= width
    shown = letters("".join(line.plain for line in lines))
    for row in ROWS:
        for cell in row:
            for word in letters(cell):
                assert word in shown
    assert sum(line.plain.count("a") for line in lines) >= 70


def test_folded_cells_contain_their_full_text() -> None:
    lines = format_table(HEADINGS, ROWS[:1], 60)
    column = lines[0].plain.index("findings")
    text = " ".join(line.plain[column:].strip() for line in lines[1:])
    assert text == ROWS[0][3].replace("\n", " ")


def test_each_row_is_one_line_without_a_terminal() -> None:
    lines = format_table(HEADINGS, ROWS, None)
    assert len(lines) == 1 + len(ROWS)
    assert "become air; no tumour" in lines[1].plain


def run_in_terminal(columns: int, *arguments: str) -> str:
    """What a command prints on a terminal of this width (stdout; a pseudo-terminal)."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    environment = {
        key: value for key, value in clean_environment().items() if key not in ("COLUMNS", "LINES")
    }
    command = [sys.executable, "-m", "liverseg_dist", *arguments]
    with subprocess.Popen(
        command, stdout=writer, stderr=subprocess.DEVNULL, env=environment | {"TERM": "dumb"}
    ) as process:
        os.close(writer)
        output = b""
        while True:
            try:
                part = os.read(reader, 1 << 16)
            except OSError:  # the terminal's other end is closed
                break
            if not part:
                break
            output += part
    os.close(reader)
    assert process.returncode in (0, 1)
    return output.decode().replace("\r\n", "\n")


def test_table_of_convert_fits_80_columns(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data")
    arguments = ("convert", str(source), str(tmp_path / "s.zarr"), "--dry-run", "convert.workers=1")
    whole = subprocess.run(
        [sys.executable, "-m", "liverseg_dist", *arguments],
        capture_output=True, text=True, env=clean_environment(), timeout=120,
    ).stdout  # fmt: skip
    narrow = run_in_terminal(80, *arguments)
    start = narrow[narrow.index("case ") :].split("\naudit of")[0]
    assert max(len(line) for line in start.splitlines()) <= 80
    table = whole[whole.index("case ") :].split("\naudit of")[0]
    for word in table.replace(";", " ").split():
        assert letters(word) in letters(narrow) or len(word) > 10
    assert len(table.splitlines()) == len(list((source / "imagesTr").glob("*.nii.gz"))) + 1


def test_columns_variable_is_used_without_a_terminal() -> None:
    for columns in ("80", "50"):
        output = subprocess.run(
            [sys.executable, "-m", "liverseg_dist", "doctor"],
            capture_output=True, text=True, env=clean_environment() | {"COLUMNS": columns}, timeout=120,
        ).stdout  # fmt: skip
        table = [
            line
            for line in output.splitlines()
            if not line.startswith(("problem:", "warning:", "nothing"))
        ]
        assert max(len(line) for line in table) <= int(columns)
        assert letters("for a scan of 512 x 512 x 700") in letters(output)

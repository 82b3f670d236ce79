"""Tables that users made in an editor or a spreadsheet: rows of text cells, each with its line
number.

Separated by comma, semicolon or tab, whichever gives the wanted columns. Cells stay text (`001`,
`1e3`, `no`); around them and in the header spaces, case, byte order marks and invisible characters
do not matter. Blank rows, rows that begin with `#`, and empty columns at the end are skipped.
Columns that are not asked for are ignored.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.decode import read_text
from liverseg_dist.texts.names import clean_text

SEPARATORS = (",", ";", "\t")
_EXCEL_SEPARATOR = re.compile(r"\"?sep=(.)\"?[,;\s]*", re.IGNORECASE)
_EXCEL_TEXT = re.compile(r'="(.*)"', re.DOTALL)


@dataclass(frozen=True)
class Row:
    """Cells by column name, and the line of the file where the row begins."""

    line: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


@dataclass(frozen=True)
class Table:
    rows: tuple[Row, ...]
    separator: str


def read_table(path: Path, columns: Sequence[str], purpose: str = "") -> Table:
    """The rows of a table that has these columns.

    Args:
        path: CSV (`,` or `;`) or TSV, with a header line.
        columns: Names of the columns that are needed, in lower case.
        purpose: What the table is for, as the end of a message.

    Raises:
        UserError: Unreadable, a column missing or given twice, a row that does not fit the header.
    """
    text = read_text(path, purpose=purpose)
    shown = printable(path)
    if "\0" in text:
        raise UserError(
            f"{shown}: holds zero bytes, so it is no text table; export it as CSV (UTF-8){purpose}"
        )
    try:
        separator, lines = _split_rows(text, columns)
    except csv.Error as error:
        raise UserError(f"{shown}: not a CSV table: {error}{purpose}") from None
    expected = ",".join(columns)
    if not lines:
        raise UserError(f"{shown}: an empty table; its header is {expected}{purpose}")
    header_line, header = lines[0]
    names = [_normalize_column_name(cell) for cell in header]
    for column in columns:
        places = [number for number, name in enumerate(names, start=1) if name == column]
        if not places:
            found = separator.join(printable(cell) for cell in header)[:200]
            raise UserError(
                f"{shown}: column {column} is missing; expected {expected}, line {header_line} is '{found}'{purpose}"
            )
        if len(places) > 1:
            where = f"as numbers {places[0]} and {places[1]}"
            raise UserError(f"{shown}: column {column} stands twice, {where}; remove one")
    rows = []
    for line, cells in lines[1:]:
        if any(cells[len(names) :]):
            raise UserError(
                f"{shown}: line {line} has {len(cells)} cells, the header has {len(names)}; "
                f"quote cells that hold the separator '{separator}'"
            )
        padded = cells + [""] * (len(names) - len(cells))
        rows.append(Row(line, {column: padded[names.index(column)] for column in columns}))
    return Table(tuple(rows), separator)


def _split_rows(text: str, columns: Sequence[str]) -> tuple[str, list[tuple[int, list[str]]]]:
    """The separator whose header has most of the columns, and (line, cells) of each row."""
    first = 0
    lines = text.split("\n", 1)
    declared = _EXCEL_SEPARATOR.fullmatch(lines[0])
    separators: Sequence[str] = SEPARATORS
    if declared:  # Excel writes and obeys such a first line
        text, first, separators = lines[1] if len(lines) > 1 else "", 1, (declared[1],)
    best: tuple[int, str] = (-1, separators[0])
    for separator in separators:
        try:
            header = next(_iterate_records(text, separator), (0, []))[1]
        except csv.Error:  # quotes that only fit another separator
            continue
        known = len({_normalize_column_name(cell) for cell in header}.intersection(columns))
        best = max(best, (known, separator), key=lambda one: one[0])
    return best[1], [(line + first, cells) for line, cells in _iterate_records(text, best[1])]


def _iterate_records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
    )
    begins = 1
    try:
        for record in reader:
            cells = [_clean_cell(cell) for cell in record]
            if any(cells) and not cells[0].startswith("#"):
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {begins}: {error} (a quote that is not closed?)") from None


def _clean_cell(cell: str) -> str:
    """Excel's `="001"`, which keeps zeros, is the text 001."""
    cell = " ".join(clean_text(" ".join(cell.splitlines())).split())
    match = _EXCEL_TEXT.fullmatch(cell)
    return match[1].strip() if match else cell


def _normalize_column_name(cell: str) -> str:
    """`Z mm`, `z-mm` and `Z_MM` are one column."""
    return re.sub(r"[\s_-]+", "_", cell.casefold())

"""Read tables that users made in an editor or a spreadsheet: rows of text cells with line numbers.

The separator is the comma, semicolon or tab that gives the expected columns. Cells stay text
(`001`, `1e3`, `no`). Spaces around cells, upper and lower case in the header, byte order marks and
invisible characters are ignored. Blank rows, rows that begin with `#`, empty columns at the end and
other columns are skipped.
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
MAX_HEADER_CHARACTERS = 200
_EXCEL_SEPARATOR = re.compile(r"\"?sep=(.)\"?[,;\s]*", re.IGNORECASE)
_EXCEL_TEXT = re.compile(r'="(.*)"', re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    line: int
    """Line of the file where the row begins."""
    cells: dict[str, str]
    """By column name."""

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


@dataclass(frozen=True)
class Table:
    """The rows of a file, and the separator of its cells."""

    rows: tuple[Row, ...]
    separator: str


def read_table(
    path: Path, columns: Sequence[str], purpose: str = "", optional_columns: Sequence[str] = ()
) -> Table:
    """Read a table.

    Args:
        path: CSV (`,` or `;`) or TSV, with a header line.
        columns: Names of the required columns, in lower case.
        purpose: What the table is for, appended to error messages.
        optional_columns: Names of columns that a table may lack; their cells are then empty.

    Raises:
        UserError: The file is unreadable, a column is missing or repeated, or a row has more cells
            than the header.
    """
    text = read_text(path, purpose=purpose)
    shown = printable(path)
    if "\0" in text:
        raise UserError(
            f"{shown}: holds zero bytes, so it is not a text table; "
            f"export it as CSV (UTF-8){purpose}"
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
    for column in (*columns, *optional_columns):
        count = names.count(column)
        if count == 0 and column in optional_columns:
            continue
        if count == 0:
            found = separator.join(printable(cell) for cell in header)[:MAX_HEADER_CHARACTERS]
            raise UserError(
                f"{shown}: column {column} is missing; expected {expected}, "
                f"line {header_line} is '{found}'{purpose}"
            )
        if count > 1:
            first = names.index(column)
            second = names.index(column, first + 1)
            raise UserError(
                f"{shown}: column {column} occurs twice, as numbers {first + 1} and {second + 1}; "
                "remove one"
            )
    rows = []
    for line, cells in lines[1:]:
        if any(cells[len(names) :]):
            raise UserError(
                f"{shown}: line {line} has {len(cells)} cells, the header has {len(names)}; "
                f"quote cells that hold the separator '{separator}'"
            )
        # Spreadsheets leave out empty cells at the end of a row.
        padded = cells + [""] * (len(names) - len(cells))
        given = dict(zip(names, padded, strict=False))
        rows.append(
            Row(line, {column: given.get(column, "") for column in (*columns, *optional_columns)})
        )
    return Table(tuple(rows), separator)


def _split_rows(text: str, columns: Sequence[str]) -> tuple[str, list[tuple[int, list[str]]]]:
    """Split a table with the separator that gives most of the columns in the header.

    Returns:
        The separator, and (line, cells) of each row.
    """
    separators: Sequence[str] = SEPARATORS
    skipped_lines = 0
    first_line, _, rest = text.partition("\n")
    # Excel writes and reads a first line such as `sep=;`.
    if declared := _EXCEL_SEPARATOR.fullmatch(first_line):
        text, skipped_lines, separators = rest, 1, (declared[1],)
    best, best_count = separators[0], -1
    for separator in separators:
        try:
            _, header = next(_iterate_records(text, separator), (0, []))
        except csv.Error:
            # The quotes are valid with another separator only.
            continue
        names = {_normalize_column_name(cell) for cell in header}
        count = len(names.intersection(columns))
        if count > best_count:
            best, best_count = separator, count
    rows = [(line + skipped_lines, cells) for line, cells in _iterate_records(text, best)]
    return best, rows


def _iterate_records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of each row that is not blank and not a comment."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
    )
    # A quoted cell may contain line ends, so a row may have several lines.
    first_line = 1
    try:
        for record in reader:
            cells = [_clean_cell(cell) for cell in record]
            if any(cells) and not cells[0].startswith("#"):
                yield first_line, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {first_line}: {error} (a quote that is not closed?)") from None


def _clean_cell(cell: str) -> str:
    """One line without surrounding spaces. Excel's `="001"`, which keeps zeros, becomes 001."""
    cell = " ".join(clean_text(" ".join(cell.splitlines())).split())
    match = _EXCEL_TEXT.fullmatch(cell)
    return match[1].strip() if match else cell


def _normalize_column_name(cell: str) -> str:
    """Make `Z mm`, `z-mm` and `Z_MM` equal."""
    return re.sub(r"[\s_-]+", "_", cell.casefold())

"""CSV text as this project writes it: undefined values are empty cells, no cell is a formula.

`cases.csv`, `lesions.csv` and `volumes.csv` are opened in spreadsheets, and names in them come from
users' files. A spreadsheet computes a cell that starts with one of `FORMULA_STARTS`, so such a text
gets a leading apostrophe (https://owasp.org/www-community/attacks/CSV_Injection).
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

FORMULA_STARTS = frozenset("=+-@\t\r")


def format_csv(
    columns: Sequence[str],
    rows: Iterable[Mapping[str, object]],
    float_digits: int | None = None,
) -> str:
    """Write rows as CSV text with a header line.

    Args:
        columns: Names of the columns, in order.
        rows: Values by column name. Missing ones become empty cells, other names are ignored.
        float_digits: Significant digits of floats; None: as many as are needed to read them back.

    Returns:
        The text; lines end with a line feed.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: escape_cell(row.get(name)) for name in columns}
        if float_digits is not None:
            for name, cell in cells.items():
                if isinstance(cell, float):
                    cells[name] = f"{cell:.{float_digits}g}"
        writer.writerow(cells)
    return text.getvalue()


def escape_cell(value: object) -> object:
    """A cell: None becomes empty, booleans 0 or 1; a formula gets a leading apostrophe."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value[:1] in FORMULA_STARTS:
        return f"'{value}"
    return value

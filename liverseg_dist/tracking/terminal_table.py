"""Tables on a terminal: folded to its width, never cut.

The width is that of `COLUMNS`, else of the terminal. Where stdout is not a terminal and `COLUMNS`
is not set, nothing is folded: each row is one line, for programs that read it. A table that fits is
printed as it is. Otherwise the widest columns are folded. Where that is not enough, each row
becomes a block of `heading: value` lines.
"""

import os
import sys
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

GAP = "  "
MIN_FOLDED = 10
"""Narrowest width of a folded column, unless the longest word of its heading is longer."""
Cell = str | Text
Row = Sequence[Cell]


def print_table(
    headings: Sequence[str], rows: Sequence[Row], right: Sequence[str] = (), plain: bool = False
) -> None:
    """Print a table to stdout.

    Args:
        headings: One for each column; an empty one is allowed.
        rows: Cells as text; a newline starts a new line in the cell. `rich.text.Text` may have a
            colour.
        right: Headings of the columns that are aligned to the right.
        plain: Without the line of headings.
    """
    # Lines are folded here already: rich must not fold or cut them again.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in format_table(headings, rows, terminal_width(), right, plain):
        console.print(line)
    sys.stdout.flush()


def terminal_width() -> int | None:
    """Width from `COLUMNS`, else of the terminal; None where neither is known."""
    try:
        columns = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        columns = 0
    if columns > 0:
        return columns
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    # Stdout is not a terminal, or a stream without a file.
    except (OSError, ValueError, AttributeError):
        return None


def format_table(
    headings: Sequence[str],
    rows: Sequence[Row],
    width: int | None,
    right: Sequence[str] = (),
    plain: bool = False,
) -> list[Text]:
    """Format a table as lines, none wider than `width` (None: no limit).

    All other arguments are those of `print_table`.
    """
    texts = [_convert_row(row, one_line=width is None) for row in rows]
    heads = [Text(heading, style="bold") for heading in headings]
    table = texts if plain else [heads, *texts]
    natural: list[int] = []
    narrowest: list[int] = []
    for column, heading in enumerate(headings):
        longest = max((_longest_line(row[column]) for row in table), default=0)
        natural.append(longest)
        narrowest.append(min(longest, max(MIN_FOLDED, _longest_word(heading))))
    widths: list[int] | None = natural
    if width is not None:
        widths = _fit_columns(natural, narrowest, width - len(GAP) * (len(headings) - 1))
    lines: list[Text] = []
    if widths is None:
        assert width is not None
        for row in texts:
            lines += _format_block(headings, row, width)
        return lines
    is_right = [heading in right for heading in headings]
    for row in table:
        lines += _format_row(row, widths, is_right)
    return lines


def _convert_row(row: Row, one_line: bool) -> list[Text]:
    cells = [cell if isinstance(cell, Text) else Text(cell) for cell in row]
    return [_join_lines(cell) for cell in cells] if one_line else cells


def _fit_columns(natural: Sequence[int], narrowest: Sequence[int], total: int) -> list[int] | None:
    """Column widths with a sum of at most `total`; None where the narrowest ones are too wide.

    The widest column is narrowed first.
    """
    if sum(narrowest) > total:
        return None
    # One column at a time: the widest one may change while the table is narrowed.
    widths = list(natural)
    while sum(widths) > total:
        shrinkable = [i for i in range(len(widths)) if widths[i] > narrowest[i]]
        widths[max(shrinkable, key=lambda i: widths[i])] -= 1
    return widths


def _format_row(row: Sequence[Text], widths: Sequence[int], is_right: Sequence[bool]) -> list[Text]:
    folded = [_fold_cell(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for number in range(max((len(cell) for cell in folded), default=0)):
        line = Text()
        for i, cell in enumerate(folded):
            part = cell[number] if number < len(cell) else Text()
            padding = " " * (widths[i] - cell_len(part.plain))
            line.append(GAP if i else "")
            line.append_text(Text(padding) + part if is_right[i] else part + Text(padding))
        # The padding of the last column is not printed.
        line.rstrip()
        lines.append(line)
    return lines


def _format_block(headings: Sequence[str], row: Sequence[Text], width: int) -> list[Text]:
    """A row as `heading: value` lines, for terminals that are too narrow for columns."""
    lines = []
    for number, (heading, cell) in enumerate(zip(headings, row, strict=True)):
        if not cell.plain:
            continue
        label = Text(f"{heading}: " if heading else "", style="bold")
        indent = 0 if number == 0 else 2
        parts = _fold_cell(label + cell, max(1, width - indent))
        lines += [Text(" " * indent) + part for part in parts]
    return lines


def _fold_cell(cell: Text, width: int) -> list[Text]:
    """Lines of at most `width`, broken between words, or within a word that is longer."""
    lines: list[Text] = []
    for line in cell.split("\n", allow_blank=True):
        start = 0
        for stop in _find_breaks(line.plain, max(1, width)):
            part = line[start:stop]
            part.rstrip()
            lines.append(part)
            start = stop
    return lines or [Text()]


def _find_breaks(text: str, width: int) -> list[int]:
    """Ends of the lines of `text`, as character indices."""
    ends = []
    start = 0
    while cell_len(text[start:].rstrip()) > width:
        fitting = chop_cells(text[start:], width)[0]
        stop = start + max(1, len(fitting))
        # A space after the last word belongs to its line.
        space = text.rfind(" ", start, stop + 1)
        stop = space + 1 if space > start else stop
        ends.append(stop)
        start = stop
    return [*ends, len(text)]


def _join_lines(cell: Text) -> Text:
    return Text("; ").join(cell.split("\n")) if "\n" in cell.plain else cell


def _longest_line(cell: Text) -> int:
    return max((cell_len(line) for line in cell.plain.split("\n")), default=0)


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)

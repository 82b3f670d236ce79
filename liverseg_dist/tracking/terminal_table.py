"""Tables on a terminal: folded to its width, never cut.

The width is that of `COLUMNS`, else of the terminal. Where stdout is no terminal and `COLUMNS` is not set, nothing is
folded: each row is one line, for programs that read it. A table that fits is printed as it is; else the widest columns
fold; where even that is too wide, each row becomes a block of `heading: value` lines.
"""

import os
import sys
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

GAP = "  "
MIN_FOLDED = 10
"""A column is not folded below this width (or its heading's longest word, if that is longer)."""
Cell = str | Text
Row = Sequence[Cell]


def print_table(
    headings: Sequence[str], rows: Sequence[Row], right: Sequence[str] = (), plain: bool = False
) -> None:
    """Print a table to stdout.

    Args:
        headings: One for each column; an empty one is allowed.
        rows: Cells as text; newlines in a cell start a new line of it. `rich.text.Text` carries a colour.
        right: Headings of the columns that are aligned to the right.
        plain: Without the line of headings.
    """
    # A console of unlimited width: folding is done here, and rich must not fold or cut once more.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in format_table(headings, rows, terminal_width(), right, plain):
        console.print(line)
    sys.stdout.flush()


def terminal_width() -> int | None:
    """Columns to fill: `COLUMNS`, else those of the terminal; None where stdout is neither."""
    try:
        columns = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        columns = 0
    if columns > 0:
        return columns
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):  # not a terminal, or a stream without a file
        return None


def format_table(
    headings: Sequence[str],
    rows: Sequence[Row],
    width: int | None,
    right: Sequence[str] = (),
    plain: bool = False,
) -> list[Text]:
    """The lines of a table, none wider than `width` (None: no limit); arguments as for `print_table`."""
    texts = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    if width is None:
        texts = [[_one_line(cell) for cell in row] for row in texts]
    heads = [Text(heading, style="bold") for heading in headings]
    table = texts if plain else [heads, *texts]
    natural = [
        max((_longest_line(row[i]) for row in table), default=0) for i in range(len(headings))
    ]
    least = [
        min(n, max(MIN_FOLDED, _longest_word(head)))
        for n, head in zip(natural, headings, strict=True)
    ]
    widths = (
        natural if width is None else _fit(natural, least, width - len(GAP) * (len(headings) - 1))
    )
    if widths is None:
        assert width is not None
        return [line for row in texts for line in _block(headings, row, width)]
    lines = []
    for row in table:
        lines += _row_lines(row, widths, [heading in right for heading in headings])
    return lines


def _fit(natural: Sequence[int], least: Sequence[int], room: int) -> list[int] | None:
    """Widths that fill at most `room`: the widest column gives way first; None where that is impossible."""
    if sum(least) > room:
        return None
    widths = list(natural)
    while sum(widths) > room:
        shrinkable = [
            i for i, (w, least_w) in enumerate(zip(widths, least, strict=True)) if w > least_w
        ]
        widths[max(shrinkable, key=lambda i: widths[i])] -= 1
    return widths


def _row_lines(
    row: Sequence[Text], widths: Sequence[int], to_the_right: Sequence[bool]
) -> list[Text]:
    folded = [_fold(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for number in range(max((len(cell) for cell in folded), default=0)):
        line = Text()
        for i, cell in enumerate(folded):
            part = cell[number] if number < len(cell) else Text()
            padding = " " * (widths[i] - cell_len(part.plain))
            line.append(GAP if i else "")
            line.append_text(Text(padding) + part if to_the_right[i] else part + Text(padding))
        line.rstrip()
        lines.append(line)
    return lines


def _block(headings: Sequence[str], row: Sequence[Text], width: int) -> list[Text]:
    """A row as lines of its own, for terminals that are too narrow for columns."""
    lines = []
    for number, (heading, cell) in enumerate(zip(headings, row, strict=True)):
        if not cell.plain:
            continue
        label = Text(f"{heading}: " if heading else "", style="bold")
        indent = 0 if number == 0 else 2
        parts = _fold(label + cell, max(1, width - indent))
        lines += [Text(" " * indent) + part for part in parts]
    return lines


def _fold(cell: Text, width: int) -> list[Text]:
    """Lines of at most `width`, broken between words, and within a word that is longer."""
    lines: list[Text] = []
    for line in cell.split("\n", allow_blank=True):
        start = 0
        for stop in _breaks(line.plain, max(1, width)):
            part = line[start:stop]
            part.rstrip()
            lines.append(part)
            start = stop
    return lines or [Text()]


def _breaks(text: str, width: int) -> list[int]:
    """Ends of the lines of `text`, as character indices."""
    ends = []
    start = 0
    while cell_len(text[start:].rstrip()) > width:
        fitting = chop_cells(text[start:], width)[0]
        stop = start + max(1, len(fitting))
        # A space that follows the last word goes with it.
        space = text.rfind(" ", start, stop + 1)
        stop = space + 1 if space > start else stop
        ends.append(stop)
        start = stop
    return [*ends, len(text)]


def _one_line(cell: Text) -> Text:
    return Text("; ").join(cell.split("\n")) if "\n" in cell.plain else cell


def _longest_line(cell: Text) -> int:
    return max((cell_len(line) for line in cell.plain.split("\n")), default=0)


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)

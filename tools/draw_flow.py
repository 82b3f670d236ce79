"""Draw a flow chart as SVG from a text file: boxes on a grid and arrows between them.

  python tools/draw_flow.py .github/pictures/data-flow.txt        writes data-flow.svg beside it

The text file explains its lines. The pictures in README files are made in this way, so that a change of the
text shows in a review.
"""

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 190, 58
GAP_X, GAP_Y = 46, 52
MARGIN = 16
FILLS = {"data": "#e8f0fa", "step": "#fdf1dc"}
STROKES = {"data": "#2f6db5", "step": "#b4751a"}


@dataclass(frozen=True)
class Box:
    """One box; `left` and `top` in pixels."""

    column: int
    row: int
    title: str
    subtitle: str
    kind: str

    @property
    def left(self) -> int:
        return MARGIN + self.column * (WIDTH + GAP_X)

    @property
    def top(self) -> int:
        return MARGIN + self.row * (HEIGHT + GAP_Y)

    def port(self, side: str, shift: int) -> tuple[int, int]:
        """Point where an arrow starts or ends: r(ight), l(eft), t(op), b(ottom)."""
        centre_x, centre_y = self.left + WIDTH // 2 + shift, self.top + HEIGHT // 2
        points = {
            "r": (self.left + WIDTH, centre_y),
            "l": (self.left, centre_y),
            "t": (centre_x, self.top),
            "b": (centre_x, self.top + HEIGHT),
        }
        return points[side]


@dataclass(frozen=True)
class Arrow:
    """An arrow between two boxes, with the sides where it leaves and enters."""

    start: str
    end: str
    sides: str
    shift_out: int
    shift_in: int
    level: int


def read_chart(text: str) -> tuple[dict[str, Box], list[Arrow]]:
    """Parse the text file. Raises `ValueError` for a line that it does not know."""
    boxes: dict[str, Box] = {}
    arrows: list[Arrow] = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if not line.strip() or line.startswith("#"):
            continue
        kind, _, name = fields[0].partition(" ")
        if kind == "box":
            _, column, row, title, subtitle, fill = fields
            boxes[name.strip()] = Box(int(column), int(row), title, subtitle, fill)
        elif kind == "arrow":
            start, _, end = name.partition("->")
            numbers = [int(field) for field in fields[2:]] + [0, 0, 0]
            arrows.append(Arrow(start.strip(), end.strip(), fields[1], *numbers[:3]))
        else:
            raise ValueError(f"neither box nor arrow: {line}")
    return boxes, arrows


def draw_box(box: Box) -> str:
    x = box.left + WIDTH // 2
    return (
        f'<rect x="{box.left}" y="{box.top}" width="{WIDTH}" height="{HEIGHT}" rx="7" '
        f'fill="{FILLS[box.kind]}" stroke="{STROKES[box.kind]}" stroke-width="1.5"/>\n'
        f'<text x="{x}" y="{box.top + 25}" class="title">{escape(box.title)}</text>\n'
        f'<text x="{x}" y="{box.top + 44}" class="subtitle">{escape(box.subtitle)}</text>\n'
    )


def draw_arrow(arrow: Arrow, boxes: dict[str, Box]) -> str:
    """A line of horizontal and vertical parts. `level` moves the horizontal part of a vertical arrow."""
    side_out, side_in = arrow.sides.split("-")
    x0, y0 = boxes[arrow.start].port(side_out, arrow.shift_out)
    x1, y1 = boxes[arrow.end].port(side_in, arrow.shift_in)
    points = [(x0, y0)]
    if side_out in "tb" and side_in in "tb" and x0 != x1:
        # Leave the box vertically, cross over in the gap between two rows, and enter vertically.
        y = y0 + (GAP_Y // 2 if side_out == "b" else -GAP_Y // 2) + arrow.level
        points += [(x0, y), (x1, y)]
    elif side_out in "tb" and side_in in "rl":
        points.append((x0, y1))
    points.append((x1, y1))
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" class="arrow" marker-end="url(#head)"/>\n'


def draw_chart(boxes: dict[str, Box], arrows: list[Arrow]) -> str:
    """The whole SVG document."""
    width = max(box.left for box in boxes.values()) + WIDTH + MARGIN
    height = max(box.top for box in boxes.values()) + HEIGHT + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" text-anchor="middle">\n'
        "<style>.title{font-size:15px;font-weight:bold;fill:#1a1a1a}"
        ".subtitle{font-size:12px;fill:#444}"
        ".arrow{fill:none;stroke:#555;stroke-width:1.6}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
    ]
    parts += [draw_arrow(arrow, boxes) for arrow in arrows]
    parts += [draw_box(box) for box in boxes.values()]
    return "".join(parts) + "</svg>\n"


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(sys.argv[1])
    boxes, arrows = read_chart(source.read_text(encoding="utf-8"))
    target = source.with_suffix(".svg")
    target.write_text(draw_chart(boxes, arrows), encoding="utf-8")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

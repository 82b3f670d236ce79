"""The results as Markdown, for `tools/bench/RESULTS.md`."""

from pathlib import Path

from .context import MEASURED, Figures, read_lines
from .runner import SECTIONS

HIDDEN = ("section", "case", "system", "status", "took_s")


def format_table(path: Path) -> str:
    """Return a heading with date and hardware, then a table for each section."""
    lines = read_lines(path)
    about = [line for line in lines if line["section"] == "run"]
    parts = [format_heading(about[-1] if about else {})]
    for name, section in SECTIONS.items():
        own = [line for line in lines if line["section"] == name]
        if own:
            parts.append(format_section(name, section.summary, own))
    return "\n\n".join(parts) + "\n"


def format_heading(about: Figures) -> str:
    words = [f"{key} {value}" for key, value in about.items() if key not in ("section", "status")]
    return f"## GPU: `tools/bench/gpu` ({about.get('date', 'unknown date')})\n\n" + "; ".join(words)


def format_section(name: str, summary: str, lines: list[Figures]) -> str:
    """A table with a row for each case; cases without a figure are listed below it."""
    measured = [line for line in lines if line["status"] == MEASURED]
    columns: list[str] = []
    for line in measured:
        columns += [key for key in line if key not in HIDDEN and key not in columns]
    text = [f"### {name}: {summary}"]
    if measured:
        heads = ["case", "system", *columns]
        text.append("")
        text.append("| " + " | ".join(heads) + " |")
        text.append("|---|---|" + "--:|" * len(columns))
        for line in measured:
            cells = [format_value(line.get(key, "")) for key in heads]
            text.append("| " + " | ".join(cells) + " |")
    rest = [line for line in lines if line["status"] != MEASURED and line["status"] != "done"]
    if rest:
        text.append("")
    for line in rest:
        place = ", ".join(str(line[key]) for key in ("case", "system") if line.get(key))
        reason = f" ({line['reason']})" if line.get("reason") else ""
        text.append(f"- {place or 'section'}: {line['status']}{reason}")
    return "\n".join(text)


def format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)

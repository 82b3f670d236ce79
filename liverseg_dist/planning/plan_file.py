"""Write a plan as a YAML file of differences, with the reason in a comment above each setting."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.config import load_settings
from liverseg_dist.errors import printable
from liverseg_dist.files import write_text
from liverseg_dist.planning.experiment_rules import Decision

INDENT = "  "


def format_plan(decisions: Sequence[Decision], title: Sequence[str] = ()) -> str:
    """Return the decisions as YAML.

    Args:
        decisions: In the order of the file; settings of one section may be apart.
        title: Lines of comment at the top.
    """
    tree: dict[str, Any] = {}
    for decision in decisions:
        node = tree
        *sections, name = decision.key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = decision
    # A comment of several lines would end in the middle of a setting.
    lines = [f"# {_comment(text)}" for text in title]
    _append_section(lines, tree, "")
    return "\n".join(lines) + "\n"


def write_plan(path: Path, decisions: Sequence[Decision], title: Sequence[str] = ()) -> None:
    """Write the file, and check that it is read back as the same settings.

    Raises:
        UserError: The settings do not go together.
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, format_plan(decisions, title))
    # Read back: a plan that cannot be loaded must fail here and not in the training.
    load_settings([path])


def _append_section(lines: list[str], tree: dict[str, Any], indent: str) -> None:
    for name, entry in tree.items():
        if isinstance(entry, Decision):
            lines.append(f"{indent}# {_comment(entry.reason)}")
            lines.append(f"{indent}{name}: {format_value(entry.value)}")
        else:
            lines.append(f"{indent}{name}:")
            _append_section(lines, entry, indent + INDENT)


def format_value(value: Any) -> str:
    """Return a value as YAML on one line. JSON is a subset of YAML that every value here fits."""
    if isinstance(value, str) and value.replace("_", "").isalnum() and not value.isdigit():
        # As people write it; words that YAML reads as something else are quoted.
        return value if value.lower() not in _YAML_WORDS else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")


def _comment(text: str) -> str:
    """Return a text that stays on one line of comment."""
    return printable(text)

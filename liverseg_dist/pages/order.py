"""The order in which names are shown: numbers in them count as numbers."""

import re


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts liver_2 before liver_10.

    Args:
        name: Any text.

    Returns:
        Its runs of ASCII digits as numbers and what lies between them as text; the name itself decides equal ones.
    """
    parts = [
        (0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part)
        for part in re.split(r"([0-9]{1,18})", name)
        if part
    ]
    return (*parts, (2, 0, name))

"""YAML that people wrote or somebody sent: read into plain values of a bounded size, or refused with a `ValueError`.

`yaml.safe_load` runs nothing, but lets a few hundred bytes of aliases stand for gigabytes and fails in many ways.
"""

import math
from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 20
MOST_VALUES = 100_000
MOST_LEVELS = 50
MOST_BITS = 64


class NotYaml(ValueError):
    """It breaks YAML's own rules."""


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (`<<: *base`) copy what they name, which may be made of copies (in older PyYAML)."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise ValueError(f"merge keys make more than {MOST_VALUES:,} values")


def parse_yaml(text: str) -> Any:
    """Raises `ValueError` in one line for what is no YAML, or stands for more than a settings file can hold."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"longer than {MOST_CHARACTERS >> 20} MiB")
    try:
        loader = _Loader(text)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:  # its constructors' own
        raise NotYaml(" ".join(str(error).split())) from None
    _check(content)
    return content


def read_yaml(path: Path) -> Any:
    """The same from a file, of which no more is read than may be. Raises `OSError` and `ValueError`."""
    with path.open(encoding="utf-8") as file:
        return parse_yaml(file.read(MOST_CHARACTERS + 1))


def check_text(text: str) -> str:
    """The text, if it can name a file and be saved. Raises `ValueError`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text with half a character") from None
    if "\0" in text:
        raise ValueError("a text with a zero byte")
    return text


def _check(content: Any) -> None:
    """Counts what an alias names each time it is named; one that holds itself is infinitely deep."""
    waiting, count = [(content, 1)], 0
    while waiting:
        value, level = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(
                f"stands for more than {MOST_VALUES:,} values (aliases within aliases?)"
            )
        if level > MOST_LEVELS:
            raise ValueError(
                f"nested more than {MOST_LEVELS} levels deep (an alias within itself?)"
            )
        if isinstance(value, dict):
            waiting += [(part, level + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(part, level + 1) for part in value]
        elif isinstance(value, str):
            check_text(value)
        elif isinstance(value, int) and value.bit_length() > MOST_BITS - 1:
            raise ValueError(f"a whole number of more than {MOST_BITS} bits ({_size(value)})")


def _size(value: int) -> str:
    """Python does not write out what has more than 4,300 digits."""
    return f"about {'-' if value < 0 else ''}1e{int(value.bit_length() * math.log10(2))}"

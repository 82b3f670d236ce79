"""Read YAML and JSON that users wrote or downloaded, with limits and clear errors.

`yaml.safe_load` runs no code, but a few hundred bytes of aliases can expand to gigabytes, the last
of two equal keys silently replaces the first, and `001`, `1e3`, `no` and dates change their type.
Here keys are always text, equal keys are refused with both line numbers, and `read_yaml_as_text`
keeps the values as written.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.decode import MAX_TEXT_BYTES, read_text

MAX_YAML_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_LEVELS = 50
MAX_BITS = 64
TYPED_TAGS = ("int", "float", "bool", "timestamp")
"""Scalars that YAML converts to another type than text."""
MAX_KEY_CHARACTERS = 80


class YamlSyntaxError(ValueError):
    """The text is not valid YAML."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with text keys."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolve merge keys (`<<: *base`), which may copy mappings that consist of copies."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise ValueError(f"merge keys make more than {MAX_VALUES:,} values")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # A tag such as !!map may be on a scalar.
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"line {_get_line(node)}: a mapping is expected")
        self.flatten_mapping(node)
        content: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(
                    f"line {_get_line(key)}: a key must be text, not a list or a mapping"
                )
            content[key.value] = self.construct_object(value, deep=deep)
        return content


class _TextLoader(_Loader):
    """PyYAML's safe loader with text keys and text values. Only null stays null."""


def _construct_as_written(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    return str(node.value)


for _tag in TYPED_TAGS:
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_as_written)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text. Values have YAML's types; keys are text.

    Raises:
        ValueError: Not YAML, a repeated key, or too many values. The message is one line.
    """
    return _parse_both(text)[0]


def read_yaml(path: Path, purpose: str = "") -> Any:
    """Read a YAML file like `parse_yaml`. Raises `UserError`."""
    return read_yaml_both(path, purpose)[0]


def read_yaml_as_text(path: Path, purpose: str = "") -> Any:
    """Read a YAML file of ids or names: all values are text or null. Raises `UserError`."""
    return read_yaml_both(path, purpose)[1]


def read_yaml_both(path: Path, purpose: str = "") -> tuple[Any, Any]:
    """Read a YAML file with YAML's types and with the values as written. Raises `UserError`."""
    text = read_text(path, max_bytes=MAX_YAML_BYTES, purpose=purpose)
    try:
        return _parse_both(text)
    except ValueError as error:
        raise UserError(f"{printable(path)}: not valid YAML: {error}{purpose}") from None


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: Not JSON, or a repeated key.
    """
    repeated: list[str] = []

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs) and not repeated:
            keys = [key for key, _ in pairs]
            repeated.append(next(key for key in keys if keys.count(key) > 1))
        return content

    try:
        content = json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if repeated:
        # The hook of `json.loads` gets no line numbers, so the text is searched again.
        first, second = _find_repeated_key_lines(text)
        raise ValueError(
            f"the key {_format_key(repeated[0])} occurs twice, "
            f"in lines {first} and {second}; remove one"
        )
    return content


def read_json(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, purpose: str = "") -> Any:
    """Read a JSON file like `parse_json`. Raises `UserError`."""
    text = read_text(path, max_bytes=max_bytes, purpose=purpose)
    try:
        return parse_json(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{printable(path)}: not valid JSON: {reason}{purpose}") from None


def check_text(text: str) -> str:
    """Return the text if it can be saved and can name a file. Raises `ValueError`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text with an incomplete character (a lone surrogate)") from None
    # No file system accepts it in a name.
    if "\0" in text:
        raise ValueError("a text with a zero byte")
    return text


def _parse_both(text: str) -> tuple[Any, Any]:
    """Parse with YAML's types and with values as written; the checks precede the construction."""
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"longer than {MAX_YAML_BYTES >> 20} MiB")
    try:
        # The text is parsed once and constructed twice.
        loader, as_text = _Loader(text), _TextLoader("")
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _check_repeated_keys(node)
            typed = loader.construct_document(node)
            _check_size(typed)
            written = as_text.construct_document(node)
        finally:
            loader.dispose()
            as_text.dispose()
    except RecursionError:
        raise ValueError(f"nested more than {MAX_LEVELS} levels deep") from None
    except _YamlRestrictionError:
        raise
    # PyYAML's constructors raise these exceptions for invalid scalars.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error).replace('in "<unicode string>", ', "in ")
        raise YamlSyntaxError(" ".join(reason.split())) from None
    return typed, written


class _YamlRestrictionError(ValueError):
    """Valid YAML that exceeds a limit or has a repeated key."""


def _check_repeated_keys(root: yaml.Node) -> None:
    """Check all mappings at all levels; a mapping with several aliases is visited once."""
    # A list instead of recursion: nested input must not exhaust the stack.
    pending = [root]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                pending += [key, value]
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in lines:
                    raise _YamlRestrictionError(
                        f"the key {_format_key(key.value)} occurs twice, "
                        f"in lines {lines[key.value]} and {_get_line(key)}; remove one"
                    )
                lines[key.value] = _get_line(key)


def _check_size(content: Any) -> None:
    """Limit the number and depth of values.

    An aliased value counts each time it is used. A value that contains itself has no end and is
    found by its depth.
    """
    pending, count = [(content, 1)], 0
    while pending:
        value, level = pending.pop()
        count += 1
        if count > MAX_VALUES:
            raise _YamlRestrictionError(
                f"expands to more than {MAX_VALUES:,} values (aliases within aliases?)"
            )
        if level > MAX_LEVELS:
            raise _YamlRestrictionError(
                f"nested more than {MAX_LEVELS} levels deep (an alias within itself?)"
            )
        if isinstance(value, dict):
            for key, item in value.items():
                pending += [(key, level + 1), (item, level + 1)]
        elif isinstance(value, (list, tuple, set)):
            pending += [(item, level + 1) for item in value]
        elif isinstance(value, str):
            try:
                check_text(value)
            except ValueError as error:
                raise _YamlRestrictionError(str(error)) from None
        elif isinstance(value, int) and value.bit_length() > MAX_BITS - 1:
            raise _YamlRestrictionError(
                f"a whole number of more than {MAX_BITS} bits ({_format_magnitude(value)})"
            )


def _find_repeated_key_lines(text: str) -> tuple[int, int]:
    """Lines of the first repeated key and its repetition, in valid JSON."""
    objects: list[dict[str, int]] = []
    line = 1
    for token in _split_json_tokens(text):
        if token == "\n":
            line += 1
        elif token == "{":
            objects.append({})
        elif token == "}":
            objects.pop()
        elif token.endswith(":"):
            key = json.loads(token[:-1])
            if key in objects[-1]:
                return objects[-1][key], line
            objects[-1][key] = line
    return 0, 0


def _split_json_tokens(text: str) -> Iterator[str]:
    """Yield keys (with their colon), other strings, braces and line ends of a JSON text."""
    pattern = re.compile(r'"(?:[^"\\]|\\.)*"(?:\s*:)?|[{}\n]')
    for match in pattern.finditer(text):
        token = match[0]
        yield token
        # Line ends between a key and its colon are part of the key's token.
        yield from "\n" * (token.count("\n") if len(token) > 1 else 0)


def _get_line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _format_key(key: str) -> str:
    return f"'{printable(key[:MAX_KEY_CHARACTERS])}'"


def _format_magnitude(value: int) -> str:
    """The order of magnitude: Python refuses to print more than 4,300 digits."""
    return f"about {'-' if value < 0 else ''}1e{int(value.bit_length() * math.log10(2))}"

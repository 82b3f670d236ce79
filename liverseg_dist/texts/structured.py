"""YAML and JSON that users wrote or downloaded: plain values of a bounded size, or a clear refusal.

`yaml.safe_load` runs no code, but a few hundred bytes of aliases can stand for gigabytes, the last
of two equal keys wins without a word, and `001`, `1e3`, `no` and dates change their type. Here keys
are always text, equal keys are refused with both line numbers, and `read_yaml_as_text` keeps the
values as written.
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
# What YAML would turn into another type than text.
TYPED_TAGS = ("int", "float", "bool", "timestamp")


class YamlSyntaxError(ValueError):
    """The text breaks YAML's own rules."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with text keys."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (`<<: *base`) copy what they name, which may consist of copies itself."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise ValueError(f"merge keys make more than {MAX_VALUES:,} values")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # a tag such as !!map on a scalar
            raise ValueError(f"line {_get_line(node)}: a mapping is expected")
        self.flatten_mapping(node)
        content: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {_get_line(key)}: a key is a text, not a list or a mapping")
            content[key.value] = self.construct_object(value, deep=deep)
        return content


class _TextLoader(_Loader):
    """The same with every value but null as it is written."""


def _construct_as_written(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    return str(node.value)


for _tag in TYPED_TAGS:
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_as_written)


def parse_yaml(text: str) -> Any:
    """The values of a YAML text, typed as YAML types them; keys are text.

    Raises:
        ValueError: In one line, for what is not YAML, has a key twice, or stands for too many
            values.
    """
    return _parse_both(text)[0]


def read_yaml(path: Path, purpose: str = "") -> Any:
    """`parse_yaml` of a file. Raises `UserError`."""
    return read_yaml_both(path, purpose)[0]


def read_yaml_as_text(path: Path, purpose: str = "") -> Any:
    """A YAML file whose values are all text (or null): ids, names. Raises `UserError`."""
    return read_yaml_both(path, purpose)[1]


def read_yaml_both(path: Path, purpose: str = "") -> tuple[Any, Any]:
    """A YAML file twice: with YAML's types, and with the values as written. Raises `UserError`."""
    text = read_text(path, max_bytes=MAX_YAML_BYTES, purpose=purpose)
    try:
        return _parse_both(text)
    except ValueError as error:
        raise UserError(f"{printable(path)}: not valid YAML: {error}{purpose}") from None


def parse_json(text: str) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: In one line, for what is not JSON or has a key twice.
    """
    repeated: list[str] = []

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and not repeated:
            keys = [key for key, _ in pairs]
            repeated.append(next(key for key in keys if keys.count(key) > 1))
        return made

    try:
        content = json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if repeated:
        first, second = _find_repeated_key_lines(text)
        raise ValueError(
            f"the key {_format_key(repeated[0])} stands twice, in lines {first} and {second}; remove one"
        )
    return content


def read_json(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, purpose: str = "") -> Any:
    """`parse_json` of a file. Raises `UserError`."""
    text = read_text(path, max_bytes=max_bytes, purpose=purpose)
    try:
        return parse_json(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{printable(path)}: not valid JSON: {reason}{purpose}") from None


def check_text(text: str) -> str:
    """The text, if it can name a file and be saved. Raises `ValueError`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text with half a character") from None
    if "\0" in text:
        raise ValueError("a text with a zero byte")
    return text


def _parse_both(text: str) -> tuple[Any, Any]:
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"longer than {MAX_YAML_BYTES >> 20} MiB")
    try:
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
    # PyYAML's constructors raise these for damaged scalars.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error).replace('in "<unicode string>", ', "in ")
        raise YamlSyntaxError(" ".join(reason.split())) from None
    return typed, written


class _YamlRestrictionError(ValueError):
    """Valid YAML that we do not accept."""


def _check_repeated_keys(root: yaml.Node) -> None:
    """At every level, each mapping once however many aliases name it."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                waiting += [key, value]
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in lines:
                    first = lines[key.value]
                    raise _YamlRestrictionError(
                        f"the key {_format_key(key.value)} stands twice, in lines {first} and {_get_line(key)}; remove one"
                    )
                lines[key.value] = _get_line(key)


def _check_size(content: Any) -> None:
    """Counts what an alias names each time it is named; one that holds itself is infinitely deep."""
    waiting, count = [(content, 1)], 0
    while waiting:
        value, level = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            raise _YamlRestrictionError(
                f"stands for more than {MAX_VALUES:,} values (aliases within aliases?)"
            )
        if level > MAX_LEVELS:
            raise _YamlRestrictionError(
                f"nested more than {MAX_LEVELS} levels deep (an alias within itself?)"
            )
        if isinstance(value, dict):
            waiting += [(part, level + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(part, level + 1) for part in value]
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
    """Lines of the first key that its object already has. Only called for valid JSON."""
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
    """Keys (with their colon), other strings, braces and line ends of a JSON text."""
    pattern = re.compile(r'"(?:[^"\\]|\\.)*"(?:\s*:)?|[{}\n]')
    for match in pattern.finditer(text):
        token = match[0]
        yield token
        # Between a key and its colon there may be line ends.
        yield from "\n" * (token.count("\n") if len(token) > 1 else 0)


def _get_line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _format_key(key: str) -> str:
    return f"'{printable(key[:80])}'"


def _format_magnitude(value: int) -> str:
    """Python does not write out what has more than 4,300 digits."""
    return f"about {'-' if value < 0 else ''}1e{int(value.bit_length() * math.log10(2))}"

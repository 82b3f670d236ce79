"""Damage to bytes, and to trees of JSON or YAML: a pure function of a `random.Random`.

Hypothesis hands in a `Random` of its own, whose draws it shrinks; the long campaign one that is seeded by the input's
number.
"""

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Tree = Any
"""What json.loads makes."""

DEEP, DIGITS = "@deep@", "@digits@"
"""Stand for what json.dumps would not write: 5,000 nested lists, a number of 5,000 digits."""
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 64, 255, 256, 32767, 65536, 10**5, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -(2**63),
    0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "x", "0", "-1", "1e400", "null", "\0", "\n", "a\nb", "\x1b[2J", "<script>alert(1)</script>", "..", ".",
    "../../etc/passwd", "/etc/passwd", "\ud800", "Leber groß 肝臓", "=1+1", "x" * 5000, "{{7*7}}", "%s%n", "a/b", "CON",
    "file:///etc", "int16", "zstd", DEEP, DIGITS,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [0],
    {"": ""},
    {"a": {"b": {"c": 1}}},
    [1, "a", None],
    [None] * 300,
)
MAGIC = tuple(
    (value & (256**size - 1)).to_bytes(size, order)
    for value in (
        0,
        1,
        -1,
        127,
        128,
        255,
        0x7FFF,
        0x8000,
        0x7FFFFFFF,
        0x80000000,
        100_000,
        2**40,
        2**62,
    )
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
)


def damaged(data: bytes, chance: Random) -> bytes:
    """One to four changes: bits, magic numbers, cuts, doubles, noise."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not raw:
            return bytes(raw)
        chance.choice(_BYTE_CHANGES)(raw, chance)
    return bytes(raw)


def _place(raw: bytearray, chance: Random) -> int:
    """Anywhere, and more often near the beginning, where headers are, and the end, where indices and checksums are."""
    ends = (len(raw), len(raw), min(len(raw), 352), min(len(raw), 24))
    at = chance.randrange(chance.choice(ends))
    return len(raw) - 1 - at if chance.random() < 0.25 else at


def _flip(raw: bytearray, chance: Random) -> None:
    raw[_place(raw, chance)] ^= 1 << chance.randrange(8)


def _set(raw: bytearray, chance: Random) -> None:
    raw[_place(raw, chance)] = chance.randrange(256)


def _magic(raw: bytearray, chance: Random) -> None:
    value, at = chance.choice(MAGIC), _place(raw, chance)
    raw[at : at + len(value)] = value[: len(raw) - at]


def _cut(raw: bytearray, chance: Random) -> None:
    del raw[_place(raw, chance) :]


def _remove(raw: bytearray, chance: Random) -> None:
    at = _place(raw, chance)
    del raw[at : at + chance.choice((1, 2, 4, 16, 300))]


def _insert(raw: bytearray, chance: Random) -> None:
    at = _place(raw, chance)
    raw[at:at] = bytes(
        chance.choice((0, 32, 255, chance.randrange(256))) for _ in range(chance.choice((1, 4, 60)))
    )


def _double(raw: bytearray, chance: Random) -> None:
    at, size = _place(raw, chance), chance.choice((1, 8, 64, 500))
    raw[at:at] = raw[at : at + size] * chance.choice((1, 2, 20))


def _append(raw: bytearray, chance: Random) -> None:
    raw += chance.choice((b"\0", b"\n", b"\0" * 600, bytes(raw[:400]), b"PK\x03\x04", b"\xff" * 16))


_BYTE_CHANGES: Sequence[Callable[[bytearray, Random], None]] = (
    _flip, _flip, _set, _magic, _magic, _cut, _remove, _insert, _double, _append,
)  # fmt: skip


def damaged_tree(tree: Tree, chance: Random) -> Tree:
    """A copy with one to three nodes replaced, removed, renamed, doubled, wrapped or exchanged."""
    holder = {"root": json.loads(json.dumps(tree))}
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        nodes = [node for node in _walk(holder) if len(node[0])]
        within, key = chance.choice(
            [(node, key) for node in nodes for key in _keys(node[0])] or [((holder,), "root")]
        )
        holder.setdefault("root", None)
        _change(within[0], key, nodes, chance)
    return holder.get("root")


def _walk(node: Tree) -> list[tuple[Tree]]:
    if not isinstance(node, (dict, list)):
        return []
    return [(node,)] + [found for key in _keys(node) for found in _walk(node[key])]


def _keys(node: Tree) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(min(len(node), 50)))


def _change(within: Tree, key: Any, nodes: list[tuple[Tree]], chance: Random) -> None:
    value, what = within[key], chance.randrange(10)
    if what <= 4:
        within[key] = _nasty(value, chance)
    elif what == 5:
        del within[key]
    elif what == 6 and isinstance(within, dict):
        within[chance.choice((str(key) + "x", "", "__proto__", *TEXTS[:6], str(key).upper()))] = (
            within.pop(key)
        )
    elif what == 7:
        within[key] = [value] if chance.random() < 0.5 else {"0": value}
    elif what == 8 and isinstance(within, list):
        within.insert(key, value)
    else:
        other = chance.choice(nodes or [([None],)])[0]
        if not _holds(other, within):
            within[key] = (
                json.loads(json.dumps(other[chance.choice(_keys(other))])) if len(other) else None
            )


def _holds(outer: Tree, inner: Tree) -> bool:
    return any(node is inner for (node,) in _walk(outer))


def _nasty(value: Any, chance: Random) -> Any:
    kind = chance.randrange(4)
    if isinstance(value, (int, float)) and kind < 2:
        return chance.choice(
            (
                value + 1,
                value - 1,
                -value,
                value * 1000,
                value * 10**12,
                str(value),
                float(value) + 0.5,
            )
        )
    if isinstance(value, str) and kind == 0:
        at = chance.randrange(len(value) + 1)
        return value[:at] + chance.choice(TEXTS) + value[at:]
    return copy.deepcopy(chance.choice(chance.choice((NUMBERS, TEXTS, OTHERS))))


def json_text(tree: Tree, **how: Any) -> bytes:
    """As JSON, with what json.dumps would not write."""
    text = json.dumps(tree, **how)
    text = text.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).replace(f'"{DIGITS}"', "9" * 5000)
    return text.encode("utf-8", "surrogatepass")


def damaged_json(tree: Tree, chance: Random, **how: Any) -> bytes:
    """Three of four times the tree, else its text; seldom what no tree of ours would become."""
    if chance.random() < 0.04:
        return chance.choice(ODD_TEXTS)
    if chance.random() < 0.75:
        return json_text(damaged_tree(tree, chance), **how)
    return damaged(json_text(tree, **how), chance)


ODD_TEXTS = (
    b"", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{\x00}\x00", b"nul", b"{}{}", b'"text"',
    b"1e999999", b"-" + b"1" * 6000, b'{"a": 1, "a": 2}', b"\x00" * 100, b"NaN",
)  # fmt: skip

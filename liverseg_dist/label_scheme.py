"""Read a `LabelScheme` from a `dataset.json`, a labels mapping or `--labels` options."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import (
    BACKGROUND,
    IGNORE,
    LITS_SCHEME,
    LabelScheme,
    Structure,
    StructureKind,
    check_value,
)
from liverseg_dist.texts.paths import expand_user_path
from liverseg_dist.texts.structured import read_json

MAX_FILE_BYTES = 64 << 20
LESION_WORDS = re.compile(
    r"tumou?r|cancer|carcinoma|lesion|metastas|nodule|cyst(?!ic duct)|neoplasm|mass\b|hcc\b|oedema|edema|abscess",
    re.IGNORECASE,
)
"""Names that mean a lesion, where a file does not state the kind."""
NO_CONTAINER_WORDS = re.compile(r"vessel|vein|arter|duct|aorta|cava", re.IGNORECASE)
"""Structures that lesions do not lie in, although they are no lesions."""


def scheme_from_labels(
    labels: Mapping[str, Any], kinds: Mapping[str, StructureKind] | None = None
) -> LabelScheme:
    """The scheme of a `labels` mapping as the Decathlon or nnU-Net writes it.

    Decathlon: `{"0": "background", "1": "liver"}`. nnU-Net: `{"background": 0, "liver": [1, 2],
    "tumour": 2, "ignore": 3}`, where a list is a region. A structure is a lesion where its name
    means one, unless `kinds` states it. A lesion lies in the smallest organ whose region contains
    it; where the file has no regions, in the organ that its name contains, else in the only organ
    there is, which then includes the lesion's voxels as in LiTS.

    Raises:
        UserError: The mapping is no scheme of either form.
    """
    if not isinstance(labels, Mapping) or not labels:
        raise UserError('labels: a mapping such as {"0": "background", "1": "liver"} is expected')
    named = _values_by_name(labels)
    ignore = named.pop("ignore", None)
    background = named.pop("background", (BACKGROUND,))
    if background != (BACKGROUND,):
        raise UserError(f"labels: background is {_shown(background)}; it is always 0")
    if ignore is not None and len(ignore) != 1:
        raise UserError(f"labels: ignore is {_shown(ignore)}; it is one value")
    ignore_value = ignore[0] if ignore is not None else _default_ignore(named)
    kind_of = {name: (kinds or {}).get(name) or guess_kind(name) for name in named}
    has_regions = any(len(values) > 1 for values in named.values())
    regions = dict(named) if has_regions else _with_lesions_inside(named, kind_of)
    structures = []
    for name, values in regions.items():
        inside = _smallest_container(name, regions, kind_of)
        structures.append(Structure(name, values, kind_of[name], inside))
    names = {BACKGROUND: "background"} | _name_of_each_value(named)
    if ignore_value is not None:
        names[ignore_value] = "ignore"
    return LabelScheme(tuple(sorted(names.items())), tuple(structures), ignore_value)


def read_label_scheme(file: Path) -> LabelScheme:
    """Read the scheme from a `dataset.json`: `label_scheme`, which `liverseg predict` writes beside
    its masks, else `labels`. Raises `UserError` that names the file."""
    content = read_json(file, max_bytes=MAX_FILE_BYTES)
    try:
        if not isinstance(content, dict) or "labels" not in content:
            raise UserError(
                "no labels in it; expected a dataset.json as the Decathlon or nnU-Net writes it"
            )
        # Kinds, containers and codes, which the form of `labels` has no place for.
        if isinstance(content.get("label_scheme"), dict):
            return LabelScheme.from_json(content["label_scheme"])
        return scheme_from_labels(content["labels"])
    except UserError as error:
        raise UserError(f"{printable(file)}: {error}") from None


def parse_label_options(options: Iterable[str]) -> LabelScheme:
    """The scheme of `--labels` options: one `dataset.json`, or `NAME=VALUES` for each structure.

    `NAME:lesion=2` and `NAME:organ=1,2` state the kind. Values that no option names count as
    background.

    Raises:
        UserError: An option is neither, or the structures do not fit each other.
    """
    texts = list(options)
    if not texts:
        return LITS_SCHEME
    assignments = [text for text in texts if "=" in text and not Path(text).is_file()]
    if not assignments:
        if len(texts) > 1:
            raise UserError("--labels: one dataset.json, or NAME=VALUES for each structure")
        path = expand_user_path(texts[0])
        return read_label_scheme(path / "dataset.json" if path.is_dir() else path)
    if len(assignments) < len(texts):
        raise UserError("--labels: either a dataset.json or NAME=VALUES, not both")
    labels: dict[str, list[int]] = {}
    kinds: dict[str, StructureKind] = {}
    for text in assignments:
        name, _, values = text.rpartition("=")
        name, _, kind = name.partition(":")
        name, kind = name.strip(), kind.strip()
        if kind == "organ":
            kinds[name] = "organ"
        elif kind == "lesion":
            kinds[name] = "lesion"
        elif kind:
            raise UserError(
                f"--labels {printable(text)}: the kind is organ or lesion, not {printable(kind)}"
            )
        if name in labels:
            raise UserError(f"--labels: {printable(name)} is given twice")
        labels[name] = [_integer(value, name) for value in values.split(",")]
    scheme = scheme_from_labels(labels, kinds)
    return LabelScheme(scheme.values, scheme.structures, scheme.ignore, drops_other_values=True)


def _values_by_name(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> values, whichever way round the file has them."""
    is_decathlon = all(str(key).strip().isdecimal() for key in labels)
    named: dict[str, tuple[int, ...]] = {}
    for key, entry in labels.items():
        if is_decathlon:
            if not isinstance(entry, str):
                raise UserError(f"labels: value {printable(key)} has {_shown(entry)} for a name")
            name, numbers = entry, (key,)
        else:
            name = str(key)
            numbers = tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)
        values = tuple(sorted({_integer(number, name) for number in numbers}))
        name = name.strip()
        if name.casefold() in ("background", "ignore"):
            name = name.casefold()
        if name in named:
            raise UserError(f"labels: {printable(name)} is named twice")
        named[name] = values
    return named


def _integer(value: object, name: str) -> int:
    """A label value; text that is a number counts as one."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.isascii() and text.isdecimal():
        text = int(text)
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    if isinstance(text, bool) or not isinstance(text, int):
        raise UserError(
            f"labels: {printable(name)} is {_shown(value)}; expected a label value such as 1, or a list"
        )
    check_value(text)
    return text


def _default_ignore(named: Mapping[str, tuple[int, ...]]) -> int | None:
    """255 stands for voxels outside a slab, unless a structure uses it."""
    used = {value for values in named.values() for value in values}
    return None if IGNORE in used else IGNORE


def guess_kind(name: str) -> StructureKind:
    """The kind of a structure that its name suggests."""
    return "lesion" if LESION_WORDS.search(name.replace("_", " ")) else "organ"


def _with_lesions_inside(
    named: Mapping[str, tuple[int, ...]], kind_of: Mapping[str, StructureKind]
) -> dict[str, tuple[int, ...]]:
    """The structures with each organ grown by the lesions that lie in it, for files that have no
    regions."""
    containers = [
        name for name in named if kind_of[name] == "organ" and not NO_CONTAINER_WORDS.search(name)
    ]  # fmt: skip
    grown = {name: set(values) for name, values in named.items()}
    for name, values in named.items():
        if kind_of[name] != "lesion":
            continue
        words = name.casefold().replace("_", " ")
        by_name = [organ for organ in containers if organ.casefold().replace("_", " ") in words]
        if by_name:
            grown[max(by_name, key=len)] |= set(values)
        elif len(containers) == 1:
            grown[containers[0]] |= set(values)
    return {name: tuple(sorted(values)) for name, values in grown.items()}


def _smallest_container(
    name: str, regions: Mapping[str, tuple[int, ...]], kind_of: Mapping[str, StructureKind]
) -> str | None:
    own = set(regions[name])
    around = []
    for other, values in regions.items():
        if kind_of[other] == "organ" and own < set(values):
            around.append(other)
    return min(around, key=lambda other: len(regions[other])) if around else None


def _name_of_each_value(named: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Each value by the smallest region that has it."""
    names: dict[int, str] = {}
    for name, values in sorted(named.items(), key=lambda item: -len(item[1])):
        names |= dict.fromkeys(values, name)
    return names


def _shown(value: object) -> str:
    return printable(json.dumps(value, default=str))[:80]

"""`LabelScheme`: which label values a mask holds, and which structures they make up.

A structure is identified by its name, never by its number: the liver is 1 in LiTS, 6 in AMOS and 40
in TotalSegmentator. A structure may hold several values (nnU-Net's regions), and a lesion names the
organ it lies in, so that burden, distance to the organ's surface and response need no knowledge of
any data set.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import BACKGROUND, IGNORE, LIVER, TUMOUR
from liverseg_dist.texts.paths import expand_user_path
from liverseg_dist.texts.structured import read_json

StructureKind = Literal["organ", "lesion"]

LARGEST_VALUE = 255
"""Masks are uint8."""
MAX_FILE_BYTES = 64 << 20
MAX_NAME_CHARACTERS = 100
LESION_WORDS = re.compile(
    r"tumou?r|cancer|carcinoma|lesion|metastas|nodule|cyst(?!ic duct)|neoplasm|mass\b|hcc\b|oedema|edema|abscess",
    re.IGNORECASE,
)
"""Names that mean a lesion, where a file does not state the kind."""
NO_CONTAINER_WORDS = re.compile(r"vessel|vein|arter|duct|aorta|cava", re.IGNORECASE)
"""Structures that lesions do not lie in, although they are no lesions."""


def _check_value(value: int) -> None:
    if not 0 <= value <= LARGEST_VALUE:
        raise UserError(f"labels: value {value} is not from 0 to {LARGEST_VALUE}")


@dataclass(frozen=True)
class Structure:
    """One structure of a mask.

    Attributes:
        name: Unique within its scheme.
        values: Label values whose union is the structure, ascending.
        kind: `organ` is measured as a whole, `lesion` component by component.
        inside: Name of the structure that contains it, or None.
        snomed: SNOMED CT code of the structure, or None.
    """

    name: str
    values: tuple[int, ...]
    kind: StructureKind = "organ"
    inside: str | None = None
    snomed: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "values": list(self.values),
            "kind": self.kind,
            "inside": self.inside,
            "snomed": self.snomed,
        }


@dataclass(frozen=True)
class LabelScheme:
    """The label values of masks and the structures they make up. Raises `UserError` where both do
    not fit.

    Attributes:
        values: (label value, name) pairs, ascending by value, background and the ignore value
            included.
        structures: In the order in which results list them.
        ignore: The value of voxels without any annotation, or None.
        drops_other_values: Whether other values than `values` count as background; else they are
            refused.
    """

    values: tuple[tuple[int, str], ...]
    structures: tuple[Structure, ...]
    ignore: int | None = IGNORE
    drops_other_values: bool = field(default=False)

    def __post_init__(self) -> None:
        # A mapping from value to name is taken as well; pairs keep the scheme hashable.
        pairs = self.values.items() if isinstance(self.values, Mapping) else self.values
        object.__setattr__(self, "values", tuple(sorted(pairs)))
        object.__setattr__(self, "structures", tuple(self.structures))
        numbers = [value for value, _ in self.values]
        for number in numbers:
            _check_value(number)
        if len(set(numbers)) < len(numbers):
            raise UserError(f"labels: a value is named twice ({', '.join(map(str, numbers))})")
        if not self.structures:
            raise UserError("labels: no structure is named beside background and ignore")
        self._check_names()
        for structure in self.structures:
            self._check_structure(structure, set(numbers))

    def _check_names(self) -> None:
        seen: set[str] = set()
        for structure in self.structures:
            name = structure.name
            if not name.strip() or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
                raise UserError(f"labels: {printable(name)[:80]!r} cannot name a structure")
            if name.casefold() in seen:
                raise UserError(f"labels: two structures are called {name}")
            seen.add(name.casefold())

    def _check_structure(self, structure: Structure, known: set[int]) -> None:
        name, values = structure.name, set(structure.values)
        if structure.kind not in ("organ", "lesion"):
            raise UserError(f"labels: {name} is an organ or a lesion, not {structure.kind!r}")
        if not values:
            raise UserError(f"labels: {name} has no label value")
        if not values <= known:
            raise UserError(
                f"labels: {name} uses value {min(values - known)}, which is not in the scheme"
            )
        if values & {BACKGROUND, self.ignore}:
            raise UserError(
                f"labels: {name} contains the value of the background or the ignore label"
            )
        if structure.inside is None:
            return
        container = self.find(structure.inside)
        if container is None or container.name == name:
            raise UserError(
                f"labels: {name} lies inside {structure.inside}, which is no other structure"
            )
        # A strict superset also rules out circles of containers.
        if not values < set(container.values):
            raise UserError(
                f"labels: {name} lies inside {container.name}, whose values do not include all of its own"
            )

    @property
    def organs(self) -> tuple[Structure, ...]:
        return tuple(structure for structure in self.structures if structure.kind == "organ")

    @property
    def lesions(self) -> tuple[Structure, ...]:
        return tuple(structure for structure in self.structures if structure.kind == "lesion")

    def find(self, name: str) -> Structure | None:
        """The structure of that name, or None."""
        return next((structure for structure in self.structures if structure.name == name), None)

    def structure(self, name: str) -> Structure:
        """The structure of that name. Raises `UserError` with the known names."""
        found = self.find(name)
        if found is None:
            known = ", ".join(structure.name for structure in self.structures)
            raise UserError(f"no structure is called {printable(name)}; the labels are {known}")
        return found

    def mask_of(self, label_zyx: np.ndarray, structure: Structure | str) -> np.ndarray:
        """Boolean mask of a structure in a label array of any shape."""
        found = self.structure(structure) if isinstance(structure, str) else structure
        is_member = np.zeros(LARGEST_VALUE + 1, dtype=bool)
        is_member[list(found.values)] = True
        return is_member[label_zyx]

    def unknown_values(self, label_zyx: np.ndarray) -> list[int]:
        """Label values in the array that the scheme does not name, ascending."""
        present = np.flatnonzero(np.bincount(label_zyx.reshape(-1), minlength=LARGEST_VALUE + 1))
        known = {BACKGROUND, self.ignore, *(value for value, _ in self.values)}
        return [int(value) for value in present if int(value) not in known]

    def to_json(self) -> dict[str, Any]:
        return {
            "values": {str(value): name for value, name in self.values},
            "structures": [structure.to_json() for structure in self.structures],
            "ignore": self.ignore,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LabelScheme":
        """The scheme that `to_json` wrote. Raises `UserError` where it is damaged."""
        try:
            values = tuple(
                sorted((int(value), str(name)) for value, name in data["values"].items())
            )
            structures = []
            for entry in data["structures"]:
                numbers = tuple(int(value) for value in entry["values"])
                inside, snomed = entry.get("inside"), entry.get("snomed")
                structures.append(
                    Structure(str(entry["name"]), numbers, entry["kind"], inside, snomed)
                )
            ignore = data["ignore"]
            return cls(values, tuple(structures), None if ignore is None else int(ignore))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError("a stored label scheme is damaged") from None


LITS_SCHEME = LabelScheme(
    ((BACKGROUND, "background"), (LIVER, "liver"), (TUMOUR, "tumour"), (IGNORE, "ignore")),
    (
        Structure("liver", (LIVER, TUMOUR), "organ", None, "10200004"),
        Structure("tumour", (TUMOUR,), "lesion", "liver", "108369006"),
    ),
)
"""Task03_Liver and LiTS: the liver includes its tumours."""


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
    kind_of = {name: (kinds or {}).get(name) or _kind_by_name(name) for name in named}
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
    """Read the scheme from the `labels` of a `dataset.json`. Raises `UserError` that names the file."""
    content = read_json(file, max_bytes=MAX_FILE_BYTES)
    try:
        if not isinstance(content, dict) or "labels" not in content:
            raise UserError(
                "no labels in it; expected a dataset.json as the Decathlon or nnU-Net writes it"
            )
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
    if isinstance(text, bool) or not isinstance(text, int):
        raise UserError(
            f"labels: {printable(name)} is {_shown(value)}; expected a label value such as 1, or a list"
        )
    _check_value(text)
    return text


def _default_ignore(named: Mapping[str, tuple[int, ...]]) -> int | None:
    """255 stands for voxels outside a slab, unless a structure uses it."""
    used = {value for values in named.values() for value in values}
    return None if IGNORE in used else IGNORE


def _kind_by_name(name: str) -> StructureKind:
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

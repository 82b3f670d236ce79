"""`LabelScheme`: which label values a mask holds, and which structures they make up.

A structure is identified by its name, never by its number: the liver is 1 in LiTS, 6 in AMOS and 40
in TotalSegmentator. A structure may hold several values (nnU-Net's regions), and a lesion names the
organ it lies in, so that burden, distance to the organ's surface and response need no knowledge of
any data set.

`label_scheme` reads schemes from files and options.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from liverseg_dist.errors import UserError, printable

BACKGROUND = 0
IGNORE = 255
"""Padding without a class; losses and metrics exclude these voxels."""
LIVER = 1
TUMOUR = 2

StructureKind = Literal["organ", "lesion"]

LARGEST_VALUE = 255
"""Masks are uint8."""
MAX_NAME_CHARACTERS = 100


def check_value(value: int) -> None:
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
            check_value(number)
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

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class value, background first, without the ignore value.

        Class values of a store are 0, 1, 2, ... without gaps (`is_contiguous`), so that a class
        value is also the channel of the network.
        """
        return tuple(name for value, name in self.values if value != self.ignore)

    @property
    def num_classes(self) -> int:
        """Number of class values with the background."""
        return len(self.class_names)

    @property
    def is_contiguous(self) -> bool:
        """Whether the class values are 0, 1, 2, ... without gaps."""
        numbers = [value for value, _ in self.values if value != self.ignore]
        return numbers == list(range(len(numbers)))

    @property
    def structure_names(self) -> tuple[str, ...]:
        return tuple(structure.name for structure in self.structures)

    @cached_property
    def membership(self) -> np.ndarray:
        """Which class values make up each structure: bool (structures, LARGEST_VALUE + 1)."""
        table = np.zeros((len(self.structures), LARGEST_VALUE + 1), dtype=bool)
        for row, structure in zip(table, self.structures, strict=True):
            row[list(structure.values)] = True
        return table

    @cached_property
    def paint_order(self) -> tuple[tuple[int, int], ...]:
        """(index of a structure, class value) in the order in which regions are painted.

        Where regions overlap, the later value replaces the earlier one, as with nnU-Net's
        `regions_class_order`: containers come before what they contain. The value of a structure is
        the one that no structure within it holds.
        """
        by_size = sorted(
            range(len(self.structures)), key=lambda index: -len(self.structures[index].values)
        )
        order = []
        for index in by_size:
            own = set(self.structures[index].values)
            for other in self.structures:
                if set(other.values) < set(self.structures[index].values):
                    own -= set(other.values)
            # A structure that consists of others alone has no value of its own to paint.
            if own:
                order.append((index, min(own)))
        return tuple(order)

    def indistinguishable_classes(self, annotated: Collection[str]) -> tuple[int, ...]:
        """For each class value, the smallest value that the annotation does not distinguish from it.

        Args:
            annotated: names of the structures that were annotated. Two classes differ only where
                an annotated structure contains one of them; the background of a case without
                annotated spleen may be spleen.
        """
        rows = [i for i, structure in enumerate(self.structures) if structure.name in annotated]
        columns = self.membership[rows][:, : self.num_classes]
        first: dict[bytes, int] = {}
        groups = []
        for value in range(self.num_classes):
            groups.append(first.setdefault(columns[:, value].tobytes(), value))
        return tuple(groups)

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
        return np.asarray(is_member[label_zyx])

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

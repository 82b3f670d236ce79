"""The labels of one source: which structures its label values, or its label files, stand for.

`dataset.json` names them (`read_source_labels`); a folder with one file per structure names them by
its files; without names the values are those of LiTS. `data.label_mapping` maps the values of all
sources to the class values of a store.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import UserError, printable
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.labels import BACKGROUND, LITS_SCHEME, LabelScheme
from liverseg_dist.texts.names import list_some
from liverseg_dist.texts.structured import read_json

INDEX_FILE = "dataset.json"
MAX_INDEX_BYTES = 64 << 20
LABELS_KEY = "labels"
ANNOTATED_KEY = "annotated"
"""Key of `dataset.json`: {"pattern of case ids": ["annotated structure", ...]}."""
ORDER_KEY = "regions_class_order"
UNNAMED_LABELS = "0 background, 1 liver, 2 tumour (or cancer)"
TUMOUR_SYNONYMS = frozenset(
    ("tumour", "tumor", "cancer", "lesion", "liver tumour", "liver tumor", "liver_tumour",
     "liver_tumor")
)  # fmt: skip
"""Names, in lower case, of the second structure of LiTS."""


@dataclass(frozen=True)
class SourceLabels:
    """What the label values of a source mean.

    Attributes:
        where: The file or folder, printable, for messages.
        scheme: Over the values of the source's label files.
        is_named: False: the source names no labels, and `scheme` is an assumption.
        ignore: The value that the source declares as not annotated, or None.
        other_names: (name in the source, name in `scheme`) where both differ.
        annotated: (pattern of case ids, names of the annotated structures).
        in_files: One file per structure; the values are numbers that reading assigns.
    """

    where: str
    scheme: LabelScheme = LITS_SCHEME
    is_named: bool = False
    ignore: int | None = None
    other_names: tuple[tuple[str, str], ...] = ()
    annotated: tuple[tuple[str, tuple[str, ...]], ...] = ()
    in_files: bool = False

    def find_name(self, name: str) -> str | None:
        """The scheme's name of a structure, for any spelling; None for an unknown one."""
        wanted = fold_name(name)
        for own, in_scheme in self.other_names:
            if fold_name(own) == wanted:
                return in_scheme
        for structure in self.scheme.structure_names:
            if fold_name(structure) == wanted:
                return structure
        return None

    def describe(self) -> str:
        """`0 background, 1 spleen, 6 liver`, or the names of the files."""
        if self.in_files:
            return list_some([printable(name) for name in self.scheme.structure_names])
        shown = []
        for value, name in self.scheme.values:
            if value != self.scheme.ignore or value == self.ignore:
                shown.append(f"{value} {printable(name)}")
        return list_some(shown, 20)


def fold_name(name: str) -> str:
    """Key for comparisons of structure names: `Right_Kidney` is `right kidney`."""
    return " ".join(name.replace("_", " ").casefold().split())


def read_source_labels(
    content: Mapping[str, Any], index: Path
) -> tuple[SourceLabels, list[Finding]]:
    """The labels that a `dataset.json` names, and findings.

    Args:
        content: The parsed file.
        index: The file, for messages.

    Raises:
        UserError: The labels, `regions_class_order` or `annotated` are not of a known form.
    """
    where = printable(index)
    labels = content.get(LABELS_KEY)
    if labels is None:
        message = f"{index.name} names no labels; their voxels are read as {UNNAMED_LABELS}"
        source = SourceLabels(where, annotated=_read_annotated(content, where, SourceLabels(where)))
        return source, [Finding("warning", "labels_unnamed", message)]
    try:
        scheme = scheme_from_labels(labels)
        _check_distinct(scheme)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    _check_class_order(content.get(ORDER_KEY), scheme, where)
    ignore = scheme.ignore if _declares_ignore(labels) else None
    source = _with_lits_names(SourceLabels(where, scheme, is_named=True, ignore=ignore))
    annotated = _read_annotated(content, where, source)
    source = SourceLabels(
        where, source.scheme, True, ignore, source.other_names, annotated=annotated
    )
    return source, []


def find_mask_labels(folder: Path) -> LabelScheme:
    """The scheme of the masks in a folder: of the `dataset.json` in it or above it, else LiTS.

    Raises:
        UserError: The `dataset.json` cannot be read, or its labels are no scheme.
    """
    for place in (folder, folder.absolute().parent):
        scheme = read_folder_labels(place)
        if scheme is not None:
            return scheme
    return LITS_SCHEME


def read_folder_labels(folder: Path) -> LabelScheme | None:
    """The scheme that the `dataset.json` of a folder names; None without one.

    Raises:
        UserError: The `dataset.json` cannot be read, or its labels are no scheme.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        return None
    content = read_json(index, max_bytes=MAX_INDEX_BYTES)
    return read_source_labels(content, index)[0].scheme if isinstance(content, dict) else None


def _with_lits_names(source: SourceLabels) -> SourceLabels:
    """A source of liver and tumour with the names of LiTS; it may call the tumour otherwise."""
    scheme = source.scheme
    organ, lesion = LITS_SCHEME.structures
    if len(scheme.structures) != len(LITS_SCHEME.structures):
        return source
    found = {fold_name(structure.name): structure for structure in scheme.structures}
    synonyms = {fold_name(name) for name in TUMOUR_SYNONYMS} & found.keys()
    if organ.name not in found or len(synonyms) != 1:
        return source
    names = {found[organ.name].name: organ.name, found[synonyms.pop()].name: lesion.name}
    structures = []
    for structure in scheme.structures:
        like = organ if names[structure.name] == organ.name else lesion
        structures.append(
            type(structure)(like.name, structure.values, like.kind, like.inside, like.snomed)
        )
    values = tuple((value, names.get(name, name)) for value, name in scheme.values)
    try:
        renamed = LabelScheme(values, tuple(structures), scheme.ignore)
    except UserError:
        # The tumour's values are not part of the liver's: no LiTS in spite of its names.
        return source
    other = tuple((own, name) for own, name in names.items() if own != name)
    return SourceLabels(source.where, renamed, True, source.ignore, other)


def _declares_ignore(labels: Mapping[str, Any]) -> bool:
    names = [*labels, *(name for name in labels.values() if isinstance(name, str))]
    return any(str(name).strip().casefold() == "ignore" for name in names)


def _check_distinct(scheme: LabelScheme) -> None:
    """Raises `UserError` for two structures that no voxel could distinguish."""
    seen: dict[tuple[int, ...], str] = {}
    for structure in scheme.structures:
        other = seen.setdefault(structure.values, structure.name)
        if other != structure.name:
            names = f"{printable(other)} and {printable(structure.name)}"
            raise UserError(f"labels: {names} have the same values")


def _check_class_order(order: object, scheme: LabelScheme, where: str) -> None:
    """Check nnU-Net's `regions_class_order`: the value that each region paints, in their order."""
    if order is None:
        return
    is_list = isinstance(order, list) and all(type(value) is int for value in order)
    if not is_list or len(order) != len(scheme.structures):  # type: ignore[arg-type]
        raise UserError(
            f"{where}: {ORDER_KEY} must list one value for each of the {len(scheme.structures)} "
            f"regions ({list_some(scheme.structure_names)}), not {printable(str(order))[:80]}"
        )
    for value, structure in zip(order, scheme.structures, strict=True):  # type: ignore[call-overload]
        if value not in structure.values:
            raise UserError(
                f"{where}: {ORDER_KEY} paints {printable(structure.name)} with {value}, which is "
                f"not one of its values ({', '.join(map(str, structure.values))})"
            )


def _read_annotated(
    content: Mapping[str, Any], where: str, source: SourceLabels
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    entries = content.get(ANNOTATED_KEY)
    if entries is None:
        return ()
    if not isinstance(entries, dict):
        raise UserError(
            f"{where}: {ANNOTATED_KEY} must be a mapping from a pattern of case names to the "
            'structures annotated there, e.g. {"ct_*": ["liver"]}'
        )
    result = []
    for pattern, names in entries.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"{where}: {ANNOTATED_KEY} {printable(pattern)}: expected a list of structures"
            )
        found = []
        for name in names:
            known = source.find_name(name)
            if known is None:
                raise UserError(
                    f"{where}: {ANNOTATED_KEY} {printable(pattern)}: no label is called "
                    f"{printable(name)}; the labels are {source.describe()}"
                )
            found.append(known)
        result.append((str(pattern), tuple(found)))
    return tuple(result)


def labels_of_files(where: str, names: list[str]) -> SourceLabels:
    """The labels of a folder with one file per structure; the values follow the names' order.

    Raises:
        UserError: More files than label values, or names that are no structures.
    """
    numbers: dict[str, int] = {}
    for number, name in enumerate(sorted(names), start=BACKGROUND + 1):
        numbers[name] = number
    try:
        scheme = scheme_from_labels({"background": BACKGROUND, **numbers})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return SourceLabels(where, scheme, is_named=True, in_files=True)

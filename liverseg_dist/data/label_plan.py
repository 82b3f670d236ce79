"""Plan the labels of a store that is made of one or several sources.

Sources are joined by the names of their structures: the liver is 1 in one source and 6 in another.
A class of the store is a set of structures that some voxel belongs to (`{liver, tumour}`), and its
class value is its number: 0, 1, 2, ... without gaps. A structure that a source does not name is not
annotated in the cases of that source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from liverseg_dist.config.labels import OTHER_LABELS, LabelSettings
from liverseg_dist.data.io.source_labels import SourceLabels
from liverseg_dist.data.label_drafts import (
    IGNORE_NAME,
    SETTING,
    StructureDraft,
    containers_of,
    draft_structures,
    find_label,
)
from liverseg_dist.data.label_mapping import LITS_MAPPING, LabelMapping
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import BACKGROUND, IGNORE, LITS_SCHEME, LabelScheme, Structure


@dataclass(frozen=True)
class LabelPlan:
    """The scheme of a store, and the mapping of each source to it."""

    scheme: LabelScheme
    mappings: tuple[LabelMapping, ...]


def plan_labels(
    sources: Sequence[SourceLabels], settings: LabelSettings | None = None
) -> LabelPlan:
    """The scheme of a store that is made of some sources.

    Args:
        sources: Labels of each source.
        settings: `convert.labels`; None: all labels of the sources.

    Raises:
        UserError: The settings name an unknown label, or no structure is left.
    """
    # The common case needs no plan: values and structures are those of LiTS.
    if settings is None and all(map(_has_lits_values, sources)):
        return LabelPlan(LITS_SCHEME, (LITS_MAPPING,) * len(sources))
    drafts = draft_structures(sources, settings or {})
    signatures = _find_signatures(drafts, len(sources))
    by_structure = settings is not None or {draft.name for draft in drafts} == set(
        LITS_SCHEME.structure_names
    )
    classes = _order_classes(signatures, drafts, by_structure=by_structure)
    scheme = _build_scheme(classes, drafts)
    mappings = []
    for number, source in enumerate(sources):
        mappings.append(
            _build_mapping(number, source, scheme, classes, signatures[number], drafts, settings)
        )
    return LabelPlan(scheme, tuple(mappings))


def _has_lits_values(source: SourceLabels) -> bool:
    return source.scheme == LITS_SCHEME and source.ignore is None and not source.in_files


# --- classes -----------------------------------------------------------------------------------

Signature = frozenset[str]
"""Names of the structures that a voxel belongs to."""


def _find_signatures(drafts: Sequence[StructureDraft], sources: int) -> list[dict[int, Signature]]:
    """For each source: the structures that a voxel of each value belongs to."""
    result = []
    for number in range(sources):
        members: dict[int, set[str]] = {}
        for draft in drafts:
            for value in sorted(draft.values.get(number, ())):
                # Also those containers that the source does not name.
                names = {draft.name, *containers_of(draft, drafts)}
                members.setdefault(value, set()).update(names)
        result.append({value: frozenset(members[value]) for value in sorted(members)})
    return result


def _order_classes(
    signatures: Sequence[Mapping[int, Signature]],
    drafts: Sequence[StructureDraft],
    *,
    by_structure: bool,
) -> list[Signature]:
    """The classes of the store, in the order of their values from 1.

    They follow the order of the structures (`by_structure`), or that of the sources' values.
    """
    classes: list[Signature] = []
    for by_value in signatures:
        for signature in by_value.values():
            if signature not in classes:
                classes.append(signature)
    if not by_structure:
        return classes
    position = {draft.name: number for number, draft in enumerate(drafts)}

    def order(signature: Signature) -> tuple[int, list[int]]:
        return position[_own_structure(signature, classes, drafts)], sorted(
            position[name] for name in signature
        )

    return sorted(classes, key=order)


def _own_structure(
    signature: Signature, classes: Sequence[Signature], drafts: Sequence[StructureDraft]
) -> str:
    """The smallest structure of a class, which names it: the one with the fewest classes."""
    size = {draft.name: sum(draft.name in other for other in classes) for draft in drafts}
    members = [draft.name for draft in drafts if draft.name in signature]
    # The last of equals: contents follow their containers.
    return min(reversed(members), key=lambda name: size[name])


def _build_scheme(classes: Sequence[Signature], drafts: Sequence[StructureDraft]) -> LabelScheme:
    if len(classes) >= IGNORE:
        raise UserError(f"{SETTING}: {len(classes)} classes; labels have at most {IGNORE - 1}")
    names = {BACKGROUND: "background", **_name_classes(classes, drafts)}
    structures = []
    for draft in drafts:
        values = [number for number, members in enumerate(classes, 1) if draft.name in members]
        structures.append(
            Structure(draft.name, tuple(values), draft.kind, draft.inside, draft.snomed)
        )
    pairs = (*names.items(), (IGNORE, IGNORE_NAME))
    try:
        return LabelScheme(tuple(sorted(pairs)), tuple(structures))
    except UserError as error:
        raise UserError(f"{SETTING}: {str(error).removeprefix('labels: ')}") from None


def _name_classes(classes: Sequence[Signature], drafts: Sequence[StructureDraft]) -> dict[int, str]:
    """Name of each class value: that of its smallest structure, and different for each."""
    numbers: dict[str, list[int]] = {}
    for number, signature in enumerate(classes, start=1):
        own = _own_structure(signature, classes, drafts)
        numbers.setdefault(own, []).append(number)
    names = {}
    for own, group in numbers.items():
        # Regions that overlap in part: the intersection has the names of both.
        simplest = min(group, key=lambda number: len(classes[number - 1]))
        for number in group:
            members = [draft.name for draft in drafts if draft.name in classes[number - 1]]
            names[number] = own if number == simplest else " + ".join(members)
    return names


def _build_mapping(
    number: int,
    source: SourceLabels,
    scheme: LabelScheme,
    classes: Sequence[Signature],
    signatures: Mapping[int, Signature],
    drafts: Sequence[StructureDraft],
    settings: LabelSettings | None,
) -> LabelMapping:
    class_of = {BACKGROUND: BACKGROUND}
    if source.is_named:
        # Labels that the settings drop.
        for value, _ in source.scheme.values:
            if value != source.scheme.ignore:
                class_of[value] = BACKGROUND
    for value, signature in signatures.items():
        class_of[value] = classes.index(signature) + 1
    for value, special in _special_values(source, settings or {}):
        class_of[value] = IGNORE if special == IGNORE else class_of.get(value, BACKGROUND)
    others = (settings or {}).get(OTHER_LABELS)
    class_of_file = []
    if source.in_files:
        for value, name in source.scheme.values:
            if value in class_of:
                class_of_file.append((name, class_of[value]))
    return LabelMapping(
        scheme=scheme,
        class_of=tuple(sorted(class_of.items())),
        annotated=tuple(draft.name for draft in drafts if number in draft.values),
        expected=source.describe() if source.is_named else _describe_values(class_of, scheme),
        drops_other_values=others is not None and others.drop,
        sources_of=tuple((draft.name, draft.origins.get(number, ())) for draft in drafts),
        class_of_file=tuple(class_of_file),
    )


def _special_values(source: SourceLabels, settings: LabelSettings) -> list[tuple[int, int]]:
    """(value, class) of values that are no structure: ignored, and dropped by their number."""
    found = []
    if source.ignore is not None:
        found.append((source.ignore, IGNORE))
    for name, entry in settings.items():
        is_ignore = name.casefold() == IGNORE_NAME and not entry.drop
        if name == OTHER_LABELS or not (entry.drop or is_ignore):
            continue
        for label in entry.from_labels or (name,):
            match = find_label(label, source)
            for value in match[1] if match is not None else ():
                found.append((value, IGNORE if is_ignore else BACKGROUND))
    return found


def _describe_values(class_of: Mapping[int, int], scheme: LabelScheme) -> str:
    names = dict(scheme.values)
    return ", ".join(f"{value} {printable(names[number])}" for value, number in class_of.items())

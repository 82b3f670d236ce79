"""The structures of a store, drafted from the labels of its sources and `convert.labels`.

`label_plan` turns the drafts into classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from liverseg_dist.config.labels import OTHER_LABELS, LabelSettings, StructureConfig
from liverseg_dist.data.io.source_labels import SourceLabels, fold_name
from liverseg_dist.errors import UserError, printable
from liverseg_dist.label_scheme import guess_kind
from liverseg_dist.labels import BACKGROUND, LITS_SCHEME, Structure, StructureKind
from liverseg_dist.texts.names import list_some

SETTING = "convert.labels"
IGNORE_NAME = "ignore"
"""Key of the settings for labels that become the ignore value."""


@dataclass
class StructureDraft:
    """A structure of the store while the plan is made."""

    name: str
    kind: StructureKind
    inside: str | None = None
    snomed: str | None = None
    is_inside_set: bool = False
    """Whether the settings name the container, so that it must exist."""
    values: dict[int, set[int]] = field(default_factory=dict)
    """Values of each source (by number) that make up the structure."""
    origins: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Labels of each source that it is made of."""


def draft_structures(
    sources: Sequence[SourceLabels], settings: LabelSettings
) -> list[StructureDraft]:
    """The structures of a store.

    Args:
        sources: Labels of each source.
        settings: `convert.labels`.

    Raises:
        UserError: The settings name an unknown label or container, or no structure is left.
    """
    drafts = _collect_structures(sources, settings)
    if not drafts:
        raise UserError(f"{SETTING}: no structure is left; keep at least one label")
    _check_containers(drafts)
    _add_contents_to_containers(drafts, len(sources))
    return _in_order_of_lits(drafts)


def _collect_structures(
    sources: Sequence[SourceLabels], settings: LabelSettings
) -> list[StructureDraft]:
    drafts: list[StructureDraft] = []
    used: list[set[str]] = [set() for _ in sources]
    for name, entry in settings.items():
        if name == OTHER_LABELS:
            continue
        if name.casefold() == IGNORE_NAME or entry.drop:
            _mark_used(name, entry, sources, used)
            continue
        drafts.append(_draft_setting(name, entry, sources, used))
    others = settings.get(OTHER_LABELS)
    for number, source in enumerate(sources):
        if not _keeps_others(source, settings, others):
            continue
        for structure in source.scheme.structures:
            if structure.name not in used[number]:
                _add_kept(drafts, structure, number)
    return drafts


def _keeps_others(
    source: SourceLabels, settings: LabelSettings, others: StructureConfig | None
) -> bool:
    """Whether labels that the settings do not name are structures too."""
    if others is not None:
        return not others.drop
    # Of a hundred files, the settings name those that are wanted. Without names there is nothing
    # to keep.
    names_structures = any(not entry.drop for entry in settings.values())
    return not (names_structures and (source.in_files or not source.is_named))


def _draft_setting(
    name: str, entry: StructureConfig, sources: Sequence[SourceLabels], used: list[set[str]]
) -> StructureDraft:
    """A structure that the settings name; what they leave open is that of its labels."""
    values, origins = _collect_labels(name, entry, sources)
    kinds: set[StructureKind] = set()
    containers: set[str | None] = set()
    for number, names in origins.items():
        used[number] |= set(names)
        for origin in names:
            structure = sources[number].scheme.structure(origin)
            kinds.add(structure.kind)
            containers.add(structure.inside)
    own_kind = kinds.pop() if len(kinds) == 1 else guess_kind(name)
    own_container = containers.pop() if len(containers) == 1 else None
    return StructureDraft(
        name,
        entry.kind or own_kind,
        entry.inside or own_container,
        entry.snomed,
        entry.inside is not None,
        values,
        origins,
    )


def _collect_labels(
    name: str, entry: StructureConfig, sources: Sequence[SourceLabels]
) -> tuple[dict[int, set[int]], dict[int, tuple[str, ...]]]:
    """Values and names of the labels, by source, that a structure of the settings is made of."""
    values: dict[int, set[int]] = {}
    origins: dict[int, tuple[str, ...]] = {}
    for label in entry.from_labels if entry.from_labels is not None else (name,):
        is_known = False
        for number, source in enumerate(sources):
            found = find_label(label, source)
            if found is None:
                continue
            is_known = True
            values.setdefault(number, set()).update(found[1])
            if found[0] is not None:
                origins[number] = (*origins.get(number, ()), found[0])
            else:
                origins.setdefault(number, ())
        if not is_known:
            raise _unknown_label(name, label, sources)
    return values, origins


def find_label(label: int | str, source: SourceLabels) -> tuple[str | None, set[int]] | None:
    """Name and values of a label of a source; None if it has no such label."""
    if isinstance(label, str):
        name = source.find_name(label)
        if name is not None:
            return name, set(source.scheme.structure(name).values)
        if not (label.isascii() and label.isdecimal()):
            return None
        label = int(label)
    if source.in_files or label == BACKGROUND:
        return None
    if not source.is_named:
        return None, {label}
    for value, name in source.scheme.values:
        if value == label and (value != source.scheme.ignore or value == source.ignore):
            return (name if source.scheme.find(name) else None), {label}
    return None


def _mark_used(
    name: str, entry: StructureConfig, sources: Sequence[SourceLabels], used: list[set[str]]
) -> None:
    """Mark the labels of a dropped structure, and check that there are some."""
    _, origins = _collect_labels(name, entry, sources)
    for number, names in origins.items():
        used[number] |= set(names)


def _unknown_label(name: str, label: int | str, sources: Sequence[SourceLabels]) -> UserError:
    known = []
    for source in sources:
        prefix = f"those of {source.where} are " if len(sources) > 1 else "the labels are "
        known.append(prefix + source.describe())
    return UserError(
        f"{SETTING}: {printable(name)}: no label is called {printable(str(label))}; "
        f"{'; '.join(known)}"
    )


def _add_kept(drafts: list[StructureDraft], structure: Structure, number: int) -> None:
    """Add a label that the settings do not mention, or the same one of a further source."""
    wanted = fold_name(structure.name)
    draft = next((draft for draft in drafts if fold_name(draft.name) == wanted), None)
    if draft is None:
        draft = StructureDraft(structure.name, structure.kind, snomed=structure.snomed)
        drafts.append(draft)
    if draft.inside is None:
        draft.inside = structure.inside
    draft.snomed = draft.snomed or structure.snomed
    draft.values.setdefault(number, set()).update(structure.values)
    draft.origins[number] = (*draft.origins.get(number, ()), structure.name)


def _check_containers(drafts: Sequence[StructureDraft]) -> None:
    """Resolve the names of containers; those that the settings dropped are no containers."""
    names = {fold_name(draft.name): draft.name for draft in drafts}
    for draft in drafts:
        if draft.inside is None:
            continue
        found = names.get(fold_name(draft.inside)) or _renamed(draft.inside, drafts)
        if found is None and draft.is_inside_set:
            raise UserError(
                f"{SETTING}: {printable(draft.name)}: inside {printable(draft.inside)}, which is "
                f"no structure; the structures are {list_some([d.name for d in drafts])}"
            )
        draft.inside = None if found == draft.name else found
    for draft in drafts:
        if draft.name in containers_of(draft, drafts):
            raise UserError(f"{SETTING}: {printable(draft.name)} would lie inside itself")


def _renamed(label: str, drafts: Sequence[StructureDraft]) -> str | None:
    """The structure that a label of a source became."""
    for draft in drafts:
        if any(label in names for names in draft.origins.values()):
            return draft.name
    return None


def containers_of(draft: StructureDraft, drafts: Sequence[StructureDraft]) -> list[str]:
    """Names of all structures that contain one, the smallest first; ends with a circle, if any."""
    by_name = {other.name: other for other in drafts}
    containers: list[str] = []
    inside = draft.inside
    while inside is not None and inside not in containers:
        containers.append(inside)
        inside = by_name[inside].inside
    return containers


def _add_contents_to_containers(drafts: Sequence[StructureDraft], sources: int) -> None:
    """Voxels of a structure are voxels of its containers too, where a source has these."""
    by_name = {draft.name: draft for draft in drafts}
    for draft in drafts:
        for container in containers_of(draft, drafts):
            for number in range(sources):
                if number in draft.values and number in by_name[container].values:
                    by_name[container].values[number] |= draft.values[number]


def _in_order_of_lits(drafts: list[StructureDraft]) -> list[StructureDraft]:
    """Structures of LiTS in its order; others unchanged. Codes of its structures are filled in."""
    for draft in drafts:
        known = LITS_SCHEME.find(draft.name)
        if known is not None and known.kind == draft.kind:
            draft.snomed = draft.snomed or known.snomed
    names = LITS_SCHEME.structure_names
    if {draft.name for draft in drafts} == set(names):
        return sorted(drafts, key=lambda draft: names.index(draft.name))
    return drafts

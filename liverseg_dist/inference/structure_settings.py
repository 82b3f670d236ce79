"""The settings of `inference.*` that apply to structures, resolved for the labels of a run.

A setting with one value applies to every structure it makes sense for: a number to every lesion
structure, `true` to every organ that contains lesions. Used by the predictor, by post-processing
and by its search.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liverseg_dist.config import InferenceConfig
from liverseg_dist.config.aliases import former_name
from liverseg_dist.errors import UserError
from liverseg_dist.inference.structure_values import is_task03
from liverseg_dist.labels import LabelScheme, Structure

ORGAN_SETTINGS = ("largest_component", "fill_holes")
"""Settings that name structures."""
VALUE_SETTINGS = ("lesion_threshold", "reach_mm", "cut_mm", "min_volume_ml")
"""Settings that map structures to numbers."""


@dataclass(frozen=True)
class StructureSettings:
    """The settings by name of the structure; a structure without an entry is not changed.

    Attributes:
        lesion_threshold: lowest probability of a lesion inside its organ.
        largest_component: structures of which the largest connected part is kept.
        fill_holes: structures whose holes are filled.
        reach_mm: largest distance of a lesion from its organ's tissue.
        cut_mm: largest distance of a lesion's voxel from its organ.
        min_volume_ml: smallest volume of a connected part.
    """

    lesion_threshold: Mapping[str, float]
    largest_component: tuple[str, ...]
    fill_holes: tuple[str, ...]
    reach_mm: Mapping[str, float]
    cut_mm: Mapping[str, float]
    min_volume_ml: Mapping[str, float]


def list_main_organs(labels: LabelScheme) -> tuple[Structure, ...]:
    """The organs that contain lesions; every organ where no organ does."""
    containers = {lesion.inside for lesion in labels.lesions}
    found = tuple(organ for organ in labels.organs if organ.name in containers)
    return found or labels.organs


def list_applicable_structures(labels: LabelScheme, setting: str) -> tuple[Structure, ...]:
    """The structures that a setting applies to when it has one value for all."""
    if setting in ORGAN_SETTINGS:
        return list_main_organs(labels)
    if setting in ("reach_mm", "cut_mm"):
        return tuple(lesion for lesion in labels.lesions if lesion.inside is not None)
    return labels.lesions


def resolve_structure_settings(config: InferenceConfig, labels: LabelScheme) -> StructureSettings:
    """The settings for the structures of a scheme.

    Raises:
        UserError: a setting names a structure that the scheme does not have or that the setting
            does not apply to.
    """
    # Resolved once per run, so that a wrong name is reported before the first scan.
    values = {name: _resolve_values(config, labels, name) for name in VALUE_SETTINGS}
    names = {name: _resolve_names(config, labels, name) for name in ORGAN_SETTINGS}
    return StructureSettings(
        values["lesion_threshold"],
        names["largest_component"],
        names["fill_holes"],
        values["reach_mm"],
        values["cut_mm"],
        values["min_volume_ml"],
    )


def dump_inference(config: InferenceConfig, labels: LabelScheme) -> dict[str, Any]:
    """The inference settings as JSON, with the settings of structures resolved.

    Task03 has one lesion structure in one organ: it keeps the keys and values of earlier versions,
    which had no names in them, so that fingerprints and results do not change.
    """
    resolved = resolve_structure_settings(config, labels)
    content: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        # Earlier versions had no such key: their fingerprints and results stay valid.
        if name == "padding" and value == InferenceConfig.model_fields[name].default:
            continue
        if name not in (*VALUE_SETTINGS, *ORGAN_SETTINGS):
            content[name] = value
        elif is_expressible_without_names(resolved, labels, name):
            content[former_name(f"inference.{name}")] = _without_names(resolved, name)
        else:
            found = getattr(resolved, name)
            content[name] = list(found) if name in ORGAN_SETTINGS else dict(found)
    return content


def is_expressible_without_names(
    resolved: StructureSettings, labels: LabelScheme, setting: str
) -> bool:
    """Whether one value describes the setting, and the scheme is that of Task03."""
    applicable = {structure.name for structure in list_applicable_structures(labels, setting)}
    return is_task03(labels) and set(getattr(resolved, setting)) <= applicable


def _without_names(resolved: StructureSettings, setting: str) -> Any:
    found = getattr(resolved, setting)
    if setting in ORGAN_SETTINGS:
        return bool(found)
    # What "off" looks like differs: a distance of 0 is a strict limit, a threshold of 0 is none.
    off = None if setting in ("reach_mm", "cut_mm") else 0.0
    return next(iter(found.values()), off)


def _resolve_values(config: InferenceConfig, labels: LabelScheme, setting: str) -> dict[str, float]:
    given = getattr(config, setting)
    applicable = list_applicable_structures(labels, setting)
    if not isinstance(given, dict):
        given = {structure.name: given for structure in applicable}
    resolved = {}
    for structure in _find_structures(labels, setting, given):
        value = given[structure.name]
        # A distance of 0 is a limit; a threshold or a volume of 0 changes nothing.
        is_off = value is None if setting in ("reach_mm", "cut_mm") else value == 0
        if is_off:
            continue
        if setting != "min_volume_ml" and structure not in applicable:
            names = ", ".join(one.name for one in applicable) or "none"
            raise UserError(
                f"inference.{setting}: {structure.name} is not a lesion with an organ around it; "
                f"those of this run are: {names}"
            )
        resolved[structure.name] = float(value)
    return resolved


def _resolve_names(config: InferenceConfig, labels: LabelScheme, setting: str) -> tuple[str, ...]:
    given = getattr(config, setting)
    if isinstance(given, bool):
        organs = list_applicable_structures(labels, setting) if given else ()
        return tuple(organ.name for organ in organs)
    found = _find_structures(labels, setting, given)
    return tuple(structure.name for structure in found)


def _find_structures(labels: LabelScheme, setting: str, names: Any) -> list[Structure]:
    """The named structures in the scheme's order."""
    for name in names:
        try:
            labels.structure(name)
        except UserError as error:
            raise UserError(f"inference.{setting}: {error}") from None
    return [structure for structure in labels.structures if structure.name in names]

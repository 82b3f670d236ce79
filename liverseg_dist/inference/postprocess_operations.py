"""The post-processing operations of a label scheme, and the settings that they stand for.

An operation is one setting of `inference.*` for one structure. Task03 has one organ and one lesion
structure, so its operations have the names that the settings had before there were others. Used by
`postprocess_search`, its command and the report.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from liverseg_dist.config import InferenceConfig
from liverseg_dist.config.aliases import former_name
from liverseg_dist.files import write_text
from liverseg_dist.inference.label_codes import THRESHOLDS
from liverseg_dist.inference.structure_settings import (
    ORGAN_SETTINGS,
    is_expressible_without_names,
    list_applicable_structures,
    resolve_structure_settings,
)
from liverseg_dist.inference.structure_values import is_task03
from liverseg_dist.labels import LabelScheme

OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "lesion_threshold": (0.0, *THRESHOLDS),
    "largest_component": (False, True),
    "fill_holes": (False, True),
    "reach_mm": (None, 0.0, 5.0, 10.0, 20.0),
    "cut_mm": (None, 0.0, 5.0, 10.0, 20.0),
    "min_volume_ml": (0.0, 0.03, 0.1, 0.3, 1.0),
}
"""Candidates of each setting, in the order of application; the first of each does nothing.

All but the threshold are steps of `postprocess.STEPS`.
"""


@dataclass(frozen=True)
class Operation:
    """One setting for one structure.

    Attributes:
        setting: a key of `OPTIONS`.
        structure: name of the structure.
        options: candidates; the first one does nothing.
    """

    setting: str
    structure: str
    options: tuple[Any, ...]


def list_operations(labels: LabelScheme) -> dict[str, Operation]:
    """The operations by name, in the order of their application."""
    operations = {}
    for setting, options in OPTIONS.items():
        for structure in list_applicable_structures(labels, setting):
            name = name_operation(labels, setting, structure.name)
            operations[name] = Operation(setting, structure.name, options)
    return operations


def name_operation(labels: LabelScheme, setting: str, structure: str) -> str:
    """`min_volume_ml.NAME`; for Task03 the former name of the setting."""
    if is_task03(labels):
        return former_name(f"inference.{setting}")
    return f"{setting}.{structure}"


def without_postprocessing(config: InferenceConfig) -> InferenceConfig:
    """The settings with all operations switched off."""
    return config.model_copy(update={name: options[0] for name, options in OPTIONS.items()})


def build_config(labels: LabelScheme, chosen: Mapping[str, Any]) -> InferenceConfig:
    """Settings with the given operations only.

    Args:
        labels: the scheme.
        chosen: option of each operation by name.
    """
    # Through the validation of the settings, so that every option is one that a user could write.
    return InferenceConfig.model_validate(_build_settings(labels, chosen))


def select_active_operations(config: InferenceConfig, labels: LabelScheme) -> dict[str, Any] | None:
    """The operations that change masks, with their settings; None if there are none."""
    resolved = resolve_structure_settings(config, labels)
    active: dict[str, Any] = {}
    for setting in OPTIONS:
        found = getattr(resolved, setting)
        is_short = is_expressible_without_names(resolved, labels, setting)
        for structure in found:
            value = True if setting in ORGAN_SETTINGS else found[structure]
            # For Task03 a setting for another structure than usual is named in full.
            name = f"{setting}.{structure}"
            active[name_operation(labels, setting, structure) if is_short else name] = value
    return active or None


def write_choice(file: Path, labels: LabelScheme, chosen: Mapping[str, Any], comment: str) -> None:
    """Save the choice in the run's folder; `load_run` reads it after `config.yaml`.

    Args:
        file: the YAML file.
        labels: labels of the run.
        chosen: options of the operations that are kept; all others are switched off.
        comment: text for the head of the file.
    """
    settings = {"inference": _build_settings(labels, chosen)}
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    write_text(file, head + yaml.safe_dump(settings, sort_keys=False))


def _build_settings(labels: LabelScheme, chosen: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for setting, options in OPTIONS.items():
        if setting in ORGAN_SETTINGS:
            # An empty list, not an absent key: the run's own setting must be overridden.
            settings[setting] = []
            continue
        # Structures that are switched off are named: the mapping is merged with that of training.
        structures = list_applicable_structures(labels, setting)
        if setting == "min_volume_ml":
            structures = labels.structures
        settings[setting] = {structure.name: options[0] for structure in structures}
    for name, operation in list_operations(labels).items():
        if name not in chosen:
            continue
        if operation.setting not in ORGAN_SETTINGS:
            settings[operation.setting][operation.structure] = chosen[name]
        elif chosen[name]:
            settings[operation.setting].append(operation.structure)
    return settings

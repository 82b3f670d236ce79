"""Checks of a store's metadata, before memory is allocated or a name becomes part of a path.

A store may come from an untrusted source. Each check raises KeyError, TypeError or ValueError
(pydantic's errors are ValueErrors); `case_store` turns them into a `UserError` of one line.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from liverseg_dist.config import CT_CHANNELS, ChannelConfig, IntensityConfig
from liverseg_dist.config.channels import check_channel_names
from liverseg_dist.config.convert import SlabConfig
from liverseg_dist.data.store.layout import DTYPES, TRAIN_ONLY, has_plausible_shape
from liverseg_dist.errors import UserError
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.volume import Grid

MAX_CHANNELS = 64
ABSENT_INTENSITY = IntensityConfig(lower_hu=0.0, upper_hu=1.0, mean=0.0, std=1.0)
"""For a channel that a case does not have: its voxels are 0 before and after normalisation."""
MAX_COUNT = 2**62
"""Counts are summed as int64 over all cases."""


def check_root(root: Mapping[str, Any]) -> None:
    """Check the entries of the root that describe the whole data set.

    Cases are checked when they are read: there may be ten thousand.
    """
    _check_text(root["name"], "name")
    spacing_mm = [float(value) for value in root["spacing_mm"]]
    is_positive = all(math.isfinite(mm) and mm > 0 for mm in spacing_mm)
    if len(spacing_mm) != 3 or not is_positive:
        raise ValueError(f"spacing_mm is {spacing_mm}")
    splits = _check_mapping(root["splits"], "splits")
    parts = [splits["test"], *_check_list(splits["folds"], "folds"), splits.get(TRAIN_ONLY, [])]
    for part in parts:
        for case_id in _check_list(part, "splits"):
            _check_text(case_id, "splits")
    _check_mapping(root["audit"], "audit")
    _check_mapping(root["convert"], "convert")


def parse_labels(root: Mapping[str, Any]) -> LabelScheme:
    """The label scheme of a store. Stores of schema 1 have the labels of LiTS."""
    if "labels" not in root:
        return LITS_SCHEME
    try:
        scheme = LabelScheme.from_json(root["labels"])
    except UserError as error:
        raise ValueError(str(error)) from None
    if not scheme.is_contiguous:
        raise ValueError("the label values of its scheme have gaps")
    return scheme


def parse_channels(root: Mapping[str, Any]) -> tuple[ChannelConfig, ...]:
    """The channels of a store. Stores of schema 1 have one channel of CT."""
    if "channels" not in root:
        return CT_CHANNELS
    channels = [ChannelConfig.model_validate(entry) for entry in root["channels"]]
    if not 1 <= len(channels) <= MAX_CHANNELS:
        raise ValueError(f"{len(channels)} channels")
    check_channel_names(channels)
    return tuple(channels)


def parse_intensities(root: Mapping[str, Any], channels: int) -> tuple[IntensityConfig | None, ...]:
    """The normalisation of each channel of a store; None where each scan has its own."""
    entries = root["intensity"]
    # Stores of one CT channel have the entry itself, as in schema 1.
    if isinstance(entries, dict):
        entries = [entries]
    if len(entries) != channels:
        raise ValueError(f"{len(entries)} normalisations for {channels} channels")
    return tuple(
        None if entry is None else IntensityConfig.model_validate(entry) for entry in entries
    )


def parse_case(
    case: Mapping[str, Any], labels: LabelScheme, intensities: Sequence[IntensityConfig | None]
) -> dict[str, Any]:
    """Check the metadata of one case; returns the fields of `CaseMeta` that it holds.

    Args:
        case: Entry of the case in the root.
        labels: Label scheme of the store.
        intensities: Normalisation of each channel of the store.
    """
    first, last = case["valid_slices"]
    grid, source_grid = Grid.from_json(case["grid"]), Grid.from_json(case["source_grid"])
    for case_grid in (grid, source_grid):
        if min(case_grid.shape) < 1 or not has_plausible_shape(case_grid.shape):
            raise ValueError(f"a grid of {case_grid.shape} voxels")
    # Slabs have a fixed number of slices; a larger range would address slices that do not exist.
    if not 0 <= _check_count(first) < _check_count(last) <= SlabConfig().slices:
        raise ValueError(f"valid_slices {first} to {last}")
    if not isinstance(case["labelled"], bool):
        raise TypeError("labelled is not true or false")
    return {
        "patient": _check_text(case["patient"], "patient"),
        "parent": _check_text(case["parent"], "parent"),
        "labelled": case["labelled"],
        "imputed": "imputed_by" in case,
        "grid": grid,
        "source_grid": source_grid,
        "valid_slices": (first, last),
        "class_voxels": tuple(
            parse_class_voxels(case["class_voxels"], labels.num_classes).tolist()
        ),
        "lesions": _parse_lesions(case, labels),
        "annotated": _parse_annotated(case, labels),
        "present": _parse_present(case, len(intensities)),
        "intensities": _parse_case_intensities(case, intensities),
    }


def parse_class_voxels(values: Any, classes: int) -> np.ndarray:
    """Voxels of each class, background first, as int64."""
    counts = [_check_count(value) for value in values]
    if len(counts) != classes:
        raise ValueError(f"{len(counts)} class counts for {classes} classes")
    return np.array(counts, dtype=np.int64)


def _parse_lesions(case: Mapping[str, Any], labels: LabelScheme) -> dict[str, int]:
    names = [structure.name for structure in labels.lesions]
    if "lesions" not in case:
        # Schema 1 counted the tumours of the liver, its only lesions.
        return dict.fromkeys(names, _check_count(case["tumours"]))
    counts = _check_mapping(case["lesions"], "lesions")
    return {name: _check_count(counts[name]) for name in names}


def _parse_annotated(case: Mapping[str, Any], labels: LabelScheme) -> tuple[str, ...]:
    """Names of the annotated structures, in the order of the scheme; all without an entry."""
    if "annotated" not in case:
        return labels.structure_names if case["labelled"] else ()
    listed = _check_list(case["annotated"], "annotated")
    unknown = set(listed) - set(labels.structure_names)
    if unknown:
        raise ValueError(f"annotated names {sorted(map(str, unknown))[0]}, which is no structure")
    return tuple(name for name in labels.structure_names if name in listed)


def _parse_present(case: Mapping[str, Any], channels: int) -> tuple[bool, ...]:
    if "present" not in case:
        return (True,) * channels
    flags = _check_list(case["present"], "present")
    if len(flags) != channels or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError("present is not one flag for each channel")
    if not any(flags):
        raise ValueError("a case without any channel")
    return tuple(flags)


def _parse_case_intensities(
    case: Mapping[str, Any], intensities: Sequence[IntensityConfig | None]
) -> tuple[IntensityConfig, ...]:
    """The normalisation of each channel: of the case where it has one, else of the store."""
    own = case.get("intensity") or [None] * len(intensities)
    if len(own) != len(intensities):
        raise ValueError("intensity is not one entry for each channel")
    result = []
    for entry, shared in zip(own, intensities, strict=True):
        intensity = shared if entry is None else IntensityConfig.model_validate(entry)
        # An absent channel has no voxels and so no statistics; its zeros stay zeros.
        result.append(intensity or ABSENT_INTENSITY)
    return tuple(result)


def check_array(array: Any, name: str, shape: tuple[int, ...] | None = None) -> None:
    """Check data type, shape and chunks of an open Zarr array before a voxel of it is read.

    Args:
        array: The Zarr array.
        name: Its name in the store, which determines the data type.
        shape: The shape that the metadata of the case implies; None if any shape is possible.
    """
    if array.dtype.name != DTYPES[name]:
        raise ValueError(f"voxels of type {array.dtype}, not {DTYPES[name]}")
    if shape is not None and tuple(array.shape) != tuple(shape):
        raise ValueError(f"shape {tuple(array.shape)}, but its metadata has {tuple(shape)}")
    if name == "foreground" and array.shape[1:] != (5,):
        raise ValueError(f"shape {tuple(array.shape)}")
    if not has_plausible_shape(array.shape, array.chunks, array.shards or array.chunks):
        shape_text, chunk_text = tuple(array.shape), tuple(array.chunks)
        raise ValueError(f"shape {shape_text} in chunks of {chunk_text} is not plausible")


def _check_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{name} is not a name")
    return value


def _check_count(value: Any) -> int:
    # bool is a subclass of int, but true is not a count.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_COUNT:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def _check_mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is not a mapping")
    return value


def _check_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is not a list")
    return value

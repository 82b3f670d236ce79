"""A store's metadata is untrusted: what is read of it is checked here, before memory is taken or a name is believed.

Each check raises KeyError, TypeError or ValueError (of which pydantic's are); `store` tells them in one line.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from liverseg_dist.config.convert import SlabConfig
from liverseg_dist.data.store.layout import DTYPES, TRAIN_ONLY, has_plausible_shape
from liverseg_dist.volume import Grid


def check_root(root: Mapping[str, Any]) -> None:
    """The parts that are read without asking for a case; not the cases, of which there may be ten thousand."""
    _text(root["name"], "name")
    spacing = [float(value) for value in root["spacing_mm"]]
    if len(spacing) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
        raise ValueError(f"spacing_mm is {spacing}")
    splits = _mapping(root["splits"], "splits")
    for part in (splits["test"], *_list(splits["folds"], "folds"), splits.get(TRAIN_ONLY, [])):
        for name in _list(part, "splits"):
            _text(name, "splits")
    _mapping(root["audit"], "audit")
    _mapping(root["convert"], "convert")


def checked_case(case: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `CaseMeta` that are the case's own."""
    first, last = case["valid_slices"]
    grid, source_grid = Grid.from_json(case["grid"]), Grid.from_json(case["source_grid"])
    for found in (grid, source_grid):
        if min(found.shape) < 1 or not has_plausible_shape(found.shape):
            raise ValueError(f"a grid of {found.shape} voxels")
    if not 0 <= _count(first) < _count(last) <= SlabConfig().slices:
        raise ValueError(f"valid_slices {first} to {last}")
    if not isinstance(case["labelled"], bool):
        raise TypeError("labelled is true or false")
    return {
        "patient": _text(case["patient"], "patient"),
        "parent": _text(case["parent"], "parent"),
        "labelled": case["labelled"],
        "imputed": "imputed_by" in case,
        "grid": grid,
        "source_grid": source_grid,
        "valid_slices": (first, last),
        "class_voxels": tuple(checked_counts(case["class_voxels"]).tolist()),
        "tumours": _count(case["tumours"]),
    }


def checked_counts(values: Any) -> np.ndarray:
    """Background, liver, tumour voxels, int64."""
    background, liver, tumour = values
    return np.array([_count(background), _count(liver), _count(tumour)], dtype=np.int64)


def check_array(array: Any, name: str, shape: tuple[int, ...] | None = None) -> None:
    """An open Zarr array, before a voxel of it is read: is it what its name and its case say?"""
    if array.dtype.name != DTYPES[name]:
        raise ValueError(f"voxels of type {array.dtype}, not {DTYPES[name]}")
    if shape is not None and tuple(array.shape) != tuple(shape):
        raise ValueError(f"shape {tuple(array.shape)}, its metadata says {tuple(shape)}")
    if name == "foreground" and array.shape[1:] != (5,):
        raise ValueError(f"shape {tuple(array.shape)}")
    if not has_plausible_shape(array.shape, array.chunks, array.shards or array.chunks):
        raise ValueError(f"shape {tuple(array.shape)} in chunks of {tuple(array.chunks)} cannot be")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{name} is no name")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"{str(value)[:40]} is no count")
    return value


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is no mapping")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is no list")
    return value

"""Checks of a store's metadata, before memory is allocated or a name becomes part of a path.

A store may come from an untrusted source. Each check raises KeyError, TypeError or ValueError
(pydantic's errors are ValueErrors); `case_store` turns them into a `UserError` of one line.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from liverseg_dist.config.convert import SlabConfig
from liverseg_dist.data.store.layout import DTYPES, TRAIN_ONLY, has_plausible_shape
from liverseg_dist.volume import Grid

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


def parse_case(case: Mapping[str, Any]) -> dict[str, Any]:
    """Check the metadata of one case; returns the fields of `CaseMeta` that it holds."""
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
        "class_voxels": tuple(parse_class_voxels(case["class_voxels"]).tolist()),
        "tumours": _check_count(case["tumours"]),
    }


def parse_class_voxels(values: Any) -> np.ndarray:
    """Voxels of background, liver and tumour as int64."""
    background, liver, tumour = values
    counts = [_check_count(background), _check_count(liver), _check_count(tumour)]
    return np.array(counts, dtype=np.int64)


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

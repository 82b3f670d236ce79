"""Metadata of a store that was changed by hand: each wrong entry is refused before it is used."""

import copy
from typing import Any

import numpy as np
import pytest

from liverseg_dist.config import CT_CHANNELS, IntensityConfig
from liverseg_dist.data.store.metadata_checks import (
    ABSENT_INTENSITY,
    MAX_CHANNELS,
    MAX_COUNT,
    check_root,
    parse_case,
    parse_channels,
    parse_class_voxels,
    parse_intensities,
    parse_labels,
)
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.volume import Grid

INTENSITY = IntensityConfig(lower_hu=-100, upper_hu=240, mean=0.5, std=0.2)
OTHER = INTENSITY.model_copy(update={"mean": 0.7})
ROOT = {
    "name": "phantoms",
    "spacing_mm": [2.5, 1.0, 1.0],
    "splits": {"test": ["a"], "folds": [["b"], ["c"]]},
    "audit": {},
    "convert": {},
}
GRID = Grid((16, 20, 24), np.diag([1.0, 1.0, 2.5, 1.0])).to_json()
CASE = {
    "patient": "a",
    "parent": "a",
    "labelled": True,
    "grid": GRID,
    "source_grid": GRID,
    "valid_slices": [0, 16],
    "class_voxels": [7000, 600, 80],
    "tumours": 2,
}


def parse(
    changes: dict[str, Any],
    labels: LabelScheme = LITS_SCHEME,
    intensities: tuple[IntensityConfig | None, ...] = (INTENSITY,),
) -> dict[str, Any]:
    return parse_case({**copy.deepcopy(CASE), **changes}, labels, intensities)


def test_a_case_of_schema_1_has_the_labels_and_the_channel_of_lits() -> None:
    found = parse({})
    assert found["lesions"] == {"tumour": 2}
    assert found["annotated"] == ("liver", "tumour")
    assert found["present"] == (True,)
    assert found["intensities"] == (INTENSITY,)
    assert not found["imputed"]
    assert parse({"labelled": False})["annotated"] == ()
    assert parse({"imputed_by": "run"})["imputed"]


def test_annotated_structures_have_the_order_of_the_scheme() -> None:
    assert parse({"annotated": ["tumour", "liver"]})["annotated"] == ("liver", "tumour")
    assert parse({"annotated": []})["annotated"] == ()


def test_a_case_has_its_own_normalisation_or_that_of_the_store() -> None:
    own = parse({"intensity": [OTHER.model_dump(), None]}, intensities=(INTENSITY, INTENSITY))
    assert own["intensities"] == (OTHER, INTENSITY)
    absent = parse({"present": [True, False]}, intensities=(INTENSITY, None))
    assert absent["intensities"] == (INTENSITY, ABSENT_INTENSITY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patient": "a\nb"}, "patient is not a name"),
        ({"parent": 3}, "parent is not a name"),
        ({"labelled": 1}, "labelled is not true or false"),
        ({"valid_slices": [3, 3]}, "valid_slices 3 to 3"),
        ({"valid_slices": [0, 10**6]}, "valid_slices 0 to 1000000"),
        ({"valid_slices": [-1, 4]}, "-1 is not a count"),
        ({"valid_slices": [0, 4, 8]}, "too many values"),
        ({"class_voxels": [1, 2]}, "2 class counts for 3 classes"),
        ({"class_voxels": [1, 2, True]}, "True is not a count"),
        ({"class_voxels": [1, 2, 3.0]}, "3.0 is not a count"),
        ({"class_voxels": [1, 2, MAX_COUNT]}, "is not a count"),
        ({"tumours": -2}, "-2 is not a count"),
        ({"lesions": [1]}, "lesions is not a mapping"),
        ({"lesions": {}}, "tumour"),
        ({"annotated": "liver"}, "annotated is not a list"),
        ({"annotated": ["spleen"]}, "annotated names spleen"),
        ({"present": [1]}, "present is not one flag for each channel"),
        ({"present": [True, True]}, "present is not one flag for each channel"),
        ({"present": [False]}, "a case without any channel"),
        ({"intensity": [None, None]}, "intensity is not one entry for each channel"),
        ({"grid": {**GRID, "shape_zyx": [0, 20, 24]}}, "a grid of"),
        ({"grid": {**GRID, "shape_zyx": [10**6, 10**6, 10**6]}}, "a grid of"),
    ],
)
def test_a_wrong_entry_of_a_case_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        parse(changes)


@pytest.mark.parametrize("missing", CASE)
def test_a_missing_entry_of_a_case_is_refused(missing: str) -> None:
    case = {name: value for name, value in CASE.items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        parse_case(case, LITS_SCHEME, (INTENSITY,))


def test_a_good_root_is_accepted() -> None:
    check_root(ROOT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a\x00b"}, "name is not a name"),
        ({"spacing_mm": [1.0, 1.0]}, "spacing_mm is"),
        ({"spacing_mm": [1.0, 0.0, 1.0]}, "spacing_mm is"),
        ({"spacing_mm": [1.0, float("nan"), 1.0]}, "spacing_mm is"),
        ({"splits": []}, "splits is not a mapping"),
        ({"splits": {"test": [], "folds": {}}}, "folds is not a list"),
        ({"splits": {"test": [], "folds": ["abc"]}}, "splits is not a list"),
        ({"splits": {"test": [4], "folds": []}}, "splits is not a name"),
        ({"audit": None}, "audit is not a mapping"),
        ({"convert": []}, "convert is not a mapping"),
    ],
)
def test_a_wrong_entry_of_the_root_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_root({**ROOT, **changes})


def test_labels_with_gaps_cannot_be_channels_of_a_network() -> None:
    scheme = LabelScheme(((0, "background"), (3, "spleen")), (Structure("spleen", (3,)),))
    with pytest.raises(ValueError, match="have gaps"):
        parse_labels({"labels": scheme.to_json()})
    assert parse_labels({}) == LITS_SCHEME
    assert parse_labels({"labels": LITS_SCHEME.to_json()}) == LITS_SCHEME
    with pytest.raises(ValueError, match="damaged"):
        parse_labels({"labels": {"values": {"x": "liver"}}})


def test_channels_are_limited_and_named_once() -> None:
    assert parse_channels({}) == CT_CHANNELS
    channel = CT_CHANNELS[0].model_dump()
    with pytest.raises(ValueError, match="0 channels"):
        parse_channels({"channels": []})
    with pytest.raises(ValueError, match=f"{MAX_CHANNELS + 1} channels"):
        parse_channels({"channels": [channel] * (MAX_CHANNELS + 1)})
    with pytest.raises(ValueError, match="two channels are called ct"):
        parse_channels({"channels": [channel, channel]})


def test_each_channel_needs_its_normalisation() -> None:
    one = INTENSITY.model_dump()
    assert parse_intensities({"intensity": one}, 1) == (INTENSITY,)
    assert parse_intensities({"intensity": [one, None]}, 2) == (INTENSITY, None)
    with pytest.raises(ValueError, match="1 normalisations for 2 channels"):
        parse_intensities({"intensity": one}, 2)
    with pytest.raises(ValueError, match="std"):
        parse_intensities({"intensity": {**one, "std": -1.0}}, 1)


def test_counts_are_64_bit() -> None:
    counts = parse_class_voxels([2**40, 0, 2**33], 3)
    assert counts.dtype == np.int64
    assert counts.tolist() == [2**40, 0, 2**33]

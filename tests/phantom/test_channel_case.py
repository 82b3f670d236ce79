"""Cases with CT and MR: positions in the world, motion, absent channels, benign lesions."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.phantom.anatomy import nominal_to_world
from liverseg_dist.phantom.channel_case import (
    ChannelCase,
    Recipe,
    list_present_channels,
    make_channel_case,
)
from liverseg_dist.phantom.grids import draw_mr_grid
from liverseg_dist.phantom.liver import HILUM
from liverseg_dist.phantom.organ_labels import parse_organs
from liverseg_dist.phantom.scan import draw_case_patient, make_scan
from liverseg_dist.volume import Volume

ORGANS = parse_organs("all")
BOTH = Recipe("ct+mr", ("gre",), ORGANS, seed=3)
CASE = 1
"""A patient with four tumours."""


@pytest.fixture(scope="module")
def aligned() -> ChannelCase:
    return make_channel_case(BOTH, CASE)


@pytest.fixture(scope="module")
def mr_alone() -> ChannelCase:
    """The MR of the same patient, with its label on its own grid."""
    return make_channel_case(replace(BOTH, modality="mr"), CASE)


def centroid(label: Volume, value: int) -> np.ndarray:
    return label.grid.world_mm(np.argwhere(label.voxels == value)).mean(axis=0)


def is_complete(label: Volume, value: int) -> bool:
    """Whether the structure is in the field of view as a whole, and large enough to measure."""
    mask = label.voxels == value
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1, 1:-1] = True
    return mask.sum() > 100 and not (mask & ~inner).any()


def values_at(image: Volume, world_mm: np.ndarray) -> np.ndarray:
    """Values of the image at positions in the world, by linear interpolation."""
    index = image.grid.index_of(world_mm)
    return ndimage.map_coordinates(image.voxels.astype(np.float32), index.T, order=1)


def in_ball(centre_mm: list[float], radius_mm: float) -> np.ndarray:
    """Positions in the world inside a ball."""
    steps = np.linspace(-radius_mm, radius_mm, 7)
    offsets = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    return np.array(centre_mm) + offsets[np.linalg.norm(offsets, axis=1) <= radius_mm]


def test_ct_is_that_of_the_default_set(aligned: ChannelCase) -> None:
    default = make_scan(3, CASE, "small", False)
    np.testing.assert_array_equal(aligned.images["CT"].voxels, default.image.voxels)
    assert aligned.images["CT"].grid == default.image.grid
    for value in (1, 2):
        np.testing.assert_array_equal(aligned.label.voxels == value, default.label.voxels == value)


def test_every_organ_is_labelled(aligned: ChannelCase, mr_alone: ChannelCase) -> None:
    for case in (aligned, mr_alone):
        found = set(np.unique(case.label.voxels).tolist()) - {0}
        # A quarter of the patients has no gallbladder; this one has none.
        assert found == set(ORGANS.values.values()) - {ORGANS.values["gallbladder"]}
    spleen, kidney, liver = (
        centroid(aligned.label, ORGANS.values[name]) for name in ("spleen", "kidney_right", "liver")
    )
    # x grows to the patient's right in RAS+ phantoms, z to the head.
    assert spleen[0] < 0 < kidney[0]
    assert kidney[2] < liver[2]


def test_organs_have_their_values_in_both_images(aligned: ChannelCase) -> None:
    """The label describes the CT, and at the same place in the world the MR."""
    label = aligned.label
    median = {}
    for name in ("liver", "spleen", "kidney_left", "aorta"):
        inside = ndimage.binary_erosion(label.voxels == ORGANS.values[name], iterations=2)
        world = label.grid.world_mm(np.argwhere(inside))
        values = values_at(aligned.images["MR"], world)
        values = values[values > 0]
        median[name] = np.median(values)
        assert np.median(aligned.images["CT"].voxels[inside]) > 80
    # T1-weighted: the liver is brighter than spleen, kidney and blood.
    assert median["liver"] > 1.1 * max(median["spleen"], median["kidney_left"], median["aorta"])


def test_ct_and_mr_overlap_in_the_world(aligned: ChannelCase, mr_alone: ChannelCase) -> None:
    assert aligned.truth["mr_from_ct"] == np.eye(4).tolist()
    assert aligned.images["MR"].grid == mr_alone.images["MR"].grid
    assert aligned.images["MR"].grid != aligned.images["CT"].grid
    voxel_mm = max(mr_alone.label.grid.spacing_mm)
    compared = 0
    for name, value in ORGANS.values.items():
        if is_complete(aligned.label, value) and is_complete(mr_alone.label, value):
            shift = centroid(aligned.label, value) - centroid(mr_alone.label, value)
            assert np.linalg.norm(shift) < voxel_mm, name
            compared += 1
    assert compared >= 4


def test_misalignment_is_the_motion_of_the_truth(aligned: ChannelCase) -> None:
    recipe = replace(BOTH, misalignment_mm=12.0)
    case = make_channel_case(recipe, CASE)
    motion = np.array(case.truth["mr_from_ct"])
    np.testing.assert_array_equal(case.images["MR"].voxels, aligned.images["MR"].voxels)
    np.testing.assert_allclose(
        case.images["MR"].affine, motion @ aligned.images["MR"].affine, atol=1e-3
    )
    assert case.images["CT"].grid == aligned.images["CT"].grid
    # Rigid, and the hilum of the liver is shifted by the given distance.
    np.testing.assert_allclose(motion[:3, :3] @ motion[:3, :3].T, np.eye(3), atol=1e-5)
    angle_deg = np.rad2deg(np.arccos((np.trace(motion[:3, :3]) - 1) / 2))
    assert angle_deg == pytest.approx(3.0, abs=0.01)
    hilum = nominal_to_world(draw_case_patient(recipe.key(CASE)), HILUM)
    moved = motion[:3, :3] @ hilum + motion[:3, 3]
    assert np.linalg.norm(moved - hilum) == pytest.approx(12.0, abs=0.01)
    # Liver voxels of the CT are at the moved place in the MR: brighter than without the motion.
    inside = ndimage.binary_erosion(case.label.voxels == ORGANS.values["liver"], iterations=2)
    world = case.label.grid.world_mm(np.argwhere(inside))
    there = values_at(case.images["MR"], world @ motion[:3, :3].T + motion[:3, 3])
    np.testing.assert_allclose(
        there.mean(), values_at(aligned.images["MR"], world).mean(), rtol=0.01
    )


def test_case_is_a_function_of_recipe_and_number(mr_alone: ChannelCase) -> None:
    recipe = replace(BOTH, modality="mr")
    again = make_channel_case(recipe, CASE)
    np.testing.assert_array_equal(again.images["MR"].voxels, mr_alone.images["MR"].voxels)
    assert again.truth == mr_alone.truth
    other = make_channel_case(replace(recipe, seed=4), CASE)
    assert other.images["MR"].grid != again.images["MR"].grid


def test_mr_grids_are_those_of_abdominal_mr() -> None:
    spacing = []
    for number in range(12):
        patient = draw_case_patient(BOTH.key(number))
        grid = draw_mr_grid(np.random.default_rng(number), patient, "full")
        spacing.append(grid.spacing_mm)
        low, high = grid.corners_mm()[:, 2].min(), grid.corners_mm()[:, 2].max()
        assert low < patient.liver_z_mm[0]
        assert high > patient.liver_z_mm[1]
    z, y, x = np.array(spacing).T
    assert z.min() >= 3 - 1e-6
    assert z.max() <= 8 + 1e-6
    assert len(np.unique(np.round(z, 2))) >= 3
    np.testing.assert_allclose(y, x)
    assert 1.0 < y.min() < y.max() < 1.5


def test_share_of_cases_lacks_one_channel() -> None:
    recipe = replace(BOTH, sequences=("gre", "tse"), missing_share=0.25)
    assert recipe.channels == ("CT", "MR T1 GRE", "MR T2 TSE")
    present = [list_present_channels(recipe, number) for number in range(40)]
    absent = [set(recipe.channels) - set(names) for names in present]
    assert 9 <= sum(map(bool, absent)) <= 11
    assert max(map(len, absent)) == 1
    assert set().union(*absent) == set(recipe.channels)
    assert [list_present_channels(recipe, number) for number in range(3)] == present[:3]
    assert list_present_channels(replace(recipe, missing_share=0.0), 0) == recipe.channels


def test_label_is_on_the_grid_of_the_first_channel_present() -> None:
    recipe = replace(BOTH, missing_share=1.0, labels=parse_organs("liver"))
    number = next(n for n in range(20) if list_present_channels(recipe, n) == ("MR",))
    case = make_channel_case(recipe, number)
    assert list(case.images) == ["MR"]
    assert case.truth["channels"] == {"CT": False, "MR": True}
    assert case.label.grid == case.images["MR"].grid


def test_registered_channels_share_a_grid_and_differ() -> None:
    recipe = replace(BOTH, sequences=("gre", "tse", "pd"), one_grid=True)
    case = make_channel_case(recipe, CASE)
    assert list(case.images) == ["CT", "MR T1 GRE", "MR T2 TSE", "MR PD TSE"]
    for image in case.images.values():
        assert image.grid == case.label.grid
    values = [image.voxels.ravel() for image in case.images.values()]
    for first in range(4):
        for second in range(first):
            assert abs(np.corrcoef(values[first], values[second])[0, 1]) < 0.97


def test_structures_that_are_not_annotated_are_background(aligned: ChannelCase) -> None:
    plan = parse_organs("spleen,kidneys")
    case = make_channel_case(Recipe("ct", (), plan, seed=3), CASE)
    for name in plan.structures:
        expected = aligned.label.voxels == ORGANS.values[name]
        np.testing.assert_array_equal(case.label.voxels == plan.values[name], expected)
    assert set(np.unique(case.label.voxels)) == {0, 1, 2, 3}
    # The liver without a label of its own for tumours includes them.
    liver = make_channel_case(Recipe("ct", (), type(plan)(("liver",)), seed=3), CASE)
    np.testing.assert_array_equal(liver.label.voxels == 1, np.isin(aligned.label.voxels, (1, 2)))


def test_benign_lesions_look_like_tumours_in_one_modality_only() -> None:
    recipe = replace(BOTH, sequences=("tse",), labels=parse_organs("liver"), benign_lesions=6)
    contrasts: dict[str, list[tuple[float, float]]] = {}
    for number in (0, 1, 2):
        case = make_channel_case(recipe, number)
        plain = make_channel_case(replace(recipe, modality="ct", benign_lesions=0), number)
        # They are liver in the label.
        np.testing.assert_array_equal(case.label.voxels, plain.label.voxels)
        assert 1 <= len(case.truth["benign_lesions"]) <= 6
        parenchyma = case.label.grid.world_mm(np.argwhere(case.label.voxels == 1))
        ct, mr = case.images["CT"], case.images["MR"]
        liver_hu = np.median(values_at(ct, parenchyma))
        liver_mr = np.median(values_at(mr, parenchyma))
        found = [(lesion["kind"], lesion) for lesion in case.truth["benign_lesions"]]
        for kind, lesion in found:
            world = in_ball(lesion["centre_mm"], 0.25 * lesion["diameter_mm"])
            contrast = (
                float(np.median(values_at(ct, world)) - liver_hu),
                float(np.median(values_at(mr, world)) / liver_mr),
            )
            contrasts.setdefault(kind, []).append(contrast)
        tumours = ndimage.binary_erosion(case.label.voxels == 2, iterations=2)
        if tumours.any():
            world = case.label.grid.world_mm(np.argwhere(tumours))
            contrast = (
                float(np.median(values_at(ct, world)) - liver_hu),
                float(np.median(values_at(mr, world)) / liver_mr),
            )
            contrasts.setdefault("tumour", []).append(contrast)
    hu = {kind: [c[0] for c in both] for kind, both in contrasts.items()}
    mr_ratio = {kind: np.median([c[1] for c in both]) for kind, both in contrasts.items()}
    assert set(contrasts) >= {"tumour", "haemangioma", "nodular_hyperplasia"}
    # In CT the hyperplasia is invisible and the haemangioma has the contrast of tumours.
    assert np.abs(hu["nodular_hyperplasia"]).max() < 20
    assert max(hu["haemangioma"]) < -20
    assert min(hu["haemangioma"]) > -80
    # In T2-weighted MR the hyperplasia is like a tumour and the haemangioma is brighter.
    assert mr_ratio["nodular_hyperplasia"] == pytest.approx(mr_ratio["tumour"], rel=0.3)
    assert mr_ratio["haemangioma"] > 1.2 * mr_ratio["tumour"]

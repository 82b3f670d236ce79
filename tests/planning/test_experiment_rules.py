"""Rules on fingerprints made by hand: voxel size, slabs, patch, batch, sampling, splits."""

import math

import numpy as np
import pytest

from liverseg_dist.model.topology import plan_pooling, size_multiple
from liverseg_dist.planning.experiment_rules import (
    RARE_SHARE,
    choose_oversampling,
    choose_splits,
    choose_steps,
    choose_voxels,
    largest_batch,
    median_spacing,
    smaller_patches,
    stored_shape,
    wanted_patch,
)
from tests.planning.fingerprints import MR, ORGANS, case, dataset


def test_voxel_size_is_the_median_of_each_axis() -> None:
    shapes = (100, 200, 200)
    spacings = [(2.0, 0.7, 0.7), (2.5, 0.8, 0.9), (3.0, 1.0, 0.8)]
    found = dataset([case(n, shapes, spacing) for n, spacing in enumerate(spacings)])
    assert median_spacing(found)[0] == pytest.approx((2.5, 0.8, 0.8))


def test_anisotropic_axis_takes_the_tenth_percentile() -> None:
    # As nnU-Net for ACDC: slices of 5 to 10 mm, of which the median would be too coarse.
    spacings = [(z, 1.25, 1.25) for z in (5.0, 10.0, 10.0, 10.0, 10.0)]
    found = dataset([case(n, (20, 256, 256), mm) for n, mm in enumerate(spacings)], MR)
    spacing, reason = median_spacing(found)
    assert spacing[0] == pytest.approx(np.percentile([5, 10, 10, 10, 10], 10))
    assert "10th percentile" in reason


def test_anisotropic_axis_does_not_become_finer_than_the_others() -> None:
    spacings = [(0.5, 1.0, 1.0), (0.5, 1.0, 1.0), *[(4.0, 1.0, 1.0)] * 8]
    found = dataset([case(n, (20, 256, 256), mm) for n, mm in enumerate(spacings)])
    assert median_spacing(found)[0][0] == pytest.approx(1.0)


def test_many_thick_slices_are_not_anisotropic() -> None:
    # nnU-Net asks for few voxels along the axis as well.
    spacings = [(4.0, 1.0, 1.0), (5.0, 1.0, 1.0)]
    found = dataset([case(n, (300, 256, 256), mm) for n, mm in enumerate(spacings)])
    assert median_spacing(found)[0][0] == pytest.approx(4.5)


def test_one_slab_where_the_structures_fit_64_slices() -> None:
    found = choose_voxels(dataset([case(0, (60, 256, 256), (4.0, 1.5, 1.5))]))
    assert (found.policy, found.spacing_mm) == ("fit", (4.0, 1.5, 1.5))


def test_slices_become_thicker_where_that_loses_nothing() -> None:
    found = choose_voxels(dataset([case(0, (200, 256, 256), (2.0, 1.5, 1.5))]))
    assert found.policy == "fit"
    # 150 mm and 10 mm on both sides in 64 slices.
    assert found.spacing_mm[0] == pytest.approx(170 / 64, abs=0.011)
    assert found.spacing_mm[0] * 64 >= 170
    assert found.spacing_mm[1:] == (1.5, 1.5)


def test_small_lesions_keep_their_slices() -> None:
    small = case(0, (200, 256, 256), (2.0, 1.5, 1.5), lesions_mm=(5.0, 6.0, 7.0))
    found = choose_voxels(dataset([small]))
    assert (found.policy, found.spacing_mm) == ("tile", (2.0, 1.5, 1.5))
    assert "lesion of 5.2 mm" in found.policy_reason


def test_tiles_have_cubic_voxels_at_most() -> None:
    thin = case(0, (400, 512, 512), (0.5, 0.8, 0.8), lesions_mm=(4.0,))
    found = choose_voxels(dataset([thin]))
    assert (found.policy, found.spacing_mm) == ("tile", (0.8, 0.8, 0.8))


def test_margin_ends_with_the_scan() -> None:
    whole = case(0, (64, 256, 256), (2.0, 1.5, 1.5), foreground_mm=(128.0, 180.0, 220.0))
    assert choose_voxels(dataset([whole])).policy == "fit"


def test_labels_without_foreground_are_planned_by_the_scan() -> None:
    empty = case(0, (64, 128, 128), (4.0, 2.0, 2.0), foreground_mm=(0.0, 0.0, 0.0))
    data = dataset([empty])
    assert choose_voxels(data).policy == "fit"
    assert wanted_patch(data, (4.0, 2.0, 2.0), 6)[0] == (64, 128, 128)


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((60, 256, 256), (4.0, 1.5, 1.5)),
        ((31, 256, 256), (7.7, 1.25, 1.25)),
        ((300, 512, 512), (1.0, 0.8, 0.8)),
        ((13, 40, 50), (5.0, 4.0, 4.0)),
    ],
)
def test_patches_are_divisible_and_within_a_slab(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    data = dataset([case(0, shape, spacing_mm)])
    wanted, _ = wanted_patch(data, spacing_mm, 6)
    patches = smaller_patches(wanted, stored_shape(data, spacing_mm), spacing_mm, 6)
    assert patches[0] == wanted
    assert wanted[0] <= 64
    sizes = [math.prod(patch) for patch in patches]
    assert sizes == sorted(set(sizes), reverse=True), "each is smaller than the one before"
    for patch in patches:
        multiple = size_multiple(plan_pooling(patch, spacing_mm, 6)[0])
        assert all(edge % n == 0 for edge, n in zip(patch, multiple, strict=True))


def test_patch_is_limited_by_the_structures() -> None:
    small = case(0, (64, 512, 512), (2.5, 0.8, 0.8), foreground_mm=(60.0, 80.0, 80.0))
    wanted, reason = wanted_patch(dataset([small]), (2.5, 0.8, 0.8), 6)
    # 80 mm and a quarter are 125 voxels, padded to what five halvings need.
    assert wanted[1:] == (128, 128)
    assert "context" in reason


def test_batch_covers_five_percent_at_most() -> None:
    tiny = dataset([case(n, (64, 128, 128), (4.0, 2.0, 2.0)) for n in range(3)])
    assert largest_batch(tiny, choose_voxels(tiny), (64, 128, 128)) == 2
    huge = dataset([case(n, (64, 128, 128), (4.0, 2.0, 2.0)) for n in range(400)])
    assert largest_batch(huge, choose_voxels(huge), (64, 128, 128)) == 20


def test_rare_lesions_are_sampled_more_often() -> None:
    shape, mm = (64, 256, 256), (4.0, 1.0, 1.0)
    rare = dataset([case(0, shape, mm, lesions_mm=(6.0,), lesion_voxels=100)])
    common = dataset([case(0, shape, mm, lesions_mm=(60.0,), lesion_voxels=100_000)])
    assert choose_oversampling(rare)[0] == RARE_SHARE
    assert choose_oversampling(common)[0] == 0.33
    assert "no structure is a lesion" in choose_oversampling(dataset(rare.cases[:0], MR, ORGANS))[1]


def test_steps_grow_with_the_cases_up_to_those_of_nnunet() -> None:
    assert choose_steps(131, 2)[0] == 250_000
    assert choose_steps(131, 10)[0] == 50_000
    assert choose_steps(6, 2)[0] == 15_000


def test_splits_of_few_cases() -> None:
    assert choose_splits(131) == []
    six = {decision.key: decision.value for decision in choose_splits(6)}
    assert six == {"convert.splits.test_fraction": 0.0, "convert.splits.folds": 3}
    one = {decision.key: decision.value for decision in choose_splits(1)}
    assert one["data.fold"] == "all"

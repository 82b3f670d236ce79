"""Post-processing against scipy's components on hand-made and random masks."""

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference.postprocess import drop_small_tumours, foreground_box, keep_largest_liver, postprocess

FACES = ndimage.generate_binary_structure(3, 1)
CORNERS = ndimage.generate_binary_structure(3, 3)


def noise(seed: int, shape: tuple[int, int, int] = (20, 24, 22)) -> np.ndarray:
    """Blobs of liver with specks of tumour."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    mask = (field > np.quantile(field, 0.85)).astype(np.uint8)
    mask[(mask == 1) & (rng.random(shape) < 0.2)] = 2
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_largest_liver_keeps_its_tumours_and_nothing_else(seed: int) -> None:
    mask = noise(seed)
    components, count = ndimage.label(mask > 0, CORNERS)
    assert count > 3
    largest = 1 + np.argmax(np.bincount(components.ravel())[1:])
    expected = np.where(components == largest, mask, 0)
    keep_largest_liver(mask)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_voxels", [1, 2, 3, 1000])
def test_small_tumours_become_liver(seed: int, min_voxels: int) -> None:
    mask = noise(seed)
    components, _ = ndimage.label(mask == 2, FACES)
    sizes = np.bincount(components.ravel())
    expected = np.where((mask == 2) & (sizes[components] < min_voxels), 1, mask)
    drop_small_tumours(mask, min_voxels)
    assert np.array_equal(mask, expected)


def test_the_smallest_volume_is_in_ml() -> None:
    mask = np.zeros((5, 10, 10), np.uint8)
    mask[1:4, 1:9, 1:9] = 1
    mask[2, 2, 2:6] = 2  # 4 voxels
    mask[2, 6, 2:5] = 2  # 3 voxels
    before = mask.copy()
    postprocess(mask, spacing_mm=(1.0, 2.0, 5.0), config=InferenceConfig(min_tumour_ml=0.03))
    assert np.array_equal(mask, before)
    postprocess(mask, spacing_mm=(1.0, 2.0, 5.0), config=InferenceConfig(min_tumour_ml=0.031))
    assert (mask == 2).sum() == 4
    assert (mask > 0).sum() == (before > 0).sum()


def test_by_default_nothing_changes() -> None:
    mask = noise(0)
    before = mask.copy()
    postprocess(mask, (1.0, 1.0, 1.0), InferenceConfig())
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("config", [InferenceConfig(largest_component=True, min_tumour_ml=1.0)])
def test_empty_and_view_masks(config: InferenceConfig) -> None:
    empty = np.zeros((4, 5, 6), np.uint8)
    postprocess(empty, (1.0, 1.0, 1.0), config)
    assert not empty.any()
    mask = noise(1)
    turned = mask.copy()[::-1].transpose(2, 0, 1)  # a view, as a mask in the file's own orientation is
    postprocess(turned, (1.0, 2.0, 1.0), config)
    postprocess(mask, (2.0, 1.0, 1.0), config)
    assert np.array_equal(turned, mask[::-1].transpose(2, 0, 1))


def test_foreground_box() -> None:
    mask = np.zeros((6, 7, 8), np.uint8)
    assert foreground_box(mask) is None
    mask[2, 3, 4] = mask[4, 1, 7] = 1
    assert foreground_box(mask) == (slice(2, 5), slice(1, 4), slice(4, 8))

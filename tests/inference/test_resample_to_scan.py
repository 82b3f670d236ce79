"""Resampling to a scan's grid against scipy's interpolation of single points."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from liverseg_dist.errors import RunFailed
from liverseg_dist.inference.resample_to_scan import resample_to_scan
from liverseg_dist.volume import Grid


def make_grid(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], oblique: bool = False
) -> Grid:
    affine = np.diag([*reversed(spacing), 1.0])
    if oblique:
        c, s = np.cos(0.3), np.sin(0.3)
        affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = (-100, 30, 12)
    return Grid(shape, affine)


def resample(values: np.ndarray, source: Grid, target: Grid, slab: int) -> np.ndarray:
    out = np.full((len(values), *target.shape), -1.0, dtype=np.float32)
    slabs = (
        (z, torch.from_numpy(values[:, z : z + slab])) for z in range(0, values.shape[1], slab)
    )
    for box, part in resample_to_scan(slabs, source, target):
        assert (out[(slice(None), *box)] == -1).all()
        out[(slice(None), *box)] = part.numpy()
    return out


def interpolate_points(values: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), axis=-1)
    at = np.moveaxis(source.index_of(target.world_mm(index)), -1, 0)
    inside = np.all(
        [(a > -0.5 - 1e-4) & (a < n - 0.5 + 1e-4) for a, n in zip(at, source.shape, strict=True)],
        axis=0,
    )
    return np.stack(
        [np.where(inside, map_coordinates(v, at, order=1, mode="nearest"), -1.0) for v in values]
    )


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("slab", [1, 3, 100])
@pytest.mark.parametrize(
    "spacing", [(2.0, 1.0, 1.0), (0.7, 1.3, 0.9), (5.0, 0.5, 0.8), (1.0, 1.0, 1.0)]
)
def test_equals_interpolation_of_single_points(
    spacing: tuple[float, float, float], slab: int, oblique: bool
) -> None:
    target = make_grid((11, 17, 14), (1.0, 1.0, 1.0), oblique)
    source = target.with_spacing(spacing)
    values = np.random.default_rng(0).random((3, *source.shape), dtype=np.float32)
    result = resample(values, source, target, slab)
    np.testing.assert_allclose(result, interpolate_points(values, source, target), atol=2e-5)
    assert (result >= 0).all()  # the same field of view: every voxel has a value


@pytest.mark.parametrize("slab", [2, 100])
def test_voxels_outside_the_field_of_view_are_in_no_box(slab: int) -> None:
    target = make_grid((20, 17, 14), (1.0, 1.0, 1.0))
    source = target.cropped((6, -2, 5), (8, 12, 30)).with_spacing((1.6, 0.9, 1.0))
    values = np.random.default_rng(0).random((2, *source.shape), dtype=np.float32)
    result = resample(values, source, target, slab)
    np.testing.assert_allclose(result, interpolate_points(values, source, target), atol=2e-5)
    assert (result[:, :6] == -1).all()
    assert (result[:, 6:14, :10, 5:] >= 0).all()


def test_equal_grids_copy_bit_for_bit() -> None:
    target = make_grid((9, 8, 7), (2.5, 0.7, 0.7), oblique=True)
    values = np.random.default_rng(0).random((3, *target.shape), dtype=np.float32)
    assert np.array_equal(
        resample(values, target.with_spacing(target.spacing_mm), target, 4), values
    )


def test_a_scan_outside_the_field_of_view_has_no_box() -> None:
    target = make_grid((9, 8, 7), (1, 1, 1))
    source = target.cropped((100, 0, 0), (5, 8, 7))
    assert (resample(np.ones((1, *source.shape), np.float32), source, target, 2) == -1).all()


def test_grids_with_different_axes_are_refused() -> None:
    target = make_grid((9, 8, 7), (1, 1, 1))
    with pytest.raises(RunFailed, match="not parallel"):
        resample(
            np.ones((1, 9, 8, 7), np.float32),
            make_grid((9, 8, 7), (1, 1, 1), oblique=True),
            target,
            3,
        )

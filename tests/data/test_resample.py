"""Resampling against scipy and scikit-image, and as properties of geometry."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.transform import resize

from liverseg_dist.data.preprocessing.resample import (
    Interpolation,
    align_axes,
    resample_nearest,
    resample_probabilities,
    resample_to_grid,
)
from liverseg_dist.data.preprocessing.resample_axis import SamplePositions, interpolation_matrix
from liverseg_dist.data.preprocessing.resample_separable import NUDGE
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Grid, Volume
from tests.data.geometry import ALL_ORIENTATIONS, grids, numbered

PLAIN = Interpolation(antialias=False)
SHAPE = (12, 40, 50)
GRID = Grid(SHAPE, np.diag([0.8, 0.9, 1.2, 1]))
SPACINGS = [(1.0, 1.0, 1.0), (1.9, 0.77, 0.61), (2.3, 1.5, 1.13), (0.9, 3.1, 2.9)]


def smooth(dtype: type = np.float32, scale: float = 1000) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=SHAPE)
    return (ndimage.gaussian_filter(noise, 1) * scale).astype(dtype)


def classes() -> np.ndarray:
    values = smooth()
    return ((values > 30).astype(np.uint8) + (values > 120)).astype(np.uint8)


def zoom_with_scipy(values: np.ndarray, grid: Grid, order: int) -> np.ndarray:
    factors = [new / old for new, old in zip(grid.shape, values.shape, strict=True)]
    return ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True)


# --- against references -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_images_equal_scipy_zoom(spacing_mm: tuple[float, float, float], order: int) -> None:
    target = GRID.with_spacing(spacing_mm)
    values = smooth()
    resampled = resample_to_grid(
        Volume(values, GRID), target, interpolation=Interpolation(order, order, antialias=False)
    ).voxels
    reference = np.clip(
        zoom_with_scipy(values.astype(np.float64), target, order), values.min(), values.max()
    )
    np.testing.assert_allclose(resampled, reference, atol=2e-6 * np.abs(values).max())


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_images_equal_skimage_resize_as_nnunet_calls_it(
    spacing_mm: tuple[float, float, float], antialias: bool
) -> None:
    target = GRID.with_spacing(spacing_mm)
    values = smooth(np.float64)
    reference = resize(values, target.shape, order=3, mode="edge", anti_aliasing=antialias)
    resampled = resample_to_grid(
        Volume(values.astype(np.float32), GRID),
        target,
        interpolation=Interpolation(3, 3, antialias),
    ).voxels
    if antialias:  # skimage filters and clips in another order: compare where nothing is clipped
        free = (reference > values.min() + 1) & (reference < values.max() - 1)
        resampled, reference = resampled[free], reference[free]
    np.testing.assert_allclose(resampled, reference, atol=3e-6 * np.abs(values).max())


def test_thick_slices_use_a_separate_order_as_in_nnunet() -> None:
    """In plane cubic, across slices linear or nearest: slice by slice resize, then zoom along z."""
    thick = Grid(SHAPE, np.diag([0.8, 0.8, 5.0, 1]))
    target = thick.with_spacing(
        (3.0, 1.0, 1.0)
    )  # 12 slices to 20: no position halfway, where the nearest voxel is ambiguous
    values = smooth()
    options = {"order": 3, "mode": "edge", "anti_aliasing": False, "clip": False}
    in_plane = np.stack(
        [resize(image.astype(np.float64), target.shape[1:], **options) for image in values]
    )
    for thick_order in (0, 1):
        reference = np.clip(
            zoom_with_scipy(in_plane, target, thick_order), values.min(), values.max()
        )
        interpolation = Interpolation(3, thick_order, antialias=False)
        resampled = resample_to_grid(
            Volume(values, thick), target, interpolation=interpolation
        ).voxels
        np.testing.assert_allclose(resampled, reference, atol=3e-6 * np.abs(values).max())


def brick() -> np.ndarray:
    """Its corners show whether the computed box is large enough."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:9, 11:30, 7:41] = 1
    label[5:7, 14:20, 20:25] = 2
    return label


@pytest.mark.parametrize("label", [classes(), brick()], ids=["all over", "brick"])
@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_labels_equal_one_hot_linear_argmax(
    spacing_mm: tuple[float, float, float], label: np.ndarray
) -> None:
    target = GRID.with_spacing(spacing_mm)
    assert set(np.unique(label)) == {0, 1, 2}
    shares = np.stack(
        [zoom_with_scipy((label == value).astype(np.float64), target, 1) for value in range(3)]
    )
    resampled = resample_to_grid(Volume(label, GRID), target, "label").voxels
    assert resampled.dtype == np.uint8
    ordered = np.sort(shares, axis=0)
    clear = ordered[2] - ordered[1] > 4 * NUDGE
    assert clear.mean() > 0.85
    np.testing.assert_array_equal(resampled[clear], shares.argmax(axis=0)[clear])
    taken = np.take_along_axis(shares, resampled[None].astype(int), axis=0)[0]
    np.testing.assert_allclose(
        taken, ordered[2], atol=4 * NUDGE
    )  # in a tie any of the best classes is correct


def test_probabilities_equal_scipy_zoom_and_sum_to_one() -> None:
    target = GRID.with_spacing((0.9, 0.5, 0.7))
    shares = (
        np.random.default_rng(0)
        .dirichlet([1, 1, 1], SHAPE)
        .transpose(3, 0, 1, 2)
        .astype(np.float32)
    )
    resampled = resample_probabilities(shares, GRID, target)
    np.testing.assert_allclose(
        resampled,
        np.stack([zoom_with_scipy(c.astype(np.float64), target, 1) for c in shares]),
        atol=1e-6,
    )
    np.testing.assert_allclose(resampled.sum(axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("degrees", [7.0, 90.0, 130.0])
def test_a_label_on_a_rotated_grid_equals_scipy_nearest(degrees: float) -> None:
    label = classes()
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("zx", [degrees, 3], degrees=True).as_matrix() @ np.diag(
        [1.1, 0.7, 0.9]
    )
    affine[:3, 3] = GRID.world_mm(np.array(SHAPE) / 2) - affine[:3, :3] @ np.array([10, 12, 8])
    target = Grid((17, 25, 21), affine)
    assert align_axes(GRID, target) is None
    at = GRID.index_of(target.world_mm(np.argwhere(np.ones(target.shape)))).T
    reference = ndimage.map_coordinates(label, at, order=0, mode="grid-constant", cval=0).reshape(
        target.shape
    )
    assert (reference > 0).sum() > 500
    for resampled in (
        resample_to_grid(Volume(label, GRID), target, "label"),
        resample_nearest(Volume(label, GRID), target),
    ):
        np.testing.assert_array_equal(resampled.voxels, reference)


def test_an_image_on_a_rotated_grid_is_linear_inside_and_air_outside() -> None:
    values = smooth(np.int16)
    affine = GRID.affine.copy()
    affine[:3, :3] = Rotation.from_euler("z", 20, degrees=True).as_matrix() @ affine[:3, :3]
    target = Grid(SHAPE, affine)
    at = GRID.index_of(target.world_mm(np.argwhere(np.ones(target.shape)))).T
    reference = ndimage.map_coordinates(
        values.astype(np.float64), at, order=1, mode="nearest"
    ).reshape(SHAPE)
    beyond = (
        np.maximum(-0.5 - at.T, at.T - (np.array(SHAPE) - 0.5)).max(axis=1).reshape(SHAPE)
    )  # voxels past a face
    inside, outside = beyond < -0.01, beyond > 0.01
    resampled = resample_to_grid(Volume(values, GRID), target).voxels
    assert resampled.dtype == np.int16
    assert outside.any()
    np.testing.assert_allclose(resampled[inside], reference[inside], atol=0.5 + 1e-3)
    assert (resampled[outside] == -1024).all()


# --- properties -------------------------------------------------------------------------------------------------------

orientations = st.sampled_from(ALL_ORIENTATIONS)


@given(grids(sheared=True), orientations, st.sampled_from(["image", "label"]))
def test_reorientation_and_back_is_exact(grid: Grid, orientation: str, kind: str) -> None:
    volume = numbered(grid)
    if kind == "label":
        volume = volume.with_voxels((volume.voxels % 3).astype(np.uint8))
    turned = volume.reoriented(orientation)
    np.testing.assert_array_equal(resample_to_grid(volume, turned.grid, kind).voxels, turned.voxels)  # type: ignore[arg-type]
    np.testing.assert_array_equal(resample_to_grid(turned, volume.grid, kind).voxels, volume.voxels)  # type: ignore[arg-type]


@given(
    grids(), st.tuples(*[st.integers(-3, 5)] * 3), st.tuples(*[st.integers(1, 8)] * 3), orientations
)
def test_crops_padding_and_reorientation_are_exact(
    grid: Grid, start: tuple[int, int, int], shape: tuple[int, int, int], orientation: str
) -> None:
    volume = numbered(grid)
    expected = volume.cropped(start, shape, fill=-7).reoriented(orientation)
    resampled = resample_to_grid(volume, expected.grid, fill=-7)
    np.testing.assert_array_equal(resampled.voxels, expected.voxels)


@given(
    grids(oblique=False),
    orientations,
    st.tuples(*[st.floats(0.5, 4, allow_nan=False)] * 3),
    st.sampled_from([1, 3]),
)
@settings(max_examples=60)
def test_orientation_does_not_change_the_result(
    grid: Grid, orientation: str, spacing_mm: tuple[float, float, float], order: int
) -> None:
    """Resampling commutes with reorientation of the scan."""
    volume = numbered(grid)
    turned = volume.reoriented(orientation)
    target = volume.reoriented("RAS").grid.with_spacing(spacing_mm)
    interpolation = Interpolation(order)
    spread = sorted(grid.spacing_mm)
    assume(
        spread[2] - spread[1] > 1e-6 or spread[2] < 2.9 * spread[0]
    )  # two equally thick axes: the first one counts
    one, other = (
        resample_to_grid(v, target, interpolation=interpolation).voxels.astype(int)
        for v in (volume, turned)
    )
    assert np.abs(one - other).max() <= 1  # rounding of x.5


@given(
    grids(oblique=False),
    st.tuples(*[st.floats(0.4, 5, allow_nan=False)] * 3),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
)
@settings(max_examples=60)
def test_a_constant_stays_constant(
    grid: Grid, spacing_mm: tuple[float, float, float], order: int, antialias: bool
) -> None:
    target = grid.with_spacing(spacing_mm)
    resampled = resample_to_grid(
        Volume(np.full(grid.shape, 40, np.int16), grid),
        target,
        interpolation=Interpolation(order, order, antialias),
    )
    assert (resampled.voxels == 40).all()


def test_a_linear_ramp_stays_linear() -> None:
    """World coordinates resample to themselves: no shift by half a voxel anywhere."""
    grid = Grid((20, 24, 28), np.diag([1.0, 1.3, 2.1, 1]))
    target = grid.with_spacing((1.7, 0.9, 1.6))
    index = np.argwhere(np.ones(grid.shape)).reshape(*grid.shape, 3)
    wanted_at = target.world_mm(np.argwhere(np.ones(target.shape))).reshape(*target.shape, 3)
    inner = tuple(slice(n // 4, -(n // 4)) for n in target.shape)
    for axis in range(3):
        ramp = grid.world_mm(index)[..., axis].astype(np.float32)
        for interpolation in (Interpolation(1, 1, False), Interpolation(3, 3, False)):
            resampled = resample_to_grid(
                Volume(ramp, grid), target, interpolation=interpolation
            ).voxels
            np.testing.assert_allclose(resampled[inner], wanted_at[..., axis][inner], atol=2e-3)


def test_small_tumours_keep_their_volume_when_slices_grow() -> None:
    """With doubled slice thickness each new slice is halfway between two; the mean loss is 0."""
    grid = Grid((40, 60, 60), np.diag([0.8, 0.8, 1.5, 1]))
    world_mm = grid.world_mm(np.argwhere(np.ones(grid.shape)))
    target = grid.with_spacing((3.0, 0.8, 0.8))
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(20):
        centre = grid.world_mm(np.array([20, 30, 30]) + rng.uniform(-3, 3, 3))
        label = 1 + (np.linalg.norm(world_mm - centre, axis=-1) < 5).astype(np.uint8).reshape(
            grid.shape
        )
        resampled = resample_to_grid(Volume(label, grid), target, "label").voxels
        shares.append(np.count_nonzero(resampled == 2) * 2 / np.count_nonzero(label == 2))
    assert np.mean(shares) == pytest.approx(1, abs=0.06)


def test_padding_class_255_survives_and_empty_labels_stay_empty() -> None:
    label = classes()
    label[:3] = 255
    target = GRID.with_spacing((1.2, 1.7, 1.6))
    resampled = resample_to_grid(Volume(label, GRID), target, "label").voxels
    assert (resampled[:3] == 255).all()
    assert not (resampled[3:] == 255).any()
    assert not resample_to_grid(
        Volume(np.zeros(SHAPE, np.uint8), GRID), target, "label"
    ).voxels.any()


def test_voxels_outside_the_scan_get_the_fill_value() -> None:
    target = GRID.with_spacing((1.2, 1.5, 1.5)).cropped((-2, -5, -5), (30, 40, 45))
    image = resample_to_grid(Volume(np.full(SHAPE, 50, np.int16), GRID), target).voxels
    assert set(np.unique(image)) == {-1024, 50}
    label = resample_to_grid(Volume(np.ones(SHAPE, np.uint8), GRID), target, "label").voxels
    np.testing.assert_array_equal(label == 1, image == 50)
    far = GRID.with_spacing((1.2, 1.5, 1.5)).cropped((900, 900, 900), (4, 5, 6))
    assert (resample_to_grid(Volume(np.full(SHAPE, 50, np.int16), GRID), far).voxels == -1024).all()
    assert not resample_to_grid(Volume(np.ones(SHAPE, np.uint8), GRID), far, "label").voxels.any()


def test_integers_are_rounded_and_stay_in_range() -> None:
    values = smooth(np.int16)
    target = GRID.with_spacing((0.7, 0.5, 0.5))
    resampled = resample_to_grid(Volume(values, GRID), target, interpolation=PLAIN).voxels
    reference = zoom_with_scipy(values.astype(np.float64), target, 3)
    assert resampled.dtype == np.int16
    assert values.min() <= resampled.min() <= resampled.max() <= values.max()
    np.testing.assert_allclose(
        resampled, np.clip(reference, values.min(), values.max()), atol=0.501
    )
    assert reference.max() > values.max()  # the spline overshoots, so the clip has an effect


def test_the_input_is_not_modified() -> None:
    values, label = smooth(np.int16), classes()
    copies = values.copy(), label.copy()
    values.setflags(write=False)
    label.setflags(write=False)
    resample_to_grid(Volume(values, GRID), GRID.with_spacing((1, 1, 1)))
    resample_to_grid(Volume(label, GRID), GRID.with_spacing((1, 1, 1)), "label")
    np.testing.assert_array_equal(values, copies[0])
    np.testing.assert_array_equal(label, copies[1])


@pytest.mark.parametrize(("length", "count"), [(n, m) for n in (1, 2, 5, 40) for m in (1, 3, 64)])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_axis_matrices_equal_scipy_on_unit_vectors(length: int, count: int, order: int) -> None:
    step = length / count
    matrix = interpolation_matrix(SamplePositions(length, count, (step - 1) / 2, step), order)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-9)
    if length > 1:
        reference = np.stack(
            [
                ndimage.zoom(unit, count / length, order=order, mode="nearest", grid_mode=True)
                for unit in np.eye(length)
            ],
            axis=1,
        )
        np.testing.assert_allclose(matrix, reference, atol=1e-6)


def test_a_target_that_is_too_large_is_refused_before_allocation() -> None:
    with pytest.raises(UserError, match="voxel sizes"):
        resample_to_grid(
            Volume(np.zeros(SHAPE, np.int16), GRID), GRID.with_spacing((1e-3, 1e-3, 1e-2))
        )


def test_results_do_not_depend_on_the_number_of_blas_threads() -> None:
    """Stores and masks must not depend on the number of cores that a process may use."""
    program = """
import hashlib, numpy as np
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.volume import Grid, Volume
voxels = np.random.default_rng(0).integers(-1000, 1000, (60, 190, 190)).astype(np.float32)
grid = Grid(voxels.shape, np.diag([2.9, 2.9, 3.1, 1.0]))
target = Grid((31, 92, 92), np.diag([6.0, 6.0, 6.0, 1.0]))
print(hashlib.sha256(resample_to_grid(Volume(voxels, grid), target, "image").voxels.tobytes()).hexdigest())
"""
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(hashes) == 1

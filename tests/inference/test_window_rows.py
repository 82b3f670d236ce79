"""Rows of windows and what is averaged over them, against whole arrays."""

import numpy as np
import pytest
import torch
from torch import nn

from liverseg_dist.config import InferenceConfig, IntensityConfig
from liverseg_dist.inference.window_averaging import BLOCK_VOXELS, WindowAveraging
from liverseg_dist.inference.window_rows import ImageChannels, read_row, shift_slices
from liverseg_dist.inference.windows import WindowGrid
from liverseg_dist.model.outputs import OutputChannels

CPU = torch.device("cpu")
INTENSITY = IntensityConfig(lower_hu=-100, upper_hu=200, mean=0.4, std=0.25)


def normalise(voxels: np.ndarray) -> np.ndarray:
    """The normalisation of `INTENSITY` in float64."""
    unit = (np.clip(voxels.astype(np.float64), -100, 200) + 100) / 300
    return (unit - 0.4) / 0.25


def make_grid(shape: tuple[int, int, int], window: tuple[int, int, int]) -> WindowGrid:
    return WindowGrid.from_shape(shape, window, 0.5, "gaussian")


def pad(voxels: np.ndarray, grid: WindowGrid, value: float) -> np.ndarray:
    padded = np.full(grid.padded_shape, value, dtype=voxels.dtype)
    z, y, x = grid.margin
    depth, height, width = voxels.shape
    padded[z : z + depth, y : y + height, x : x + width] = voxels
    return padded


@pytest.mark.parametrize("shape", [(20, 18, 16), (5, 30, 6), (8, 8, 8)])
def test_rows_are_the_slices_of_the_padded_scan(shape: tuple[int, int, int]) -> None:
    voxels = np.random.default_rng(1).integers(-500, 500, shape).astype(np.int16)
    grid = make_grid(shape, (8, 8, 8))
    channels = ImageChannels.from_array(voxels, INTENSITY, None)
    expected = normalise(pad(voxels, grid, -100))
    for start in grid.starts[0]:
        row = read_row(channels, grid, start, CPU)
        assert row.shape == (1, 8, *grid.padded_shape[1:])
        np.testing.assert_allclose(row[0], expected[start : start + 8], atol=1e-5)


def test_a_scan_without_normalisation_is_padded_with_its_minimum() -> None:
    voxels = np.random.default_rng(2).normal(size=(4, 6, 9)).astype(np.float32)
    grid = make_grid(voxels.shape, (8, 8, 8))
    row = read_row(ImageChannels.from_array(voxels, None, None), grid, 0, CPU)
    assert np.array_equal(row[0].numpy(), pad(voxels, grid, float(voxels.min())))


def test_the_scan_itself_is_not_changed() -> None:
    voxels = np.random.default_rng(3).integers(-500, 500, (8, 8, 8)).astype(np.float32)
    before = voxels.copy()
    grid = make_grid(voxels.shape, (8, 8, 8))
    read_row(ImageChannels.from_array(voxels, INTENSITY, None), grid, 0, CPU)
    assert np.array_equal(voxels, before)


def test_a_map_that_is_read_only_is_accepted() -> None:
    voxels = np.random.default_rng(4).integers(-500, 500, (8, 8, 8)).astype(np.int16)
    voxels.setflags(write=False)
    grid = make_grid(voxels.shape, (8, 8, 8))
    row = read_row(ImageChannels.from_array(voxels, INTENSITY, None), grid, 0, CPU)
    np.testing.assert_allclose(row[0], normalise(voxels), atol=1e-5)


def test_an_absent_channel_is_zero_and_is_not_read() -> None:
    voxels = np.random.default_rng(5).integers(-500, 500, (2, 8, 8, 8)).astype(np.float32)
    voxels[1] = np.nan
    channels = ImageChannels.from_array(voxels, [INTENSITY, INTENSITY], [True, False])
    row = read_row(channels, make_grid((8, 8, 8), (8, 8, 8)), 0, CPU)
    np.testing.assert_allclose(row[0], normalise(voxels[0]), atol=1e-5)
    assert not row[1].any()


def test_another_number_of_normalisations_is_an_error() -> None:
    voxels = np.zeros((2, 4, 4, 4), np.float32)
    with pytest.raises(ValueError, match="2 channels, 1 normalisations, 2 entries of present"):
        ImageChannels.from_array(voxels, INTENSITY, None)


@pytest.mark.parametrize("slices", [1, 3, 5, 8])
def test_shifted_slices_are_those_of_a_copy(slices: int) -> None:
    total = torch.randn(2, 8, 3, 4)
    expected = torch.zeros_like(total)
    expected[:, : 8 - slices] = total[:, slices:]
    shift_slices(total, slices)
    assert torch.equal(total, expected)


class Scaled(nn.Module):
    """A network whose logits are the input times a factor, for each of the channels."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, image_BCDHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([image_BCDHW * factor for factor in self.factors], dim=1)


@pytest.mark.parametrize("regions", [False, True], ids=["classes", "regions"])
def test_probabilities_of_models_are_averaged(regions: bool) -> None:
    outputs = OutputChannels(regions=regions)
    models = [Scaled([0.5, -1, 2, 1][: outputs.count]), Scaled([1, 1, -3, 0][: outputs.count])]
    averaging = WindowAveraging(models, outputs, InferenceConfig(average="probabilities"), CPU)
    image = torch.randn(2, 1, 4, 5, 6)
    found = averaging.compute_model_mean(image)
    expected = torch.zeros_like(found, dtype=torch.float64)
    for model in models:
        logits = model(image).double()
        # Classes without their background.
        part = torch.sigmoid(logits) if regions else torch.softmax(logits, dim=1)[:, 1:]
        expected += part / len(models)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_averaged_logits_become_the_softmax_of_their_mean() -> None:
    outputs = OutputChannels()
    models = [Scaled([0.5, -1, 2]), Scaled([1, 1, -3])]
    averaging = WindowAveraging(models, outputs, InferenceConfig(average="logits"), CPU)
    image = torch.randn(1, 1, 4, 5, 6)
    with torch.inference_mode():
        found = averaging.finish_mean(averaging.compute_model_mean(image)[0])
    mean = (models[0](image).double() + models[1](image).double()) / 2
    expected = torch.softmax(mean, dim=1)[0, 1:]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_blocks_cover_a_window_once() -> None:
    averaging = WindowAveraging([Scaled([1, 1, 1])], OutputChannels(), InferenceConfig(), CPU)
    for shape in ((7, 300, 300), (64, 32, 32), (3, 1000, 1000)):
        blocks = averaging.split_into_blocks(shape)
        covered = [z for block in blocks for z in range(block.start, block.stop)]
        assert covered == list(range(shape[0]))
        longest = max(block.stop - block.start for block in blocks)
        assert longest == 1 or longest * shape[1] * shape[2] <= BLOCK_VOXELS

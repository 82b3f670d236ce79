"""Class probabilities of a whole scan by a sliding window, in memory that does not grow with the scan's length.

  predictor = Predictor(model, (64, 128, 128), regions=False, config=InferenceConfig(), device=torch.device("cuda"))
  for first, slab_CDHW in predictor.stream(image_zyx, intensity): ...      # finished slices, from the first to the last

Windows are computed in rows of equal z. Once a row is done, no later window touches the slices above the next row's
start: they are divided by their weights, handed out and forgotten. So beside the model only one row lives in memory:
its input (window depth x Y x X) and one float32 sum per channel.

Sums are float32 whatever the precision of the model, and windows are added in one fixed order: the result of a scan is
the same bits on every run. The batch size changes only how the convolutions themselves are computed.
Dimensions: B windows, C channels, D H W = z, y, x.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from liverseg_dist.config import InferenceConfig, IntensityConfig
from liverseg_dist.inference.windows import WindowGrid
from liverseg_dist.model import labels_from, probabilities
from liverseg_dist.volume import Index3

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIRRORS: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4))
"""Which axes of B C D H W each of the eight mirrored copies flips."""


class Predictor:
    """A model (or several, whose probabilities are averaged) that is slid over scans.

    `patch_size` is z, y, x; `regions` tells whether the outputs are overlapping regions (sigmoid) or classes (softmax).
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        patch_size: Index3,
        regions: bool,
        config: InferenceConfig,
        device: torch.device,
    ) -> None:
        self.models = [model] if isinstance(model, nn.Module) else list(model)
        for one in self.models:
            one.to(device).eval()
        self.patch_size = patch_size
        self.regions = regions
        self.config = config
        self.device = device

    def probabilities(self, image_zyx: np.ndarray, intensity: IntensityConfig | None = None) -> np.ndarray:
        """Probabilities (C, z, y, x) float32 of the whole scan at once; large. See `stream`."""
        return np.concatenate([slab.cpu().numpy() for _, slab in self.stream(image_zyx, intensity)], axis=1)

    def segment(self, image_zyx: np.ndarray, intensity: IntensityConfig | None = None) -> np.ndarray:
        """Labels (z, y, x) uint8 on the image's own voxels."""
        labels = np.empty(image_zyx.shape, dtype=np.uint8)
        for first, slab_CDHW in self.stream(image_zyx, intensity):
            labels[first : first + slab_CDHW.shape[1]] = labels_from(slab_CDHW[None], self.regions)[0].cpu().numpy()
        return labels

    def stream(self, image_zyx: np.ndarray, intensity: IntensityConfig | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yields (first slice, probabilities C D H W on `device`), slab after slab, each slice once.

        `image_zyx` is the network's input, or HU of any type when `intensity` says how to bring it there; it is
        read one row at a time, so a memory map will do. What lies outside the scan is its lowest value, or
        `intensity.lower_hu`: as the training's padding.
        """
        z, y, x = image_zyx.shape
        grid = WindowGrid.over((z, y, x), self.patch_size, self.config.overlap, self.config.window_weights)
        pad_value = float(image_zyx.min()) if intensity is None else intensity.lower_hu
        yield from self._stream(image_zyx, grid, intensity, pad_value)

    @torch.inference_mode()
    def _stream(
        self, image_zyx: np.ndarray, grid: WindowGrid, intensity: IntensityConfig | None, pad_value: float
    ) -> Iterator[tuple[int, Tensor]]:
        depth, margin = self.patch_size[0], grid.margin
        weights_DHW, sums = self._weights(grid)
        total_CDHW: Tensor | None = None
        crop_y = slice(margin[1], margin[1] + grid.shape[1])
        crop_x = slice(margin[2], margin[2] + grid.shape[2])
        ends = [*grid.starts[0][1:], grid.padded[0]]
        for start, end in zip(grid.starts[0], ends, strict=True):
            row_DHW = self._row(image_zyx, grid, start, intensity, pad_value)
            for y, x, window_CDHW in self._windows(row_DHW, grid):
                if total_CDHW is None:
                    plane = (depth, *grid.padded[1:])
                    total_CDHW = torch.zeros(window_CDHW.shape[0], *plane, device=self.device)
                box = total_CDHW[:, :, y : y + self.patch_size[1], x : x + self.patch_size[2]]
                box.addcmul_(window_CDHW, weights_DHW)
            del row_DHW
            assert total_CDHW is not None
            first, last = max(start, margin[0]), min(end, margin[0] + grid.shape[0])
            if last > first:
                done = total_CDHW[:, first - start : last - start, crop_y, crop_x]
                share = sums[0][first:last, None, None] * (sums[1][crop_y, None] * sums[2][crop_x])
                yield first - margin[0], done / share
            _shift(total_CDHW, end - start)

    def _weights(self, grid: WindowGrid) -> tuple[Tensor, list[Tensor]]:
        """Weights of one window D H W, and the sums of weights along z, y, x."""
        z, y, x = (torch.from_numpy(w).to(self.device) for w in grid.weights)
        sums = [torch.from_numpy(s).to(self.device) for s in grid.weight_sums()]
        return z[:, None, None] * (y[:, None] * x), sums

    def _row(
        self, image_zyx: np.ndarray, grid: WindowGrid, start: int, intensity: IntensityConfig | None, pad_value: float
    ) -> Tensor:
        """Input D H W of the row of windows at padded slice `start`, normalised on the device, padded in plane."""
        depth = self.patch_size[0]
        first = start - grid.margin[0]
        low, high = max(0, first), min(grid.shape[0], first + depth)
        slices = np.ascontiguousarray(image_zyx[low:high])
        part = torch.from_numpy(slices if slices.flags.writeable else slices.copy()).to(self.device).float()
        row = torch.full((depth, *grid.padded[1:]), pad_value, device=self.device)
        y, x = grid.margin[1:]
        row[low - first : high - first, y : y + grid.shape[1], x : x + grid.shape[2]] = part
        return row if intensity is None else normalise_(row, intensity)

    def _windows(self, row_DHW: Tensor, grid: WindowGrid) -> Iterator[tuple[int, int, Tensor]]:
        """(y, x, probabilities C D H W) of each window of a row, in order; mirrored copies already averaged.

        Windows and their mirrored copies fill batches alike, and are summed in one order whatever the batch size.
        """
        height, width = self.patch_size[1:]
        mirrors = MIRRORS if self.config.mirror else MIRRORS[:1]
        copies = list(product(grid.in_plane, mirrors))
        total: Tensor | None = None
        for number in range(0, len(copies), self.config.batch_size):
            batch = copies[number : number + self.config.batch_size]
            inputs = [row_DHW[None, None, :, y : y + height, x : x + width].flip(axes) for (y, x), axes in batch]
            answers = self._forward(torch.cat(inputs))
            for offset, ((y, x), axes) in enumerate(batch):
                answer = answers[offset : offset + 1].flip(axes) if axes else answers[offset : offset + 1]
                total = answer if total is None else total + answer
                if (number + offset + 1) % len(mirrors) == 0:
                    yield y, x, (total / len(mirrors) if len(mirrors) > 1 else total)[0]
                    total = None

    def _forward(self, image_BCDHW: Tensor) -> Tensor:
        """Probabilities B C D H W float32, averaged over the models."""
        dtype = AUTOCAST.get(self.config.precision)
        total: Tensor | None = None
        for model in self.models:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                logits = model(image_BCDHW)
            answer = probabilities(logits.float(), self.regions)
            total = answer if total is None else total.add_(answer)
        assert total is not None
        return total.div_(len(self.models)) if len(self.models) > 1 else total


def normalise_(hu: Tensor, intensity: IntensityConfig) -> Tensor:
    """HU to the network's input in place: clip, map to [0, 1], then (v - mean) / std."""
    width = intensity.upper_hu - intensity.lower_hu
    return (
        hu.clamp_(intensity.lower_hu, intensity.upper_hu)
        .sub_(intensity.lower_hu)
        .div_(width)
        .sub_(intensity.mean)
        .div_(intensity.std)
    )


def _shift(total_CDHW: Tensor, slices: int) -> None:
    """Drop the first slices, bring the others forward, clear the rest; in place, in pieces that do not overlap."""
    depth = total_CDHW.shape[1]
    for first in range(0, depth - slices, slices):
        last = min(first + slices, depth - slices)
        total_CDHW[:, first:last] = total_CDHW[:, first + slices : last + slices]
    total_CDHW[:, max(0, depth - slices) :] = 0

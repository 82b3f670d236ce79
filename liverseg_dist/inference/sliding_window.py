"""Probabilities of liver and tumour over a whole scan by a sliding window, in memory that does not grow with the scan.

  predictor = SlidingWindowPredictor(model, (64, 128, 128), regions=False, config=InferenceConfig(), device=torch.device("cuda"))
  for first, slab_FDHW in predictor.stream_probabilities(image_zyx, intensity): ...      # finished slices, from the first to the last

Windows are computed in rows of equal z. Once a row is done, no later window touches the slices above the next row's
start: they are handed out and forgotten (each window is added with its part in the sum of weights, which is known
beforehand, so nothing is left to divide). So beside the model only one row lives in memory:
its input (window depth x Y x X) and one float32 sum per foreground channel. The background's probability is what is
left to 1; it is neither summed nor interpolated.

Sums are float32 whatever the precision of the model, and windows are added in one fixed order: on one kind of device a
scan's result is the same bits on every run. Only the batch size may change the last ones, because a convolution of
another batch size may sum in another order. On a CPU so may the number of threads a convolution is spread over (1e-7;
with channels-last weights 1e-4): `threads` therefore computes whole windows side by side, each by one thread, which
gives the same bits for any number of them.
Dimensions: B windows, C channels of the model, F foreground channels (liver, tumour), D H W = z, y, x.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import combinations, product
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from liverseg_dist.config import InferenceConfig, IntensityConfig
from liverseg_dist.data.intensity import normalise_intensity_
from liverseg_dist.inference.windows import WindowGrid
from liverseg_dist.labels import LIVER, STRUCTURES, TUMOUR
from liverseg_dist.model import foreground_probabilities_, labels_from_logits, log_odds
from liverseg_dist.precision import autocast
from liverseg_dist.volume import Index3

Batch = Sequence[tuple[tuple[int, int], tuple[int, ...]]]
"""(y, x) and the flipped axes of each window."""
Item = TypeVar("Item")
WindowMapper = Callable[
    [Callable[[Sequence[Any]], Iterator[Tensor]], Sequence[Any], Callable[[Any], tuple[int, ...]]],
    Iterator[Tensor],
]
"""(computes some items in order, all items, shape of an item's answer) -> the answers of all items, in order."""
YIELDED_VOXELS = 4 << 20
"""Finished voxels handed out at once."""
BLOCK_VOXELS = 1 << 17
"""Voxels of a window worked on at once on a CPU, so that what is needed between two steps stays in the core's cache."""
WindowReader = Callable[[slice], Tensor]
"""What a window says (F d H W) about some of its slices."""


class SlidingWindowPredictor:
    """A model (or several, whose probabilities are averaged) that is slid over scans.

    `patch_size` is z, y, x; `regions` tells whether the outputs are overlapping regions (sigmoid) or classes (softmax).
    With `threads` above 1 (CPU) that many batches are computed side by side; the memory of activations grows with them,
    and torch's own threads should be set to 1. `mirror_axes` (of z, y, x) are those that `inference.mirror` mirrors.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        patch_size: Index3,
        regions: bool,
        config: InferenceConfig,
        device: torch.device,
        threads: int = 1,
        mirror_axes: Sequence[int] = (0, 1, 2),
    ) -> None:
        self.models = [model] if isinstance(model, nn.Module) else list(model)
        for one in self.models:
            one.to(device).eval()
        self.patch_size = patch_size
        self.regions = regions
        self.config = config
        self.device = device
        self.threads = threads if device.type == "cpu" else 1
        self.mirrors = _mirrors(mirror_axes if config.mirror else ())
        self._window_mapper: WindowMapper | None = None

    def with_window_mapper(self, spread: "WindowMapper") -> "SlidingWindowPredictor":
        """The same predictor, whose windows several processes compute (`distributed.window_parallel`)."""
        other = copy.copy(self)
        other._window_mapper = spread
        return other

    def predict_probabilities(
        self, image_zyx: np.ndarray, intensity: IntensityConfig | None = None
    ) -> np.ndarray:
        """Probabilities (C, z, y, x) float32 of the whole scan at once, as the model has them; large. See `stream_probabilities`."""
        slabs = [
            self.add_background(slab).cpu().numpy().copy()
            for _, slab in self.stream_probabilities(image_zyx, intensity)
        ]
        return np.concatenate(slabs, axis=1)

    def predict_labels(
        self, image_zyx: np.ndarray, intensity: IntensityConfig | None = None
    ) -> np.ndarray:
        """Labels (z, y, x) uint8 on the image's own voxels."""
        labels = np.empty(image_zyx.shape, dtype=np.uint8)
        for first, slab_FDHW in self.stream_probabilities(image_zyx, intensity):
            labels[first : first + slab_FDHW.shape[1]] = self.assign_labels(slab_FDHW)
        return labels

    def assign_labels(self, foreground_FDHW: Tensor) -> np.ndarray:
        """Labels D H W uint8 of what `stream_probabilities` yields; with `tumour_threshold` inside a liver of at least one half."""
        if self.config.tumour_threshold > 0:
            organ = sum_organ_probability(foreground_FDHW, self.regions) >= 0.5
            label = organ.to(torch.uint8) * LIVER
            return (
                label.masked_fill_(
                    organ & (foreground_FDHW[1] >= self.config.tumour_threshold), TUMOUR
                )
                .cpu()
                .numpy()
            )
        return (
            labels_from_logits(self.add_background(foreground_FDHW)[None], self.regions)[0]
            .cpu()
            .numpy()
        )

    def add_background(self, foreground_FDHW: Tensor) -> Tensor:
        """All channels of the model's answer: classes with their background; regions as they are."""
        if self.regions:
            return foreground_FDHW
        liver, tumour = foreground_FDHW
        return torch.stack([1 - (liver + tumour), liver, tumour])

    def stream_probabilities(
        self, image_zyx: np.ndarray, intensity: IntensityConfig | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (first slice, probabilities F D H W on `device`), a few slices at a time, each slice once.

        F are the classes liver and tumour, or the regions liver (with its tumours) and tumour. What is yielded is valid
        until the next is asked for: it lies in memory that is used again.
        `image_zyx` is the network's input, or HU of any type when `intensity` says how to bring it there; it is
        read one row at a time, so a memory map will do. What lies outside the scan is its lowest value, or
        `intensity.lower_hu`: as the training's padding.
        """
        z, y, x = image_zyx.shape
        grid = WindowGrid.from_shape(
            (z, y, x), self.patch_size, self.config.overlap, self.config.window_weights
        )
        pad_value = float(image_zyx.min()) if intensity is None else intensity.lower_hu
        yield from self._stream_rows(image_zyx, grid, intensity, pad_value)

    @torch.inference_mode()
    def _stream_rows(
        self,
        image_zyx: np.ndarray,
        grid: WindowGrid,
        intensity: IntensityConfig | None,
        pad_value: float,
    ) -> Iterator[tuple[int, Tensor]]:
        (depth, height, width), margin = self.patch_size, grid.margin
        shares = [
            {at: torch.from_numpy(part).to(self.device) for at, part in axis.items()}
            for axis in grid.compute_shares()
        ]
        total_FDHW = torch.zeros(len(STRUCTURES), depth, *grid.padded_shape[1:], device=self.device)
        crop_y = slice(margin[1], margin[1] + grid.shape[1])
        crop_x = slice(margin[2], margin[2] + grid.shape[2])
        ends = [*grid.starts[0][1:], grid.padded_shape[0]]
        for start, end in zip(grid.starts[0], ends, strict=True):
            row_DHW = self._row(image_zyx, grid, start, intensity, pad_value)
            for y, x, window in self._windows(row_DHW, grid):
                box_FDHW = total_FDHW[:, :, y : y + height, x : x + width]
                share_HW = shares[1][y][:, None] * shares[2][x]
                for part in self._blocks(self.patch_size):
                    box_FDHW[:, part].addcmul_(
                        window(part), shares[0][start][part, None, None] * share_HW
                    )
            del row_DHW
            first, last = max(start, margin[0]), min(end, margin[0] + grid.shape[0])
            step = max(1, YIELDED_VOXELS // (grid.shape[1] * grid.shape[2]))
            for z in range(first, last, step):
                part = slice(z, min(z + step, last))
                done_FDHW = total_FDHW[:, part.start - start : part.stop - start, crop_y, crop_x]
                yield z - margin[0], self._finished(done_FDHW)
            if end < grid.padded_shape[0]:
                _shift(total_FDHW, end - start)

    def _row(
        self,
        image_zyx: np.ndarray,
        grid: WindowGrid,
        start: int,
        intensity: IntensityConfig | None,
        pad_value: float,
    ) -> Tensor:
        """Input D H W of the row of windows at padded slice `start`, normalised on the device, padded in plane."""
        depth = self.patch_size[0]
        first = start - grid.margin[0]
        low, high = max(0, first), min(grid.shape[0], first + depth)
        slices = np.ascontiguousarray(image_zyx[low:high])
        part = torch.from_numpy(slices if slices.flags.writeable else slices.copy()).to(self.device)
        part = part.to(
            torch.float32, copy=intensity is not None
        )  # never normalise the caller's own voxels in place
        if part.shape != (depth, *grid.padded_shape[1:]):
            row = torch.full((depth, *grid.padded_shape[1:]), pad_value, device=self.device)
            y, x = grid.margin[1:]
            row[low - first : high - first, y : y + grid.shape[1], x : x + grid.shape[2]] = part
            part = row
        if intensity is None:
            return part
        return normalise_intensity_(
            part, intensity.lower_hu, intensity.upper_hu, intensity.mean, intensity.std
        )

    def _windows(
        self, row_DHW: Tensor, grid: WindowGrid
    ) -> Iterator[tuple[int, int, WindowReader]]:
        """(y, x, what it says) of each window of a row, in order; mirrored copies already averaged.

        Windows and their mirrored copies fill batches alike, and are summed in one order whatever the batch size.
        """
        height, width = self.patch_size[1:]
        mirrors = self.mirrors
        copies = list(product(grid.starts_yx, mirrors))
        size = self.config.batch_size
        batches = [copies[number : number + size] for number in range(0, len(copies), size)]

        def images(batch: Batch) -> Tensor:
            inputs = []
            for (y, x), axes in batch:
                window = row_DHW[None, None, :, y : y + height, x : x + width]
                inputs.append(window.flip(axes) if axes else window)
            return torch.cat(inputs) if len(inputs) > 1 else inputs[0]

        if len(self.models) == len(mirrors) == self.threads == 1 and self._window_mapper is None:
            for batch in batches:  # nothing to keep: probabilities are made where they are added
                for ((y, x), _), logits_CDHW in zip(
                    batch, self._logits(self.models[0], images(batch)), strict=True
                ):
                    yield y, x, partial(self._block, logits_CDHW)
            return
        total: Tensor | None = None
        summed = 0
        for batch, answers in zip(
            batches, self._answers(lambda one: self._forward(images(one)), batches), strict=True
        ):
            for offset, ((y, x), axes) in enumerate(batch):
                answer = answers[offset : offset + 1]
                answer = answer.flip(axes) if axes else answer
                total = answer if total is None else total + answer
                summed += 1
                if summed % len(mirrors) == 0:
                    mean_FDHW = (total / len(mirrors) if len(mirrors) > 1 else total)[0]
                    yield y, x, partial(_slices, mean_FDHW)
                    total = None

    def _answers(
        self, compute: Callable[[Item], Tensor], batches: Sequence[Item]
    ) -> Iterator[Tensor]:
        """`compute` of each batch in order, wherever it is computed."""

        def run(own: Sequence[Any]) -> Iterator[Tensor]:
            return compute_in_order(compute, own, self.threads)

        if self._window_mapper is None:
            return run(batches)
        return self._window_mapper(
            run, batches, lambda batch: (len(batch), len(STRUCTURES), *self.patch_size)
        )

    @torch.inference_mode()
    def _forward(self, image_BCDHW: Tensor) -> Tensor:
        """What is to be averaged, B F D H W float32, averaged over the models."""
        total: Tensor | None = None
        for model in self.models:
            logits_BCDHW = self._logits(model, image_BCDHW)
            batch, _, *shape = logits_BCDHW.shape
            answer = torch.empty(batch, len(STRUCTURES), *shape, device=logits_BCDHW.device)
            for logits_CDHW, answer_FDHW in zip(logits_BCDHW, answer, strict=True):
                for part in self._blocks(shape):
                    answer_FDHW[:, part] = self._block(logits_CDHW, part)
            total = answer if total is None else total.add_(answer)
        assert total is not None
        return total.div_(len(self.models)) if len(self.models) > 1 else total

    def _logits(self, model: nn.Module, image_BCDHW: Tensor) -> Tensor:
        with autocast(self.device.type, self.config.precision):
            return model(image_BCDHW)

    def _block(self, logits_CDHW: Tensor, part: slice) -> Tensor:
        """What some slices of a window say, F d H W: `config.average`."""
        odds_BFDHW = log_odds(logits_CDHW[None, :, part], self.regions)
        return (
            foreground_probabilities_(odds_BFDHW, self.regions)
            if self.config.average == "probabilities"
            else odds_BFDHW
        )[0]

    def _finished(self, mean_FDHW: Tensor) -> Tensor:
        """The mean over windows as probabilities, in place."""
        if self.config.average == "logits":
            for part in self._blocks(mean_FDHW.shape[1:]):
                foreground_probabilities_(mean_FDHW[None, :, part], self.regions)
        return mean_FDHW

    def _blocks(self, shape: Sequence[int]) -> list[slice]:
        """The slices of a window that are worked on at once."""
        step = (
            max(1, BLOCK_VOXELS // (shape[1] * shape[2])) if self.device.type == "cpu" else shape[0]
        )
        return [slice(z, min(z + step, shape[0])) for z in range(0, shape[0], step)]


def _slices(window_FDHW: Tensor, part: slice) -> Tensor:
    return window_FDHW[:, part]


def sum_organ_probability(foreground_FDHW: Tensor, regions: bool) -> Tensor:
    """Probability D H W of the liver with its tumours: classes exclude each other, regions overlap."""
    return foreground_FDHW[0] if regions else foreground_FDHW[0] + foreground_FDHW[1]


def _mirrors(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Which axes of B C D H W each copy flips: none, one, two, all."""
    return tuple(
        tuple(axis + 2 for axis in some)
        for n in range(len(axes) + 1)
        for some in combinations(axes, n)
    )


def _shift(total_FDHW: Tensor, slices: int) -> None:
    """Drop the first slices, bring the others forward, clear the rest; in place, in pieces that do not overlap."""
    depth = total_FDHW.shape[1]
    for first in range(0, depth - slices, slices):
        last = min(first + slices, depth - slices)
        total_FDHW[:, first:last] = total_FDHW[:, first + slices : last + slices]
    total_FDHW[:, max(0, depth - slices) :] = 0


def compute_in_order(
    compute: Callable[[Item], Tensor], items: Sequence[Item], threads: int
) -> Iterator[Tensor]:
    """`compute` of each item, in the items' order; up to `threads` at once, each with one of torch's threads."""
    if threads <= 1:
        yield from map(compute, items)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: deque[Future[Tensor]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(compute, item))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

"""Probabilities of the classes for a whole scan, with a sliding window and bounded memory.

    predictor = SlidingWindowPredictor(
        model, (64, 128, 128), OutputChannels(), InferenceConfig(), torch.device("cuda")
    )
    for first, slab_FDHW in predictor.stream_probabilities(image_CZYX, intensities):
        ...  # finished slices, from the first to the last

Windows are computed in rows of equal z. After a row, no later window covers the slices above the
next row's start: they are yielded, and their memory is reused. Each window is added with its share
in the sum of weights, which is known in advance, so the sum needs no division. Apart from the
model, memory holds one row: its input (channels x window depth x Y x X) and one float32 sum per
foreground channel. The background's probability is the remainder to 1; it is neither summed nor interpolated.

Sums are float32 for any precision of the model, and windows are added in one fixed order. So on one
kind of device the result for a scan is bit-identical in every run. The batch size can change the
last bits, because a convolution may sum in another order for another batch size. On a CPU, so can
the number of threads of one convolution (1e-7; 1e-4 with channels-last weights). `threads`
therefore computes whole windows in parallel, each with one thread, and the result does not depend
on it.

Dimensions: B windows, C channels of the image or of the model, F foreground channels (classes
without background, or regions), D H W = z, y, x.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference.label_assignment import add_background, assign_labels
from liverseg_dist.inference.ordered_threads import Item, compute_in_order
from liverseg_dist.inference.structure_settings import resolve_structure_settings
from liverseg_dist.inference.window_averaging import WindowAveraging
from liverseg_dist.inference.window_rows import ImageChannels, Intensities, read_row, shift_slices
from liverseg_dist.inference.windows import WindowGrid
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.volume import Index3

WindowCopy = tuple[tuple[int, int], tuple[int, ...]]
"""Start (y, x) of a window, and the axes along which this copy is flipped."""
Batch = Sequence[WindowCopy]
WindowMapper = Callable[
    [Callable[[Sequence[Any]], Iterator[Tensor]], Sequence[Any], Callable[[Any], tuple[int, ...]]],
    Iterator[Tensor],
]
"""(computes some items in order, all items, shape of an item's result) -> all results, in order."""
WindowReader = Callable[[slice], Tensor]
"""Gives the values of a window (F d H W) for some of its slices."""
YIELDED_VOXELS = 4 << 20
"""Finished voxels that are yielded at once."""
BATCH_DIMS = 2
"""Dimensions of B C D H W before the spatial ones."""


class SlidingWindowPredictor:
    """Applies a model to scans window by window.

    Args:
        model: one model, or several whose results are averaged.
        patch_size: shape of a window (z, y, x).
        outputs: what the output channels mean: classes (softmax) or regions (sigmoid) of a scheme.
        config: settings of `inference.*`.
        device: device on which the models compute.
        threads: batches computed in parallel, on a CPU only; memory for activations grows with it.
            Torch's own number of threads should then be 1.
        mirror_axes: axes of z, y, x that `inference.mirror` mirrors.

    Raises:
        UserError: a setting names a structure that the scheme does not have.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        patch_size: Index3,
        outputs: OutputChannels,
        config: InferenceConfig,
        device: torch.device,
        threads: int = 1,
        mirror_axes: Sequence[int] = (0, 1, 2),
    ) -> None:
        self.models = [model] if isinstance(model, nn.Module) else list(model)
        # Evaluation mode: normalisation layers and dropout must not depend on the batch.
        for each_model in self.models:
            each_model.to(device).eval()
        self.patch_size = patch_size
        self.outputs = outputs
        self.config = config
        self.structure_settings = resolve_structure_settings(config, outputs.labels)
        self.device = device
        # On a GPU one stream computes all windows; threads would only compete for it.
        self.threads = threads if device.type == "cpu" else 1
        self.flips = _list_flips(mirror_axes if config.mirror else ())
        self._averaging = WindowAveraging(self.models, outputs, config, device)
        self._window_mapper: WindowMapper | None = None

    def with_window_mapper(self, mapper: "WindowMapper") -> "SlidingWindowPredictor":
        """A copy of this predictor whose windows several processes compute.

        Args:
            mapper: distributes the windows (`distributed.window_parallel`).
        """
        # A shallow copy: the models are shared, which on a GPU is most of the memory.
        other = copy.copy(self)
        other._window_mapper = mapper
        return other

    def predict_probabilities(
        self,
        image: np.ndarray,
        intensities: Intensities = None,
        present: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Probabilities (C, z, y, x) float32 of the whole scan, with the model's channels.

        The array is large; `stream_probabilities` yields it in parts and documents the arguments.
        """
        slabs = []
        for _, slab_FDHW in self.stream_probabilities(image, intensities, present):
            # The memory of a yielded slab is reused, hence the copy.
            slabs.append(self.add_background(slab_FDHW).cpu().numpy().copy())
        return np.concatenate(slabs, axis=1)

    def predict_labels(
        self,
        image: np.ndarray,
        intensities: Intensities = None,
        present: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Class values (z, y, x) uint8 on the image's voxels. Arguments: `stream_probabilities`."""
        labels = np.empty(image.shape[-3:], dtype=np.uint8)
        for first, slab_FDHW in self.stream_probabilities(image, intensities, present):
            labels[first : first + slab_FDHW.shape[1]] = self.assign_labels(slab_FDHW)
        return labels

    def assign_labels(self, foreground_FDHW: Tensor) -> np.ndarray:
        """Class values (D, H, W) uint8 of probabilities that `stream_probabilities` yields.

        With `inference.lesion_threshold` above 0, a voxel is lesion where the lesion reaches the
        threshold and its organ (with its lesions) has a probability of at least 0.5.
        """
        thresholds = self.structure_settings.lesion_threshold
        return assign_labels(foreground_FDHW, self.outputs, thresholds).cpu().numpy()

    def add_background(self, foreground_FDHW: Tensor) -> Tensor:
        """All channels of the model: classes with their background; regions unchanged."""
        return add_background(foreground_FDHW, self.outputs)

    def stream_probabilities(
        self,
        image: np.ndarray,
        intensities: Intensities = None,
        present: Sequence[bool] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the probabilities of a scan, a few slices at a time, each slice once.

        Args:
            image: (C, z, y, x), or (z, y, x) for one channel: the network's input, or stored voxels
                of any type (HU for CT) if `intensities` are given. It is read one row at a time, so
                it can be a memory map. Each channel is padded by `inference.padding`.
            intensities: normalisation of each channel; one entry is that of the only channel.
            present: which channels the scan has; None: all. The network's input of an absent one is
                0; its voxels in the image have no effect.

        Yields:
            The first slice, and the probabilities (F, D, H, W) on the device. F are the classes
            without the background, or the regions, of the scheme. The tensor is valid until the
            next one is requested: its memory is reused.
        """
        channels = ImageChannels.from_array(image, intensities, present, self.config.padding)
        grid = WindowGrid.from_shape(
            channels.shape, self.patch_size, self.config.overlap, self.config.window_weights
        )
        yield from self._stream_rows(channels, grid)

    # Inference mode saves the bookkeeping of autograd, which a scan's size would multiply.
    @torch.inference_mode()
    def _stream_rows(
        self, channels: ImageChannels, grid: WindowGrid
    ) -> Iterator[tuple[int, Tensor]]:
        shares = []
        # Computed once per scan: the shares depend on the shape only.
        for axis_shares in grid.compute_shares():
            on_device = {at: torch.from_numpy(s).to(self.device) for at, s in axis_shares.items()}
            shares.append(on_device)
        in_plane = grid.padded_shape[1:]
        total_FDHW = torch.zeros(
            self.outputs.foreground_count, self.patch_size[0], *in_plane, device=self.device
        )
        margin_z, margin_y, margin_x = grid.margin
        crop_y = slice(margin_y, margin_y + grid.shape[1])
        crop_x = slice(margin_x, margin_x + grid.shape[2])
        # A row ends where the next one starts; the slices above are complete then.
        ends = [*grid.starts[0][1:], grid.padded_shape[0]]
        for start, end in zip(grid.starts[0], ends, strict=True):
            row_CDHW = read_row(channels, grid, start, self.device)
            self._add_windows(total_FDHW, row_CDHW, grid, start, shares)
            # The input is not needed while the caller works on the finished slices.
            del row_CDHW
            first, last = max(start, margin_z), min(end, margin_z + grid.shape[0])
            # Small parts: the caller resamples each one, and its temporary arrays grow with it.
            step = max(1, YIELDED_VOXELS // (grid.shape[1] * grid.shape[2]))
            for z in range(first, last, step):
                part = slice(z - start, min(z + step, last) - start)
                done_FDHW = total_FDHW[:, part, crop_y, crop_x]
                yield z - margin_z, self._averaging.finish_mean(done_FDHW)
            if end < grid.padded_shape[0]:
                shift_slices(total_FDHW, end - start)

    def _add_windows(
        self,
        total_FDHW: Tensor,
        row_CDHW: Tensor,
        grid: WindowGrid,
        start: int,
        shares: Sequence[dict[int, Tensor]],
    ) -> None:
        """Add the windows of the row at padded slice `start` to the sum."""
        height, width = self.patch_size[1:]
        shares_z, shares_y, shares_x = shares
        # In one fixed order, because sums of float32 depend on it.
        for y, x, read_window in self._compute_windows(row_CDHW, grid):
            box_FDHW = total_FDHW[:, :, y : y + height, x : x + width]
            share_HW = shares_y[y][:, None] * shares_x[x]
            for part in self._averaging.split_into_blocks(self.patch_size):
                share_DHW = shares_z[start][part, None, None] * share_HW
                box_FDHW[:, part].addcmul_(read_window(part), share_DHW)

    def _compute_windows(
        self, row_CDHW: Tensor, grid: WindowGrid
    ) -> Iterator[tuple[int, int, WindowReader]]:
        """(y, x, values) of each window of a row, in order, averaged over mirrored copies.

        Batches hold windows and their mirrored copies. The order of addition is the same for every
        batch size.
        """
        copies = list(product(grid.starts_yx, self.flips))
        size = self.config.batch_size
        batches = [copies[first : first + size] for first in range(0, len(copies), size)]
        is_single = len(self.models) == len(self.flips) == self.threads == 1
        if is_single and self._window_mapper is None:
            # No sum over copies or models: each block is converted where it is added.
            for batch in batches:
                logits_BCDHW = self._averaging.compute_logits(
                    self.models[0], self._cut_windows(row_CDHW, batch)
                )
                for ((y, x), _), logits_CDHW in zip(batch, logits_BCDHW, strict=True):
                    yield y, x, partial(self._averaging.convert_logits, logits_CDHW)
            return
        yield from self._average_copies(row_CDHW, batches)

    def _average_copies(
        self, row_CDHW: Tensor, batches: Sequence[Batch]
    ) -> Iterator[tuple[int, int, WindowReader]]:
        def compute(batch: Batch) -> Tensor:
            return self._averaging.compute_model_mean(self._cut_windows(row_CDHW, batch))

        total: Tensor | None = None
        # Copies of one window are consecutive, so one running sum is enough.
        summed = 0
        for batch, results in zip(batches, self._map_batches(compute, batches), strict=True):
            for offset, ((y, x), axes) in enumerate(batch):
                result = results[offset : offset + 1]
                result = result.flip(axes) if axes else result
                total = result if total is None else total + result
                summed += 1
                if summed % len(self.flips) == 0:
                    mean = total / len(self.flips) if len(self.flips) > 1 else total
                    yield y, x, partial(_select_slices, mean[0])
                    total = None

    def _cut_windows(self, row_CDHW: Tensor, batch: Batch) -> Tensor:
        """The network's input B C D H W of a batch."""
        height, width = self.patch_size[1:]
        inputs = []
        for (y, x), axes in batch:
            window = row_CDHW[None, :, :, y : y + height, x : x + width]
            inputs.append(window.flip(axes) if axes else window)
        return torch.cat(inputs) if len(inputs) > 1 else inputs[0]

    def _map_batches(
        self, compute: Callable[[Item], Tensor], batches: Sequence[Item]
    ) -> Iterator[Tensor]:
        """Results of all batches in order, computed by threads or by several processes."""

        def compute_own(own: Sequence[Any]) -> Iterator[Tensor]:
            return compute_in_order(compute, own, self.threads)

        def compute_shape(batch: Any) -> tuple[int, ...]:
            return len(batch), self.outputs.foreground_count, *self.patch_size

        if self._window_mapper is None:
            return compute_own(batches)
        return self._window_mapper(compute_own, batches, compute_shape)


def _select_slices(window_FDHW: Tensor, part: slice) -> Tensor:
    return window_FDHW[:, part]


# The order is fixed, because the sum over the copies depends on it in its last bits.
def _list_flips(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Axes of B C D H W that each mirrored copy flips: none, then one, two, all."""
    flips = []
    for number in range(len(axes) + 1):
        for subset in combinations(axes, number):
            flips.append(tuple(axis + BATCH_DIMS for axis in subset))
    return tuple(flips)

"""What is averaged over windows, mirrored copies and models: probabilities, or log odds.

`inference.average` selects the entry of `AVERAGES`. On a CPU the conversion runs over a few slices
at a time, so that the intermediate values stay in the core's cache. Used by `sliding_window`.

Dimensions: B windows, C channels of the model, F foreground channels (classes without background,
or regions), D H W = z, y, x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liverseg_dist.config import InferenceConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.model.outputs import OutputChannels, foreground_probabilities_, log_odds
from liverseg_dist.precision import autocast

BLOCK_VOXELS = 1 << 17
"""Voxels that a CPU converts at once."""
Conversion = Callable[[Tensor, bool], Tensor]
"""(B F D H W, regions) -> B F D H W; may work in place."""


@dataclass(frozen=True)
class Average:
    """One way to average.

    Attributes:
        convert_log_odds: gives the values to average.
        convert_mean: gives probabilities from their mean; None: the mean is a probability already.
    """

    convert_log_odds: Conversion
    convert_mean: Conversion | None


def _keep_log_odds(log_odds_BFDHW: Tensor, regions: bool) -> Tensor:
    return log_odds_BFDHW


AVERAGES = {
    "probabilities": Average(foreground_probabilities_, None),
    "logits": Average(_keep_log_odds, foreground_probabilities_),
}
"""By the name of `inference.average`. The mean of log odds has the information of the mean of
logits (nnU-Net), with one channel less."""


class WindowAveraging:
    """Computes windows with one or more models, and converts results before and after averaging.

    Args:
        models: models with equal outputs, on the device and in evaluation mode.
        outputs: what the output channels mean.
        config: settings; `average` and `precision` are read.
        device: device of the models.

    Raises:
        UserError: unknown name in `config.average`.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        outputs: OutputChannels,
        config: InferenceConfig,
        device: torch.device,
    ) -> None:
        self._models = models
        self._regions = outputs.regions
        self._foreground_count = outputs.foreground_count
        self._precision = config.precision
        self._device_type = device.type
        self._average = find_registered(AVERAGES, config.average, "inference.average")

    def compute_logits(self, model: nn.Module, image_BCDHW: Tensor) -> Tensor:
        """The output of one model, in the precision of the settings."""
        with autocast(self._device_type, self._precision):
            return model(image_BCDHW)

    @torch.inference_mode()
    def compute_model_mean(self, image_BCDHW: Tensor) -> Tensor:
        """The values to average, B F D H W float32; already averaged over the models."""
        total: Tensor | None = None
        for model in self._models:
            logits_BCDHW = self.compute_logits(model, image_BCDHW)
            batch, _, *shape = logits_BCDHW.shape
            # float32 also where autocast gives logits of lower precision: means are summed in it.
            values = torch.empty(batch, self._foreground_count, *shape, device=logits_BCDHW.device)
            for logits_CDHW, values_FDHW in zip(logits_BCDHW, values, strict=True):
                for part in self.split_into_blocks(shape):
                    values_FDHW[:, part] = self.convert_logits(logits_CDHW, part)
            # In place: a second array of this size per model is not needed.
            total = values if total is None else total.add_(values)
        assert total is not None
        return total.div_(len(self._models)) if len(self._models) > 1 else total

    def convert_logits(self, logits_CDHW: Tensor, part: slice) -> Tensor:
        """The values to average (F d H W) for some slices of a window."""
        # The conversions expect a batch axis; a window has none.
        odds_BFDHW = log_odds(logits_CDHW[None, :, part], self._regions)
        return self._average.convert_log_odds(odds_BFDHW, self._regions)[0]

    def finish_mean(self, mean_FDHW: Tensor) -> Tensor:
        """Probabilities from the mean over windows, in place."""
        convert_mean = self._average.convert_mean
        if convert_mean is not None:
            for part in self.split_into_blocks(mean_FDHW.shape[1:]):
                convert_mean(mean_FDHW[None, :, part], self._regions)
        return mean_FDHW

    def split_into_blocks(self, shape: Sequence[int]) -> list[slice]:
        """The slices of a window (D, H, W) that are converted at once; all of them on a GPU."""
        # A GPU converts all slices in one kernel launch; blocks would only add launches.
        step = shape[0]
        if self._device_type == "cpu":
            # One slice can exceed the block; the step must not become 0.
            step = max(1, BLOCK_VOXELS // (shape[1] * shape[2]))
        return [slice(z, min(z + step, shape[0])) for z in range(0, shape[0], step)]

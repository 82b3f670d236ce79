"""The figures of a step, which the device computes while the host prepares the next step.

A step never waits for its own figures: the loss, its parts, the voxel counts, the number of losses
that are not finite, the votes for a stop and the norm of the gradient are one tensor on the device.
It is summed by the backend that also sums the gradients, copied to the host in the background, and
read after the next step was launched. `Stepper` uses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from liverseg_dist.distributed.collectives import begin_sum


@dataclass
class StepResult:
    """Metrics of one step, equal on all ranks except for the durations."""

    step: int
    """Number of the step, from 1."""
    loss: float
    parts: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: bool
    stop_votes: int
    """Number of ranks on which a stop was requested."""
    wait_s: float = 0.0
    """Seconds that this rank waited for data."""
    step_s: float = 0.0
    """Seconds in which this rank launched the step and waited for the figures of the one before.

    Over many steps their mean is the time of a step on the device."""
    warning: str = ""
    """Why the step was skipped, with the names of the samples."""


@dataclass
class MicroBatchFigures:
    """What the micro-batches of a rank add up to; nothing of it has left the device.

    Attributes:
        names: names of the sums.
        sums: float64 (names), over the rank's micro-batches.
        is_finite: one flag for each micro-batch, whether its loss is finite.
        samples: names of the samples of each micro-batch.
    """

    names: list[str]
    sums: Tensor
    is_finite: list[Tensor]
    samples: list[list[str]]

    @property
    def all_samples(self) -> list[str]:
        """Names of all samples."""
        names: list[str] = []
        for samples in self.samples:
            names += samples
        return names

    def find_nonfinite_samples(self) -> list[str]:
        """Names of the samples in micro-batches whose loss is not finite. Waits for the device."""
        names: list[str] = []
        for flag, samples in zip(self.is_finite, self.samples, strict=True):
            if not bool(flag):
                names += samples
        return names


class StepFigures:
    """The sums of a step over all ranks, and the gradient's norm, until they are read.

    Args:
        figures: those of this rank.
        stop_vote: whether a stop was requested on this rank.
    """

    def __init__(self, figures: MicroBatchFigures, stop_vote: bool) -> None:
        nonfinite = len(figures.is_finite) - torch.stack(figures.is_finite).sum().double()
        vote = torch.full_like(nonfinite, float(stop_vote))
        self._names = figures.names
        # The last place is that of the norm, which needs no sum and is known after the update.
        self._values = torch.cat([figures.sums, torch.stack([nonfinite, vote, vote])])
        self._sum: dist.Work | None = begin_sum(self._values[:-1])
        self._copied: torch.cuda.Event | None = None

    def is_nonfinite(self) -> Tensor:
        """Whether the loss is not finite on some rank, a bool scalar on the device."""
        self._wait_for_sum()
        return self._values[-3] > 0

    def begin_copy(self, norm: Tensor) -> None:
        """Add the gradient's norm and start the copy to the host."""
        self._values[-1] = norm.detach().to(self._values.dtype)
        if self._values.device.type != "cuda":
            return
        # On a GPU this makes the stream wait for the sum, not the host.
        self._wait_for_sum()
        # Only a copy into pinned memory runs in the background.
        host = torch.empty(self._values.shape, dtype=self._values.dtype, pin_memory=True)
        host.copy_(self._values, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        self._values = host

    def read(self) -> tuple[dict[str, float], float, int, float]:
        """Wait for the figures.

        Returns:
            The sums by name, the number of losses that are not finite, the number of ranks on
            which a stop was requested, and the gradient's norm.
        """
        self._wait_for_sum()
        if self._copied is not None:
            self._copied.synchronize()
        *sums, nonfinite, votes, norm = self._values.tolist()
        return dict(zip(self._names, sums, strict=True)), nonfinite, int(votes), norm

    def _wait_for_sum(self) -> None:
        if self._sum is not None:
            self._sum.wait()
            self._sum = None


def add_up(vectors: Sequence[Tensor]) -> Tensor:
    """Sum tensors of one shape in their order, so that the last bits are always the same."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total

"""The default number of CPU threads of a rank, measured at the start of a run.

More threads are not always faster: threads synchronise some hundred times per step, the slowest one
decides if other processes use the cores, and a small network has little work per thread. Therefore
one step is timed with 1, 2, 4, ... threads, and a larger number is chosen only if it is clearly
faster.

The number of threads determines the order of float sums, and so the last bits of the weights. A run
therefore records its number (`RunFolder.recorded_threads`), and later starts use it without
measuring again.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from liverseg_dist.config import Settings
from liverseg_dist.distributed.collectives import gather_from_ranks

REPEATS = 3
BUDGET_S = 30.0
"""No larger number of threads is tried after this time."""
CLEAR_GAIN = 0.95
"""A larger number of threads is chosen if it takes at most this fraction of the time."""
Measure = Callable[[int], float]
"""Number of threads -> seconds."""


def choose_threads(model: nn.Module, settings: Settings, limit: int) -> int:
    """Find the fastest number of threads for forward and backward of one micro-batch on a CPU.

    A collective call: all ranks measure at the same time, as in training, and choose the same
    number. The model and the random state do not change.

    Args:
        limit: largest number of threads for this rank.
    """
    # A copy, so that no gradients remain in the model.
    trial = copy.deepcopy(model)
    channels = settings.model.in_channels or 1
    shape = (settings.train.micro_batch_size, channels, *settings.data.patch_size)
    image_BCDHW = torch.zeros(shape)

    def measure(threads: int) -> float:
        seconds = time_step(trial, image_BCDHW, threads)
        # The slowest rank determines the duration of a step.
        return max(gather_from_ranks(seconds))

    before = torch.get_num_threads()
    limit = min(gather_from_ranks(limit))
    try:
        with torch.random.fork_rng(devices=[]):
            # The first step also allocates memory and selects kernels.
            warm_up_s = measure(limit)
            # In a long step the threads synchronise rarely, so all cores are useful.
            return limit if warm_up_s > BUDGET_S else find_fastest(measure, limit)
    finally:
        torch.set_num_threads(before)


def find_fastest(measure: Measure, limit: int, budget_s: float = BUDGET_S) -> int:
    """Double the number of threads, up to `limit`, as long as each doubling is a clear gain.

    Args:
        measure: seconds of the work with a number of threads, the same on every rank.
        limit: the largest number to try.
        budget_s: seconds of measured work after which the best so far is returned.
    """
    best, spent_s = 1, 0.0
    candidate = min(2, limit)
    while candidate > best and spent_s < budget_s:
        ratios: list[float] = []
        # Alternate, so that a change of the machine's load affects both numbers.
        for _ in range(REPEATS):
            with_best, with_more = measure(best), measure(candidate)
            ratios.append(with_more / with_best)
            spent_s += with_best + with_more
            if spent_s > budget_s:
                break
        if statistics.median(ratios) > CLEAR_GAIN:
            break
        best, candidate = candidate, min(2 * candidate, limit)
    return best


def time_step(model: nn.Module, image_BCDHW: Tensor, threads: int) -> float:
    """Return the seconds of one forward and backward with `threads` threads."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    outputs = model(image_BCDHW)
    levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.stack([level.float().square().mean() for level in levels]).sum().backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - begin

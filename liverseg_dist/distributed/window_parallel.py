"""Window parallelism: several ranks compute the windows of one scan, and rank 0 combines them.

The windows, and the order in which rank 0 adds their results, are those of a single process, so the
result has the same bits. The other ranks receive placeholders of the same shape, so that all ranks
run the same loop.

All ranks synchronise once per round (one window per rank) and once at the end of a case. They then
exchange whether a rank failed. An error on one rank therefore ends the case on all ranks, and no
rank waits for a stopped one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liverseg_dist.distributed.collectives import all_max, current_rank, world_size
from liverseg_dist.distributed.connection_errors import is_consequence
from liverseg_dist.errors import RankLost, RunFailed

Compute = Callable[[Sequence[Any]], Iterator[Tensor]]
ROOT_RANK = 0
"""The rank that receives the results."""


class PeerFailed(RunFailed):
    """Another rank could not compute its windows."""


class WindowParallel:
    """Divides the windows of one case at a time among all ranks of the job.

    Args:
        device: where results are received.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextmanager
    def case_scope(self) -> Iterator[None]:
        """Surround the work on one case; all ranks enter it for the same case.

        Raises:
            PeerFailed: another rank failed on this case.
            RankLost: the connection to a rank is lost.
        """
        try:
            yield
        except PeerFailed:
            raise
        except Exception as error:
            if is_consequence(error):
                raise RankLost(*error.args) from error
            self._exchange_failure(1)
            raise
        self._synchronise()

    def map_windows(
        self, compute: Compute, items: Sequence[Any], shape_of: Callable[[Any], tuple[int, ...]]
    ) -> Iterator[Tensor]:
        """Yield the results of all items in order (float32). Call it inside `case_scope`.

        Args:
            compute: computes the results of some items, one after another.
            items: all windows; rank r of W computes items r, r + W, r + 2 W, ...
            shape_of: shape of an item's result.

        Yields:
            On rank 0 the results; on the other ranks zeros of the same shape.
        """
        size, rank = world_size(), current_rank()
        # A generator: windows are computed when they are needed, one per round.
        own_results = compute(items[rank::size])
        for first in range(0, len(items), size):
            round_items = items[first : first + size]
            own = next(own_results) if rank < len(round_items) else None
            self._synchronise()
            if rank != ROOT_RANK and own is not None:
                # Point-to-point calls need contiguous memory.
                dist.send(own.contiguous(), dst=ROOT_RANK)
            for source, item in enumerate(round_items):
                if rank != ROOT_RANK:
                    # A view of a single zero, so placeholders need no memory.
                    yield torch.zeros((), device=self._device).expand(shape_of(item))
                elif source == ROOT_RANK:
                    assert own is not None
                    yield own
                else:
                    received = torch.empty(shape_of(item), device=self._device)
                    dist.recv(received, src=source)
                    yield received

    def _synchronise(self) -> None:
        if self._exchange_failure(0):
            raise PeerFailed("another rank failed on this case; its reason is printed above")

    def _exchange_failure(self, failed: int) -> int:
        """Return 1 on all ranks if one of them passes 1."""
        try:
            return all_max(failed)
        except RuntimeError as error:
            raise RankLost(*error.args) from error

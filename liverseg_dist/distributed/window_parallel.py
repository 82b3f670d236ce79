"""Several ranks compute the windows of one scan: each its share, rank 0 gets all answers in their order.

What is computed, and the order in which rank 0 adds it up, are those of one process, so the result is the same bits.
The other ranks get placeholders: they go through the same motions to know whose turn it is.

Every rank meets the others once a round (a window each) and once at the end of a case, and tells whether it failed; so
an error on one rank ends the case on all of them, and nobody waits for one that is gone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liverseg_dist.distributed.collectives import all_max, current_rank, world_size
from liverseg_dist.distributed.heartbeat import is_consequence
from liverseg_dist.errors import RankLost, RunFailed

Compute = Callable[[Sequence[Any]], Iterator[Tensor]]
HOME = 0
"""The rank that gets the answers."""


class PeerFailed(RunFailed):
    """Another rank could not compute its share."""


class WindowParallel:
    """All ranks of the job, working on one case at a time; answers travel on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextmanager
    def case(self) -> Iterator[None]:
        """All ranks enter it for the same case. Raises `PeerFailed` on the ranks that did not fail themselves, and
        `RankLost` where one no longer answers."""
        try:
            yield
        except PeerFailed:
            raise
        except Exception as error:
            if is_consequence(error):
                raise RankLost(*error.args) from error
            self._tell(1)
            raise
        self._meet()

    def spread(
        self, compute: Compute, items: Sequence[Any], shape_of: Callable[[Any], tuple[int, ...]]
    ) -> Iterator[Tensor]:
        """Answers of all items in order (float32); rank r computes items r, r + W, ... with `compute`.

        Only on rank 0 do they hold what was computed; elsewhere they are zeros. Inside `case`.
        """
        size, me = world_size(), current_rank()
        own = compute(items[me::size])
        for first in range(0, len(items), size):
            turn = items[first : first + size]
            mine = next(own) if me < len(turn) else None
            self._meet()
            if me != HOME and mine is not None:
                dist.send(mine.contiguous(), dst=HOME)
            for number, item in enumerate(turn):
                if me != HOME:
                    yield torch.zeros((), device=self._device).expand(shape_of(item))
                elif number == HOME:
                    assert mine is not None
                    yield mine
                else:
                    answer = torch.empty(shape_of(item), device=self._device)
                    dist.recv(answer, src=number)
                    yield answer

    def _meet(self) -> None:
        if self._tell(0):
            raise PeerFailed("another process failed on this case; its reason is above")

    def _tell(self, failed: int) -> int:
        try:
            return all_max(failed)
        except RuntimeError as error:
            raise RankLost(*error.args) from error

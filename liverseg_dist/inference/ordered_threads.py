"""Compute items with several threads, and yield the results in the order of the items."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def compute_in_order(
    compute: Callable[[Item], Tensor], items: Sequence[Item], threads: int
) -> Iterator[Tensor]:
    """Yield the result of each item, in the items' order.

    Args:
        compute: computes one item.
        items: the items.
        threads: how many items are computed at a time, each with one thread of torch; 1 or less: in
            the calling thread.
    """
    if threads <= 1:
        yield from map(compute, items)
        return
    # Each thread uses one thread of torch: nested parallelism would start cores x cores threads.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending: deque[Future[Tensor]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(compute, item))
                # Bounded: each finished result waits in memory until its turn.
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # After an error, or when the caller stops: do not compute the rest.
            for future in pending:
                future.cancel()

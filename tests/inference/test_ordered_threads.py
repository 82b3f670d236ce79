"""Results of threads come in the order of the items, and an error ends the rest."""

import threading
import time

import pytest
import torch
from torch import Tensor

from liverseg_dist.inference.ordered_threads import compute_in_order


def test_results_are_in_the_order_of_the_items_although_later_ones_end_first() -> None:
    def compute(item: int) -> Tensor:
        # The first items take the longest.
        time.sleep(0.002 * (12 - item))
        return torch.tensor(item)

    results = compute_in_order(compute, range(12), threads=4)
    assert [int(result) for result in results] == list(range(12))


@pytest.mark.parametrize("threads", [0, 1])
def test_one_thread_is_the_calling_one(threads: int) -> None:
    callers = []

    def compute(item: int) -> Tensor:
        callers.append(threading.current_thread())
        return torch.tensor(item)

    assert [int(result) for result in compute_in_order(compute, [3, 1], threads)] == [3, 1]
    assert set(callers) == {threading.current_thread()}


def test_few_results_wait_in_memory() -> None:
    """A consumer that stops asking stops the computation."""
    computed = []

    def compute(item: int) -> Tensor:
        computed.append(item)
        return torch.tensor(item)

    results = compute_in_order(compute, range(100), threads=2)
    assert int(next(results)) == 0
    results.close()
    assert len(computed) <= 3


def test_an_error_is_raised_at_its_item_and_ends_the_rest() -> None:
    computed = []

    def compute(item: int) -> Tensor:
        computed.append(item)
        if item == 2:
            raise ValueError("item 2")
        return torch.tensor(item)

    results = compute_in_order(compute, range(100), threads=2)
    assert [int(next(results)), int(next(results))] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)
    assert len(computed) < 10

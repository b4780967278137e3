"""What is fed comes in order, one ahead and no more, says where it failed, and lets go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from eagle_offline.data.feed import _one_ahead, feed, mapped
from eagle_offline.prefetch import prefetch


@dataclass(frozen=True)
class Inner:
    values: torch.Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    rows: list[torch.Tensor]
    on_host: np.ndarray
    count: int


def outer(value: int) -> Outer:
    inner = (Inner(torch.full((3,), value), "one"), Inner(torch.full((0,), value), "two"))
    return Outer(inner, [torch.tensor(value)], np.array([value]), value)


def threads(*names: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_a_cpu_is_fed_the_items_as_they_come():
    items = [outer(value) for value in range(4)]
    fed = list(feed(items, torch.device("cpu")))
    assert all(one is other for one, other in zip(fed, items, strict=True))
    assert not threads("feed")


def test_every_tensor_of_a_record_is_mapped_and_nothing_else():
    record = outer(5)
    found = mapped(record, lambda tensor: tensor + 1)
    assert torch.equal(found.inner[0].values, torch.tensor([6, 6, 6]))
    assert (found.inner[1].name, found.inner[1].values.shape) == ("two", (0,))
    assert found.rows == [torch.tensor(6)]
    assert found.on_host is record.on_host
    assert found.count == 5
    assert torch.equal(record.inner[0].values, torch.tensor([5, 5, 5]))


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_results_come_in_the_order_of_the_items(count):
    assert list(_one_ahead(range(count), lambda item: item * item)) == [item * item for item in range(count)]
    assert not threads("feed")


def test_one_result_is_made_ahead_and_no_more():
    made: list[int] = []
    begun = threading.Semaphore(0)

    def work(item: int) -> int:
        made.append(item)
        begun.release()
        return item

    results = _one_ahead(range(9), work)
    for expected in range(4):
        assert next(results) == expected
        while len(made) < expected + 2:
            assert begun.acquire(timeout=5), "nothing was made ahead"
        time.sleep(0.01)
        assert made == list(range(expected + 2))
    results.close()
    assert not threads("feed")


def test_a_failure_is_raised_where_its_item_would_have_been():
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("item 3")

    seen: list[int] = []
    with pytest.raises(ValueError, match="item 3"):
        seen.extend(_one_ahead(items(), lambda item: item))
    assert seen == [0, 1, 2]
    seen.clear()
    with pytest.raises(ZeroDivisionError):
        seen.extend(_one_ahead([2, 1, 0, 4], lambda item: 2 // item))
    assert seen == [1, 2]
    assert not threads("feed")


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_early_closes_the_items_and_ends_every_thread(taken):
    closed: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from prefetch(lambda item: item, range(1000), num_workers=2)
        finally:
            closed.append(threading.current_thread().name)

    results = _one_ahead(items(), lambda item: item)
    assert [next(results) for _ in range(taken)] == list(range(taken))
    results.close()
    # A generator that was never asked for anything has nothing to end.
    assert closed == (["feed"] if taken else [])
    assert not threads("feed", "prefetch")


def test_a_failure_of_the_caller_ends_every_thread():
    def train() -> None:
        for item in _one_ahead(prefetch(lambda item: item, range(1000), num_workers=3), lambda item: item):
            if item == 7:
                raise KeyError(item)

    with pytest.raises(KeyError):
        train()
    # The generators end with the loop that drew from them.
    assert not threads("feed", "prefetch")

"""Work done ahead keeps its order, says where it failed, and lets go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eagle_offline.prefetch import prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 7, None])
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_results_come_in_the_order_of_the_items(count, depth, num_workers):
    def slow_when_even(item: int) -> int:
        time.sleep(0.002 * (item % 2 == 0))
        return item * item

    found = list(prefetch(slow_when_even, range(count), depth, num_workers))
    assert found == [item * item for item in range(count)]
    assert not prefetch_threads()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_work_is_done_ahead_but_no_further_than_depth(num_workers):
    begun: list[int] = []
    taken: list[int] = []
    for result in prefetch(lambda item: begun.append(item) or item, range(12), 3, num_workers):
        taken.append(result)
        time.sleep(0.005)
        assert max(begun) <= result + 3
    assert taken == list(range(12))
    assert len(begun) == 12


def test_workers_work_at_the_same_time():
    together = threading.Barrier(3)
    # Nobody gets past the barrier alone.
    assert list(prefetch(lambda item: together.wait(5) >= 0 and item, range(9), num_workers=3)) == list(range(9))


def test_the_next_result_is_made_while_the_last_one_is_used():
    second_begun = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            second_begun.set()
        return item

    results = prefetch(work, range(3), depth=1)
    assert next(results) == 0
    assert second_begun.wait(5), "nothing was made ahead"


@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_failure_is_raised_where_its_result_would_have_been(num_workers):
    def work(item: int) -> int:
        if item == 4:
            raise ValueError("item 4")
        return item

    results, seen = prefetch(work, range(9), 3, num_workers), []
    with pytest.raises(ValueError, match="item 4"):
        seen.extend(results)
    assert seen == [0, 1, 2, 3]
    assert not prefetch_threads()


def test_a_failure_of_the_items_themselves_is_raised():
    def items() -> Iterator[int]:
        yield 0
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(prefetch(lambda item: item, items(), depth=2))
    assert not prefetch_threads()


@pytest.mark.parametrize("num_workers", [1, 4])
def test_leaving_early_drops_what_has_not_begun_and_ends_the_threads(num_workers):
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.02)
        return item

    results = prefetch(work, range(1000), 500, num_workers)
    assert next(results) == 0
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 2
    assert len(begun) <= 60  # of 501 that were asked for
    assert not prefetch_threads()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_that_read_ahead_compute_alone_and_the_caller_as_before(num_workers):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = threading.Barrier(num_workers)

        def work(_: int) -> tuple[int, int]:
            together.wait(5)  # one item a worker
            return threading.get_ident(), torch.get_num_threads()

        found = list(prefetch(work, range(num_workers), num_workers=num_workers))
        assert len({thread for thread, _ in found}) == num_workers
        assert [count for _, count in found] == [1] * num_workers
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)

"""Which samples go through the target together."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_offline.target.batching import Batching

LENGTHS = st.lists(st.integers(2, 3000), max_size=60)


@given(LENGTHS, st.integers(1, 9))
def test_so_many_samples_go_together_the_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = Batching(batch_size=batch_size).batches(lengths)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    flat = [position for batch in batches for position in batch]
    assert flat == sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))


@given(LENGTHS, st.sampled_from([1, 100, 511, 2048, 20_000]), st.sampled_from([0, 512]))
def test_so_many_tokens_go_together_with_little_padding(lengths: list[int], budget: int, small: int) -> None:
    batches = Batching(None, budget, small).batches(lengths)
    flat = [position for batch in batches for position in batch]
    assert flat == sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    for batch in batches:
        slots = len(batch) * lengths[batch[0]]
        assert slots <= budget or len(batch) == 1
        real = sum(lengths[position] for position in batch)
        assert slots - real <= slots / 64 or slots <= small


@given(LENGTHS, st.sampled_from([100, 2048, 20_000]), st.sampled_from([0, 512]))
def test_a_batch_ends_only_where_the_next_sample_would_not_do(lengths: list[int], budget: int, small: int) -> None:
    batches = Batching(None, budget, small).batches(lengths)
    for batch, following in pairwise(batches):
        slots = (len(batch) + 1) * lengths[batch[0]]
        real = sum(lengths[position] for position in batch)
        padding = slots - real - lengths[following[0]]
        assert slots > budget or (padding > slots / 64 and slots > small)


@pytest.mark.parametrize("batching", [Batching(batch_size=3), Batching(max_batch_tokens=100)])
def test_nothing_makes_no_batch(batching: Batching) -> None:
    assert batching.batches([]) == []

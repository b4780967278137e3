"""Accept lengths: the average over slots, and the walk that greedy decoding takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import simulated_accept_length
from eagle_offline.objectives.acceptance import walked_accept_length
from tests.oracles import acceptance as oracle


def walk(hits: list[list[bool]], valid: list[bool], documents: list[int]) -> tuple[int, int]:
    num_slots = len(documents)
    tokens, rounds = walked_accept_length(
        torch.tensor(hits, dtype=torch.bool).reshape(len(hits), num_slots),
        torch.tensor(valid, dtype=torch.bool),
        torch.tensor(documents, dtype=torch.int64),
    )
    return int(tokens), int(rounds)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[bool]], list[bool], list[int]]:
    """Hits [K][T], validity [T] and document ids [T] of a few documents followed by padding."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    padding = draw(st.integers(0, 3))
    num_steps = draw(st.integers(1, 4))
    documents = [d for d, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    flags = st.lists(st.sampled_from([True, True, False]), min_size=len(documents), max_size=len(documents))
    valid = [v and d >= 0 for v, d in zip(draw(flags), documents, strict=True)]
    hits = [[h and d >= 0 for h, d in zip(draw(flags), documents, strict=True)] for _ in range(num_steps)]
    return hits, valid, documents


@pytest.mark.parametrize(
    ("hits", "valid", "expected"),
    [
        ([3, 2, 1], [4, 4, 4], 2.5),
        ([0, 0], [5, 5], 1.0),
        ([5, 5], [5, 5], 3.0),
        ([0, 0], [0, 0], 1.0),
        ([2, 0], [4, 0], 1.5),
        ([3, 1], [4, 2], 2.25),
    ],
)
def test_simulated_length_is_one_plus_the_share_right_up_to_each_step(
    hits: list[int], valid: list[int], expected: float
) -> None:
    assert float(simulated_accept_length(torch.tensor(hits), torch.tensor(valid))) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_simulated_length_lies_between_one_and_one_more_than_the_steps(pairs: list[tuple[int, int]]) -> None:
    valid = [max(pair) for pair in pairs]
    hits = [min(pair) for pair in pairs]
    found = float(simulated_accept_length(torch.tensor(hits), torch.tensor(valid)))
    assert found == pytest.approx(oracle.simulated_accept_length(hits, valid), rel=1e-6)
    assert 1 <= found <= (len(pairs) + 1) * (1 + 1e-6)


@given(rows())
@settings(max_examples=150, deadline=None)
def test_walk_equals_the_walk_slot_by_slot(row: tuple[list[list[bool]], list[bool], list[int]]) -> None:
    assert walk(*row) == oracle.walked_accept_length(*row)


@given(rows())
@settings(max_examples=60, deadline=None)
def test_a_round_yields_between_one_token_and_one_more_than_the_steps(
    row: tuple[list[list[bool]], list[bool], list[int]],
) -> None:
    tokens, rounds = walk(*row)
    assert rounds <= tokens <= (len(row[0]) + 1) * rounds
    assert (rounds == 0) == (not any(row[1]))


def test_worked_walk() -> None:
    """K = 2, one document of 7 slots: accept 2, jump 3; accept 0, jump 1; step over one; accept 1, jump 2."""
    hits = [[True, False, False, False, True, True, False], [True, True, True, True, True, False, True]]
    valid = [True, True, True, True, False, True, True]
    assert walk(hits, valid, [0] * 7) == (3 + 1 + 2, 3)


def test_a_right_step_after_a_wrong_one_is_not_accepted() -> None:
    assert walk([[False], [True], [True]], [True], [0]) == (1, 1)


@given(st.integers(1, 5), st.lists(st.integers(1, 12), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_perfect_draft_fills_every_round_but_the_last_of_a_document(num_steps: int, lengths: list[int]) -> None:
    """Slot t of L has L - 1 - t steps inside its document; rounds start K + 1 slots apart."""
    documents = [d for d, length in enumerate(lengths) for _ in range(length)]
    left = [length - 1 - t for length in lengths for t in range(length)]
    hits = [[k < remaining for remaining in left] for k in range(num_steps)]
    valid = [remaining > 0 for remaining in left]
    tokens, rounds = walk(hits, valid, documents)
    starts = [(t, length) for length in lengths for t in range(0, length - 1, num_steps + 1)]
    expected_tokens = sum(min(num_steps, length - 1 - t) + 1 for t, length in starts)
    assert (tokens, rounds) == (expected_tokens, len(starts))


@given(st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_all_right_gives_one_more_than_the_steps_in_every_round(num_steps: int, num_slots: int) -> None:
    tokens, rounds = walk([[True] * num_slots] * num_steps, [True] * num_slots, [0] * num_slots)
    assert tokens == (num_steps + 1) * rounds
    assert rounds == -(-num_slots // (num_steps + 1))


@given(rows())
@settings(max_examples=40, deadline=None)
def test_all_wrong_takes_one_round_a_valid_slot(row: tuple[list[list[bool]], list[bool], list[int]]) -> None:
    hits, valid, documents = row
    wrong = [[False] * len(documents) for _ in hits]
    assert walk(wrong, valid, documents) == (sum(valid), sum(valid))


def by_document(
    row: tuple[list[list[bool]], list[bool], list[int]], order: list[int]
) -> tuple[list[list[bool]], list[bool], list[int]]:
    """The row with its documents laid out in `order`, numbered anew, without padding."""
    hits, valid, documents = row
    slots = [[t for t, d in enumerate(documents) if d == document] for document in order]
    flat = [t for group in slots for t in group]
    renumbered = [new for new, group in enumerate(slots) for _ in group]
    return [[step[t] for t in flat] for step in hits], [valid[t] for t in flat], renumbered


@given(rows(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_documents_and_their_padding_change_nothing(
    row: tuple[list[list[bool]], list[bool], list[int]], random: object
) -> None:
    order = sorted({d for d in row[2] if d >= 0})
    random.shuffle(order)
    assert walk(*by_document(row, order)) == walk(*row)


@given(rows())
@settings(max_examples=60, deadline=None)
def test_a_row_is_the_sum_of_its_documents(row: tuple[list[list[bool]], list[bool], list[int]]) -> None:
    """A jump ends with its document and never lands inside the next."""
    parts = [walk(*by_document(row, [d])) for d in sorted({d for d in row[2] if d >= 0})]
    assert walk(*row) == (sum(tokens for tokens, _ in parts), sum(rounds for _, rounds in parts))


def test_padding_alone_takes_no_round() -> None:
    assert walk([[True, True]], [True, True], [-1, -1]) == (0, 0)

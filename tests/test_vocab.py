"""The draft vocabulary: most frequent first, ties and fillers to the lower id, special tokens always in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.errors import UsageError
from eagle_offline.vocab import choose_draft_vocab, resolve_size


def counts_of(pairs: dict[int, int], size: int) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    for token, count in pairs.items():
        counts[token] = count
    return counts


def test_the_most_frequent_are_chosen_and_sorted() -> None:
    vocab = choose_draft_vocab(counts_of({7: 1, 3: 9, 5: 4, 1: 2}, 10), [], 3, 10)
    assert vocab.selected_token_ids.tolist() == [1, 3, 5]
    assert vocab.selected_token_ids.dtype == np.int64
    assert vocab.coverage == pytest.approx(15 / 16)
    assert vocab.selected_token_mask.nonzero()[0].tolist() == [1, 3, 5]


def test_equal_counts_go_to_the_lower_id() -> None:
    assert choose_draft_vocab(counts_of({8: 2, 4: 2, 6: 2, 9: 3}, 10), [], 3, 10).selected_token_ids.tolist() == [
        4,
        6,
        9,
    ]


def test_a_corpus_with_too_few_tokens_is_filled_up_with_the_lowest_unused_ids() -> None:
    assert choose_draft_vocab(counts_of({5: 1}, 6), [], 4, 10).selected_token_ids.tolist() == [0, 1, 2, 5]
    assert choose_draft_vocab(np.zeros(0, np.int64), [9], 3, 10).selected_token_ids.tolist() == [0, 1, 9]


def test_required_ids_push_out_the_most_frequent_last() -> None:
    vocab = choose_draft_vocab(counts_of({0: 5, 1: 4, 2: 3}, 5), [4, 4, -1, 99], 2, 5)
    assert vocab.selected_token_ids.tolist() == [0, 4]


def test_more_required_ids_than_room_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(UsageError, match=r"--draft-vocab-size 2.*3"):
        choose_draft_vocab(np.ones(5, np.int64), [1, 2, 3], 2, 5)


def test_the_full_vocabulary_is_all_ids() -> None:
    vocab = choose_draft_vocab(np.zeros(3, np.int64), [], 7, 7)
    assert vocab.selected_token_ids.tolist() == list(range(7))
    assert vocab.coverage == 1.0


@pytest.mark.parametrize(
    ("requested", "vocab_size", "size"), [(None, 128_256, 32_000), (None, 900, 900), (5, 9, 5), (9, 9, 9)]
)
def test_the_default_size_is_32000_or_all(requested: int | None, vocab_size: int, size: int) -> None:
    assert resolve_size(requested, vocab_size) == size


@pytest.mark.parametrize("requested", [0, -1, 10])
def test_a_size_outside_the_vocabulary_is_refused(requested: int) -> None:
    with pytest.raises(UsageError, match=f"--draft-vocab-size {requested}"):
        resolve_size(requested, 9)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.sets(st.integers(0, 35), max_size=4),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_choice_is_that_of_a_sorted_list(counts: list[int], required: set[int], data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(len(counts), 36))
    inside = {token for token in required if token < vocab_size}
    size = data.draw(st.integers(max(1, len(inside)), vocab_size))
    full = counts + [0] * (vocab_size - len(counts))
    others = sorted(set(range(vocab_size)) - inside, key=lambda token: (-full[token], token))
    expected = sorted([*inside, *others[: size - len(inside)]])
    vocab = choose_draft_vocab(np.array(counts, np.int64), required, size, vocab_size)
    assert vocab.selected_token_ids.tolist() == expected
    assert vocab.size == size
    total = sum(full)
    assert vocab.coverage == pytest.approx(sum(full[t] for t in expected) / total if total else 1.0)
    again = choose_draft_vocab(np.array(counts, np.int64), sorted(required, reverse=True), size, vocab_size)
    assert vocab.digest == again.digest

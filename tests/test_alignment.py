"""Shifts, documents and the places of slots inside them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import default_aux_layer_ids, shift_left_with_zero
from eagle_offline.alignment import doc_remaining, document_ids, position_ids
from eagle_offline.errors import UsageError

LENGTHS = st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=3)


def zero_padded(lengths: list[list[int]]) -> torch.Tensor:
    most = max(1, *(len(row) for row in lengths), 1)
    return torch.tensor([row + [0] * (most - len(row)) for row in lengths])


def test_shift_left_of_token_ids_drops_the_first_and_fills_with_zero() -> None:
    tensor = torch.tensor([[5, 6, 7], [8, 9, 1]])
    assert shift_left_with_zero(tensor).tolist() == [[6, 7, 0], [9, 1, 0]]


def test_shift_left_moves_whole_vectors_along_the_token_axis() -> None:
    tensor = torch.arange(1.0, 13.0).reshape(1, 3, 4)
    expected = [[[5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0], [0.0] * 4]]
    assert shift_left_with_zero(tensor).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float64])
def test_shift_left_keeps_dtype_and_shape_and_its_input(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3, 2, dtype=dtype)
    copy = tensor.clone()
    out = shift_left_with_zero(tensor)
    assert out.dtype == dtype
    assert out.shape == tensor.shape
    assert torch.equal(tensor, copy)
    out.zero_()
    assert torch.equal(tensor, copy), "the result shares memory with its input"


def test_shift_left_of_a_single_slot_is_zero() -> None:
    assert shift_left_with_zero(torch.tensor([[3]])).tolist() == [[0]]


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_shift_left_repeated_reads_that_many_slots_ahead(rows: list[list[int]], times: int) -> None:
    tensor = torch.tensor(rows)
    for _ in range(times):
        tensor = shift_left_with_zero(tensor)
    assert tensor.tolist() == [[row[t + times] if t + times < 4 else 0 for t in range(4)] for row in rows]


def test_slots_of_two_documents_and_padding() -> None:
    seq_lens = torch.tensor([[3, 2], [4, 0]])
    assert document_ids(seq_lens, 6).tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]]
    assert position_ids(seq_lens, 6).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert doc_remaining(seq_lens, 6).tolist() == [[2, 1, 0, 1, 0, 0], [3, 2, 1, 0, 0, 0]]


@given(LENGTHS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_slot_knows_its_document_its_place_and_what_remains(lengths: list[list[int]], extra: int) -> None:
    num_slots = max(1, max(sum(row) for row in lengths) + extra)
    seq_lens = zero_padded(lengths)
    found = [f(seq_lens, num_slots) for f in (document_ids, position_ids, doc_remaining)]
    assert all(tensor.dtype == torch.int64 and tensor.shape == (len(lengths), num_slots) for tensor in found)
    for b, row in enumerate(lengths):
        documents = [d for d, length in enumerate(row) for _ in range(length)]
        places = [t for length in row for t in range(length)]
        left = [length - 1 - t for length in row for t in range(length)]
        padding = num_slots - len(documents)
        assert found[0][b].tolist() == documents + [-1] * padding
        assert found[1][b].tolist() == places + [0] * padding
        assert found[2][b].tolist() == left + [0] * padding


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(7, [1, 2, 3]), (8, [1, 3, 4]), (28, [1, 13, 24]), (32, [1, 15, 28]), (36, [1, 17, 32]), (61, [1, 29, 57])],
)
def test_default_layers_are_one_early_one_middle_one_late(num_layers: int, expected: list[int]) -> None:
    assert list(default_aux_layer_ids(num_layers)) == expected


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 6])
def test_a_target_too_shallow_for_three_layers_names_the_flag_to_pass(num_layers: int) -> None:
    with pytest.raises(UsageError, match="--aux-layer-ids"):
        default_aux_layer_ids(num_layers)


@given(st.integers(7, 200))
@settings(max_examples=50, deadline=None)
def test_default_layers_increase_strictly_within_the_target(num_layers: int) -> None:
    low, middle, high = default_aux_layer_ids(num_layers)
    assert 0 <= low < middle < high < num_layers

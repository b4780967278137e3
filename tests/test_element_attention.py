"""Who reads whom: the predicate against brute force, and one attention against another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from eagle_offline import create_peagle_mask_mod
from eagle_offline.element_attention import ElementAttention
from tests.oracles import peagle as oracle
from tests.oracles.ttt import row_documents


def drawn(lengths: list[int], num_slots: int, seed: int) -> oracle.Drawn:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(num_slots, generator=generator) < 0.8).tolist()
    return oracle.draw_row(lengths, mask, 5, 0.8, 0.3, oracle.permutations_of(generator))


def tensors(elements: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    anchor_pos, depth = torch.tensor(elements, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return anchor_pos, depth


def full_mask(elements: list[tuple[int, int]], lengths: list[int], num_slots: int) -> list[list[bool]]:
    mask_mod = create_peagle_mask_mod(*tensors(elements), torch.tensor(lengths, dtype=torch.int64), num_slots)
    places = torch.arange(len(elements))
    found = mask_mod(0, 0, places[:, None], places[None, :])
    assert found.dtype == torch.bool
    return found.tolist()


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    padding=st.integers(0, 4),
    seed=st.integers(0, 1000),
    shuffled=st.booleans(),
)
def test_mask_is_that_of_brute_force(lengths, padding, seed, shuffled):
    num_slots = sum(lengths) + padding
    elements = drawn(lengths, num_slots, seed).elements
    # Elements on slots of padding, and beyond the row, as callers pad with.
    elements += [(slot, 0) for slot in range(sum(lengths), num_slots)] + [(num_slots, 0), (num_slots, 1)]
    if shuffled:
        order = torch.randperm(len(elements), generator=torch.Generator().manual_seed(seed)).tolist()
        elements = [elements[place] for place in order]
    documents = row_documents(lengths, num_slots)
    expected = [[oracle.reads(one, other, documents) for other in elements] for one in elements]
    assert full_mask(elements, lengths, num_slots) == expected


def test_example_of_the_docstring_holds():
    assert full_mask([(0, 0), (1, 0), (0, 1)], [2], 2) == [
        [True, False, False],
        [True, True, False],
        [True, False, True],
    ]


def test_documents_beyond_the_row_are_padding():
    assert full_mask([(0, 0), (1, 0), (2, 0)], [3], 2)[2] == [False, False, True]


def states(num_elements: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, num_elements, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("lengths", [[70], [30, 1, 39], [20, 20]])
def test_flex_attention_with_the_mask_equals_the_dense_twin(lengths):
    row = drawn(lengths, 70, 3)
    anchor_pos, depth = tensors(row.elements)
    queries, keys, values = states(len(anchor_pos))
    mask_mod = create_peagle_mask_mod(anchor_pos, depth, torch.tensor(lengths), 70)
    size = len(anchor_pos)
    with torch.no_grad():
        blocks = create_block_mask(mask_mod, None, None, size, size, device="cpu")
        expected = flex_attention(queries, keys, values, block_mask=blocks, enable_gqa=True)
        found = ElementAttention(anchor_pos, depth, torch.tensor(lengths), 70)(queries, keys, values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_attention_reads_what_brute_force_says_and_nothing_else():
    row = drawn([9, 6], 15, 1)
    elements = row.elements
    queries, keys, values = states(len(elements))
    found = ElementAttention(*tensors(elements), torch.tensor([9, 6]), 15)(queries, keys, values)
    for place, one in enumerate(elements):
        read = [j for j, other in enumerate(elements) if oracle.reads(one, other, row.documents)]
        for head in range(4):
            scores = keys[0, head // 2, read] @ queries[0, head, place] / 8**0.5
            weights = torch.exp(scores - torch.logsumexp(scores, dim=0))
            torch.testing.assert_close(found[0, head, place], weights @ values[0, head // 2, read])


def test_padding_is_read_by_nobody_and_gives_no_nan():
    anchor_pos, depth = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 0, 0, 1])
    attention = ElementAttention(anchor_pos, depth, torch.tensor([2]), 4)
    queries, keys, values = (tensor.requires_grad_() for tensor in states(5))
    found = attention(queries, keys, values)
    assert found.isfinite().all()
    found[:, :, [0, 1, 4]].sum().backward()
    for tensor in (keys, values):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[:, :, [2, 3]].any()
    without = F.scaled_dot_product_attention(queries[:, :, 2:4], keys[:, :, 2:4], values[:, :, 2:4],
                                             attn_mask=torch.eye(2, dtype=torch.bool), enable_gqa=True)  # fmt: skip
    torch.testing.assert_close(found[:, :, 2:4], without)

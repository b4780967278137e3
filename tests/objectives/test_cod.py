"""COD sampling against its literal reading, its laws, and the segments that elements fall in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import assign_cod_segments, generate_cod_sample_indices
from eagle_offline.errors import UsageError
from tests.oracles import peagle as oracle

NUM_SLOTS = 40
MASKS = st.one_of(
    st.lists(st.booleans(), max_size=NUM_SLOTS),
    st.lists(st.sampled_from([True] * 5 + [False]), max_size=NUM_SLOTS),
    st.integers(0, NUM_SLOTS).map(lambda n: [True] * n),
    st.integers(0, NUM_SLOTS).map(lambda n: [False] * n),
    st.integers(1, NUM_SLOTS).flatmap(
        lambda n: st.integers(0, n - 1).map(lambda t: [slot == t for slot in range(n)]),
    ),
)
RATIOS = st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
EDGES = {
    "nothing": [],
    "one slot": [True],
    "one slot, not supervised": [False],
    "two slots": [True, True],
    "slot 0 alone": [True, False, False, False],
    "last slot alone": [False, False, False, True],
    "none": [False] * 9,
    "all": [True] * 30,
    "isolated": [slot % 2 == 1 for slot in range(30)],
}


def pairs(mask: list[bool], seed: int, *arguments: float) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(seed)
    anchor_pos, depth = generate_cod_sample_indices(len(mask), torch.tensor(mask), *arguments, generator=generator)
    assert anchor_pos.dtype == depth.dtype == torch.int64
    return list(zip(anchor_pos.tolist(), depth.tolist(), strict=True))


def literal(mask: list[bool], seed: int, *arguments: float) -> list[tuple[int, int]]:
    return oracle.cod_elements(mask, *arguments, oracle.permutations_of(torch.Generator().manual_seed(seed)))


@settings(max_examples=1500, deadline=None)
@given(mask=MASKS, num_depths=st.integers(1, 9), ratio=RATIOS, ratio_min=RATIOS, seed=st.integers(0, 2**32))
def test_elements_are_those_of_the_literal_reading(mask, num_depths, ratio, ratio_min, seed):
    assert pairs(mask, seed, num_depths, ratio, ratio_min) == literal(mask, seed, num_depths, ratio, ratio_min)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("arguments", [(8, 0.7, 0.2), (4, 1.0, 1.0), (1, 0.5, 0.1)])
def test_edges_are_those_of_the_literal_reading(name, arguments):
    mask = EDGES[name]
    for seed in range(20):
        assert pairs(mask, seed, *arguments) == literal(mask, seed, *arguments)


@settings(max_examples=300, deadline=None)
@given(mask=MASKS, num_depths=st.integers(1, 9), ratio=RATIOS, ratio_min=RATIOS, seed=st.integers(0, 2**32))
def test_chains_are_nested_supervised_and_inside_the_document(mask, num_depths, ratio, ratio_min, seed):
    elements = pairs(mask, seed, num_depths, ratio, ratio_min)
    assert len(set(elements)) == len(elements)
    assert elements == sorted(elements, key=lambda element: (element[1], element[0]))
    assert [anchor for anchor, depth in elements if depth == 0] == list(range(len(mask)))
    assert max((depth for _, depth in elements), default=0) < num_depths
    for anchor, depth in elements:
        assert anchor >= 0
        assert anchor + depth < len(mask)
        if depth > 0:
            assert mask[anchor + depth]
            assert (anchor, depth - 1) in set(elements)
    counts = [sum(depth == d for _, depth in elements) for d in range(1, num_depths)]
    for depth, count in enumerate(counts, 1):
        assert count <= int(max(0, sum(mask) - depth) * max(ratio**depth, ratio_min))
    assert counts == sorted(counts, reverse=True)


def test_full_supervision_yields_the_sizes_of_the_ratios():
    elements = pairs([True] * 101, 3, 4, 0.7, 0.4)
    counts = [sum(depth == d for _, depth in elements) for d in range(4)]
    # 0.7 of 100, 0.7² of 99, then the floor 0.4 of 98; a chain is cut now and then by the document's end.
    assert counts[:2] == [101, 70]
    assert 47 <= counts[2] <= 48
    assert 37 <= counts[3] <= 39


def test_every_candidate_is_drawn_equally_often():
    # Supervised slots 1 to 4 of six: depth 1 takes int(3 · 0.7) = 2 of the four.
    mask, draws = [False, True, True, True, True, False], 3000
    taken = torch.zeros(6)
    for seed in range(draws):
        for anchor, depth in pairs(mask, seed, 2, 0.7, 0.2):
            if depth == 1:
                taken[anchor + 1] += 1
    assert taken.sum() == 2 * draws
    assert taken[[0, 5]].tolist() == [0, 0]
    assert ((taken[1:5] / draws - 0.5).abs() < 0.04).all()  # 4 standard deviations are 0.037


def test_the_draw_is_a_function_of_the_generator_alone():
    mask = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.7
    one = generate_cod_sample_indices(200, mask, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    two = generate_cod_sample_indices(200, mask, generator=torch.Generator().manual_seed(5))
    other = generate_cod_sample_indices(200, mask, generator=torch.Generator().manual_seed(6))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    torch.manual_seed(5)
    assert torch.equal(generate_cod_sample_indices(200, mask)[0], one[0])  # torch's own is a generator too


def test_a_mask_of_integers_and_one_with_a_row_axis_are_taken():
    mask = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1])
    drawn = [
        generate_cod_sample_indices(8, given, generator=torch.Generator().manual_seed(1))
        for given in (mask, mask.bool(), mask[None], mask[None].float())
    ]
    assert all(torch.equal(a, b) for one in drawn for a, b in zip(one, drawn[0], strict=True))


def test_a_mask_of_another_length_is_refused_in_one_line():
    with pytest.raises(UsageError, match="expected 5 slots, found 4") as refused:
        generate_cod_sample_indices(5, torch.ones(4))
    assert "\n" not in str(refused.value)


@settings(max_examples=300, deadline=None)
@given(mask=MASKS.filter(bool), num_segments=st.integers(1, NUM_SLOTS + 3), seed=st.integers(0, 1000))
def test_segments_are_those_of_the_definition(mask, num_segments, seed):
    elements = pairs(mask, seed, 6, 0.9, 0.3)
    anchor_pos, depth = (torch.tensor(values) for values in zip(*elements, strict=True))
    found = assign_cod_segments(anchor_pos, depth, len(mask), num_segments)
    assert found.dtype == torch.int64
    assert found.tolist() == [oracle.segment_of(element, len(mask), num_segments) for element in elements]


def test_examples_of_the_docstrings_hold():
    generate = generate_cod_sample_indices(5, torch.tensor([1, 1, 1, 0, 0]), 3, 1.0)
    assert list(zip(*(values.tolist() for values in generate), strict=True))[5:] == [(0, 1), (1, 1), (0, 2)]
    owners = assign_cod_segments(torch.tensor([0, 1, 2, 3, 1]), torch.tensor([0, 0, 0, 0, 1]), 4, 2)
    assert owners.tolist() == [0, 0, 1, 1, 1]
    empty = torch.zeros(0, dtype=torch.int64)
    assert assign_cod_segments(empty, empty, 0, 3).tolist() == []

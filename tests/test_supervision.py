"""The target's logits projected onto the draft vocabulary, and which positions supervise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import compute_target_distribution
from tests.oracles.distribution import target_distribution

TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}  # the contract says float32


def selection(ids: list[int], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[ids] = True
    return torch.tensor(ids), mask


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_projection_is_a_softmax_over_the_draft_vocabulary_alone(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(*leading, 17, generator=generator)).to(dtype)
    chosen = selection([0, 3, 4, 9, 16], 17)
    loss_mask = (torch.rand(leading, generator=generator) < 0.7).long()
    probs, positions = compute_target_distribution(logits, *chosen, loss_mask)
    expected_probs, expected_positions = target_distribution(logits, *chosen, loss_mask)
    assert probs.dtype == torch.float32 or dtype == torch.float64  # logits are defined in float32 at most
    assert probs.shape == (*leading, 5)
    assert positions.shape == (*leading, 1)
    supervised = loss_mask.bool()
    torch.testing.assert_close(probs[supervised].double(), expected_probs[supervised], **TOLERANCE)
    assert torch.equal(positions.squeeze(-1).bool(), expected_positions)


def test_a_position_counts_only_when_the_full_vocabulary_argmax_is_selected() -> None:
    logits = torch.tensor([[[0.0, 5.0, 1.0, 2.0], [0.0, 1.0, 5.0, 2.0], [0.0, 1.0, 2.0, 5.0], [5.0, 1.0, 2.0, 3.0]]])
    chosen = selection([1, 3], 4)
    _, positions = compute_target_distribution(logits, *chosen, torch.tensor([[1, 1, 1, 1]]))
    assert positions.squeeze(-1).bool().tolist() == [[True, False, True, False]]
    _, masked = compute_target_distribution(logits, *chosen, torch.tensor([[0, 1, 1, 1]]))
    assert masked.squeeze(-1).bool().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(("ids", "counts"), [([1, 3], True), ([2, 3], False)])
def test_ties_go_to_the_lower_id(ids: list[int], counts: bool) -> None:
    logits = torch.tensor([[[0.0, 7.0, 7.0, 1.0]]])
    _, positions = compute_target_distribution(logits, *selection(ids, 4), torch.tensor([[1]]))
    assert bool(positions) is counts


def test_the_whole_vocabulary_as_draft_vocabulary_is_the_plain_softmax() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1))
    chosen = selection(list(range(9)), 9)
    loss_mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    probs, positions = compute_target_distribution(logits, *chosen, loss_mask)
    supervised = loss_mask.bool()
    torch.testing.assert_close(probs[supervised], torch.softmax(logits, dim=-1)[supervised], **TOLERANCE)
    assert torch.equal(positions.squeeze(-1).bool(), supervised)


def test_large_logits_and_large_unselected_ones_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, -3e4, 2.9e4, 9e4], [-9e4, -9e4, -9e4, 8e4]]])
    probs, _ = compute_target_distribution(logits, *selection([0, 1, 2], 4), torch.tensor([[1, 1]]))
    torch.testing.assert_close(probs, torch.tensor([[[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]]))


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8),
    st.sets(st.integers(0, 7), min_size=1),
    st.floats(-30, 30, width=32),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_one_and_ignore_unselected_logits(row: list[float], ids: set[int], other: float) -> None:
    chosen = selection(sorted(ids), 8)
    logits = torch.tensor([[row]])
    changed = torch.where(chosen[1], logits, torch.full_like(logits, other))
    one = torch.tensor([[1]])
    probs, _ = compute_target_distribution(logits, *chosen, one)
    same, _ = compute_target_distribution(changed, *chosen, one)
    assert torch.equal(probs, same)
    assert float(probs.double().sum()) == pytest.approx(1, abs=1e-6)
    assert (probs >= 0).all()


def test_inputs_stay_as_they_were() -> None:
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2))
    loss_mask = torch.tensor([[1, 0, 1, 1]])
    copies = logits.clone(), loss_mask.clone()
    compute_target_distribution(logits, *selection([0, 2], 6), loss_mask)
    assert torch.equal(logits, copies[0])
    assert torch.equal(loss_mask, copies[1])

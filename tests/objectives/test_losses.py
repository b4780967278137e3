"""The masked soft cross entropy against its sum written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import masked_soft_cross_entropy
from tests.oracles.distribution import soft_cross_entropy_sum


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    probs = torch.softmax(2 * torch.randn(2, 5, 7, generator=generator), dim=-1)
    mask = torch.rand(2, 5, 1, generator=generator) < 0.6
    mask[0, 0], mask[1, 4] = True, False
    return logits, probs, mask


def value(loss: torch.Tensor) -> float:
    return float(loss.detach())


def written_out(logits: torch.Tensor, probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    total, count = soft_cross_entropy_sum(logits.flatten(0, 1), probs.flatten(0, 1), mask.flatten())
    return total / count


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_equal_the_mean_over_masked_positions(seed: int, dtype: torch.dtype, relative: float) -> None:
    logits, probs, mask = draw(seed, dtype)
    exact = logits.detach().double().requires_grad_()
    expected = written_out(exact, probs, mask)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    found = masked_soft_cross_entropy(logits, probs, mask)
    (grad,) = torch.autograd.grad(found, logits)
    assert found.dim() == 0
    assert value(found) == pytest.approx(value(expected), rel=relative)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=relative, atol=relative * 1e-1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_mask_may_be_of_any_kind_of_zero_and_one(dtype: torch.dtype) -> None:
    logits, probs, mask = draw(3)
    expected = written_out(logits, probs, mask)
    assert value(masked_soft_cross_entropy(logits, probs, mask.to(dtype))) == pytest.approx(value(expected), rel=1e-12)


def test_no_position_gives_zero_with_zero_gradients() -> None:
    logits, probs, mask = draw(4)
    loss = masked_soft_cross_entropy(logits, probs, torch.zeros_like(mask))
    (grad,) = torch.autograd.grad(loss, logits)
    assert value(loss) == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_positions_outside_the_mask_change_neither_value_nor_gradient() -> None:
    logits, probs, mask = draw(5)
    other_logits, other_probs, _ = draw(6)
    mixed = torch.where(mask, logits.detach(), other_logits.detach()).requires_grad_()
    before = masked_soft_cross_entropy(logits, probs, mask)
    after = masked_soft_cross_entropy(mixed, torch.where(mask, probs, other_probs), mask)
    assert value(after) == pytest.approx(value(before), rel=1e-12)
    (grad,) = torch.autograd.grad(after, mixed)
    assert torch.equal(grad[~mask.squeeze(-1)], torch.zeros_like(grad[~mask.squeeze(-1)]))


def test_extreme_logits_stay_finite_and_right() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=torch.float64, requires_grad=True)
    probs = torch.tensor([[[0.0, 0.5, 0.5]]])
    loss = masked_soft_cross_entropy(logits, probs, torch.ones(1, 1, 1, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, logits)
    assert value(loss) == pytest.approx(1.5e4, rel=1e-12)
    torch.testing.assert_close(grad, torch.tensor([[[1.0, -0.5, -0.5]]], dtype=torch.float64))


def test_uniform_logits_cost_the_log_of_the_draft_vocabulary() -> None:
    _, probs, mask = draw(7)
    loss = masked_soft_cross_entropy(torch.zeros(2, 5, 7, dtype=torch.float64), probs, mask)
    assert value(loss) == pytest.approx(math.log(7), rel=1e-6)  # float32 probabilities sum to one to 1e-7


@given(st.integers(0, 2**31), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_adding_a_constant_to_every_logit_changes_nothing(seed: int, constant: float) -> None:
    logits, probs, mask = draw(seed)
    before = masked_soft_cross_entropy(logits, probs, mask)
    after = masked_soft_cross_entropy(logits + constant, probs, mask)
    # a float32 distribution sums to one within 1e-7 and so does not move by more than that times the constant
    assert value(after) == pytest.approx(value(before), rel=1e-9, abs=1e-11)


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_no_draft_costs_less_than_the_target_itself(seed: int) -> None:
    logits, probs, mask = draw(seed)
    exact = torch.log(probs.double())
    floor = masked_soft_cross_entropy(exact, probs, mask)
    assert value(masked_soft_cross_entropy(logits, probs, mask)) >= value(floor) - 1e-6

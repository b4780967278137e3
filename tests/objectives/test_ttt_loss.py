"""From sums to the loss, and from the loss to what one slot adds to it, against means written out in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from eagle_offline.errors import UsageError
from eagle_offline.objectives.ttt_loss import TTTLoss
from tests.oracles.distribution import overlaps
from tests.oracles.ttt import step_loss

K, NUM_ROWS, NUM_TOKENS = 3, 11, 9
OPTIONS = [
    {"lk_loss_type": None},
    {"lk_loss_type": None, "step_decay": 0.3},
    {"lk_loss_type": "alpha", "step_decay": 1.0},
    {"lk_loss_type": "lambda"},
    {"lk_loss_type": "lambda", "lk_kl_scale": 0.4, "lk_kl_decay": 1.5, "step_decay": 0.6},
    {"lk_loss_type": "lambda", "lk_kl_scale": 0.0},
    {"lk_loss_type": "lambda", "lk_kl_decay": 0.0},
]


@dataclass
class Sums:
    losses: torch.Tensor
    counts: torch.Tensor
    overlaps: torch.Tensor
    log_overlaps: torch.Tensor


def draw(seed: int = 0, empty: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, probabilities [K, N, Vd] and masks [K, N]; `empty` names a step without supervision."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(K, NUM_ROWS, NUM_TOKENS, generator=generator, dtype=torch.float64)
    probs = (3 * torch.randn(K, NUM_ROWS, NUM_TOKENS, generator=generator, dtype=torch.float64)).softmax(-1)
    mask = torch.rand(K, NUM_ROWS, generator=generator) < 0.7
    if empty is not None:
        mask[empty] = False
    return logits.requires_grad_(), probs, mask


def terms(logits: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy, overlap and its logarithm of every row, [K, N] each."""
    log_softmax = logits - logits.logsumexp(-1, keepdim=True)
    alpha = torch.minimum(probs, log_softmax.exp()).sum(-1)
    return -(probs * log_softmax).sum(-1), alpha, alpha.log()


def sums_of(logits: torch.Tensor, probs: torch.Tensor, mask: torch.Tensor) -> Sums:
    entropy, alpha, log_alpha = (torch.where(mask, term, 0 * term).sum(-1) for term in terms(logits, probs))
    return Sums(entropy, mask.sum(-1), alpha, log_alpha)


def by_definition(logits: torch.Tensor, probs: torch.Tensor, mask: torch.Tensor, options: dict) -> torch.Tensor:
    decay, kind = options.get("step_decay", 0.8), options["lk_loss_type"]
    scale, fall = options.get("lk_kl_scale", 1.0), options.get("lk_kl_decay", 3.0)
    losses = [step_loss(logits[k], probs[k], mask[k], kind, scale, fall)[0] for k in range(K)]
    weights = [decay**k for k in range(K)]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)  # type: ignore[return-value]


@pytest.mark.parametrize("empty", [None, 0, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_of_sums_is_the_loss_by_definition(options, empty):
    logits, probs, mask = draw(empty=empty)
    expected = by_definition(logits, probs, mask, options)
    loss = TTTLoss(K, **options).loss(sums_of(logits, probs, mask))
    torch.testing.assert_close(loss, expected.detach() + 0 * loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", [None, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weighted_rows_have_the_gradient_of_the_loss_whichever_pack_they_are_in(options, empty):
    """Rows cut into three packs; the weights come from counts and overlaps of all of them, before any gradient."""
    logits, probs, mask = draw(1, empty)
    loss = TTTLoss(K, **options)
    (expected,) = torch.autograd.grad(by_definition(logits, probs, mask, options), logits)
    sums = sums_of(logits, probs, mask)
    weights = loss.weights(sums.counts, sums.overlaps.detach() if loss.weighs_by_overlap else None)
    found = torch.zeros_like(expected)
    for rows in (slice(0, 2), slice(2, 9), slice(9, NUM_ROWS)):
        entropy, alpha, log_alpha = terms(logits[:, rows], probs[:, rows])
        added = weights.cross_entropy[:, None] * entropy
        if weights.overlap is not None:
            added = added - weights.overlap[:, None] * alpha
        if weights.log_overlap is not None:
            added = added - weights.log_overlap[:, None] * log_alpha
        (gradient,) = torch.autograd.grad((added * mask[:, rows]).sum(), logits)
        found += gradient
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert weights.cross_entropy.dtype == torch.float64


def test_the_share_of_the_lambda_loss_is_of_all_packs_not_of_each():
    """Two packs of unlike overlap: the mean of their own shares would be another number."""
    loss = TTTLoss(1, lk_loss_type="lambda")
    counts, sums = torch.tensor([[1], [3]]), torch.tensor([[0.9], [0.3]], dtype=torch.float64)
    both = loss.weights(counts.sum(0), sums.sum(0))
    share = float(torch.exp(torch.tensor(-3.0 * 1.2 / 4)))
    assert float(both.cross_entropy) == pytest.approx(share / 4)
    assert float(both.overlap) == pytest.approx((1 - share) / 4)


def test_lambda_weights_need_the_overlaps_first():
    with pytest.raises(UsageError, match="mean overlaps"):
        TTTLoss(K, lk_loss_type="lambda").weights(torch.ones(K, dtype=torch.int64))
    assert [TTTLoss(K, lk_loss_type=kind).weighs_by_overlap for kind in (None, "alpha", "lambda")] == [0, 0, 1]


def test_overlap_is_the_sum_of_the_smaller_probabilities():
    logits, probs, mask = draw(2)
    expected = [float(alpha.detach()) for k in range(K) for alpha in overlaps(logits[k], probs[k], mask[k])]
    assert terms(logits, probs)[1][mask].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"lk_loss_type": "beta"},
        {"ttt_steps": 0},
        {"lk_kl_scale": 1.5},
        {"lk_kl_scale": float("nan")},
        {"lk_kl_decay": -1.0},
        {"step_decay": 0.0},
    ],
    ids=str,
)
def test_factors_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        TTTLoss(**options)

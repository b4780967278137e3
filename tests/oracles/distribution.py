"""What the target's logits say about one batch, one position at a time, in float64."""

from __future__ import annotations

import torch


def project_row(logits: torch.Tensor, selected_token_ids: torch.Tensor) -> torch.Tensor:
    """Softmax of one row of full-vocabulary logits over the selected ids alone: float64 [Vd]."""
    chosen = torch.stack([logits[int(token_id)].double() for token_id in selected_token_ids])
    weights = torch.exp(chosen - chosen.max())
    return weights / weights.sum()


def first_argmax(row: torch.Tensor) -> int:
    """The index of the largest entry, the lowest one when several are equal."""
    values = row.tolist()
    return values.index(max(values))


def target_distribution(
    logits: torch.Tensor, selected_token_ids: torch.Tensor, selected_token_mask: torch.Tensor, loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected probabilities float64 [..., Vd] and position mask bool [...] of logits [..., V]."""
    flat_logits, flat_mask = logits.reshape(-1, logits.shape[-1]), loss_mask.reshape(-1)
    probs = torch.stack([project_row(row, selected_token_ids) for row in flat_logits])
    positions = torch.tensor(
        [
            bool(m) and bool(selected_token_mask[first_argmax(row)])
            for row, m in zip(flat_logits, flat_mask, strict=True)
        ]
    )
    return probs.reshape(*loss_mask.shape, -1), positions.reshape(loss_mask.shape)


def soft_cross_entropy_sum(
    logits: torch.Tensor, target_probs: torch.Tensor, position_mask: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Sum over masked positions of the cross entropy in float64, and how many positions those are.

    `logits`, `target_probs` are [N, Vd], `position_mask` [N].
    """
    total, count = logits.new_zeros((), dtype=torch.float64), 0
    for row, probs, counted in zip(logits, target_probs, position_mask, strict=True):
        if counted:
            row64 = row.double()
            total = total - (probs.double() * (row64 - torch.logsumexp(row64, dim=0))).sum()
            count += 1
    return total, count


def overlaps(logits: torch.Tensor, target_probs: torch.Tensor, position_mask: torch.Tensor) -> list[torch.Tensor]:
    """`sum_v min(p_v, softmax(q)_v)` of every masked position, in order."""
    return [
        torch.minimum(probs.double(), torch.exp(row.double() - torch.logsumexp(row.double(), dim=0))).sum()
        for row, probs, counted in zip(logits, target_probs, position_mask, strict=True)
        if counted
    ]

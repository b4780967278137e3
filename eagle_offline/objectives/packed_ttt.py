"""The EAGLE-3 unroll as training runs it: the numbers of the plain one, and nothing computed that they do not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from eagle_offline.objectives.fused_loss import TargetRows, fused_loss
from eagle_offline.objectives.plan import UnrollPlan
from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.objectives.ttt_loss import StepWeights


class Unroll(Protocol):
    """A draft at work; `eagle_offline.draft.packed.PackedUnroll` is one."""

    def first(self, aux_hidden_states: Tensor) -> Tensor: ...
    def next(self, step: int, hidden: Tensor) -> Tensor: ...


def unroll_packed(
    unroll: Unroll,
    normed: Callable[[Tensor], Tensor],
    head_weight: Tensor,
    plan: UnrollPlan,
    aux_hidden_states: Callable[[], Tensor],
    targets: TargetRows,
    weights: StepWeights,
) -> tuple[Tensor, UnrollSums]:
    """Run an unroll over packed documents.

    Args:
        unroll: a fresh one, of the draft.
        normed: what stands between the state that is fed back and the draft's head.
        head_weight: ``[Vd, H]``, of the draft's head.
        plan: what to compute.
        aux_hidden_states: gives ``[N, A·H]``.
        targets: the target's supervision.
        weights: what a row of each step adds to the loss.

    Returns:
        The loss, with gradient, and the sums of the plain unroll over one row of ``N`` slots, without.
    """
    hidden, states = None, []
    for step, planned in enumerate(plan.steps):
        hidden = unroll.first(aux_hidden_states()) if hidden is None else unroll.next(step, hidden)
        states.append(normed(hidden[planned.supervised]))
    sums = fused_loss(torch.cat(states), head_weight, plan.loss_rows, targets, weights)
    step_hits = torch.zeros_like(plan.step_valid)
    step_hits.view(-1)[plan.loss_slots] = sums.hits
    step_overlaps = torch.zeros(step_hits.shape, dtype=sums.overlaps.dtype, device=step_hits.device)
    step_overlaps.view(-1)[plan.loss_slots] = sums.overlaps
    return sums.loss, UnrollSums(
        losses=sums.losses,
        counts=plan.step_counts,
        hits=step_hits.sum(dim=1),
        overlaps=step_overlaps.sum(dim=1),
        log_overlaps=sums.log_overlaps,
        step_hits=step_hits.unsqueeze(1),
        step_overlaps=step_overlaps.unsqueeze(1),
        step_valid=plan.step_valid.unsqueeze(1),
    )

"""Head, target distribution, loss and its gradient in one pass over chunks: no full logits are ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle_offline.objectives.ttt_loss import StepWeights
from eagle_offline.supervision import Head


@dataclass(frozen=True)
class TargetRows:
    """Stored supervision: final states with the head restricted to the draft vocabulary, or probabilities.

    Attributes:
        rows: gives rows from one to before another, ``[n, H]`` with a head, ``[n, Vd]`` without.
        head: the target's, its rows the draft vocabulary; None for probabilities.
    """

    rows: Callable[[int, int], Tensor]
    head: Head | None

    @classmethod
    def of(cls, rows: Tensor, head: Head | None) -> TargetRows:
        """Return supervision that is there as a whole, ``[P, H]`` or ``[P, Vd]``."""
        return cls(lambda start, stop: rows[start:stop], head)

    def probs(self, start: int, stop: int) -> Tensor:
        """Return the probabilities of some rows, float32 ``[n, Vd]`` (float64 for float64 rows)."""
        rows = self.rows(start, stop)
        if self.head is not None:
            return self.head.logits(rows).softmax(dim=-1)
        return rows if rows.dtype == torch.float64 else rows.float()


@dataclass(frozen=True)
class LossRows:
    """Which rows of a loss belong to which step and which target, sorted by target.

    Attributes:
        order: int64 ``[R]``, where each sorted row stands among the states given.
        steps, targets: int64 ``[R]``, of each sorted row.
        chunks: bounds of each chunk, on the host: first and last sorted row, first and last target row.
    """

    order: Tensor
    steps: Tensor
    targets: Tensor
    chunks: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class LossSums:
    """Sums by step, and what each row came to.

    Attributes:
        loss: scalar with gradient, see `StepWeights`.
        losses, log_overlaps: float ``[K]``: soft cross-entropy, or KL where `StepWeights` asks for it, and ``Σ log α``
            (``α = 0`` left out); no gradient.
        hits: bool ``[R]``, top-1 right, in the order of the states given.
        overlaps: float ``[R]``, ``α``, in the order of the states given.
    """

    loss: Tensor
    losses: Tensor
    log_overlaps: Tensor
    hits: Tensor
    overlaps: Tensor


def fused_loss(
    states: Tensor, head_weight: Tensor, rows: LossRows, targets: TargetRows, weights: StepWeights
) -> LossSums:
    """Return the weighted loss of draft states against the target, and what else the same pass sees.

    Args:
        states: ``[R, H]``, normed, ready for the draft's head.
        head_weight: ``[Vd, H]``, of the draft's head.
        rows: which step and target each row has.
        targets: the target's supervision.
        weights: what a row of each step adds to the loss.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        states = states.to(torch.get_autocast_dtype(device))
    return LossSums(*_FusedLoss.apply(states, head_weight, rows, targets, weights))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head_weight: Tensor, rows: LossRows, targets: TargetRows, weights: StepWeights
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        head = head_weight.to(states.dtype)
        wants_states, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_states = torch.empty_like(states) if wants_states else None
        grad_head = torch.zeros_like(head_weight, dtype=wide) if wants_head else None
        losses = torch.zeros(len(weights.cross_entropy), dtype=wide, device=states.device)
        log_overlaps = torch.zeros_like(losses)
        hits = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        overlaps = torch.zeros(len(states), dtype=wide, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for first, last, first_target, last_target in rows.chunks:
                order, steps = rows.order[first:last], rows.steps[first:last]
                probs = targets.probs(first_target, last_target).to(wide)
                best = probs.argmax(dim=-1)
                entropies = torch.special.entr(probs).sum(dim=-1) if weights.kl_divergence else None
                local = rows.targets[first:last] - first_target
                probs, chunk = probs[local], states[order]
                logits = (chunk @ head.T).to(wide)
                hits[order] = logits.argmax(dim=-1) == best[local]
                normalizer = logits.logsumexp(dim=-1)
                mass = probs.sum(dim=-1)
                row_losses = mass * normalizer - torch.linalg.vecdot(probs, logits)
                if entropies is not None:
                    row_losses -= entropies[local]
                losses.index_add_(0, steps, row_losses)
                softmax = logits.sub_(normalizer.unsqueeze(-1)).exp_()
                alpha = torch.minimum(probs, softmax).sum(dim=-1)
                overlaps[order] = alpha
                log_overlaps.index_add_(0, steps, alpha.where(alpha > 0, torch.ones_like(alpha)).log())
                if not (wants_states or wants_head):
                    continue
                gradient = _logit_gradient(softmax, probs, mass, alpha, steps, weights).to(states.dtype)
                if grad_states is not None:
                    grad_states[order] = gradient @ head
                if grad_head is not None:
                    grad_head += (gradient.T @ chunk).to(wide)
        ctx.save_for_backward(grad_states, grad_head)
        ctx.weight_dtype = head_weight.dtype
        ctx.mark_non_differentiable(losses, log_overlaps, hits, overlaps)
        loss = (weights.cross_entropy * losses.double()).sum()
        if weights.overlap is not None:
            loss = loss - (weights.overlap[rows.steps] * overlaps[rows.order]).sum()
        if weights.log_overlap is not None:
            loss = loss - (weights.log_overlap * log_overlaps).sum()
        return loss.to(wide), losses, log_overlaps, hits, overlaps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        grad_states, grad_head = ctx.saved_tensors
        upstream = gradients[0]
        return (
            None if grad_states is None else grad_states * upstream,
            None if grad_head is None else (grad_head * upstream).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _logit_gradient(
    softmax: Tensor, probs: Tensor, mass: Tensor, alpha: Tensor, steps: Tensor, weights: StepWeights
) -> Tensor:
    """Return the gradient of the rows' loss by their logits; ``softmax`` and ``probs`` are used up.

    With ``s`` the softmax: ``∂CE/∂q = Σp · s − p``, ``∂α/∂q_j = s_j ([s_j < p_j] − Σ_i [s_i < p_i] s_i)``.
    """
    chain = None
    if weights.overlap is not None:
        chain = weights.overlap[steps].to(softmax.dtype)
    if weights.log_overlap is not None:
        # A row without any overlap adds nothing to Σ log α.
        share = weights.log_overlap[steps].to(softmax.dtype) / alpha
        share = share.where(alpha > 0, torch.zeros_like(share))
        chain = share if chain is None else chain + share
    pulled = None
    if chain is not None:
        below = softmax * (softmax < probs)
        pulled = (below - softmax * below.sum(dim=-1, keepdim=True)).mul_(chain.unsqueeze(-1))
    gradient = softmax.mul_(mass.unsqueeze(-1)).sub_(probs)
    gradient = gradient.mul_(weights.cross_entropy[steps].to(softmax.dtype).unsqueeze(-1))
    return gradient if pulled is None else gradient.sub_(pulled)


def chunk_rows(targets: Sequence[int], longest: int) -> tuple[tuple[int, int, int, int], ...]:
    """Return chunks of at most ``longest`` rows, for `LossRows`, from sorted targets on the host.

    Example:
        >>> chunk_rows([0, 0, 1, 4], 3)
        ((0, 3, 0, 2), (3, 4, 4, 5))
    """
    bounds = [(start, min(start + longest, len(targets))) for start in range(0, len(targets), longest)]
    return tuple((start, stop, int(targets[start]), int(targets[stop - 1]) + 1) for start, stop in bounds)

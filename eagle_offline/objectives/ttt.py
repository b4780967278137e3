"""The EAGLE-3 objective: the test-time-training unroll, its loss and its metrics, in plain form."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from eagle_offline.alignment import SlotBatch, shift_left_with_zero
from eagle_offline.alignment import doc_remaining as remaining_steps
from eagle_offline.errors import UsageError
from eagle_offline.objectives.losses import overlap, soft_cross_entropy
from eagle_offline.objectives.ttt_loss import STEP_DECAY, TTTLoss
from eagle_offline.supervision import compute_target_distribution


class Draft(Protocol):
    """What an unroll asks of a draft; `eagle_offline.draft.eagle3.Eagle3DraftModel` is one."""

    def project_hidden_states(self, aux: Tensor) -> Tensor: ...

    def __call__(
        self,
        input_ids: Tensor,
        projected_hidden_states: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        cache_hidden: list[list],
        seq_lens: Tensor | None,
    ) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...


@dataclass
class Eagle3StepMetrics:
    """What one call of a trainer module yields.

    Attributes:
        loss: scalar, with gradient.
        accuracy: scalar, top-1 agreement over all supervised (slot, step) pairs.
        valid_tokens: scalar, how many such pairs there are.
        step_prefix_hits: int64 ``[K]``, slots right at every step up to ``k``.
        step_valid: int64 ``[K]``, slots valid by loss mask and document at every step up to ``k``.
    """

    loss: Tensor
    accuracy: Tensor
    valid_tokens: Tensor
    step_prefix_hits: Tensor
    step_valid: Tensor


@dataclass
class UnrollSums:
    """Sums over slots, one entry a step; what is divided, and by what, is the caller's business.

    Attributes:
        losses: float ``[K]``, soft cross-entropy (of P-EAGLE KL) summed over supervised slots, with gradient.
        counts: int64 ``[K]``, supervised slots. hits: int64 ``[K]``, those whose top-1 is right.
        overlaps, log_overlaps: float ``[K]``, ``Σ α`` and ``Σ log α`` (terms with ``α = 0`` left out), when asked for.
        step_hits: bool ``[K, B, T]``, top-1 right at a supervised slot, the target's choice in the draft vocabulary.
        step_overlaps: float ``[K, B, T]``, ``α`` at a supervised slot, 0 elsewhere and where it was not asked for.
        step_valid: bool ``[K, B, T]``, valid by loss mask and document at this step.
    """

    losses: Tensor
    counts: Tensor
    hits: Tensor
    overlaps: Tensor
    log_overlaps: Tensor
    step_hits: Tensor
    step_overlaps: Tensor
    step_valid: Tensor

    def prefix_hits(self) -> Tensor:
        """Return int64 ``[K]``: slots right at every step up to ``k``."""
        return self.step_hits.long().cumprod(dim=0).sum(dim=(1, 2))

    def prefix_asked(self) -> Tensor:
        """Return int64 ``[K]``: slots valid at every step up to ``k`` and right at every one before ``k``."""
        right_before = torch.ones_like(self.step_hits)
        right_before[1:] = self.step_hits[:-1]
        return (right_before & self.step_valid).long().cumprod(dim=0).sum(dim=(1, 2))

    def chain_overlaps(self) -> Tensor:
        """Return float64 ``[K]``: ``Σ Π_{j ≤ k} α_j`` over slots valid at every step up to ``k``."""
        return self.step_overlaps.double().mul(self.step_valid).cumprod(dim=0).sum(dim=(1, 2))

    def prefix_valid(self) -> Tensor:
        """Return int64 ``[K]``: slots valid at every step up to ``k``."""
        return self.step_valid.long().cumprod(dim=0).sum(dim=(1, 2))


def supervised_counts(batch: SlotBatch, ttt_steps: int) -> Tensor:
    """Return int64 ``[K]``: ``N_k`` of a batch, from masks alone, before any forward."""
    mask, counts = batch.position_mask, []
    for step in range(ttt_steps):
        counts.append(batch.counting_slots(mask, step).sum())
        mask = shift_left_with_zero(mask)
    return torch.stack(counts)


def unroll(draft_model: Draft, batch: SlotBatch, ttt_steps: int, *, with_overlap: bool = False) -> UnrollSums:
    """Run the draft ``ttt_steps`` times over its own states and sum losses and hits per step.

    All steps share one ``cache_hidden``, so step ``k`` attends causally to step 0's keys and to the own slot's
    keys of steps ``1 … k``, as the draft does when it serves. ``attention_mask`` stays; ids and masks roll left by
    one a step. Logits are computed at supervised slots only; no other slot has a say in a sum.

    Args:
        draft_model: the draft.
        batch: see `SlotBatch`.
        ttt_steps: ``K``.
        with_overlap: also sum the overlaps, which the LK losses need.
    """
    hidden = draft_model.project_hidden_states(batch.aux_hidden_states)
    cache_hidden: list[list] = [[], []]
    ids, position_mask, loss_mask = batch.input_ids, batch.position_mask, batch.loss_mask.bool()
    sums: dict[str, list[Tensor]] = {field.name: [] for field in fields(UnrollSums)}
    for step in range(ttt_steps):
        if step > 0:
            ids, position_mask, loss_mask = (shift_left_with_zero(rows) for rows in (ids, position_mask, loss_mask))
        hidden = draft_model(ids, hidden, batch.attention_mask, batch.position_ids, cache_hidden, batch.seq_lens)
        supervised = batch.counting_slots(position_mask, step)
        slots = supervised.flatten().nonzero().squeeze(-1)
        logits = draft_model.compute_logits(hidden.flatten(0, 1).index_select(0, slots))
        # Probabilities are not rolled: slot t at step k is supervised by what slot t + k is at step 0.
        probs = batch.target_probs.flatten(0, 1).index_select(0, slots + step)
        hits = torch.zeros_like(supervised)
        hits.view(-1)[slots] = logits.argmax(dim=-1) == probs.argmax(dim=-1)
        alpha = overlap(logits, probs) if with_overlap else torch.ones_like(slots, dtype=hidden.dtype)
        overlaps = torch.zeros(supervised.shape, dtype=alpha.dtype, device=alpha.device)
        if with_overlap:
            overlaps.view(-1)[slots] = alpha.detach()
        sums["losses"].append(soft_cross_entropy(logits, probs).sum())
        sums["overlaps"].append(alpha.sum())
        # A slot without any overlap adds nothing; 1 in its stead keeps 1/α out of the gradient.
        sums["log_overlaps"].append(alpha.where(alpha > 0, torch.ones_like(alpha)).log().sum())
        sums["counts"].append(supervised.sum())
        sums["hits"].append(hits.sum())
        sums["step_hits"].append(hits)
        sums["step_overlaps"].append(overlaps)
        sums["step_valid"].append(batch.counting_slots(loss_mask, step))
    return UnrollSums(**{name: torch.stack(values) for name, values in sums.items()})


class Eagle3TrainerModule(nn.Module):
    """A draft and its EAGLE-3 loss: the plain reference, one call a batch, each mean over that batch.

    Args:
        draft_model: an `Eagle3DraftModel`.
        selected_token_ids: int64 ``[Vd]``, strictly increasing.
        selected_token_mask: bool ``[V]``.
        ttt_steps: ``K``, how far the draft is unrolled (7).
        lk_loss_type: None for soft cross-entropy, ``"alpha"`` or ``"lambda"`` (LK losses, arXiv 2602.23881).
        lk_kl_scale, lk_kl_decay: ``s`` in ``[0, 1]`` and ``d ≥ 0`` of the ``lambda`` loss.

    Raises:
        UsageError: for a loss type or a factor out of range.
    """

    selected_token_ids: Tensor
    selected_token_mask: Tensor

    def __init__(
        self,
        draft_model: nn.Module,
        *,
        selected_token_ids: Tensor,
        selected_token_mask: Tensor,
        ttt_steps: int = 7,
        lk_loss_type: str | None = None,
        lk_kl_scale: float = 1.0,
        lk_kl_decay: float = 3.0,
    ):
        super().__init__()
        self.ttt_loss = TTTLoss(ttt_steps, STEP_DECAY, lk_loss_type, lk_kl_scale, lk_kl_decay)
        self.draft_model = draft_model
        self.register_buffer("selected_token_ids", selected_token_ids, persistent=False)
        self.register_buffer("selected_token_mask", selected_token_mask.bool(), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        aux_hidden_states: Tensor,
        target_logits: Tensor | None = None,
        target_probs: Tensor | None = None,
        position_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_lens: Tensor | None = None,
        doc_remaining: Tensor | None = None,
    ) -> Eagle3StepMetrics:
        """Run the unrolled loss for one slot-frame batch.

        Exactly one supervision: full-vocabulary ``target_logits`` ``[B, T, V]``, or ``target_probs`` ``[B, T, Vd]``
        with ``position_mask`` ``[B, T, 1]``. Packed rows bring ``position_ids`` and ``seq_lens``;
        ``doc_remaining`` follows from ``seq_lens`` when it is left out. Other tensors: see `SlotBatch`.

        Raises:
            UsageError: none or both supervisions given.
        """
        if (target_logits is None) == (target_probs is None):
            raise UsageError("pass exactly one of target_logits and target_probs")
        if target_logits is not None:
            target_probs, position_mask = compute_target_distribution(
                target_logits, self.selected_token_ids, self.selected_token_mask, loss_mask
            )
        if target_probs is None or position_mask is None:
            raise UsageError("target_probs needs its position_mask")
        if doc_remaining is None and seq_lens is not None:
            doc_remaining = remaining_steps(seq_lens, input_ids.shape[1])
        batch = SlotBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            loss_mask=loss_mask.bool(),
            aux_hidden_states=aux_hidden_states,
            target_probs=target_probs,
            position_mask=position_mask.reshape(loss_mask.shape).bool(),
            position_ids=position_ids,
            seq_lens=seq_lens,
            doc_remaining=doc_remaining,
        )
        ttt_loss = self.ttt_loss
        with_overlap = ttt_loss.lk_loss_type is not None
        sums = unroll(cast(Draft, self.draft_model), batch, ttt_loss.ttt_steps, with_overlap=with_overlap)
        valid_tokens = sums.counts.sum()
        return Eagle3StepMetrics(
            loss=ttt_loss.loss(sums),
            accuracy=sums.step_hits.sum() / valid_tokens.clamp_min(1),
            valid_tokens=valid_tokens,
            step_prefix_hits=sums.prefix_hits(),
            step_valid=sums.prefix_valid(),
        )

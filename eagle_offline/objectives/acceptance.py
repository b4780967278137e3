"""How many tokens a round of speculative decoding yields, predicted from top-1 hits on known text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from eagle_offline.alignment import doc_remaining, document_ids, shift_left_with_zero


def simulated_accept_length(step_prefix_hits: Tensor, step_valid: Tensor) -> Tensor:
    """Return ``τ = 1 + Σ_k P_k``, the mean over all slots of one round's yield (the target's own token included).

    Args:
        step_prefix_hits: ``[K]``, slots whose top-1 is right at every step up to ``k``.
        step_valid: ``[K]``, slots that are supervised by the loss mask at every step up to ``k``.

    Returns:
        Scalar, float64. ``P_k`` is 0 where no slot is valid.
    """
    hits, valid = step_prefix_hits.double(), step_valid.double()
    return 1 + torch.where(valid > 0, hits / valid.clamp_min(1), torch.zeros_like(hits)).sum()


def expected_accept_length(step_chain_overlaps: Tensor, step_valid: Tensor) -> Tensor:
    """Return ``1 + Σ_k E_k``: what a round yields on average when tokens are drawn at temperature 1.

    A drafted token is accepted with probability ``α``, its overlap with the target; a chain survives to step ``k``
    with the product of its overlaps. Slots that are valid but carry no supervision (the target's best token is not
    among the draft's) count as refused.

    Args:
        step_chain_overlaps: float ``[K]``, ``Σ Π_{j ≤ k} α_j`` over valid slots.
        step_valid: ``[K]``, as in `simulated_accept_length`.

    Returns:
        Scalar, float64.
    """
    return simulated_accept_length(step_chain_overlaps, step_valid)


def walked_accept_length(step_hits: Tensor, slot_valid: Tensor, document_ids: Tensor) -> tuple[int, int]:
    """Walk through documents as greedy decoding with a chain of ``K`` would and count what it yields.

    At a valid slot the run of ``a ≤ K`` consecutive right steps is accepted, the target adds one token, and the
    walk goes on ``a + 1`` slots further. Slots that are not valid are stepped over one by one. A document's
    walk ends with its last slot.

    Args:
        step_hits: bool ``[K, T]``, top-1 right at each step of each slot, the position mask folded in.
        slot_valid: bool ``[T]``, slots that are supervised at step 0.
        document_ids: int64 ``[T]``, -1 on padding; a document's slots stand together.

    Returns:
        Tokens yielded and rounds taken; the accept length is their quotient.

    Example:
        Four slots, a chain of 2. Slot 0 accepts two tokens, so the next round starts at slot 3 and accepts none:

        >>> hits = torch.tensor([[True, False, True, False], [True, True, False, False]])
        >>> walked_accept_length(hits, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64))
        (4, 2)
    """
    num_slots = slot_valid.shape[0]
    runs = step_hits.long().cumprod(dim=0).sum(dim=0).tolist()
    valid, documents = slot_valid.tolist(), document_ids.tolist()
    tokens = rounds = slot = 0
    while slot < num_slots:
        if not valid[slot] or documents[slot] < 0:
            slot += 1
            continue
        landing = slot + runs[slot] + 1
        tokens, rounds = tokens + runs[slot] + 1, rounds + 1
        document = documents[slot]
        slot += 1
        while slot < min(landing, num_slots) and documents[slot] == document:
            slot += 1
    return tokens, rounds


class PackedAnswers(Protocol):
    """Where answers stand in packed rows: `loss_mask` bool ``[B, T]``, slot frame, and `seq_lens` int64 ``[B, D]``."""

    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def seq_lens(self) -> Tensor | None: ...


def walk_answers(step_hits: Tensor, batch: PackedAnswers) -> tuple[int, int]:
    """Walk through the answers of a packed batch, each from its first token to its last.

    Decoding a turn begins once its first token is known and ends with its last; so a round counts only the
    tokens that the assistant produced, and none begins at a turn's last token. On answers that the target wrote
    greedily the walk takes the very rounds that decoding takes.

    Args:
        step_hits: bool ``[K, B, T]``, see `UnrollSums`.
        batch: what was unrolled, with ``seq_lens``.

    Returns:
        Tokens yielded and rounds taken, see `walked_accept_length`.
    """
    assert batch.seq_lens is not None
    num_slots = batch.loss_mask.shape[1]
    documents = document_ids(batch.seq_lens, num_slots).cpu()
    remaining = doc_remaining(batch.seq_lens, num_slots)
    produced, mask = [], batch.loss_mask.bool()
    for step in range(len(step_hits)):
        # Step k of slot t predicts x_{t+k+2}, whose loss mask is what slot t has at step k + 1.
        mask = shift_left_with_zero(mask)
        produced.append(mask & (step + 1 < remaining))
    answered = torch.stack(produced).cpu()
    hits = step_hits.cpu() & answered
    walked = [
        walked_accept_length(hits[:, row], answered[0, row] & batch.loss_mask[row].bool().cpu(), documents[row])
        for row in range(len(documents))
    ]
    return sum(tokens for tokens, _ in walked), sum(rounds for _, rounds in walked)

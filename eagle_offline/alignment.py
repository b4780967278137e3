"""Which position reads what and predicts what: the one place where sequences are shifted.

A sample holds tokens ``x_0 … x_{T-1}``, their loss mask ``m``, states ``a`` and target distributions ``p``, all at
their own positions. A draft works in the *slot frame*: slot ``t`` reads the state ``a_t`` and the token
``x_{t+1}`` and predicts the token ``x_{t+2}``, so it is supervised by ``p_{t+1}`` where ``m_{t+1} = 1``::

    position          0     1     2     3     4
    tokens            The   cat   sat   on    mats
    slot reads        a_0   a_1   a_2   a_3   a_4
      and             cat   sat   on    mats  (0)
    slot predicts     sat   on    mats  …     –

The cache stores unshifted samples; the shift happens once, when a batch is assembled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def shift_left_with_zero(tensor: Tensor) -> Tensor:
    """Return ``tensor`` moved left by one along the sequence axis, its last slot zero.

    Args:
        tensor: any dtype ``[B, T]`` or ``[B, T, …]``; left unchanged.

    Example:
        >>> shift_left_with_zero(torch.tensor([[5, 6, 7]])).tolist()
        [[6, 7, 0]]
    """
    shifted = torch.zeros_like(tensor)
    shifted[:, :-1] = tensor[:, 1:]
    return shifted


def document_ids(seq_lens: Tensor, num_slots: int) -> Tensor:
    """Return int64 ``[B, T]``: which document of its row each slot belongs to, -1 on padding.

    Args:
        seq_lens: int64 ``[B, max_docs]``, document lengths in order, zero-padded.
        num_slots: ``T``.

    Example:
        >>> document_ids(torch.tensor([[3, 2]]), 6).tolist()
        [[0, 0, 0, 1, 1, -1]]
    """
    ends = seq_lens.cumsum(dim=1)
    slots = torch.arange(num_slots, device=seq_lens.device).expand(seq_lens.shape[0], num_slots).contiguous()
    ids = torch.searchsorted(ends, slots, right=True)
    return ids.masked_fill(slots >= ends[:, -1:], -1)


def _bounds(seq_lens: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each slot's document start and end (exclusive) and the padding mask, each ``[B, T]``."""
    ids = document_ids(seq_lens, num_slots)
    padding = ids < 0
    ends = seq_lens.cumsum(dim=1)
    end = ends.gather(1, ids.clamp_min(0))
    start = (ends - seq_lens).gather(1, ids.clamp_min(0))
    return start, end, padding


def position_ids(seq_lens: Tensor, num_slots: int) -> Tensor:
    """Return int64 ``[B, T]``: the position inside each slot's own document, 0 on padding.

    Example:
        >>> position_ids(torch.tensor([[3, 2]]), 6).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    start, _, padding = _bounds(seq_lens, num_slots)
    slots = torch.arange(num_slots, device=seq_lens.device)
    return (slots - start).masked_fill(padding, 0)


def doc_remaining(seq_lens: Tensor, num_slots: int) -> Tensor:
    """Return int64 ``[B, T]``: how many unroll steps of a slot stay inside its document, 0 on padding.

    For position ``t`` of a document of ``L`` tokens this is ``L - 1 - t``; slot ``t`` counts at step ``k`` iff
    ``k < doc_remaining[t]``. It is never shifted.

    Example:
        >>> doc_remaining(torch.tensor([[3, 2]]), 6).tolist()
        [[2, 1, 0, 1, 0, 0]]
    """
    _, end, padding = _bounds(seq_lens, num_slots)
    slots = torch.arange(num_slots, device=seq_lens.device)
    return (end - 1 - slots).masked_fill(padding, 0)


def causal_visibility(attention_mask: Tensor, seq_lens: Tensor | None = None) -> Tensor:
    """Return bool ``[B, 1, T, T]``: query slot ``t`` may read key slot ``s``.

    That is ``s ≤ t``, in the same document, ``s`` not padding. A slot always reads itself, so that no softmax is
    over nothing; what comes out at padding is never used.

    Args:
        attention_mask: ``[B, T]``, 1 on real slots.
        seq_lens: int64 ``[B, max_docs]`` for packed rows; None when a row is one document.
    """
    num_slots = attention_mask.shape[1]
    slots = torch.arange(num_slots, device=attention_mask.device)
    visible = (slots[:, None] >= slots[None, :]) & attention_mask.bool()[:, None, :]
    if seq_lens is not None:
        documents = document_ids(seq_lens, num_slots)
        visible &= (documents[:, :, None] == documents[:, None, :]) & (documents[:, None, :] >= 0)
    visible |= torch.eye(num_slots, dtype=torch.bool, device=attention_mask.device)
    return visible.unsqueeze(1)


@dataclass
class SlotBatch:
    """Slot-frame tensors of one unroll.

    Attributes:
        input_ids: int64 ``[B, T]``.
        attention_mask: ``[B, T]``, 1 on real slots.
        loss_mask: bool ``[B, T]``.
        aux_hidden_states: ``[B, T, A·H]``.
        target_probs: float32 ``[B, T, Vd]``.
        position_mask: bool ``[B, T]``.
        position_ids, doc_remaining: int64 ``[B, T]`` or None; seq_lens: int64 ``[B, max_docs]`` or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    aux_hidden_states: Tensor
    target_probs: Tensor
    position_mask: Tensor
    position_ids: Tensor | None = None
    seq_lens: Tensor | None = None
    doc_remaining: Tensor | None = None

    def counting_slots(self, mask: Tensor, ttt_step: int) -> Tensor:
        """Return bool ``[B, T]``: the slots of an already shifted mask whose step stays inside their document."""
        if self.doc_remaining is None:
            return mask
        return mask & (ttt_step < self.doc_remaining)

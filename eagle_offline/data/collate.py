"""Samples laid end to end into rows, unshifted, and the step from there into the slot frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids, shift_left_with_zero
from eagle_offline.cache.reader import Sample
from eagle_offline.errors import DataError
from eagle_offline.supervision import Head, chosen_inside


@dataclass(frozen=True)
class PackedBatch:
    """A pack of samples in ``B`` rows of ``T`` slots, nothing shifted.

    Attributes:
        sample_ids: of the samples, in the order of their documents.
        input_ids: int64 ``[B, T]``; loss_mask: bool ``[B, T]``.
        aux_hidden_states: ``[B, T, A·H]`` in the stored dtype.
        seq_lens: int64 ``[B, max_docs]``.
        target_slots: int64 ``[P]``, flat positions in ``B·T`` with stored supervision.
        target_rows: ``[P, H]`` final states, or ``[P, Vd]`` probabilities.
        target_argmax: int64 ``[P]``.
    """

    sample_ids: list[int]
    input_ids: Tensor
    loss_mask: Tensor
    aux_hidden_states: Tensor
    seq_lens: Tensor
    target_slots: Tensor
    target_rows: Tensor
    target_argmax: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.seq_lens.sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the pack on ``device``."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sample_ids"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def lay_rows(lengths: Sequence[int], row_slots: int) -> list[list[int]]:
    """Return the samples of each row: longest first, each into the first row that has room.

    Example:
        >>> lay_rows([3, 5, 2], row_slots=5)
        [[1], [0, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), None)
        if row is None:
            rows.append([])
            room.append(row_slots)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def collate(samples: Sequence[Sample], row_slots: int | None = None) -> PackedBatch:
    """Lay samples into rows.

    Args:
        samples: at least one.
        row_slots: ``T``; None for the longest sample. Dense attention costs ``B·T²``, so short rows are cheap.

    Raises:
        DataError: a sample carries no target supervision.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    row_slots = max(lengths) if row_slots is None else row_slots
    rows = lay_rows(lengths, row_slots)
    batch_size, aux_size = len(rows), samples[0].aux_hidden_states.shape[-1]
    input_ids = torch.zeros(batch_size, row_slots, dtype=torch.int64)
    loss_mask = torch.zeros(batch_size, row_slots, dtype=torch.bool)
    aux = torch.zeros(batch_size, row_slots, aux_size, dtype=samples[0].aux_hidden_states.dtype)
    seq_lens = torch.zeros(batch_size, max(map(len, rows)), dtype=torch.int64)
    sample_ids, slots, target_rows, argmax = [], [], [], []
    for row, members in enumerate(rows):
        start = 0
        for place, index in enumerate(members):
            sample, end = samples[index], start + lengths[index]
            input_ids[row, start:end] = sample.input_ids
            loss_mask[row, start:end] = sample.loss_mask
            aux[row, start:end] = sample.aux_hidden_states
            seq_lens[row, place] = lengths[index]
            sample_ids.append(sample.sample_id)
            slots.append(sample.supervision.positions + row * row_slots + start)
            target_rows.append(_target_rows(sample))
            argmax.append(sample.supervision.target_argmax)
            start = end
    return PackedBatch(
        sample_ids=sample_ids,
        input_ids=input_ids,
        loss_mask=loss_mask,
        aux_hidden_states=aux,
        seq_lens=seq_lens,
        target_slots=torch.cat(slots),
        target_rows=torch.cat(target_rows),
        target_argmax=torch.cat(argmax),
    )


def _target_rows(sample: Sample) -> Tensor:
    supervision = sample.supervision
    rows = supervision.target_probs if supervision.last_hidden_state is None else supervision.last_hidden_state
    if rows is None:
        raise DataError(f"sample {sample.sample_id} carries no target supervision")
    return rows


def slot_batch(pack: PackedBatch, selected_head: Head | None, selected_token_mask: Tensor) -> SlotBatch:
    """Return a pack in the slot frame, its target probabilities computed where the loss mask is set.

    Args:
        pack: on the training device.
        selected_head: the target's head restricted to the draft vocabulary; None when the pack holds probabilities.
        selected_token_mask: bool ``[V]``.
    """
    batch_size, num_slots = pack.input_ids.shape
    supervised = pack.loss_mask.flatten()[pack.target_slots]
    slots, rows = pack.target_slots[supervised], pack.target_rows[supervised]
    stored = rows.float() if selected_head is None else selected_head.logits(rows).softmax(dim=-1)
    probs = torch.zeros(batch_size * num_slots, stored.shape[-1], dtype=stored.dtype, device=stored.device)
    probs[slots] = stored
    position_mask = torch.zeros(batch_size * num_slots, dtype=torch.bool, device=stored.device)
    position_mask[slots] = chosen_inside(pack.target_argmax[supervised], selected_token_mask)
    positions = position_ids(pack.seq_lens, num_slots)
    slots_in_use = torch.arange(num_slots, device=stored.device) < pack.seq_lens.sum(dim=1, keepdim=True)
    return SlotBatch(
        input_ids=shift_left_with_zero(pack.input_ids),
        attention_mask=slots_in_use,
        loss_mask=shift_left_with_zero(pack.loss_mask),
        aux_hidden_states=pack.aux_hidden_states,
        target_probs=shift_left_with_zero(probs.view(batch_size, num_slots, -1)),
        position_mask=shift_left_with_zero(position_mask.view(batch_size, num_slots)),
        position_ids=positions,
        seq_lens=pack.seq_lens,
        doc_remaining=doc_remaining(pack.seq_lens, num_slots),
    )

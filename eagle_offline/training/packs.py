"""A pack of samples as training runs it: laid end to end, what to compute settled, on its way through the draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_offline.alignment import position_ids, shift_left_with_zero
from eagle_offline.cache.reader import Sample
from eagle_offline.cache.stored_states import StoredStates, merges_ahead
from eagle_offline.data.stored_pack import StoredPack, pack_of_samples
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_parallel import Part
from eagle_offline.objectives.parallel_plan import ParallelPlan
from eagle_offline.objectives.plan import UnrollPlan, moved
from eagle_offline.objectives.ttt_loss import StepWeights
from eagle_offline.supervision import Head, chosen_inside
from eagle_offline.training.objective import Objective, PackSlots, PackStates

# Logits that live at once, in values: three such tensors stand in memory while a chunk of the loss is computed.
_CHUNK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 26}
# Fewer rows than these are multiplied no faster, whatever the vocabulary.
_LEAST_CHUNK_ROWS = 128


@dataclass(frozen=True)
class TrainingPack:
    """Samples end to end, ``N`` flat slots of ``D`` documents.

    Attributes:
        sample_ids: in the order of their documents.
        num_tokens: ``N``.
        input_ids: int64 ``[N]``, slot frame; position_ids: int64 ``[N]``.
        aux_states: rows of ``A·H`` values as stored, ``N`` in all.
        target_states: rows of final states, ``H`` values, or of probabilities, ``Vd``, as stored; ``P`` in all.
        loss_mask: bool ``[1, N]``, slot frame; seq_lens: int64 ``[1, D]``.
        plan: what is computed over it.
    """

    sample_ids: tuple[int, ...]
    num_tokens: int
    input_ids: Tensor
    position_ids: Tensor
    aux_states: tuple[StoredStates, ...]
    target_states: tuple[StoredStates, ...]
    loss_mask: Tensor
    seq_lens: Tensor
    plan: UnrollPlan | ParallelPlan

    def to(self, device: torch.device | str) -> TrainingPack:
        """Return the pack on ``device``."""
        return moved(self, device)


def make_pack(
    samples: Sequence[Sample],
    selected_token_mask: Tensor,
    objective: Objective,
    device: torch.device,
    supervision_gate: str = "input",
) -> TrainingPack:
    """Lay decoded samples end to end; see `plan_pack`, which training calls with what it reads undecoded.

    Raises:
        DataError: a sample carries no target supervision.
    """
    return plan_pack(pack_of_samples(samples), selected_token_mask, objective, device, supervision_gate)


def plan_pack(
    stored: StoredPack,
    selected_token_mask: Tensor,
    objective: Objective,
    device: torch.device,
    supervision_gate: str = "input",
    epoch: int | None = None,
) -> TrainingPack:
    """Settle what is computed over samples, on the CPU.

    Args:
        stored: the samples, at least one.
        selected_token_mask: bool ``[V]``, on the CPU.
        objective: what is computed.
        device: where the pack will be run, which decides how much of the loss is computed at once.
        supervision_gate: ``input``, ``predicted`` or ``both``; see `_gate`.
        epoch: that the pack is trained in; None for one that is validated on.
    """
    seq_lens, slots = torch.from_numpy(stored.lengths)[None], stored.target_slots
    num_slots = len(stored.input_ids)
    gate = _gate(stored.loss_mask[None], seq_lens, supervision_gate)
    known = torch.zeros(1, num_slots, dtype=torch.bool)
    known[0, slots] = chosen_inside(stored.target_argmax, selected_token_mask)
    rows = torch.full((1, num_slots), -1)
    rows[0, slots] = torch.arange(len(slots))
    draft_vocab_size = int(selected_token_mask.sum())
    plan = objective.plan(
        PackSlots(
            sample_ids=stored.sample_ids,
            lengths=stored.lengths,
            gate=shift_left_with_zero(gate)[0].numpy(),
            known=shift_left_with_zero(known)[0].numpy(),
            target_rows=shift_left_with_zero(rows)[0].numpy(),
            epoch=epoch,
        ),
        max(_LEAST_CHUNK_ROWS, _CHUNK_VALUES.get(device.type, _CHUNK_VALUES["cpu"]) // draft_vocab_size),
        ragged=device.type != "cpu",
    )
    return TrainingPack(
        sample_ids=stored.sample_ids,
        num_tokens=num_slots,
        input_ids=shift_left_with_zero(stored.input_ids[None])[0],
        position_ids=position_ids(seq_lens, num_slots)[0],
        aux_states=stored.aux_states,
        target_states=stored.target_states,
        loss_mask=shift_left_with_zero(stored.loss_mask[None]),
        seq_lens=seq_lens,
        plan=plan,
    )


def _gate(loss_mask: Tensor, seq_lens: Tensor, supervision_gate: str) -> Tensor:
    """Return bool ``[1, N]``, unshifted: the positions whose target distribution supervises a slot.

    The distribution at position ``t`` predicts ``x_{t+1}``: ``input`` asks for ``m_t``, ``predicted`` for ``m_{t+1}``
    inside the document, ``both`` for both.
    """
    if supervision_gate == "input":
        return loss_mask
    predicted = shift_left_with_zero(loss_mask)
    predicted[0, seq_lens[0].cumsum(dim=0) - 1] = False
    return predicted if supervision_gate == "predicted" else loss_mask & predicted


def pack_parts(
    model: Eagle3DraftModel,
    pack: TrainingPack,
    objective: Objective,
    selected_head: Head | None,
    weights: StepWeights,
    recompute: bool = False,
) -> list[Part]:
    """Return what a draft computes over a pack on its device; see `Objective.parts`.

    Args:
        model: the draft.
        pack: on the draft's device.
        objective: that the pack was planned for.
        selected_head: the target's head restricted to the draft vocabulary; None when the pack holds probabilities.
        weights: what a supervised slot of each step adds to the loss.
        recompute: what can be computed again when going back is not kept.
    """
    states = PackStates(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        aux_hidden_states=lambda: _merged(pack.aux_states),
        targets=_target_rows(pack.target_states, selected_head),
    )
    return objective.parts(model, pack.plan, states, weights, recompute)


def _target_rows(states: Sequence[StoredStates], selected_head: Head | None) -> TargetRows:
    """Return supervision that is merged at once, or by chunks of the loss where values take far more than bytes."""
    if len(states) == 1 and not merges_ahead(states[0].fields):
        return TargetRows(states[0].between, selected_head)
    return TargetRows.of(_merged(states), selected_head)


def _merged(states: Sequence[StoredStates]) -> Tensor:
    """Return the values of all rows, put together on the device that they are on."""
    parts = [part.merge() for part in states]
    return parts[0] if len(parts) == 1 else torch.cat(parts)

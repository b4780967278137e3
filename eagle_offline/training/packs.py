"""A pack of samples as training runs it: laid end to end, what to compute settled, on its way through the draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_offline.alignment import position_ids, shift_left_with_zero
from eagle_offline.cache.reader import Sample
from eagle_offline.data.collate import collate
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.plan import UnrollPlan, moved, plan_unroll
from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.supervision import Head

# Logits that live at once, in values: three such tensors stand in memory while a chunk of the loss is computed.
_CHUNK_VALUES = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class TrainingPack:
    """Samples end to end, ``N`` flat slots of ``D`` documents.

    Attributes:
        sample_ids: in the order of their documents.
        num_tokens: ``N``.
        input_ids: int64 ``[N]``, slot frame; position_ids: int64 ``[N]``.
        aux_hidden_states: ``[N, A·H]`` in the stored dtype.
        target_rows: ``[P, H]`` final states, or ``[P, Vd]`` probabilities.
        loss_mask: bool ``[1, N]``, slot frame; seq_lens: int64 ``[1, D]``.
        plan: what an unroll over it computes.
    """

    sample_ids: tuple[int, ...]
    num_tokens: int
    input_ids: Tensor
    position_ids: Tensor
    aux_hidden_states: Tensor
    target_rows: Tensor
    loss_mask: Tensor
    seq_lens: Tensor
    plan: UnrollPlan

    def to(self, device: torch.device | str) -> TrainingPack:
        """Return the pack on ``device``."""
        return moved(self, device)


def make_pack(
    samples: Sequence[Sample], selected_token_mask: Tensor, ttt_steps: int, draft_vocab_size: int, device: torch.device
) -> TrainingPack:
    """Lay samples end to end and settle what their unroll computes, on the CPU.

    Args:
        samples: at least one.
        selected_token_mask: bool ``[V]``, on the CPU.
        ttt_steps: ``K``.
        draft_vocab_size: ``Vd``.
        device: where the pack will be run, which decides how much of the loss is computed at once.

    Raises:
        DataError: a sample carries no target supervision.
    """
    pack = collate(samples, row_slots=sum(len(sample.input_ids) for sample in samples))
    num_slots = pack.num_tokens
    supervised = pack.loss_mask[0, pack.target_slots]
    position_mask = torch.zeros(1, num_slots, dtype=torch.bool)
    position_mask[0, pack.target_slots] = supervised & selected_token_mask[pack.target_argmax]
    rows = torch.full((1, num_slots), -1)
    rows[0, pack.target_slots] = torch.arange(len(pack.target_slots))
    loss_mask = shift_left_with_zero(pack.loss_mask)
    plan = plan_unroll(
        pack.seq_lens[0].numpy(),
        loss_mask[0].numpy(),
        shift_left_with_zero(position_mask)[0].numpy(),
        shift_left_with_zero(rows)[0].numpy(),
        ttt_steps,
        max(1, _CHUNK_VALUES.get(device.type, _CHUNK_VALUES["cpu"]) // draft_vocab_size),
    )
    return TrainingPack(
        sample_ids=tuple(pack.sample_ids),
        num_tokens=num_slots,
        input_ids=shift_left_with_zero(pack.input_ids)[0],
        position_ids=position_ids(pack.seq_lens, num_slots)[0],
        aux_hidden_states=pack.aux_hidden_states[0],
        target_rows=pack.target_rows,
        loss_mask=loss_mask,
        seq_lens=pack.seq_lens,
        plan=plan,
    )


def run_pack(
    model: Eagle3DraftModel, pack: TrainingPack, selected_head: Head | None, step_weights: Tensor
) -> tuple[Tensor, UnrollSums]:
    """Run a draft over a pack on its device; see `unroll_packed`.

    Args:
        model: the draft.
        pack: on the draft's device.
        selected_head: the target's head restricted to the draft vocabulary; None when the pack holds probabilities.
        step_weights: ``[K]``, what the loss of one supervised slot of each step counts.
    """
    return unroll_packed(
        PackedUnroll(model, pack.plan, pack.input_ids, pack.position_ids),
        model.before_head,
        model.lm_head.weight,
        pack.plan,
        pack.aux_hidden_states,
        TargetRows(pack.target_rows, selected_head),
        step_weights,
    )

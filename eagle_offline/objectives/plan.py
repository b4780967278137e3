"""What an unroll over packed documents has to compute, settled from masks before any of it runs.

A slot is *active* at step ``k`` while a step from ``k`` on is supervised there: nothing else of it can reach the loss.
Step 0's keys are needed from a document's first slot to its last active one; everything else is computed at active
slots alone. All index tensors are made on the CPU, beside the reading of a pack, so that the steps never ask the
device how many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from eagle_offline.objectives.attention_calls import AttentionCall, plan_padded, plan_ragged
from eagle_offline.objectives.fused_loss import LossRows, chunk_rows

T = TypeVar("T")


@dataclass(frozen=True)
class StepPlan:
    """One unroll step.

    Attributes:
        slots: int64 ``[R]``, the active slots, flat.
        rows: int64 ``[R]``, their rows among the active slots of the step before; at step 0, among the key slots.
        supervised: int64 ``[n]``, rows among ``slots`` that are supervised at this step.
        calls: attention over step 0's keys.
    """

    slots: Tensor
    rows: Tensor
    supervised: Tensor
    calls: tuple[AttentionCall, ...]


@dataclass(frozen=True)
class UnrollPlan:
    """A whole unroll.

    Attributes:
        key_slots: int64 ``[S]``, flat slots whose step-0 keys are read.
        key_calls: attention of all key slots among themselves, which every draft layer but the last needs at step 0.
        steps: one a step; rows of a step are a subset of those before.
        loss_rows: of the supervised rows of all steps, one after the other.
        loss_slots: int64 ``[R]``, their flat places in ``K·N``.
        step_counts: int64 ``[K]``, ``N_k``.
        step_valid: bool ``[K, N]``, slots valid by loss mask and document at each step.
    """

    key_slots: Tensor
    key_calls: tuple[AttentionCall, ...]
    steps: tuple[StepPlan, ...]
    loss_rows: LossRows
    loss_slots: Tensor
    step_counts: Tensor
    step_valid: Tensor

    @property
    def first(self) -> StepPlan:
        """Step 0."""
        return self.steps[0]


def moved(record: T, device: torch.device | str) -> T:
    """Return a record of tensors, and of such records, on ``device``."""
    changed: dict[str, Any] = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value.to(device, non_blocking=True)
        elif is_dataclass(value):
            changed[field.name] = moved(value, device)
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            changed[field.name] = tuple(moved(item, device) for item in value)
    return replace(record, **changed)  # type: ignore[type-var]


def plan_unroll(
    lengths: Sequence[int] | np.ndarray,
    loss_mask: np.ndarray,
    position_mask: np.ndarray,
    target_rows: np.ndarray,
    ttt_steps: int,
    longest_chunk: int,
    ragged: bool = False,
) -> UnrollPlan:
    """Plan an unroll over documents that stand end to end.

    Args:
        lengths: tokens of each document.
        loss_mask: bool ``[N]``, slot frame.
        position_mask: bool ``[N]``, slot frame.
        target_rows: int64 ``[N]``, slot frame: the row of target supervision of each slot, -1 without.
        ttt_steps: ``K``.
        longest_chunk: rows of the loss that are computed at once.
        ragged: attention in runs without padding, for a GPU, instead of padded calls, for a CPU.
    """
    plan_calls = plan_ragged if ragged else plan_padded
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    documents = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.arange(len(documents)) - starts[documents]
    remaining = lengths[documents] - 1 - columns
    steps = np.arange(ttt_steps)[:, None]
    inside = steps < remaining
    supervised = _shifted(position_mask, ttt_steps) & inside
    # Active at k: supervised at k or at any later step.
    active = np.logical_or.accumulate(supervised[::-1], axis=0)[::-1]
    key_counts = np.zeros(len(lengths), np.int64)
    np.maximum.at(key_counts, documents[active[0]], columns[active[0]] + 1)
    key_slots = np.flatnonzero(columns < key_counts[documents])
    key_starts = np.cumsum(key_counts) - key_counts
    row_of = np.full(len(documents), -1, np.int64)
    row_of[key_slots] = np.arange(len(key_slots))
    planned, loss_steps, loss_targets, loss_slots = [], [], [], []
    for step in range(ttt_steps):
        slots = np.flatnonzero(active[step])
        rows = row_of[slots]
        row_of[slots] = np.arange(len(slots))
        chosen = np.flatnonzero(supervised[step, slots])
        planned.append(
            StepPlan(
                slots=torch.from_numpy(slots),
                rows=torch.from_numpy(rows),
                supervised=torch.from_numpy(chosen),
                calls=plan_calls(documents[slots], columns[slots], key_starts),
            )
        )
        loss_steps.append(np.full(len(chosen), step))
        loss_targets.append(target_rows[slots[chosen] + step])
        loss_slots.append(slots[chosen] + step * len(documents))
    targets = np.concatenate(loss_targets)
    order = np.argsort(targets, kind="stable")
    loss_rows = LossRows(
        order=torch.from_numpy(order),
        steps=torch.from_numpy(np.concatenate(loss_steps)[order]),
        targets=torch.from_numpy(targets[order]),
        chunks=chunk_rows(targets[order].tolist(), longest_chunk),
    )
    return UnrollPlan(
        key_slots=torch.from_numpy(key_slots),
        key_calls=plan_calls(documents[key_slots], columns[key_slots], key_starts),
        steps=tuple(planned),
        loss_rows=loss_rows,
        loss_slots=torch.from_numpy(np.concatenate(loss_slots)),
        step_counts=torch.from_numpy(supervised.sum(axis=1)),
        step_valid=torch.from_numpy(_shifted(loss_mask, ttt_steps) & inside),
    )


def _shifted(mask: np.ndarray, ttt_steps: int) -> np.ndarray:
    """Return ``[K, N]``: the mask moved left by each step, false beyond the end."""
    padded = np.concatenate([mask.astype(bool), np.zeros(ttt_steps, bool)])
    return np.stack([padded[step : step + len(mask)] for step in range(ttt_steps)])

"""What a run minimises, as one object: what a pack has to compute, how it is computed, what an element weighs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.draft.parallel import PackedParallel
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_parallel import PackedParallelLoss, Part
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.parallel_loss import ParallelLoss
from eagle_offline.objectives.parallel_plan import (
    ParallelPlan,
    every_element,
    plan_parallel,
    sample_elements,
)
from eagle_offline.objectives.peagle_plan import CodSampling
from eagle_offline.objectives.plan import UnrollPlan, plan_unroll
from eagle_offline.objectives.ttt_loss import StepSums, StepWeights, TTTLoss
from eagle_offline.train_settings import TrainSettings


@dataclass(frozen=True)
class PackSlots:
    """What a plan is made from: samples end to end, slot frame.

    Attributes:
        sample_ids: of each document. lengths: int64 ``[D]``, tokens of each.
        gate: bool ``[N]``, slots whose input or predicted token asks for supervision.
        known: bool ``[N]``, slots where the target's choice is in the draft vocabulary.
        target_rows: int64 ``[N]``, the row of target supervision of each slot, -1 without.
        epoch: that the pack is trained in; None for one that is validated on.
    """

    sample_ids: tuple[int, ...]
    lengths: np.ndarray
    gate: np.ndarray
    known: np.ndarray
    target_rows: np.ndarray
    epoch: int | None


@dataclass(frozen=True)
class PackStates:
    """What a plan is run over, on the draft's device.

    Attributes:
        input_ids, position_ids: int64 ``[N]``.
        aux_hidden_states: gives ``[N, A·H]``.
        targets: the target's supervision.
    """

    input_ids: Tensor
    position_ids: Tensor
    aux_hidden_states: Callable[[], Tensor]
    targets: TargetRows


class Loss(Protocol):
    """From sums by step to a loss; `TTTLoss` and `ParallelLoss` are two."""

    @property
    def num_steps(self) -> int: ...
    @property
    def weighs_by_overlap(self) -> bool: ...
    def loss(self, sums: StepSums) -> Tensor: ...
    def weights(self, counts: Tensor, overlaps: Tensor | None = None) -> StepWeights: ...
    def no_weights(self) -> StepWeights: ...


class Objective(Protocol):
    """EAGLE-3's unroll or P-EAGLE's parallel forward."""

    @property
    def loss(self) -> Loss: ...

    def plan(self, slots: PackSlots, longest_chunk: int, *, ragged: bool) -> UnrollPlan | ParallelPlan:
        """Settle what a pack computes, on the CPU."""
        ...

    def parts(
        self,
        draft_model: Eagle3DraftModel,
        plan: UnrollPlan | ParallelPlan,
        states: PackStates,
        weights: StepWeights,
        recompute: bool,
    ) -> list[Part]:
        """Return what a pack computes in parts, each to be called, and its loss sent back, before the next is."""
        ...


@dataclass(frozen=True)
class UnrollObjective:
    """EAGLE-3: one part, the unroll."""

    loss: TTTLoss

    def plan(self, slots: PackSlots, longest_chunk: int, *, ragged: bool) -> UnrollPlan:
        return plan_unroll(
            slots.lengths,
            slots.gate,
            slots.gate & slots.known,
            slots.target_rows,
            self.loss.ttt_steps,
            longest_chunk,
            ragged=ragged,
        )

    def parts(
        self,
        draft_model: Eagle3DraftModel,
        plan: UnrollPlan | ParallelPlan,
        states: PackStates,
        weights: StepWeights,
        recompute: bool,
    ) -> list[Part]:
        planned = cast(UnrollPlan, plan)
        return [
            partial(
                unroll_packed,
                PackedUnroll(draft_model, planned, states.input_ids, states.position_ids, recompute),
                draft_model.before_head,
                draft_model.lm_head.weight,
                planned,
                states.aux_hidden_states,
                states.targets,
                weights,
            )
        ]


@dataclass(frozen=True)
class ParallelObjective:
    """P-EAGLE: elements drawn by seed, epoch and sample when trained on, all of them when validated on.

    Attributes:
        loss: of their sums.
        sampling: how many are drawn.
        seed: of the draws.
        num_segments: parts that the chains of a pack are run in; None for as many as keep the elements of one no more
            than the pack's slots.
    """

    loss: ParallelLoss
    sampling: CodSampling
    seed: int
    num_segments: int | None

    def plan(self, slots: PackSlots, longest_chunk: int, *, ragged: bool) -> ParallelPlan:
        supervised = slots.gate.copy()
        # What a document's last slot would predict is another document's.
        supervised[np.cumsum(slots.lengths) - 1] = False
        num_depths = self.loss.num_depths
        if slots.epoch is None:
            elements = every_element(supervised, num_depths)
        else:
            generators = [self._generator(slots.epoch, sample_id) for sample_id in slots.sample_ids]
            elements = sample_elements(slots.lengths, supervised, self.sampling, generators)
        num_segments = self.num_segments or max(1, -(-len(elements.anchors) // len(supervised)))
        return plan_parallel(
            slots.lengths,
            supervised,
            slots.known,
            slots.target_rows,
            elements,
            num_depths,
            longest_chunk,
            num_segments,
            ragged=ragged,
        )

    def _generator(self, epoch: int, sample_id: int) -> torch.Generator:
        """Return what a sample's draws of an epoch are a pure function of."""
        key = np.random.SeedSequence([self.seed, epoch, sample_id]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(key[0]))

    def parts(
        self,
        draft_model: Eagle3DraftModel,
        plan: UnrollPlan | ParallelPlan,
        states: PackStates,
        weights: StepWeights,
        recompute: bool,
    ) -> list[Part]:
        planned = cast(ParallelPlan, plan)
        return PackedParallelLoss(
            PackedParallel(draft_model, planned, states.input_ids, states.position_ids, recompute),
            draft_model.before_head,
            draft_model.lm_head.weight,
            planned,
            states.aux_hidden_states,
            states.targets,
            weights,
        ).parts()


def build_objective(settings: TrainSettings) -> Objective:
    """Return what a run minimises."""
    if settings.objective == "peagle":
        return ParallelObjective(
            ParallelLoss(settings.num_depths, settings.depth_weights, settings.depth_mean == "depths"),
            CodSampling(settings.num_depths, settings.down_sample_ratio, settings.down_sample_ratio_min),
            settings.seed,
            settings.sequence_partitions,
        )
    return UnrollObjective(
        TTTLoss(
            settings.ttt_steps,
            settings.step_decay,
            settings.lk_loss_type,
            settings.lk_kl_scale,
            settings.lk_kl_decay,
        )
    )

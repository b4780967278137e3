"""The P-EAGLE objective: all depths of a draft in one parallel forward, its loss and its metrics, in plain form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagle_offline.element_attention import ElementAttention
from eagle_offline.errors import UsageError
from eagle_offline.objectives.peagle_plan import CodSampling, PEaglePlan, PEagleUnit, plan_batch
from eagle_offline.objectives.ttt import Eagle3StepMetrics
from eagle_offline.supervision import compute_target_distribution


class ParallelDraft(Protocol):
    """What P-EAGLE asks of a draft; `eagle_offline.draft.eagle3.Eagle3DraftModel` is one."""

    config: Any

    def project_hidden_states(self, aux: Tensor) -> Tensor: ...

    def project_mask_hidden(self) -> Tensor: ...

    def forward_parallel(
        self,
        input_ids: Tensor,
        projected_hidden_states: Tensor,
        position_ids: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class UnitSums:
    """Sums of one unit: ``loss`` with gradient, ``correct`` and ``count``, and survival by depth, int64 ``[D]``."""

    loss: Tensor
    correct: Tensor
    count: Tensor
    prefix_hits: Tensor
    valid: Tensor


@dataclass(frozen=True)
class _Targets:
    """Supervision of a batch in one of its two forms, looked up where it is needed."""

    logits: Tensor | None
    probs: Tensor | None
    position_mask: Tensor | None
    token_ids: Tensor
    token_mask: Tensor

    def at(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities ``[m, Vd]`` at slots ``[m]``, and bool ``[m]``: the best token can be drafted."""
        if self.logits is not None:
            # A slot is asked for once a depth; its full-vocabulary row is looked at once.
            distinct, place = slots.unique(return_inverse=True)
            logits = self.logits[row].index_select(0, distinct)
            seen = torch.ones_like(distinct, dtype=torch.bool)
            probs, inside = compute_target_distribution(logits, self.token_ids, self.token_mask, seen)
            return probs.index_select(0, place), inside.squeeze(-1).index_select(0, place)
        assert self.probs is not None
        inside = torch.ones_like(slots) if self.position_mask is None else self.position_mask[row].reshape(-1)[slots]
        return self.probs[row].index_select(0, slots), inside.bool()


class PEagleTrainerModule(nn.Module):
    """A draft and its P-EAGLE loss: the plain reference, one forward a row, or one a segment of a row.

    Each document's elements are drawn (`generate_cod_sample_indices`) and run through the draft at once: depth 0 with
    its token and state, deeper elements with ``mask_token_id`` and ``mask_hidden``, who reads whom as in
    `create_peagle_mask_mod`. The loss is the mean of ``KL(target ‖ draft)`` over the drawn elements of the whole batch
    whose reference slot is supervised.

    With ``sequence_partitions`` a batch's loss is the sum over a plan's units, each a forward and a backward of its
    own, so that the memory of one is held at a time::

        plan = module.build_peagle_plan(loss_mask, attention_mask)
        for index in range(len(plan.units)):
            module(..., peagle_segment=(plan, index)).loss.backward()

    Args:
        draft_model: an `Eagle3DraftModel` whose config says ``parallel_drafting``.
        selected_token_ids: int64 ``[Vd]``, strictly increasing.
        selected_token_mask: bool ``[V]``.
        num_depths: ``D``.
        mask_token_id: the token that stands for one not yet known, the draft's own.
        down_sample_ratio, down_sample_ratio_min: ``r`` and ``r_min``.
        sequence_partitions: segments of a row in `build_peagle_plan`.

    Raises:
        UsageError: for a draft without ``mask_hidden``, another mask token than the draft's, a number out of range.

    Source: P-EAGLE, arXiv 2602.01469.
    """

    selected_token_ids: Tensor
    selected_token_mask: Tensor

    def __init__(
        self,
        draft_model: nn.Module,
        selected_token_ids: Tensor,
        selected_token_mask: Tensor,
        num_depths: int,
        mask_token_id: int,
        down_sample_ratio: float = 0.7,
        down_sample_ratio_min: float = 0.2,
        sequence_partitions: int = 1,
    ):
        super().__init__()
        config = cast(ParallelDraft, draft_model).config
        if not config.parallel_drafting:
            raise UsageError("draft_model has no mask_hidden; build it with Eagle3DraftConfig(parallel_drafting=True)")
        if config.mask_token_id != mask_token_id:
            raise UsageError(
                f"mask_token_id: the draft's is {config.mask_token_id}, found {mask_token_id}; pass its own"
            )
        if sequence_partitions < 1:
            raise UsageError(f"sequence_partitions: expected at least 1, found {sequence_partitions}")
        self.draft_model = draft_model
        self.sampling = CodSampling(num_depths, down_sample_ratio, down_sample_ratio_min)
        self.mask_token_id = mask_token_id
        self.sequence_partitions = sequence_partitions
        self.register_buffer("selected_token_ids", selected_token_ids, persistent=False)
        self.register_buffer("selected_token_mask", selected_token_mask.bool(), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        aux_hidden_states: Tensor,
        target_logits: Tensor | None = None,
        peagle_segment: tuple[PEaglePlan, int] | None = None,
        target_probs: Tensor | None = None,
        position_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_lens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Eagle3StepMetrics:
        """Run the loss of one slot-frame batch, or a segment's share of it.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 1 on real slots, which stand on the left.
            loss_mask: ``[B, T]``.
            aux_hidden_states: ``[B, T, A·H]``.
            target_logits: float ``[B, T, V]``, full vocabulary; or ``target_probs`` ``[B, T, Vd]``, never both.
            peagle_segment: a plan and the index of a unit; masks, positions and the draw are then the plan's.
            position_mask: ``[B, T, 1]``, beside ``target_probs``: where the target's best token can be drafted.
                A chain that meets another counts as a miss; the loss does not read it.
            position_ids: int64 ``[B, T]``; None counts slots inside a document.
            seq_lens: int64 ``[B, max_docs]`` for packed rows.
            generator: what the draw is a function of, row by row and document by document.

        Returns:
            Metrics of what was run. ``loss`` of a segment is its sum over the plan's ``total_den``, so that losses
            and gradients of all segments add up to the batch's. Steps are depths: ``step_valid`` counts the drawn
            chains all of whose slots are supervised, ``step_prefix_hits`` those right at every depth so far.

        Raises:
            UsageError: none or both supervisions given.
        """
        if (target_logits is None) == (target_probs is None):
            raise UsageError("pass exactly one of target_logits and target_probs")
        targets = _Targets(
            target_logits, target_probs, position_mask, self.selected_token_ids, self.selected_token_mask
        )
        if peagle_segment is None:
            plan = plan_batch(self.sampling, loss_mask, attention_mask, position_ids, seq_lens, generator)
            units = plan.padded(1).units
        else:
            plan, index = peagle_segment
            units = [plan.units[index]]
        sums = [self._run(unit, input_ids, aux_hidden_states, targets) for unit in units]
        count = torch.stack([one.count for one in sums]).sum()
        return Eagle3StepMetrics(
            loss=torch.stack([one.loss for one in sums]).sum() / plan.total_den.clamp_min(1),
            accuracy=torch.stack([one.correct for one in sums]).sum() / count.clamp_min(1),
            valid_tokens=count,
            step_prefix_hits=torch.stack([one.prefix_hits for one in sums]).sum(0),
            step_valid=torch.stack([one.valid for one in sums]).sum(0),
        )

    def build_peagle_plan(
        self,
        loss_mask: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_lens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PEaglePlan:
        """Draw a batch's elements once and cut each row into ``sequence_partitions`` segments; see `forward`."""
        return plan_batch(
            self.sampling, loss_mask, attention_mask, position_ids, seq_lens, generator, self.sequence_partitions
        )

    def _run(self, unit: PEagleUnit, input_ids: Tensor, aux_hidden_states: Tensor, targets: _Targets) -> UnitSums:
        draft, anchor_pos, depth = cast(ParallelDraft, self.draft_model), unit.anchor_pos, unit.depth
        known = depth == 0
        ids = torch.full_like(anchor_pos, self.mask_token_id)
        ids[known] = input_ids[unit.row, anchor_pos[known]]
        states = draft.project_hidden_states(aux_hidden_states[unit.row, anchor_pos[known]].unsqueeze(0))
        states = torch.cat([states, draft.project_mask_hidden().to(states.dtype)], dim=1)
        states = states.index_select(1, torch.where(known, known.cumsum(0) - 1, states.shape[1] - 1))
        attend = ElementAttention(anchor_pos, depth, unit.lengths, input_ids.shape[1])
        hidden = draft.forward_parallel(ids.unsqueeze(0), states, unit.position_ids.unsqueeze(0), attend)

        scored = unit.scored.nonzero().squeeze(-1)
        logits = draft.compute_logits(hidden[0].index_select(0, scored))
        probs, inside = targets.at(unit.row, (anchor_pos + depth)[scored])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        divergences = F.kl_div(wide.log_softmax(dim=-1), probs.to(wide.dtype), reduction="none").sum(dim=-1)
        agrees, charged = logits.argmax(dim=-1) == probs.argmax(dim=-1), unit.loss_positions[scored]

        num_depths = self.sampling.num_depths
        right = torch.zeros(input_ids.shape[1], num_depths, dtype=torch.int64, device=depth.device)
        right[anchor_pos[scored], depth[scored]] = (agrees & inside).long()
        counted = unit.owned & unit.anchored
        alive = right.cumprod(dim=1)[anchor_pos[counted], depth[counted]]
        return UnitSums(
            loss=divergences[charged].sum(),
            correct=(agrees & charged).sum(),
            count=charged.sum(),
            prefix_hits=depth[counted].bincount(alive, num_depths).long(),
            valid=depth[counted].bincount(minlength=num_depths),
        )

"""The same P-EAGLE training step several ways, over the same samples and elements with the same draft.

- ours: samples end to end, depth 0 once, only what a supervised element needs, head and loss fused in chunks;
- plain: rows padded to the sequence length, one by one, a flat sequence of all elements of a row under a dense mask,
  logits, probabilities and divergence of every element, one pass back through all rows, as the NeMo AutoModel trainer
  does; or a pass back after each row, which is less to hold;
- the reference, `PEagleTrainerModule`: row by row too, each without its padding, logits of supervised elements alone, a
  pass back after each row; flex attention on CUDA.

In segments, ours cuts the chains of all samples together and runs depth 0 once; the others cut each row, and each of
its segments runs every depth-0 element on its left once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, scaled_dot_product_attention

from benchmarks.training_steps import StepSetting, StepWork
from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.draft.parallel import PackedParallel
from eagle_offline.element_attention import create_peagle_mask_mod
from eagle_offline.objectives.cod import assign_cod_segments
from eagle_offline.objectives.losses import masked_sum
from eagle_offline.objectives.packed_parallel import PackedParallelLoss
from eagle_offline.objectives.parallel_loss import ParallelLoss
from eagle_offline.objectives.parallel_plan import CodSampling, Elements, ParallelPlan, plan_parallel, sample_elements
from eagle_offline.objectives.peagle import PEagleTrainerModule
from eagle_offline.objectives.peagle_plan import PEaglePlan
from eagle_offline.objectives.plan import moved

MASK_TOKEN = 0
# Ratio and least ratio that training takes when nothing is said.
_DOWN_SAMPLING = (0.7, 0.2)
# Rows of the target's head at once, where probabilities are wanted whole.
_HEAD_ROWS = 4096


@dataclass(frozen=True)
class Setting(StepSetting):
    """See `StepSetting`; where supervision is factored, the other ways read the probabilities made of it beforehand.

    Attributes:
        num_depths: ``D``.
        num_layers: of the draft.
    """

    num_depths: int = 8
    num_layers: int = 1


@dataclass(frozen=True)
class Way:
    """One way of taking the step.

    Attributes:
        name: ``ours``, ``plain``, ``plain_by_row`` or ``reference``.
        num_segments: ``P``.
        recompute: ours alone: compute once more, going back, what is not kept.
    """

    name: str
    num_segments: int = 1
    recompute: bool = False


@dataclass(frozen=True)
class _Elements:
    """What one plain forward runs, of a padded row.

    Attributes:
        row: which one. anchors, depths: int64 ``[M]``. charged: bool ``[M]``, those that count.
    """

    row: int
    anchors: Tensor
    depths: Tensor
    charged: Tensor


class Work(StepWork):
    """A draft, samples, elements drawn of them, and one step over these each way."""

    setting: Setting

    def __init__(self, device: str, setting: Setting):
        size = setting.draft_vocab_size
        config = Eagle3DraftConfig(
            vocab_size=size,
            draft_vocab_size=size,
            num_hidden_layers=setting.num_layers,
            parallel_drafting=True,
            mask_token_id=MASK_TOKEN,
            **cast(Any, dict(setting.shape)),
        )
        super().__init__(device, setting, config)
        self.sampling = CodSampling(setting.num_depths, *_DOWN_SAMPLING)
        self._forwards: dict[int, list[_Elements]] = {}
        self._plans: dict[int, ParallelPlan] = {}
        self._references: dict[int, tuple[PEagleTrainerModule, PEaglePlan]] = {}

    def parts(self, way: Way) -> list[Callable[[], Tensor]]:
        return {
            "ours": self._ours,
            "plain": self._plain,
            "plain_by_row": self._plain_by_row,
            "reference": self._reference,
        }[way.name](way)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Bool ``[N]``."""
        return self.flat(self.padded.position_mask).cpu().numpy()

    @cached_property
    def elements(self) -> Elements:
        """Those of depths ≥ 1, drawn once for all ways."""
        generator = _generator()
        return sample_elements(self.lengths, self.supervised, self.sampling, [generator] * len(self.lengths))

    @property
    def num_charged(self) -> int:
        """``N``."""
        return self.num_supervised + len(self.elements.anchors)

    @property
    def num_elements(self) -> int:
        """Elements that our way runs."""
        return len(self.plan(1).key_slots) + len(self.elements.anchors)

    @cached_property
    def num_plain_elements(self) -> int:
        """Elements that the plain way runs unpartitioned."""
        return sum(len(elements.anchors) for elements in self._plain_forwards(1))

    def plan(self, num_segments: int) -> ParallelPlan:
        """Return our plan, on the device; a reader thread makes it while the step before runs."""
        if num_segments not in self._plans:
            plan = plan_parallel(
                self.lengths,
                self.supervised,
                self.supervised,
                np.arange(self.num_tokens),
                self.elements,
                self.setting.num_depths,
                self.setting.chunk,
                num_segments,
                ragged=self.device != "cpu",
            )
            self._plans[num_segments] = moved(plan, self.device)
        return self._plans[num_segments]

    def _ours(self, way: Way) -> list[Callable[[], Tensor]]:
        ids, positions, aux, targets = self.samples
        plan, model = self.plan(way.num_segments), self.model
        loss = PackedParallelLoss(
            PackedParallel(model, plan, ids, positions, way.recompute),
            model.before_head,
            model.lm_head.weight,
            plan,
            lambda: aux,
            targets,
            ParallelLoss(self.setting.num_depths).weights(plan.step_counts),
        )
        return [lambda part=part: part()[0] for part in loss.parts()]  # type: ignore[misc]

    @cached_property
    def probs(self) -> Tensor:
        """The target's probabilities at every slot of the padded rows, ``[B, T, Vd]``."""
        if not self.setting.factored:
            return self.padded.target_probs
        targets = self.samples[3]
        bounds = [*range(0, self.num_tokens, _HEAD_ROWS), self.num_tokens]
        found = self.padded.target_probs.new_zeros(*self.padded.input_ids.shape, self.setting.draft_vocab_size)
        real = self.padded.attention_mask.bool()
        found[real] = torch.cat([targets.probs(*pair) for pair in pairwise(bounds)])
        return found

    def _plain(self, way: Way) -> list[Callable[[], Tensor]]:
        parts = self._plain_by_row(way)
        return parts if way.num_segments > 1 else [lambda: torch.stack([part() for part in parts]).sum()]

    def _plain_by_row(self, way: Way) -> list[Callable[[], Tensor]]:
        if way.num_segments not in self._forwards:
            self._forwards[way.num_segments] = self._plain_forwards(way.num_segments)
        return [partial(self._plain_loss, self.probs, elements) for elements in self._forwards[way.num_segments]]

    def _plain_forwards(self, num_segments: int) -> list[_Elements]:
        """Return what each segment of each row runs: its own elements, and those of depth 0 on their left."""
        forwards, start = [], 0
        num_slots = self.padded.input_ids.shape[1]
        mask = self.padded.position_mask
        for row, length in enumerate(self.lengths):
            chosen = slice(*np.searchsorted(self.elements.anchors, [start, start + length]))
            deeper = torch.from_numpy(self.elements.anchors[chosen] - start)
            depths = torch.from_numpy(self.elements.depths[chosen])
            anchors = torch.cat([torch.arange(num_slots), deeper]).to(self.device)
            depths = torch.cat([torch.zeros(num_slots, dtype=torch.int64), depths]).to(self.device)
            segments = assign_cod_segments(anchors, depths, length, num_segments)
            charged = mask[row][anchors + depths]
            for segment in range(num_segments):
                own = segments == segment
                run = own | ((depths == 0) & (segments < segment))
                forwards.append(_Elements(row, anchors[run], depths[run], (charged & own)[run]))
            start += length
        return forwards

    def _plain_loss(self, probs: Tensor, elements: _Elements) -> Tensor:
        """Return what a row's charged elements add to the loss; everything is computed for all of them."""
        batch, model, anchors, depths = self.padded, self.model, elements.anchors, elements.depths
        known, places = depths == 0, torch.arange(len(depths), device=self.device)
        ids = torch.where(known, batch.input_ids[elements.row][anchors], MASK_TOKEN)
        states = model.project_hidden_states(batch.aux_hidden_states[elements.row][anchors[known]])
        states = torch.cat([states, model.project_mask_hidden()[0].to(states.dtype)])
        states = states[torch.where(known, known.cumsum(0) - 1, len(states) - 1)]
        length = torch.tensor([self.lengths[elements.row]], device=self.device)
        reads = create_peagle_mask_mod(anchors, depths, length, batch.input_ids.shape[1])
        mask = reads(0, 0, places[:, None], places)

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            groups = queries.shape[1] // keys.shape[1]
            keys, values = (states.to(values.dtype).repeat_interleave(groups, dim=1) for states in (keys, values))
            return scaled_dot_product_attention(queries.to(values.dtype), keys, values, attn_mask=mask)

        hidden = model.forward_parallel(ids[None], states[None], (anchors + depths)[None], attend)[0]
        logits = model.compute_logits(hidden)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        targets = probs[elements.row][anchors + depths].to(wide.dtype)
        divergences = kl_div(wide.log_softmax(dim=-1), targets, reduction="none").sum(dim=-1)
        return masked_sum(divergences, elements.charged) / self.num_charged

    def _reference(self, way: Way) -> list[Callable[[], Tensor]]:
        batch = self.padded
        if way.num_segments not in self._references:
            size, sampling = self.setting.draft_vocab_size, self.sampling
            module = PEagleTrainerModule(
                self.model,
                torch.arange(size, device=self.device),
                torch.ones(size, dtype=torch.bool, device=self.device),
                sampling.num_depths,
                MASK_TOKEN,
                sampling.down_sample_ratio,
                sampling.down_sample_ratio_min,
                way.num_segments,
            )
            plan = module.build_peagle_plan(batch.loss_mask, batch.attention_mask, generator=_generator())
            self._references[way.num_segments] = module, plan
        module, plan = self._references[way.num_segments]
        probs = self.probs

        def loss(index: int) -> Tensor:
            return module(
                batch.input_ids,
                batch.attention_mask,
                batch.loss_mask,
                batch.aux_hidden_states,
                peagle_segment=(plan, index),
                target_probs=probs,
            ).loss

        return [partial(loss, index) for index in range(len(plan.units))]


def _generator() -> torch.Generator:
    """Return what all ways draw their elements with, row after row."""
    return torch.Generator().manual_seed(0)

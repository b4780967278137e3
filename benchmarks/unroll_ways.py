"""The same training step three ways, over the same samples with the same draft, and what it has to compute at least.

- ours: samples end to end, only what a supervised slot needs, head and loss fused in chunks;
- padded to the sequence length, dense attention with a column a step, logits and probabilities at every slot, as the
  NeMo AutoModel trainer does;
- padded to the longest sample, attention over a key axis that grows by the row's length a step, logits at every slot,
  as SpecForge does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.training_steps import StepSetting, StepWork
from eagle_offline.alignment import SlotBatch, shift_left_with_zero
from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.draft.layers import DraftLayer, head_dim
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.losses import masked_sum, soft_cross_entropy
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.plan import UnrollPlan, moved, plan_unroll
from eagle_offline.objectives.ttt import supervised_counts
from eagle_offline.objectives.ttt_loss import TTTLoss

WAYS = ("ours", "padded_dense", "growing_keys")
RECOMPUTED = "ours_recomputed"


@dataclass(frozen=True)
class Setting(StepSetting):
    """See `StepSetting`; only our way reads factored supervision.

    Attributes:
        ttt_steps: ``K``.
    """

    ttt_steps: int = 7


class Work(StepWork):
    """A draft, samples, and one step over them each way."""

    setting: Setting

    def __init__(self, device: str, setting: Setting):
        size = setting.draft_vocab_size
        config = Eagle3DraftConfig(vocab_size=size, draft_vocab_size=size, **cast(Any, dict(setting.shape)))
        super().__init__(device, setting, config)
        self.weights = TTTLoss(setting.ttt_steps).weights(supervised_counts(self.padded, setting.ttt_steps))

    def parts(self, way: str) -> list[Callable[[], Tensor]]:
        ours = partial(self._ours, self.plan, *self.samples)
        ways: dict[str, Callable[[], Tensor]] = {
            "ours": ours,
            RECOMPUTED: partial(ours, recompute=True),
            "padded_dense": self._padded_dense,
            "growing_keys": self._growing_keys,
        }
        return [ways[way]]

    @cached_property
    def plan(self) -> UnrollPlan:
        """Our plan, on the device; a reader thread makes it while the step before runs."""
        mask = self.flat(self.padded.position_mask).cpu().numpy()
        setting, rows = self.setting, np.arange(self.num_tokens)
        ragged = self.device != "cpu"
        plan = plan_unroll(self.lengths, mask, mask, rows, setting.ttt_steps, setting.chunk, ragged=ragged)
        return moved(plan, self.device)

    def _ours(
        self,
        plan: UnrollPlan,
        ids: Tensor,
        positions: Tensor,
        aux: Tensor,
        targets: TargetRows,
        recompute: bool = False,
    ) -> Tensor:
        work = PackedUnroll(self.model, plan, ids, positions, recompute)
        model = self.model
        head_weight = model.lm_head.weight
        return unroll_packed(work, model.before_head, head_weight, plan, lambda: aux, targets, self.weights)[0]

    def _every_slot(self, batch: SlotBatch, forward: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """Return the loss of an unroll whose logits are computed at every slot."""
        hidden = self.model.project_hidden_states(batch.aux_hidden_states)
        ids, probs, mask, losses = batch.input_ids, batch.target_probs, batch.position_mask, []
        for step in range(self.setting.ttt_steps):
            if step > 0:
                ids, probs, mask = (shift_left_with_zero(rows) for rows in (ids, probs, mask))
            hidden = forward(step, ids, hidden)
            supervised = batch.counting_slots(mask, step)
            losses.append(masked_sum(soft_cross_entropy(self.model.compute_logits(hidden), probs), supervised))
        return (torch.stack(losses) * self.weights.cross_entropy).sum()

    def _padded_dense(self) -> Tensor:
        batch, cache_hidden = self.padded, [[], []]

        def forward(_step: int, ids: Tensor, hidden: Tensor) -> Tensor:
            return self.model(ids, hidden, batch.attention_mask, batch.position_ids, cache_hidden, batch.seq_lens)

        return self._every_slot(batch, forward)

    def _growing_keys(self) -> Tensor:
        longest = max(self.lengths)
        cut = {name: tensor[:, :longest] for name, tensor in vars(self.padded).items() if name != "seq_lens"}
        batch = replace(self.padded, **cut)
        layer = cast(DraftLayer, self.model.layers[0])
        attention = layer.self_attn
        groups = attention.num_heads // attention.num_key_value_heads
        slots = torch.arange(longest, device=self.device)
        mask = (slots[:, None] >= slots) & batch.attention_mask[:, None, None, :] | torch.eye(
            longest, dtype=torch.bool, device=self.device
        )
        own = torch.eye(longest, dtype=torch.bool, device=self.device).expand_as(mask)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def forward(step: int, ids: Tensor, hidden: Tensor) -> Tensor:
            cos, sin = self.model.rotary(batch.position_ids + step, hidden.dtype)
            states = layer.attention_input(hidden, self.model.embed_tokens(ids))
            query, key, value = attention.project(states, cos, sin)
            keys.append(key.repeat_interleave(groups, dim=1))
            values.append(value.repeat_interleave(groups, dim=1))
            attended = scaled_dot_product_attention(
                query.to(value.dtype),
                torch.cat(keys, dim=2).to(value.dtype),
                torch.cat(values, dim=2),
                attn_mask=torch.cat([mask, *[own] * step], dim=-1),
            )
            return layer.after_attention(hidden, attention.o_proj(attended.transpose(1, 2).flatten(2)))

        return self._every_slot(batch, forward)


def necessary_flops(
    config: Eagle3DraftConfig, plan: UnrollPlan, columns: Tensor, target_head_size: int | None = None
) -> int:
    """Return the multiplications and additions that an exact step, forward and backward, cannot do without.

    Matrix products alone: norms, rotations and softmax are not counted, nor scores that a flash kernel computes twice.
    A product of weights costs its forward once more for the gradient of its input and once more for that of its
    weight; of those that are frozen, and of inputs that need no gradient, nothing.

    Args:
        config: the draft's.
        plan: what is supervised, and so what is active.
        columns: int64 ``[N]``, each slot's place in its document.
        target_head_size: width of the final states that the target's head reads; None when probabilities are stored.
    """
    size, width, layers = config.hidden_size, head_dim(config), config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    num_keys = len(plan.key_slots)
    # The aux states need no gradient; below norms that learn, what they become does.
    aux_weights = config.num_aux_hidden_states * config.target_hidden_size * size
    total = (3 if config.fc_norm else 2) * 2 * num_keys * aux_weights
    for index in range(layers):
        input_size = 2 * size if index == 0 else size
        key_weights = input_size * 2 * kv_heads * width
        row_weights = input_size * heads * width + heads * width * size + 3 * size * config.intermediate_size
        for step, planned in enumerate(plan.steps):
            # Step 0's keys are of all key slots, and so are the outputs of every layer that another one reads.
            slots = plan.key_slots if step == 0 and index < layers - 1 else planned.slots
            key_rows = num_keys if step == 0 else len(slots)
            pairs = int(columns[slots].sum()) + (1 + step) * len(slots)
            total += 3 * 2 * (key_rows * key_weights + len(slots) * row_weights)
            # Forward: scores and weighted values; backward: gradients of queries, keys, values and weights.
            total += 6 * 2 * pairs * heads * width
    total += 3 * 2 * sum(len(planned.supervised) for planned in plan.steps) * size * config.draft_vocab_size
    if target_head_size is not None:
        total += 2 * len(plan.loss_rows.targets.unique()) * target_head_size * config.draft_vocab_size
    return total


def matmul_flops_per_second(device: str, size: int = 8192, repeats: int = 10) -> float:
    """Return the rate of a large square bf16 product."""
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for timed in (False, True):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            one @ other
        torch.cuda.synchronize()
        if timed:
            return repeats * 2 * size**3 / (time.perf_counter() - started)
    raise AssertionError

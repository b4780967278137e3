"""The same training step three ways, over the same samples with the same draft, and what it has to compute at least.

- ours: samples end to end, only what a supervised slot needs, head and loss fused in chunks;
- padded to the sequence length, dense attention with a column a step, logits and probabilities at every slot, as the
  NeMo AutoModel trainer does;
- padded to the longest sample, attention over a key axis that grows by the row's length a step, logits at every slot,
  as SpecForge does.

Of each sample the assistant says the second half. Weights are float32, on CUDA under bf16 autocast, embeddings frozen,
as `eagle_offline.training` has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.states import chat_lengths
from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids, shift_left_with_zero
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.layers import DraftLayer, head_dim
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.losses import masked_sum, soft_cross_entropy
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.plan import UnrollPlan, moved, plan_unroll
from eagle_offline.objectives.ttt import supervised_counts
from eagle_offline.objectives.ttt_loss import TTTLoss
from eagle_offline.supervision import Head

WAYS = ("ours", "padded_dense", "growing_keys")
RECOMPUTED = "ours_recomputed"


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        shape: fields of the draft's config.
        draft_vocab_size: ``Vd``.
        num_samples: samples a step.
        seq_length: what one way pads to; lengths are those of chat data for 2,048, scaled to this.
        ttt_steps: ``K``.
        chunk: rows of the loss at once.
        sample_length: length of every sample, instead of those of chat data.
        factored: supervision is final states and a head instead of probabilities; only our way reads these.
    """

    shape: tuple[tuple[str, int], ...]
    draft_vocab_size: int
    num_samples: int
    seq_length: int
    ttt_steps: int = 7
    chunk: int = 1024
    sample_length: int | None = None
    factored: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        if self.sample_length is not None:
            return [self.sample_length] * self.num_samples
        scaled = chat_lengths(self.num_samples, seed=2) * self.seq_length // 2048
        return np.maximum(scaled, 8).tolist()


class Work:
    """A draft, samples, and one step over them each way."""

    def __init__(self, device: str, setting: Setting):
        torch.manual_seed(0)
        self.setting, self.device = setting, device
        size = setting.draft_vocab_size
        self.config = Eagle3DraftConfig(vocab_size=size, draft_vocab_size=size, **dict(setting.shape))
        with torch.device(device):
            self.model = cast(Any, Eagle3DraftModel(self.config))
        self.model.embed_tokens.weight.requires_grad_(False)
        self.lengths = setting.lengths
        self.num_tokens = sum(self.lengths)
        self.padded = self._padded(setting.seq_length)
        self.num_supervised = int(self.padded.position_mask.sum())
        self.weights = TTTLoss(setting.ttt_steps).weights(supervised_counts(self.padded, setting.ttt_steps))

    def run(self, way: str) -> float:
        """Do one forward and backward; return the loss."""
        ways = {
            "ours": self._ours,
            RECOMPUTED: lambda: self._ours(recompute=True),
            "padded_dense": self._padded_dense,
            "growing_keys": self._growing_keys,
        }
        self.model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
            loss = ways[way]()
        loss.backward()
        return float(loss.detach())

    def seconds(self, way: str) -> float:
        """Return how long a step takes."""
        self._finish()
        started = time.perf_counter()
        self.run(way)
        self._finish()
        return time.perf_counter() - started

    def _finish(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _padded(self, num_slots: int) -> SlotBatch:
        """Return the samples as padded rows, slot frame, probabilities at every slot."""
        setting, count = self.setting, len(self.lengths)
        slots, lengths = torch.arange(num_slots), torch.tensor(self.lengths)[:, None]
        generator = torch.Generator(self.device).manual_seed(0)
        shape = {"generator": generator, "device": self.device}
        aux_size = self.config.num_aux_hidden_states * self.config.hidden_size
        probs = torch.zeros(count, num_slots, 0, device=self.device)
        if not setting.factored:
            probs = torch.randn(count, num_slots, setting.draft_vocab_size, **shape).mul_(3).softmax(-1)
        mask = shift_left_with_zero((slots >= lengths // 2) & (slots < lengths)).to(self.device)
        seq_lens = lengths.contiguous()
        return SlotBatch(
            input_ids=torch.randint(0, setting.draft_vocab_size, (count, num_slots), **shape),
            attention_mask=(slots < lengths).to(self.device),
            loss_mask=mask,
            aux_hidden_states=torch.randn(count, num_slots, aux_size, dtype=torch.bfloat16, **shape),
            target_probs=probs,
            position_mask=mask,
            position_ids=position_ids(seq_lens, num_slots).to(self.device),
            seq_lens=seq_lens.to(self.device),
            doc_remaining=doc_remaining(seq_lens, num_slots).to(self.device),
        )

    def _flat(self, tensor: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(tensor, self.lengths, strict=True)])

    @cached_property
    def plan(self) -> UnrollPlan:
        """Our plan, on the device; a reader thread makes it while the step before runs."""
        mask = self._flat(self.padded.position_mask).cpu().numpy()
        setting, rows = self.setting, np.arange(self.num_tokens)
        ragged = self.device != "cpu"
        plan = plan_unroll(self.lengths, mask, mask, rows, setting.ttt_steps, setting.chunk, ragged=ragged)
        return moved(plan, self.device)

    @cached_property
    def samples(self) -> tuple[Tensor, Tensor, Tensor, TargetRows]:
        """Ids, positions, aux states and supervision end to end, as a reader thread lays them out."""
        batch = self.padded
        if self.setting.factored:
            hidden_size = self.config.hidden_size
            with torch.device(self.device):
                rows = torch.randn(self.num_tokens, hidden_size, dtype=torch.bfloat16)
                head = Head(torch.randn(self.setting.draft_vocab_size, hidden_size, dtype=torch.bfloat16) / 20)
            targets = TargetRows.of(rows, head)
        else:
            targets = TargetRows.of(self._flat(batch.target_probs), None)
        flat = (self._flat(tensor) for tensor in (batch.input_ids, batch.position_ids, batch.aux_hidden_states))
        ids, positions, aux = flat
        return ids, positions, aux, targets

    def _ours(self, recompute: bool = False) -> Tensor:
        ids, positions, aux, targets = self.samples
        work = PackedUnroll(self.model, self.plan, ids, positions, recompute)
        head_weight = self.model.lm_head.weight
        return unroll_packed(work, self.model.before_head, head_weight, self.plan, aux, targets, self.weights)[0]

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

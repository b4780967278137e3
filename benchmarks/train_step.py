"""What does a training step cost, in time and memory, beside the steps that others take?

Forward and backward over the same chat-like samples, of which the assistant says the second half, with the same draft
and the same target distributions, three ways:

- ours: samples end to end, only what a supervised slot needs, head and loss fused in chunks;
- padded to the sequence length, dense attention with a column a step, logits and probabilities at every slot, as the
  NeMo AutoModel trainer does;
- padded to the longest sample, attention over a key axis that grows by the row's length a step, logits at every slot,
  as SpecForge does.

Rates are tokens of real text a second; memory is what a step needs on top of weights and samples, each way in a
process of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Figures
from benchmarks.states import chat_lengths, hidden_states
from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids, shift_left_with_zero
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.layers import DraftLayer
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.losses import masked_sum, soft_cross_entropy
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.plan import moved, plan_unroll
from eagle_offline.objectives.ttt import STEP_DECAY

NAME = "train_step"
QUESTION = __doc__

WAYS = ("ours", "padded_dense", "growing_keys")


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
    """

    shape: tuple[tuple[str, int], ...]
    draft_vocab_size: int
    num_samples: int
    seq_length: int
    ttt_steps: int = 7
    chunk: int = 1024


SMALL = Setting(
    shape=(
        ("hidden_size", 256),
        ("intermediate_size", 704),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
    ),
    draft_vocab_size=4096,
    num_samples=8,
    seq_length=512,
)
SHAPE_8B = Setting(
    shape=(
        ("hidden_size", 4096),
        ("intermediate_size", 14336),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 8),
    ),
    draft_vocab_size=32000,
    num_samples=4,
    seq_length=1024,
    chunk=2048,
)


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return a small shape on a CPU, and the 8B shape on a GPU."""
    if device == "cpu":
        return {"hidden256": lambda: measure(device, SMALL)}
    return {"8b": lambda: measure(device, SHAPE_8B)}


def measure(device: str, setting: Setting, *, repeats: int = 3) -> Figures:
    """Return real tokens a second and memory of a step, ours and the ratios to the others."""
    work = _Work(device, setting)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for way in WAYS:
            started = time.perf_counter()
            losses[way] = work.run(way)
            if repeat > 0:
                times[way].append(time.perf_counter() - started)
    if max(losses.values()) - min(losses.values()) > 1e-2 * losses["ours"]:
        raise AssertionError(f"not the same step: {losses}")
    seconds = {way: sorted(values)[len(values) // 2] for way, values in times.items()}
    extra = {way: peak_bytes(device, setting, way) for way in WAYS}
    figures: Figures = {}
    for way in WAYS[1:]:
        figures[f"speed_over_{way}"] = seconds[way] / seconds["ours"]
        figures[f"memory_of_{way}"] = extra["ours"] / extra[way]
    figures["tokens_per_second"] = work.num_tokens / seconds["ours"]
    figures["extra_memory_mb"] = extra["ours"] / 1e6
    figures["tokens"], figures["padded_slots"] = work.num_tokens, setting.num_samples * setting.seq_length
    figures["supervised_slots"] = int(work.padded.position_mask.sum())
    return figures


def peak_bytes(device: str, setting: Setting, way: str) -> int:
    """Return the memory that two steps need on top of what stood before them, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return int(pool.apply(_peak_bytes, (device, setting, way)))


def _peak_bytes(device: str, setting: Setting, way: str) -> int:
    work = _Work(device, setting)
    work.run(way)
    work.model.zero_grad(set_to_none=True)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.run(way)
        return torch.cuda.max_memory_allocated() - before
    # Linux: give freed memory back, forget the largest resident size so far, and see what one more step makes of it.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work.run(way)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Return a size from Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


class _Work:
    """A draft, samples, and one step over them each way."""

    def __init__(self, device: str, setting: Setting):
        torch.manual_seed(0)
        self.setting, self.device = setting, device
        size = setting.draft_vocab_size
        config = Eagle3DraftConfig(vocab_size=size, draft_vocab_size=size, **dict(setting.shape))
        self.model = cast(Any, Eagle3DraftModel(config)).to(device)
        scaled = chat_lengths(setting.num_samples, seed=2) * setting.seq_length // 2048
        self.lengths = np.maximum(scaled, 8).tolist()
        self.num_tokens = sum(self.lengths)
        self.padded = self._padded(setting.seq_length)
        self.weights = STEP_DECAY ** torch.arange(setting.ttt_steps, device=device, dtype=torch.float32)

    def run(self, way: str) -> float:
        """Do one forward and backward; return the loss."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
            loss = {"ours": self._ours, "padded_dense": self._padded_dense, "growing_keys": self._growing_keys}[way]()
        loss.backward()
        return float(loss.detach())

    def _padded(self, num_slots: int) -> SlotBatch:
        """Return the samples as padded rows, slot frame, probabilities at every slot."""
        hidden_size, count = dict(self.setting.shape)["hidden_size"], len(self.lengths)
        slots = torch.arange(num_slots)
        lengths = torch.tensor(self.lengths)[:, None]
        generator = torch.Generator().manual_seed(0)
        aux = torch.cat([hidden_states(count * num_slots, seed, hidden_size) for seed in range(3)], dim=-1)
        mask = shift_left_with_zero((slots >= lengths // 2) & (slots < lengths))
        probs = torch.randn(count, num_slots, self.setting.draft_vocab_size, generator=generator).mul_(3).softmax(-1)
        seq_lens = lengths.contiguous()
        batch = SlotBatch(
            input_ids=torch.randint(0, self.setting.draft_vocab_size, (count, num_slots), generator=generator),
            attention_mask=slots < lengths,
            loss_mask=mask,
            aux_hidden_states=aux.view(count, num_slots, -1) / 100,
            target_probs=probs,
            position_mask=mask,
            position_ids=position_ids(seq_lens, num_slots),
            seq_lens=seq_lens,
            doc_remaining=doc_remaining(seq_lens, num_slots),
        )
        return SlotBatch(**{name: tensor.to(self.device) for name, tensor in vars(batch).items()})

    def _flat(self, tensor: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(tensor, self.lengths, strict=True)])

    def _ours(self) -> Tensor:
        """Return our loss; laying out and planning are part of the step here, though a reader thread does them."""
        batch = self.padded
        mask = self._flat(batch.position_mask).cpu().numpy()
        rows = np.arange(self.num_tokens)
        plan = plan_unroll(self.lengths, mask, mask, rows, self.setting.ttt_steps, self.setting.chunk)
        plan = moved(plan, self.device)
        work = PackedUnroll(self.model, plan, self._flat(batch.input_ids), self._flat(batch.position_ids))
        loss, _ = unroll_packed(
            work,
            self.model.before_head,
            self.model.lm_head.weight,
            plan,
            self._flat(batch.aux_hidden_states),
            TargetRows(self._flat(batch.target_probs), None),
            self.weights / plan.step_counts.clamp_min(1),
        )
        return loss

    def _every_slot(self, batch: SlotBatch, forward: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """Return the loss of an unroll whose logits are computed at every slot."""
        hidden = self.model.project_hidden_states(batch.aux_hidden_states)
        ids, probs, mask, losses = batch.input_ids, batch.target_probs, batch.position_mask, []
        for step in range(self.setting.ttt_steps):
            if step > 0:
                ids, probs, mask = (shift_left_with_zero(rows) for rows in (ids, probs, mask))
            hidden = forward(step, ids, hidden)
            supervised = batch.counting_slots(mask, step)
            loss = masked_sum(soft_cross_entropy(self.model.compute_logits(hidden), probs), supervised)
            losses.append(loss / supervised.sum().clamp_min(1))
        return (torch.stack(losses) * self.weights).sum()

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

"""A draft, samples, and a training step over them in several ways: how long it takes, and what memory it needs.

Of each sample the assistant says the second half. Weights are float32, on CUDA under bf16 autocast, embeddings frozen,
as `eagle_offline.training` has them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.states import chat_lengths
from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids, shift_left_with_zero
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.supervision import Head

Key = TypeVar("Key", bound=Hashable)

SMALL_SHAPE = (
    ("hidden_size", 256),
    ("intermediate_size", 704),
    ("num_attention_heads", 4),
    ("num_key_value_heads", 2),
)
SHAPE_8B = (
    ("hidden_size", 4096),
    ("intermediate_size", 14336),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 8),
)
# Linux, malloc.h: allocations of so many bytes are mapped by themselves.
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 1 << 16


@dataclass(frozen=True)
class StepSetting:
    """What is run.

    Attributes:
        shape: fields of the draft's config.
        draft_vocab_size: ``Vd``.
        num_samples: samples a step.
        seq_length: what one way pads to; lengths are those of chat data for 2,048, scaled to this.
        chunk: rows of the loss at once.
        sample_length: length of every sample, instead of those of chat data.
        factored: supervision is final states and a head instead of probabilities.
    """

    shape: tuple[tuple[str, int], ...]
    draft_vocab_size: int
    num_samples: int
    seq_length: int
    chunk: int = 256
    sample_length: int | None = None
    factored: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        if self.sample_length is not None:
            return [self.sample_length] * self.num_samples
        scaled = chat_lengths(self.num_samples, seed=2) * self.seq_length // 2048
        return np.maximum(scaled, 8).tolist()


class StepWork(ABC):
    """A draft, samples, and one step over them each way; a subclass is made from a device and a setting alone."""

    def __init__(self, device: str, setting: Any, config: Eagle3DraftConfig):
        torch.manual_seed(0)
        self.setting, self.device, self.config = setting, device, config
        with torch.device(device):
            self.model = cast(Any, Eagle3DraftModel(config))
        self.model.embed_tokens.weight.requires_grad_(False)
        self.lengths = setting.lengths
        self.num_tokens = sum(self.lengths)
        self.padded = self._padded(setting.seq_length)
        self.num_supervised = int(self.padded.position_mask.sum())

    @abstractmethod
    def parts(self, way: Any) -> Sequence[Callable[[], Tensor]]:
        """Return what a step is made of: the loss of each is sent back before the next is asked for.

        Samples and plans, made once, are there when this returns.
        """

    def run(self, way: Any) -> float:
        """Do one forward and backward; return the loss."""
        self.model.zero_grad(set_to_none=True)
        losses = []
        for part in self.parts(way):
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
                loss = part()
            loss.backward()
            losses.append(loss.detach())
            # A loss that is still held keeps what its step holds.
            del loss
        return sum(map(float, losses))

    def seconds(self, way: Any) -> float:
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
        shape: dict[str, Any] = {"generator": generator, "device": self.device}
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

    def flat(self, tensor: Tensor) -> Tensor:
        """Return padded rows ``[B, T, …]`` end to end, ``[N, …]``."""
        return torch.cat([row[:length] for row, length in zip(tensor, self.lengths, strict=True)])

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
            targets = TargetRows.of(self.flat(batch.target_probs), None)
        assert batch.position_ids is not None
        positions = self.flat(batch.position_ids)
        return self.flat(batch.input_ids), positions, self.flat(batch.aux_hidden_states), targets


def median_seconds(steps: Mapping[Key, Callable[[], float]], repeats: int) -> dict[Key, float]:
    """Return each step's median seconds, measured turn by turn after a first turn that does not count."""
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for repeat in range(repeats + 1):
        for key, step in steps.items():
            taken = step()
            if repeat > 0:
                times[key].append(taken)
    return {key: statistics.median(values) for key, values in times.items()}


def peak_bytes(work: StepWork, way: Any) -> int:
    """Return the memory that a step needs on top of what stood before it; on a CPU measured in a fresh process."""
    if work.device.startswith("cuda"):
        work.run(way)
        work.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.run(way)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return int(pool.apply(_peak_resident_bytes, (type(work), work.setting, way)))


def _peak_resident_bytes(make_work: Callable[[str, Any], StepWork], setting: Any, way: Any) -> int:
    libc = ctypes.CDLL(None)
    # Linux: what is freed goes back at once, so that holes in the heap are not taken for what a step holds.
    libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    # Libraries set themselves up over one sample.
    make_work("cpu", replace(setting, num_samples=1)).run(way)
    work = make_work("cpu", setting)
    work.parts(way)
    # Forget the largest resident size so far, and see what a step makes of it.
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work.run(way)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Return a size from Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

"""Speculative decoding: draft, verify in one forward of the target, keep what it accepts, again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from eagle_offline.serving.cached_target import CachedTarget, TargetStep
from eagle_offline.serving.drafting import Drafter, Settled
from eagle_offline.serving.sampling import Sampling

T = TypeVar("T")


@dataclass
class Answer:
    """What one prompt got.

    Attributes:
        token_ids: the answer, its stop token included.
        stopped: whether a stop token ended it, rather than the limit.
        accepted: drafts accepted in each round; in the last one, those that the answer still holds. The answer's
            first token comes from the prompt's forward, before any round.
    """

    token_ids: list[int] = field(default_factory=list)
    stopped: bool = False
    accepted: list[int] = field(default_factory=list)


@dataclass
class Seconds:
    """Where the time went."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0

    def add(self, other: Seconds) -> None:
        """Add another's time."""
        self.prefill += other.prefill
        self.draft += other.draft
        self.verify += other.verify


@dataclass(frozen=True)
class Limits:
    """When an answer ends.

    Attributes:
        max_new_tokens: longest answer.
        stop_token_ids: tokens that end one.
    """

    max_new_tokens: int
    stop_token_ids: Collection[int]


def decode(
    target: CachedTarget,
    drafter: Drafter,
    prompts: list[list[int]],
    limits: Limits,
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[list[Answer], Seconds]:
    """Answer a batch of prompts.

    With `Sampling` greedy the answers are those of plain decoding, token for token; otherwise they have the
    target's distribution, whatever the drafter proposes.

    Args:
        target: the target; it must capture aux states if the drafter reads them.
        drafter: proposes; `NoDrafter` for plain decoding.
        prompts: token ids, one list a row, none empty.
        limits: when an answer ends.
        sampling: how tokens are chosen.
        generator: of every random draw, on the target's device.
    """
    return _Batch(target, drafter, limits, sampling, generator).run(prompts)


class _Batch:
    """One batch of prompts on its way to answers."""

    def __init__(
        self,
        target: CachedTarget,
        drafter: Drafter,
        limits: Limits,
        sampling: Sampling,
        generator: torch.Generator,
    ):
        self._target, self._drafter, self._limits = target, drafter, limits
        self._sampling, self._generator = sampling, generator
        self._seconds = Seconds()
        self._answers: list[Answer] = []
        # Which answer each row of the batch belongs to, and how many slots of the row are settled.
        self._rows: list[int] = []
        self._num_settled: list[int] = []

    @torch.inference_mode()
    def run(self, prompts: list[list[int]]) -> tuple[list[Answer], Seconds]:
        self._answers = [Answer() for _ in prompts]
        self._rows, self._num_settled = list(range(len(prompts))), [0] * len(prompts)
        self._drafter.start(len(prompts))
        step = self._timed("prefill", lambda: self._target.start(prompts))
        next_ids, _ = self._sampling.choose(step.logits[:, -1], self._generator)
        settled = self._settle_prompts(prompts, step, next_ids)
        finished = [self._append(row, [token], None) for row, token in enumerate(next_ids.tolist())]
        while True:
            settled, next_ids = self._drop(finished, settled, next_ids)
            if not self._rows:
                return self._answers, self._seconds
            settled, next_ids, finished = self._round(settled, next_ids)

    def _round(self, settled: Settled, last_ids: Tensor) -> tuple[Settled, Tensor, list[bool]]:
        """Draft, verify, keep; return what is settled now, the newest tokens and which rows are finished."""
        proposal = self._timed("draft", lambda: self._drafter.propose(settled, self._sampling, self._generator))
        tokens = torch.cat([last_ids.unsqueeze(1), proposal.token_ids], dim=1)
        depths = proposal.depths
        if depths is not None:
            depths = torch.cat([depths.new_zeros(1), depths])

        def verify() -> tuple[Settled, Tensor, list[bool]]:
            step = self._target.extend(tokens, depths, proposal.visible)
            acceptance = proposal.accept(step.logits, self._sampling, self._generator)
            kept, aux, columns = tokens[:, 1:], step.aux_hidden_states, acceptance.columns
            if columns is not None:
                kept = tokens.gather(1, columns[:, 1:])
                aux = None if aux is None else aux.gather(1, columns.unsqueeze(-1).expand(-1, -1, aux.shape[-1]))
            following = torch.cat([kept, kept.new_zeros(len(kept), 1)], dim=1)
            following.scatter_(1, acceptance.num_accepted.unsqueeze(1), acceptance.next_ids.unsqueeze(1))
            accepted = acceptance.num_accepted.tolist()
            counts = [count + 1 for count in accepted]
            self._target.keep(counts, columns)
            now = self._settled(following, aux, counts)
            finished = [
                self._append(row, ids[:count], count - 1)
                for row, (ids, count) in enumerate(zip(following.tolist(), counts, strict=True))
            ]
            return now, acceptance.next_ids, finished

        return self._timed("verify", verify)

    def _settle_prompts(self, prompts: list[list[int]], step: TargetStep, next_ids: Tensor) -> Settled:
        """Return the slots of the prompts, moved from left-padded to right-padded rows."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - 1] = torch.tensor(prompt[1:], dtype=torch.long)
        ends = torch.tensor(lengths, device=self._target.device).unsqueeze(1)
        following = ids.to(self._target.device).scatter(1, ends - 1, next_ids.unsqueeze(1))
        aux = step.aux_hidden_states
        if aux is not None:
            columns = (torch.arange(longest, device=aux.device) + longest - ends).clamp_max(longest - 1)
            aux = aux.gather(1, columns.unsqueeze(-1).expand(-1, -1, aux.shape[-1]))
        return self._settled(following, aux, lengths)

    def _settled(self, following: Tensor, aux: Tensor | None, counts: list[int]) -> Settled:
        """Return the slots that a forward settled, and count them."""
        width = max(counts)
        device = following.device
        starts = torch.tensor(self._num_settled, device=device).unsqueeze(1)
        self._num_settled = [before + count for before, count in zip(self._num_settled, counts, strict=True)]
        return Settled(
            input_ids=following[:, :width],
            aux_hidden_states=following.new_zeros(*following.shape, 0) if aux is None else aux[:, :width],
            position_ids=starts + torch.arange(width, device=device),
            num_slots=torch.tensor(counts, device=device),
            num_columns=max(before - count for before, count in zip(self._num_settled, counts, strict=True)) + width,
        )

    def _append(self, row: int, token_ids: list[int], num_accepted: int | None) -> bool:
        """Add a round's tokens to a row's answer; return whether it is finished."""
        answer, limits = self._answers[self._rows[row]], self._limits
        kept = token_ids[: limits.max_new_tokens - len(answer.token_ids)]
        end = next((place for place, token in enumerate(kept, start=1) if token in limits.stop_token_ids), None)
        kept = kept[:end]
        answer.token_ids += kept
        answer.stopped = end is not None
        if num_accepted is not None:
            answer.accepted.append(min(num_accepted, len(kept)))
        return answer.stopped or len(answer.token_ids) >= limits.max_new_tokens

    def _drop(self, finished: list[bool], settled: Settled, next_ids: Tensor) -> tuple[Settled, Tensor]:
        """Take finished rows out of the batch."""
        if not any(finished):
            return settled, next_ids
        staying = [row for row, done in enumerate(finished) if not done]
        self._rows = [self._rows[row] for row in staying]
        self._num_settled = [self._num_settled[row] for row in staying]
        rows = torch.tensor(staying, dtype=torch.long, device=next_ids.device)
        if staying:
            self._target.select_rows(rows)
            self._drafter.select_rows(rows)
        left = Settled(
            settled.input_ids[rows],
            settled.aux_hidden_states[rows],
            settled.position_ids[rows],
            settled.num_slots[rows],
            settled.num_columns,
        )
        return left, next_ids[rows]

    def _timed(self, name: str, work: Callable[[], T]) -> T:
        """Do the work and count its time, the device's included."""
        started = time.perf_counter()
        result = work()
        if self._target.device.type == "cuda":
            torch.cuda.synchronize(self._target.device)
        setattr(self._seconds, name, getattr(self._seconds, name) + time.perf_counter() - started)
        return result

"""Packs of a run: which ones, in which order, read ahead and brought to the device before they are asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from typing import TypeVar, cast

import numpy as np
import torch

from eagle_offline.data.feed import feed
from eagle_offline.data.mixture import CacheMixture
from eagle_offline.data.stored_pack import PackReader
from eagle_offline.errors import DataError
from eagle_offline.prefetch import prefetch
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.corpus import Corpus
from eagle_offline.training.draft_start import DraftChoice
from eagle_offline.training.objective import Objective
from eagle_offline.training.packs import TrainingPack, plan_pack
from eagle_offline.training.ranks import Ranks
from eagle_offline.training.state import Position

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedStep:
    """This rank's share of an optimizer step, read ahead.

    Attributes:
        after: where training stands once it is done.
        samples: int64, indices of what it is made of.
        packs: ``num_packs`` of them, on the CPU or, brought there one ahead of need, on the training device.
        step_counts: int64 ``[K]``, supervised slots.
        num_tokens: of all packs.
    """

    after: Position
    samples: np.ndarray
    packs: Iterable[TrainingPack]
    num_packs: int
    step_counts: np.ndarray
    num_tokens: int


class PackStream:
    """What a run trains and validates on, in packs.

    Args:
        settings: of the run.
        corpus: its samples.
        ranks: this process among those of the run.
        choice: what the draft reads and proposes.
        objective: what is computed.
        device: where packs are run.

    Attributes:
        wait_seconds: how long steps have waited for data so far.
    """

    def __init__(
        self,
        settings: TrainSettings,
        corpus: Corpus,
        ranks: Ranks,
        choice: DraftChoice,
        objective: Objective,
        device: torch.device,
    ):
        self._settings, self._corpus, self._ranks, self._device = settings, corpus, ranks, device
        self._objective = objective
        self._selected_token_mask = choice.selected_token_mask
        self._reader = PackReader.for_device(device, choice.aux_layers)
        # The epoch at hand and the next, while steps are read ahead.
        self.packs = lru_cache(maxsize=2)(lambda epoch: corpus.epoch_packs(settings, epoch))
        self.wait_seconds = 0.0

    def count_steps(self, position: Position) -> int:
        """Return the steps that the run will have at its end, those before ``position`` included.

        Raises:
            DataError: none at all.
        """
        size = self._settings.global_batch
        later = [len(self.packs(epoch)) for epoch in range(position.epoch, self._settings.num_epochs)]
        if later:
            later[0] -= position.next_pack
        steps = position.step + sum(-(-count // size) for count in later)
        if not steps:
            raise DataError("no epoch has a sample with these --cache-weights; give larger ones or more --num-epochs")
        return min(steps, self._settings.max_steps or steps)

    def plan(self, position: Position, total_steps: int) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """Yield the packs of every step still to do, each with where training stands after it."""
        size = self._settings.global_batch
        while position.step < total_steps:
            packs = self.packs(position.epoch)
            coming = packs[position.next_pack :]
            if coming:
                self._corpus.samples.read_ahead(np.concatenate(coming))
            for start in range(position.next_pack, len(packs), size):
                if position.step >= total_steps:
                    return
                last = start + size >= len(packs)
                after = (position.epoch + 1, 0) if last else (position.epoch, start + size)
                position = Position(position.step + 1, *after)
                yield position, packs[start : start + size]
            if not packs:
                position = Position(position.step, position.epoch + 1, 0)

    def load(self, step: tuple[Position, list[np.ndarray]]) -> LoadedStep:
        """Return a step with this rank's packs read and laid out, on the CPU."""
        after, packs = step
        own = packs[self._ranks.rank :: self._ranks.size]
        gate = self._settings.supervision_gate
        loaded = tuple(self.pack(self._corpus.samples, pack, gate, after.epoch_before) for pack in own)
        counts = np.zeros(self._objective.loss.num_steps, np.int64)
        for pack in loaded:
            counts += pack.plan.step_counts.numpy()
        samples = np.concatenate(own) if own else np.empty(0, np.int64)
        return LoadedStep(after, samples, loaded, len(loaded), counts, sum(pack.num_tokens for pack in loaded))

    def steps(self, position: Position, total_steps: int) -> Iterator[LoadedStep]:
        """Yield every step still to do, its packs to be taken before the next step is.

        Packs are read by threads, a few steps ahead, and brought to the device one by one, so that it holds no more
        than the pack in hand and the next, however many a step has.
        """
        loaded = prefetch(self.load, self.plan(position, total_steps), num_workers=self._settings.num_workers)
        ahead = self._timed(feed(_parts(loaded), self._device))
        for step, first in ahead:
            rest = (cast(TrainingPack, pack) for _, pack in islice(ahead, max(0, step.num_packs - 1)))
            yield replace(step, packs=chain([] if first is None else [first], rest))

    def heldout(self, *, alone: bool = False) -> Iterator[TrainingPack]:
        """Yield this rank's share of the held-out documents, in cache order, on the training device.

        The gate is the reference's whatever a run trains with, so that runs can be compared. With ``alone`` every
        document is a pack of its own.
        """
        if self._corpus.heldout is not self._corpus.samples:
            self._corpus.heldout.read_ahead(self._corpus.heldout_samples)
        packs = list(self._corpus.heldout_packs(self._settings))[self._ranks.rank :: self._ranks.size]
        if alone:
            packs = [pack[place : place + 1] for pack in packs for place in range(len(pack))]
        read = prefetch(
            lambda indices: self.pack(self._corpus.heldout, indices), packs, num_workers=self._settings.num_workers
        )
        yield from feed(read, self._device)

    def pack(
        self,
        mixture: CacheMixture,
        indices: Sequence[int] | np.ndarray,
        gate: str = "input",
        epoch: int | None = None,
    ) -> TrainingPack:
        """Return samples as one pack, on the CPU; see `plan_pack`."""
        stored = self._reader.read([mixture.locate(int(index)) for index in indices])
        return plan_pack(stored, self._selected_token_mask, self._objective, self._device, gate, epoch)

    def _timed(self, items: Iterator[T]) -> Iterator[T]:
        """Yield items; what is waited for them is added to `wait_seconds`."""
        while True:
            began = time.monotonic()
            item = next(items, None)
            self.wait_seconds += time.monotonic() - began
            if item is None:
                return
            yield item


def _parts(steps: Iterator[LoadedStep]) -> Iterator[tuple[LoadedStep, TrainingPack | None]]:
    """Yield each pack beside its step, a step without packs once."""
    for step in steps:
        for pack in step.packs if step.num_packs else (None,):
            yield replace(step, packs=()), pack

"""The draft in training: what it starts from, one optimizer step, one validation, one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from eagle_offline.data.feed import feed
from eagle_offline.data.mixture import CacheMixture
from eagle_offline.data.prefetch import prefetch
from eagle_offline.data.stored_pack import PackReader
from eagle_offline.devices import resolve_device
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import embeddings_differ
from eagle_offline.draft.origin import DraftOrigin
from eagle_offline.draft.warm_start import DraftWeights
from eagle_offline.errors import EagleOfflineError
from eagle_offline.objectives.plan import moved
from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.objectives.ttt_loss import StepWeights, TTTLoss
from eagle_offline.supervision import Head
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.corpus import Corpus
from eagle_offline.training.draft_start import choose_draft, start_draft
from eagle_offline.training.optimizer import build_optimizer, learning_rate
from eagle_offline.training.packs import TrainingPack, plan_pack, run_pack
from eagle_offline.training.ranks import GradientSum, Ranks
from eagle_offline.training.state import (
    Position,
    Standing,
    acceptable_drift,
    fingerprint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from eagle_offline.training.tally import Tally
from eagle_offline.training.validation import validate

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


@dataclass(frozen=True)
class StepOutcome:
    """What came of a step, still on the device.

    Attributes:
        step: its number, 1 for the first.
        samples: int64, indices of what this rank's share was made of.
        grad_norm: float scalar. is_finite: bool scalar; where it is false, nothing was changed.
    """

    step: int
    samples: np.ndarray
    grad_norm: Tensor
    is_finite: Tensor


class Trainer:
    """One training run: model, optimizer, plan, and how it stands.

    Args:
        settings: of the run.
        corpus: what it trains on.
        ranks: this process among those of the run.
        source: a draft whose weights it starts from.

    Attributes:
        taken_over: a line about what it took from ``source``.
        wait_seconds: how long steps have waited for data so far.
    """

    def __init__(
        self, settings: TrainSettings, corpus: Corpus, ranks: Ranks | None = None, source: DraftWeights | None = None
    ):
        self.settings, self.corpus = settings, corpus
        self.ranks = Ranks() if ranks is None else ranks
        device = resolve_device(settings.device)
        # One GPU a process: torchrun numbers them.
        self.device = torch.device(f"cuda:{self.ranks.local_rank}" if device == "cuda" else device)
        self.ttt_loss = TTTLoss(
            settings.ttt_steps,
            settings.step_decay,
            settings.lk_loss_type,
            settings.lk_kl_scale,
            settings.lk_kl_decay,
        )
        cache = corpus.cache
        self.choice = choose_draft(settings, corpus.samples.caches)
        self._selected_token_mask = self.choice.selected_token_mask
        draft, self.taken_over = start_draft(settings, cache, self.choice, source)
        # The stub of `to` is of a decorated method that mypy cannot follow.
        self.model: Eagle3DraftModel = draft.to(self.device)  # type: ignore[arg-type]
        self.ranks.agree(self.model.parameters())
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.model, settings)
        self.gradients = GradientSum(self.ranks, self.trainable)
        others = None if corpus.heldout is corpus.samples else corpus.heldout
        self.expected = fingerprint(settings, corpus.samples, others, self.choice.vocabulary.digest)
        self._selected_head: Head | None = None
        if cache.manifest.identity.capture.target_encoding == "factored":
            self._selected_head = cache.head.select(self.choice.selected_token_ids).to(self.device)
        self._reader = PackReader.for_device(self.device, self.choice.aux_layers)
        self.wait_seconds = 0.0
        self.standing = Standing(Position(step=0, epoch=0, next_pack=0))
        self.total_steps = self._count_steps()

    @property
    def position(self) -> Position:
        return self.standing.position

    def restore(self, checkpoint: Path) -> dict[str, list[float]]:
        """Go on from a checkpoint; return the sums not logged yet.

        Raises:
            MismatchError, DataError: see `load_checkpoint`. UsageError: see `acceptable_drift`.
        """
        accepted = acceptable_drift(self.settings.accept_drift)
        self.standing, unlogged = load_checkpoint(checkpoint, self.model, self.optimizer, self.expected, accepted)
        self.total_steps = self._count_steps()
        return unlogged

    def packs(self, epoch: int) -> list[np.ndarray]:
        """Return the packs of an epoch, sample indices each."""
        return self.corpus.epoch_packs(self.settings, epoch)

    def _count_steps(self) -> int:
        """Return the steps that the run will have at its end, those done included."""
        size, position = self.settings.global_batch, self.position
        later = [len(self.packs(epoch)) for epoch in range(position.epoch, self.settings.num_epochs)]
        if later:
            later[0] -= position.next_pack
        steps = position.step + sum(-(-count // size) for count in later)
        return min(steps, self.settings.max_steps or steps)

    def remaining_steps(self) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """Yield the packs of every step still to do, each with where training stands after it."""
        position, size = self.position, self.settings.global_batch
        while position.step < self.total_steps:
            packs = self.packs(position.epoch)
            for start in range(position.next_pack, len(packs), size):
                if position.step >= self.total_steps:
                    return
                last = start + size >= len(packs)
                after = (position.epoch + 1, 0) if last else (position.epoch, start + size)
                position = Position(position.step + 1, *after)
                yield position, packs[start : start + size]

    def load(self, step: tuple[Position, list[np.ndarray]]) -> LoadedStep:
        """Return a step with this rank's packs read and laid out, on the CPU."""
        after, packs = step
        own = packs[self.ranks.rank :: self.ranks.size]
        loaded = tuple(self._pack(self.corpus.samples, pack, self.settings.supervision_gate) for pack in own)
        counts = np.zeros(self.settings.ttt_steps, np.int64)
        for pack in loaded:
            counts += pack.plan.step_counts.numpy()
        samples = np.concatenate(own) if own else np.empty(0, np.int64)
        return LoadedStep(after, samples, loaded, len(loaded), counts, sum(pack.num_tokens for pack in loaded))

    def steps(self) -> Iterator[LoadedStep]:
        """Yield every step still to do, its packs to be taken before the next step is.

        Packs are read by threads, a few steps ahead, and brought to the device one by one, so that it holds no more
        than the pack in hand and the next, however many a step has.
        """
        loaded = prefetch(self.load, self.remaining_steps(), num_workers=self.settings.num_workers)
        ahead = self._timed(feed(self._parts(loaded), self.device))
        for step, first in ahead:
            rest = (cast(TrainingPack, pack) for _, pack in islice(ahead, max(0, step.num_packs - 1)))
            yield replace(step, packs=chain([] if first is None else [first], rest))

    @staticmethod
    def _parts(steps: Iterator[LoadedStep]) -> Iterator[tuple[LoadedStep, TrainingPack | None]]:
        """Yield each pack beside its step, a step without packs once."""
        for step in steps:
            for pack in step.packs if step.num_packs else (None,):
                yield replace(step, packs=()), pack

    def _timed(self, items: Iterator[T]) -> Iterator[T]:
        """Yield items; what is waited for them is added to `wait_seconds`."""
        while True:
            began = time.monotonic()
            item = next(items, None)
            self.wait_seconds += time.monotonic() - began
            if item is None:
                return
            yield item

    def _pack(self, mixture: CacheMixture, indices: Sequence[int] | np.ndarray, gate: str = "input") -> TrainingPack:
        stored = self._reader.read([mixture.locate(int(index)) for index in indices])
        return plan_pack(stored, self._selected_token_mask, self.settings.ttt_steps, self.device, gate)

    def _heldout_packs(self, *, alone: bool = False) -> Iterator[TrainingPack]:
        """Yield this rank's share of the held-out documents, in cache order, on the training device.

        The gate is the reference's whatever a run trains with, so that runs can be compared.
        """
        packs = list(self.corpus.heldout_packs(self.settings))[self.ranks.rank :: self.ranks.size]
        if alone:
            packs = [pack[place : place + 1] for pack in packs for place in range(len(pack))]
        read = prefetch(
            lambda indices: self._pack(self.corpus.heldout, indices), packs, num_workers=self.settings.num_workers
        )
        yield from feed(read, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 compute on CUDA, float32 elsewhere; the weights stay float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def step(self, loaded: LoadedStep, tally: Tally) -> StepOutcome:
        """Do one optimizer step, its means taken over the packs of all ranks; nothing changes if it is not finite."""
        # The counts follow from masks alone, so a slot's share of the whole step's mean is known before any forward.
        counts = torch.tensor(loaded.step_counts)
        self.ranks.add_up(counts)
        packs, overlaps = loaded.packs, None
        if self.ttt_loss.weighs_by_overlap:
            packs = list(packs)
            overlaps = self._overlaps(packs)
        weights = self._on_device(self.ttt_loss.weights(counts, overlaps))
        own = Tally(self.settings.ttt_steps, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, pack in enumerate(packs, start=1):
            loss, sums = self._run(pack, weights)
            if number == loaded.num_packs:
                self.gradients.arm()
            loss.backward()
            own.add(sums)
        self.gradients.finish()
        rate = learning_rate(self.position.step, self.total_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.settings.max_grad_norm)
        unfit = (~(grad_norm.isfinite() & own.totals.losses.isfinite().all())).float()
        self.ranks.add_up(unfit)
        is_finite = unfit == 0
        # The fused kernel reads this on the device and leaves everything as it is where it is 1.
        self.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        tally.take(own, keep=is_finite)
        self.standing = replace(self.standing, position=loaded.after)
        return StepOutcome(loaded.after.step, loaded.samples, grad_norm, is_finite)

    @torch.no_grad()
    def _overlaps(self, packs: Sequence[TrainingPack]) -> Tensor:
        """Return ``Σ α`` ``[K]`` of the whole step at the weights as they are: a forward pass of its own."""
        total = torch.zeros(self.settings.ttt_steps, dtype=torch.float64)
        for pack in packs:
            _, sums = self._run(pack, self._no_weights())
            total += sums.overlaps.double().cpu()
        self.ranks.add_up(total)
        return total

    def _run(self, pack: TrainingPack, weights: StepWeights) -> tuple[Tensor, UnrollSums]:
        with self.autocast():
            return run_pack(self.model, pack.to(self.device), self._selected_head, weights, self.settings.recompute)

    def _no_weights(self) -> StepWeights:
        return self._on_device(StepWeights(torch.zeros(self.settings.ttt_steps, dtype=torch.float64)))

    def _on_device(self, weights: StepWeights) -> StepWeights:
        return moved(weights, self.device)

    def culprits(self, samples: np.ndarray) -> list[int]:
        """Return the ids of the samples, of all ranks' shares, that are not finite alone; all ids if none is."""
        ids = [int(self.corpus.samples.sample_ids[index]) for index in samples]
        found = [sample_id for sample_id, index in zip(ids, samples, strict=True) if not self._is_finite(int(index))]
        found = self.ranks.gathered(found)
        return sorted(found or self.ranks.gathered(ids))

    def heldout_culprits(self) -> list[int]:
        """Return the ids of held-out samples, of this rank's share, whose loss is not finite."""
        found: list[int] = []
        with torch.no_grad():
            for pack in self._heldout_packs(alone=True):
                _, sums = self._run(pack, self._no_weights())
                found += [] if sums.losses.isfinite().all() else pack.sample_ids
        return found

    def _is_finite(self, index: int) -> bool:
        pack = self._pack(self.corpus.samples, [index], self.settings.supervision_gate)
        counts = pack.plan.step_counts
        weights = self._on_device(TTTLoss(self.settings.ttt_steps, self.settings.step_decay).weights(counts))
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self._run(pack, weights)
        loss.backward()
        tensors = [loss, *(parameter.grad for parameter in self.trainable if parameter.grad is not None)]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def validate(self) -> Tally:
        """Return the counts of the held-out documents, of all ranks.

        Raises:
            EagleOfflineError: a loss is not finite; names the samples.
        """
        with self.autocast():
            tally = validate(self.model, self._heldout_packs(), self._selected_head, self.ttt_loss, self.ranks)
        if not tally.is_finite():
            ids = sorted(self.ranks.gathered(self.heldout_culprits()))
            raise EagleOfflineError(
                f"step {self.position.step}: the loss is not finite on held-out samples "
                f"{', '.join(map(str, ids[:20]))}: look at them, or validate on others with --heldout-cache in another "
                "--output-dir"
            )
        return tally

    def epochs_done(self) -> float:
        """Return passes over the cache so far."""
        position = self.position
        if not position.next_pack:
            return float(position.epoch)
        return position.epoch + position.next_pack / len(self.packs(position.epoch))

    @cached_property
    def _has_other_embeddings(self) -> bool:
        """Whether frozen embeddings are not the target's: taken over from a draft that had trained them."""
        return embeddings_differ(self.model, self.corpus.cache.embeddings)

    def origin(self) -> DraftOrigin:
        """Return what the draft at hand was trained for and from."""
        manifest, settings = self.corpus.cache.manifest, self.settings
        identity, vocabulary = manifest.identity, self.choice.vocabulary
        return DraftOrigin(
            target_id=identity.target.id,
            target_revision=identity.target.revision,
            target_digest=identity.target.checkpoint_digest,
            target_architecture=identity.target.architecture,
            target_num_layers=identity.target.num_layers,
            target_hidden_size=identity.target.hidden_size,
            target_vocab_size=identity.target.vocab_size,
            tokenizer_digest=identity.text.tokenizer_digest,
            template_digest=identity.text.template_digest,
            aux_layer_ids=list(self.choice.aux_layer_ids),
            cache_digest=identity.digest,
            dataset=identity.dataset.model_dump(mode="json"),
            draft_vocab_digest=vocabulary.digest,
            draft_vocab_coverage=vocabulary.coverage,
            objective=settings.objective,
            ttt_steps=settings.ttt_steps,
            embeddings_trained=settings.train_embeddings or self._has_other_embeddings,
            init_from=settings.init_from,
            step=self.position.step,
        )

    def save(self, unlogged: Tally) -> None:
        """Write a checkpoint and drop old ones; every rank has the same, the first one writes.

        Args:
            unlogged: this rank's counts since the last metrics line.
        """
        total = unlogged.over_all(self.ranks)
        if not all(bool(parameter.isfinite().all()) for parameter in self.trainable):
            raise EagleOfflineError(
                f"step {self.position.step}: weights are not finite, so no checkpoint is written; those before are "
                "intact: go on from the latest with --accept-drift learning-rate and a lower --learning-rate"
            )
        if not self.ranks.is_first:
            return
        save_checkpoint(
            self.settings.output_dir,
            self.model,
            self.optimizer,
            self.choice.selected_token_ids,
            self.origin(),
            self.standing,
            self.expected,
            total.state(),
        )
        remove_old_checkpoints(self.settings.output_dir, self.settings.keep_checkpoints)

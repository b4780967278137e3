"""The draft in training: what it starts from, one optimizer step, one validation, one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagle_offline.cache.reader import Cache
from eagle_offline.devices import resolve_device
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import embeddings_differ
from eagle_offline.draft.origin import DraftOrigin, MergedAdapter
from eagle_offline.draft.warm_start import DraftWeights
from eagle_offline.errors import EagleOfflineError
from eagle_offline.objectives.plan import moved
from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.objectives.ttt_loss import StepWeights
from eagle_offline.supervision import Head
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.corpus import Corpus
from eagle_offline.training.draft_start import choose_draft, start_draft
from eagle_offline.training.objective import build_objective
from eagle_offline.training.optimizer import build_optimizer, learning_rate
from eagle_offline.training.packs import TrainingPack, pack_parts
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
from eagle_offline.training.stream import LoadedStep, PackStream
from eagle_offline.training.tally import Tally
from eagle_offline.training.validation import validate


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
        stream: its packs.
    """

    def __init__(
        self, settings: TrainSettings, corpus: Corpus, ranks: Ranks | None = None, source: DraftWeights | None = None
    ):
        self.settings, self.corpus = settings, corpus
        self.ranks = Ranks() if ranks is None else ranks
        device = resolve_device(settings.device)
        # One GPU a process: torchrun numbers them.
        self.device = torch.device(f"cuda:{self.ranks.local_rank}" if device == "cuda" else device)
        self.objective = build_objective(settings)
        self.loss = self.objective.loss
        cache = corpus.cache
        others = None if corpus.heldout is corpus.samples else corpus.heldout
        self.choice = choose_draft(settings, corpus.samples.caches, () if others is None else others.caches)
        draft, self.taken_over = start_draft(settings, cache, self.choice, source)
        # The stub of `to` is of a decorated method that mypy cannot follow.
        self.model: Eagle3DraftModel = draft.to(self.device)  # type: ignore[arg-type]
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.model, settings)
        self.gradients = GradientSum(self.ranks, self.trainable)
        vocab_digest, mask_token_id = self.choice.vocabulary.digest, self.model.config.mask_token_id
        self.expected = fingerprint(settings, corpus.samples, others, vocab_digest, mask_token_id)
        self._selected_head = self._head_of(cache)
        self._heldout_head = self._head_of(corpus.heldout.caches[0]) if others is not None else self._selected_head
        self.stream = PackStream(settings, corpus, self.ranks, self.choice, self.objective, self.device)
        self.standing = Standing(Position(step=0, epoch=0, next_pack=0))
        self.total_steps = self.stream.count_steps(self.position)

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
        self.total_steps = self.stream.count_steps(self.position)
        return unlogged

    def remaining_steps(self) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """Yield the packs of every step still to do, each with where training stands after it."""
        return self.stream.plan(self.position, self.total_steps)

    def steps(self) -> Iterator[LoadedStep]:
        """Yield every step still to do; see `PackStream.steps`."""
        return self.stream.steps(self.position, self.total_steps)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 compute on CUDA, float32 elsewhere; the weights stay float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def step(self, loaded: LoadedStep, tally: Tally) -> StepOutcome:
        """Do one optimizer step, its means taken over the packs of all ranks; nothing changes if it is not finite."""
        # The counts follow from masks alone, so a slot's share of the whole step's mean is known before any forward.
        counts = torch.tensor(loaded.step_counts)
        self.ranks.add_up(counts)
        packs, overlaps = loaded.packs, None
        if self.loss.weighs_by_overlap:
            packs = list(packs)
            overlaps = self._overlaps(packs)
        weights = self._on_device(self.loss.weights(counts, overlaps))
        own = Tally(self.loss.num_steps, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, pack in enumerate(packs, start=1):
            arm = self.gradients.arm if number == loaded.num_packs else None
            for _, sums in self._run(pack, weights, self._selected_head, backward=True, before_last=arm):
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
        total = torch.zeros(self.loss.num_steps, dtype=torch.float64)
        for pack in packs:
            for _, sums in self._run(pack, self._no_weights(), self._selected_head):
                total += sums.overlaps.double().cpu()
        self.ranks.add_up(total)
        return total

    def _run(
        self,
        pack: TrainingPack,
        weights: StepWeights,
        head: Head | None,
        *,
        backward: bool = False,
        before_last: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Tensor, UnrollSums]]:
        """Yield loss and sums of each part of a pack that has some, its loss sent back before if asked for.

        Args:
            pack, weights, head: see `pack_parts`.
            backward: send losses back.
            before_last: called before the last one is.
        """
        placed = pack.to(self.device)
        parts = pack_parts(self.model, placed, self.objective, head, weights, self.settings.recompute)
        for number, part in enumerate(parts, start=1):
            with self.autocast():
                loss, sums = part()
            if backward:
                if number == len(parts) and before_last is not None:
                    before_last()
                loss.backward()
            if sums is not None:
                yield loss.detach(), sums

    def _no_weights(self) -> StepWeights:
        return self._on_device(self.loss.no_weights())

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
            for pack in self.stream.heldout(alone=True):
                run = self._run(pack, self._no_weights(), self._heldout_head)
                found += [] if all(sums.losses.isfinite().all() for _, sums in run) else pack.sample_ids
        return found

    def _is_finite(self, index: int) -> bool:
        pack = self.stream.pack(self.corpus.samples, [index], self.settings.supervision_gate)
        means = 1 / pack.plan.step_counts.double().clamp_min(1)
        weights = self._on_device(replace(self.loss.no_weights(), cross_entropy=means))
        self.optimizer.zero_grad(set_to_none=True)
        losses = [loss for loss, _ in self._run(pack, weights, self._selected_head, backward=True)]
        tensors = [*losses, *(parameter.grad for parameter in self.trainable if parameter.grad is not None)]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def _head_of(self, cache: Cache) -> Head | None:
        """Return what gives a cache's distributions over the draft vocabulary; None if they are stored."""
        if cache.manifest.identity.capture.target_encoding != "factored":
            return None
        return cache.head.select(self.choice.selected_token_ids).to(self.device)

    def validate(self) -> Tally:
        """Return the counts of the held-out documents, of all ranks.

        Raises:
            EagleOfflineError: a loss is not finite; names the samples.
        """
        with self.autocast():
            tally = validate(self.model, self.stream.heldout(), self._heldout_head, self.objective, self.ranks)
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
        return position.epoch + position.next_pack / len(self.stream.packs(position.epoch))

    @cached_property
    def _has_other_embeddings(self) -> bool:
        """Whether frozen embeddings are not the target's: taken over from a draft that had trained them."""
        return embeddings_differ(self.model, self.corpus.cache.embeddings)

    def origin(self) -> DraftOrigin:
        """Return what the draft at hand was trained for and from."""
        manifest, settings = self.corpus.cache.manifest, self.settings
        identity, vocabulary = manifest.identity, self.choice.vocabulary
        adapter = identity.target.adapter
        return DraftOrigin(
            target_id=identity.target.id,
            target_revision=identity.target.revision,
            target_digest=identity.target.digest,
            target_adapter=None if adapter is None else MergedAdapter(**adapter.model_dump()),
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
            ttt_steps=settings.ttt_steps if settings.objective == "eagle3" else None,
            num_depths=settings.num_depths if settings.objective == "peagle" else None,
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

"""Training from a cache: plan, steps, validation, checkpoints. Neither the target nor a hub is ever touched."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from eagle_offline.cache.layout import STATUS_FILE
from eagle_offline.cache.reader import Sample
from eagle_offline.config import TrainSettings
from eagle_offline.data.prefetch import prefetch
from eagle_offline.data.sampler import plan_epoch, plan_packs
from eagle_offline.devices import resolve_device
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import draft_config, initial_draft, read_target_config
from eagle_offline.draft.origin import DraftOrigin
from eagle_offline.durable import make_directory, remove_abandoned, write_bytes
from eagle_offline.errors import EagleOfflineError, MismatchError, StoppedEarly, UsageError
from eagle_offline.interrupts import StopRequest
from eagle_offline.objectives.ttt import STEP_DECAY
from eagle_offline.progress import Progress
from eagle_offline.supervision import Head
from eagle_offline.training.corpus import Corpus, open_corpus
from eagle_offline.training.logbook import METRICS_FILE, Logbook, MetricsRow
from eagle_offline.training.optimizer import build_optimizer, learning_rate
from eagle_offline.training.packs import TrainingPack, make_pack, run_pack
from eagle_offline.training.ranks import Ranks
from eagle_offline.training.state import (
    CHECKPOINTS_DIRECTORY,
    LATEST_FILE,
    Position,
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from eagle_offline.training.validation import Tally, validate

SETTINGS_FILE = "train.json"
_OWN_ENTRIES = (SETTINGS_FILE, METRICS_FILE, LATEST_FILE, CHECKPOINTS_DIRECTORY, STATUS_FILE)


class Trainer:
    """One training run: model, optimizer, plan, and where it stands."""

    def __init__(self, settings: TrainSettings, corpus: Corpus, ranks: Ranks | None = None):
        self.settings, self.corpus = settings, corpus
        self.ranks = Ranks() if ranks is None else ranks
        device = resolve_device(settings.device)
        # One GPU a process: torchrun numbers them.
        self.device = torch.device(f"cuda:{self.ranks.local_rank}" if device == "cuda" else device)
        cache, identity = corpus.cache, corpus.cache.manifest.identity
        config = draft_config(
            read_target_config(cache.path / "target" / "config.json"),
            draft_vocab_size=len(cache.selected_token_ids),
            num_aux_hidden_states=len(cache.aux_layer_ids),
            num_layers=settings.num_draft_layers,
            fc_norm=settings.fc_norm,
            norm_output=settings.norm_output,
        )
        draft = initial_draft(
            config,
            cache.embeddings,
            cache.head,
            cache.selected_token_ids,
            seed=settings.seed,
            train_embeddings=settings.train_embeddings,
        )
        # The stub of `to` is of a decorated method that mypy cannot follow.
        self.model: Eagle3DraftModel = draft.to(self.device)  # type: ignore[arg-type]
        self.optimizer = build_optimizer(self.model, settings)
        self.position = Position(step=0, epoch=0, next_pack=0)
        self.steps_per_epoch = [-(-len(self.packs(epoch)) // settings.global_batch) for epoch in self._epochs()]
        self.total_steps = min(sum(self.steps_per_epoch), settings.max_steps or sum(self.steps_per_epoch))
        self.expected = fingerprint(
            settings, identity.digest, cache.manifest.defaults.draft_vocabulary.digest, len(cache)
        )
        self._selected_head: Head | None = None
        if identity.capture.target_encoding == "factored":
            self._selected_head = cache.head.select(cache.selected_token_ids).to(self.device)

    def _epochs(self) -> range:
        return range(self.settings.num_epochs)

    def packs(self, epoch: int) -> list[np.ndarray]:
        """Return the packs of an epoch, cache indices each."""
        cache = self.corpus.cache
        return plan_epoch(
            self.corpus.train_samples,
            cache.shards,
            cache.lengths,
            self.settings.seed,
            epoch,
            self.settings.tokens_per_batch,
        )

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

    def load(self, step: tuple[Position, list[np.ndarray]]) -> tuple[Position, list[TrainingPack]]:
        """Return a step with this rank's packs read and laid out, on the CPU."""
        position, packs = step
        own = packs[self.ranks.rank :: self.ranks.size]
        return position, [self.pack([self.corpus.cache[int(index)] for index in pack]) for pack in own]

    def pack(self, samples: Sequence[Sample]) -> TrainingPack:
        """Return samples laid out for the unroll, on the CPU."""
        cache = self.corpus.cache
        size = len(cache.selected_token_ids)
        return make_pack(samples, cache.selected_token_mask, self.settings.ttt_steps, size, self.device)

    def heldout_packs(self) -> Iterator[TrainingPack]:
        """Yield this rank's share of the held-out documents, in cache order, on the training device."""
        cache, ranks = self.corpus.heldout_cache, self.ranks
        packs = plan_packs(self.corpus.heldout_samples, cache.lengths, self.settings.tokens_per_batch)
        packs = packs[ranks.rank :: ranks.size]
        for pack in prefetch(lambda pack: self.pack([cache[int(index)] for index in pack]), packs):
            yield pack.to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 compute on CUDA, float32 elsewhere; the weights stay float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def step(self, packs: Sequence[TrainingPack], tally: Tally) -> float:
        """Do one optimizer step, its means taken over the packs of all ranks; return the gradient norm.

        Raises:
            EagleOfflineError: loss or gradient is not finite; names the samples.
        """
        settings = self.settings
        decays = STEP_DECAY ** torch.arange(settings.ttt_steps, dtype=torch.float64)
        # The counts follow from masks alone, so a slot's share of the whole step's mean is known before any forward.
        counts = sum((pack.plan.step_counts for pack in packs), torch.zeros(settings.ttt_steps, dtype=torch.int64))
        counts = counts.to(self.device)
        self.ranks.add_up(counts)
        weights = (decays.to(self.device) / decays.sum() / counts.clamp_min(1)).to(self.model.dtype)
        own = Tally(settings.ttt_steps)
        self.optimizer.zero_grad(set_to_none=True)
        for pack in packs:
            with self.autocast():
                loss, sums = run_pack(self.model, pack.to(self.device), self._selected_head, weights)
            loss.backward()
            own.add(sums)
        own.add_up(self.ranks, self.device)
        tally.take(own)
        rate = learning_rate(self.position.step, self.total_steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ranks.add_up_gradients(trainable)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm))
        if not np.isfinite(grad_norm):
            ids = [sample_id for pack in packs for sample_id in pack.sample_ids]
            raise EagleOfflineError(
                f"step {self.position.step + 1}: loss or gradient is not finite on samples {ids}; the last checkpoint "
                "is intact: look at these samples, or go on from it with a lower --learning-rate"
            )
        self.optimizer.step()
        return grad_norm

    def validate(self) -> MetricsRow:
        """Return metrics on the held-out documents."""
        with self.autocast():
            return validate(
                self.model,
                self.heldout_packs(),
                self._selected_head,
                self.settings.ttt_steps,
                self.position.step,
                self.epochs_done(),
                self.ranks,
            )

    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` holds on any rank."""
        if self.ranks.size == 1:
            return flag
        count = torch.tensor(int(flag), device=self.device)
        self.ranks.add_up(count)
        return bool(count)

    def epochs_done(self) -> float:
        """Return passes over the cache so far."""
        epoch = self.position.epoch
        done = self.position.step - sum(self.steps_per_epoch[:epoch])
        return epoch + (done / self.steps_per_epoch[epoch] if epoch < len(self.steps_per_epoch) else 0.0)

    def origin(self) -> DraftOrigin:
        """Return what the draft at hand was trained for and from."""
        manifest, settings = self.corpus.cache.manifest, self.settings
        identity, vocabulary = manifest.identity, manifest.defaults.draft_vocabulary
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
            aux_layer_ids=list(self.corpus.cache.aux_layer_ids),
            cache_digest=identity.digest,
            dataset=identity.dataset.model_dump(mode="json"),
            draft_vocab_digest=vocabulary.digest,
            draft_vocab_coverage=vocabulary.coverage,
            objective=settings.objective,
            ttt_steps=settings.ttt_steps,
            embeddings_trained=settings.train_embeddings,
            step=self.position.step,
        )

    def save(self, unlogged: Tally) -> None:
        """Write a checkpoint and drop old ones; every rank has the same, the first one writes."""
        if not self.ranks.is_first:
            return
        save_checkpoint(
            self.settings.output_dir,
            self.model,
            self.optimizer,
            self.corpus.cache.selected_token_ids,
            self.origin(),
            self.position,
            self.expected,
            unlogged.state(),
        )
        remove_old_checkpoints(self.settings.output_dir, self.settings.keep_checkpoints)


def check_output_directory(settings: TrainSettings) -> None:
    """Make the run's directory, or see that it is a run's.

    Raises:
        UsageError: a run is there and ``--resume`` was not given. MismatchError: something else is there.
    """
    directory = settings.output_dir
    make_directory(directory)
    if latest_checkpoint(directory) is not None:
        if not settings.resume:
            raise UsageError(f"{directory} already holds a run ({LATEST_FILE} is there): add --resume to go on with it")
        return
    foreign = sorted(
        entry.name for entry in directory.iterdir() if entry.name not in _OWN_ENTRIES and not entry.name.startswith(".")
    )
    if foreign and not (directory / SETTINGS_FILE).is_file():
        raise MismatchError(
            f"{directory} holds something else ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}): "
            "choose an empty or new --output-dir"
        )


def run(settings: TrainSettings, stop: StopRequest, ranks: Ranks | None = None) -> dict[str, Any]:
    """Train to the end, or until asked to stop; return the run, its steps and its last checkpoint.

    Args:
        settings: of the run.
        stop: a signal that came to any rank stops all after the step in hand.
        ranks: this process among those of the run.

    Raises:
        StoppedEarly: asked to stop; a checkpoint was written. EagleOfflineError: see `eagle_offline.errors`.
    """
    directory, ranks = settings.output_dir, Ranks() if ranks is None else ranks
    if settings.global_batch % ranks.size:
        raise UsageError(
            f"--global-batch {settings.global_batch}: packs of an optimizer step are shared by {ranks.size} processes; "
            f"expected a multiple of {ranks.size}"
        )
    if ranks.is_first:
        check_output_directory(settings)
        remove_abandoned(directory)
    ranks.wait()
    checkpoint = latest_checkpoint(directory)
    trainer, window = Trainer(settings, open_corpus(settings), ranks), _Window(settings.ttt_steps)
    if checkpoint is not None:
        trainer.position, unlogged = load_checkpoint(checkpoint, trainer.model, trainer.optimizer, trainer.expected)
        window.tally.restore(unlogged)
    logbook: Logbook | None = None
    if ranks.is_first:
        content = json.dumps(settings.model_dump(mode="json"), indent=2) + "\n"
        write_bytes(directory / SETTINGS_FILE, content.encode())
        logbook = Logbook(directory, from_step=-1 if checkpoint is None else trainer.position.step)
    has_heldout = len(trainer.corpus.heldout_samples) > 0
    if checkpoint is None and has_heldout:
        _log(logbook, trainer.validate())
    _train(trainer, logbook, window, stop)
    ranks.wait()
    return {"run": str(directory), "steps": trainer.position.step, "checkpoint": str(latest_checkpoint(directory))}


def _log(logbook: Logbook | None, row: MetricsRow) -> None:
    """Write a row where there is a logbook: on the first rank."""
    if logbook is not None:
        logbook.write(row)


def _train(trainer: Trainer, logbook: Logbook | None, window: _Window, stop: StopRequest) -> None:
    settings, has_heldout = trainer.settings, len(trainer.corpus.heldout_samples) > 0
    window.started = time.monotonic()
    total = trainer.total_steps
    shown = trainer.ranks.is_first
    with Progress("train", total, initial=trainer.position.step, unit="step", enabled=shown) as progress:
        steps = prefetch(trainer.load, trainer.remaining_steps())
        while True:
            asked = time.monotonic()
            loaded = next(steps, None)
            if loaded is None:
                break
            position, packs = loaded
            window.wait_seconds += time.monotonic() - asked
            grad_norm = trainer.step(packs, window.tally)
            epoch_ended = position.epoch > trainer.position.epoch
            trainer.position = position
            window.num_tokens += sum(pack.num_tokens for pack in packs)
            done = position.step
            if done % settings.log_every == 0 or done == total:
                row = window.close(trainer, grad_norm)
                _log(logbook, row)
                progress.reach(done, _shown(row))
                window = _Window(settings.ttt_steps)
            every = settings.eval_every
            due = epoch_ended if every is None else done % every == 0
            if has_heldout and (due or done == total):
                _log(logbook, trainer.validate())
                window.started = time.monotonic()
            stopping = trainer.any_rank(stop.requested)
            if done % settings.checkpoint_every == 0 or done == total or stopping:
                trainer.save(window.tally)
            if stopping and done < total:
                trainer.ranks.wait()
                raise StoppedEarly(f"stopped by a signal after step {done} of {total}; go on with --resume")


class _Window:
    """What happened since the last metrics line."""

    def __init__(self, ttt_steps: int):
        self.tally = Tally(ttt_steps)
        self.started = time.monotonic()
        self.wait_seconds = 0.0
        self.num_tokens = 0

    def close(self, trainer: Trainer, grad_norm: float) -> MetricsRow:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        num_tokens = torch.tensor(self.num_tokens, device=trainer.device)
        trainer.ranks.add_up(num_tokens)
        return self.tally.row(
            "train",
            trainer.position.step,
            trainer.epochs_done(),
            learning_rate=trainer.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            tokens_per_second=int(num_tokens) / elapsed,
            data_wait_share=min(1.0, self.wait_seconds / elapsed),
            memory_bytes=_peak_memory_bytes(trainer.device),
        )


def _shown(row: MetricsRow) -> dict[str, str]:
    return {
        "loss": f"{row.loss:.3f}",
        "accept": f"{row.simulated_accept_length:.2f}",
        "tok/s": f"{row.tokens_per_second:.0f}",
    }


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Training from a cache, start to end: steps, metrics, validations, checkpoints, and going on after a stop.

Neither the target nor a hub is ever touched.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle_offline.cache.layout import MANIFEST_FILE, STATUS_FILE
from eagle_offline.draft.warm_start import DraftWeights
from eagle_offline.durable import remove_abandoned, require_writable
from eagle_offline.errors import EagleOfflineError, MismatchError, StoppedEarly, UsageError
from eagle_offline.interrupts import StopRequest
from eagle_offline.progress import Progress
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.corpus import Corpus, open_corpus, small_local_cache
from eagle_offline.training.logbook import METRICS_FILE, SKIPPED_FILE, MetricsRow, SkippedRow
from eagle_offline.training.profiling import PROFILE_DIRECTORY, profiled
from eagle_offline.training.ranks import Ranks
from eagle_offline.training.records import SETTINGS_FILE, Records, Window
from eagle_offline.training.reporters import (
    TENSORBOARD_DIRECTORY,
    WANDB_DIRECTORY,
    WANDB_ID_FILE,
)
from eagle_offline.training.state import (
    BEST_FILE,
    CHECKPOINTS_DIRECTORY,
    LATEST_FILE,
    acceptable_drift,
    holds_a_run,
    latest_checkpoint,
    point_at_best,
    pointed_checkpoint,
    restore_latest,
)
from eagle_offline.training.trainer import StepOutcome, Trainer

_OWN_ENTRIES = (
    SETTINGS_FILE, METRICS_FILE, SKIPPED_FILE, LATEST_FILE, BEST_FILE, CHECKPOINTS_DIRECTORY, STATUS_FILE,
    TENSORBOARD_DIRECTORY, WANDB_DIRECTORY, WANDB_ID_FILE, PROFILE_DIRECTORY,
)  # fmt: skip

# So many steps in a row that are not finite mean that the draft itself is lost.
_MAX_SKIPPED_IN_A_ROW = 10


def check_output_directory(settings: TrainSettings) -> None:
    """Make the run's directory, or see that it is a run's.

    Raises:
        UsageError: it cannot be written, or a run is there and ``--resume`` was not given.
        MismatchError: something else is there, or around it.
    """
    directory = settings.output_dir
    for parent in directory.resolve().parents:
        if (parent / MANIFEST_FILE).is_file():
            raise MismatchError(f"{directory} lies inside the cache {parent}: choose another --output-dir")
    require_writable(directory, "--output-dir")
    if holds_a_run(directory):
        if not settings.resume:
            raise UsageError(f"{directory} already holds a run (checkpoints are there): add --resume to go on with it")
        return
    foreign = sorted(
        entry.name for entry in directory.iterdir() if entry.name not in _OWN_ENTRIES and not entry.name.startswith(".")
    )
    if foreign and not (directory / SETTINGS_FILE).is_file():
        raise MismatchError(
            f"{directory} holds something else ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}): "
            "choose an empty or new --output-dir"
        )


def run(
    settings: TrainSettings,
    stop: StopRequest,
    ranks: Ranks | None = None,
    source: Callable[[], DraftWeights | None] = lambda: None,
) -> dict[str, Any]:
    """Train to the end, or until asked to stop; return the run, its steps and its last checkpoint.

    Args:
        settings: of the run.
        stop: a signal that came to any rank stops all after the step in hand.
        ranks: this process among those of the run.
        source: gives the draft whose weights it starts from; asked at the run's start only.

    Raises:
        StoppedEarly: asked to stop; a checkpoint was written. EagleOfflineError: see `eagle_offline.errors`.
    """
    directory, ranks = settings.output_dir, Ranks() if ranks is None else ranks
    acceptable_drift(settings.accept_drift)
    if settings.global_batch % ranks.size:
        raise UsageError(
            f"--global-batch {settings.global_batch}: packs of an optimizer step are shared by {ranks.size} processes; "
            f"expected a multiple of {ranks.size}"
        )
    if ranks.is_first:
        check_output_directory(settings)
        remove_abandoned(directory)
        restored = restore_latest(directory)
        if restored is not None:
            sys.stderr.write(f"train: {directory / LATEST_FILE} was missing; going on from {restored}, the newest\n")
    ranks.wait()
    checkpoint = latest_checkpoint(directory)
    with ExitStack() as opened:
        corpus = open_corpus(settings)
        opened.callback(corpus.close)
        return _run(settings, stop, ranks, source, corpus, checkpoint)


def _run(
    settings: TrainSettings,
    stop: StopRequest,
    ranks: Ranks,
    source: Callable[[], DraftWeights | None],
    corpus: Corpus,
    checkpoint: Path | None,
) -> dict[str, Any]:
    directory = settings.output_dir
    if ranks.is_first:
        sys.stderr.writelines(f"train: {said}\n" for said in small_local_cache(settings, corpus))
    trainer = Trainer(settings, corpus, ranks, source() if checkpoint is None else None)
    if ranks.is_first:
        chosen = settings.draft_vocab is not None or settings.draft_vocab_size is not None
        mask_token = trainer.choice.mask_token
        masked = None if mask_token is None else f"mask token {mask_token.token_id} ({mask_token.reason})"
        for line in (trainer.choice.describe(chosen=chosen), masked, trainer.taken_over):
            sys.stderr.write("" if line is None else f"train: {line}\n")
    unlogged = None if checkpoint is None else trainer.restore(checkpoint)
    # What weights start from may differ between machines in its last bits.
    ranks.agree(trainer.model.parameters())
    with ExitStack() as stack:
        records = None
        if ranks.is_first:
            if checkpoint is not None:
                point_at_best(directory, trainer.standing)
            records = Records(settings, None if checkpoint is None else trainer.standing, stack)
        _Run(trainer, records, stop, unlogged).train()
    ranks.wait()
    standing, best = trainer.standing, pointed_checkpoint(directory, BEST_FILE)
    result = {"run": str(directory), "steps": standing.position.step, "checkpoint": str(latest_checkpoint(directory))}
    if best is not None:
        result |= {"best_checkpoint": str(best), "best_walked_accept_length": standing.best_length}
    if standing.position.step < trainer.total_steps:
        missed = "a walked accept length: no held-out answer to walk"
        if standing.best_length is not None:
            missed = f"a longer walked accept length than {standing.best_length:.4g} at step {standing.best_step}"
        result["stopped_early"] = (
            f"after step {standing.position.step} of {trainer.total_steps}: {standing.num_without_gain} validations "
            f"without {missed}"
        )
        sys.stderr.write(f"train: stopped early {result['stopped_early']}\n" if ranks.is_first else "")
    return result


class _Run:
    """One process's way through a run.

    Args:
        trainer: as it stands.
        records: where the first rank writes; None on others.
        stop: asks for an early end.
        unlogged: counts of steps done and not logged yet; None at the start of a run.
    """

    def __init__(
        self, trainer: Trainer, records: Records | None, stop: StopRequest, unlogged: dict[str, list[float]] | None
    ):
        self._trainer, self._records, self._stop = trainer, records, stop
        self._settings = trainer.settings
        self._has_heldout = len(trainer.corpus.heldout_samples) > 0
        self._window = Window(trainer)
        self._begins = unlogged is None
        if unlogged is not None and trainer.ranks.is_first:
            self._window.tally.restore(unlogged)
        self._unsettled: deque[tuple[StepOutcome, Tensor, torch.cuda.Event | None]] = deque()
        self._skipped_in_a_row = 0
        self._saved_at = time.monotonic()

    def train(self) -> None:
        """Do all steps that are left."""
        trainer, settings = self._trainer, self._settings
        # What a stop left to do is done as if there had been none, its checkpoint included.
        if self._has_heldout and (self._begins or trainer.standing.validation_due):
            improved = self._validate()
            if improved or self._gives_up():
                self._save()
        trace = settings.output_dir if settings.profile and trainer.ranks.is_first else None
        first = trainer.position.step
        with (
            Progress(
                "train", trainer.total_steps, initial=trainer.position.step, unit="step", enabled=trainer.ranks.is_first
            ) as progress,
            profiled(trace) as profile_step,
        ):
            for loaded in trainer.steps() if not self._gives_up() else ():
                if trainer.position.step == first:
                    # Reading ahead has to begin somewhere: that is neither the step's time nor waiting in it.
                    self._window.restart(trainer)
                epoch = trainer.position.epoch
                outcome = trainer.step(loaded, self._window.tally)
                self._window.num_tokens += loaded.num_tokens
                self._settle(outcome)
                self._after_step(outcome, progress, epoch_ended=trainer.position.epoch > epoch)
                profile_step()
                if self._gives_up():
                    break

    def _after_step(self, outcome: StepOutcome, progress: Progress, *, epoch_ended: bool) -> None:
        trainer, settings = self._trainer, self._settings
        done, total = trainer.position.step, trainer.total_steps
        minutes = settings.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        stopping, late = trainer.ranks.any(self._stop.requested, late)
        logs = done % settings.log_every == 0 or done == total
        every = settings.eval_every
        validates = self._has_heldout and ((epoch_ended if every is None else done % every == 0) or done == total)
        saves = late or stopping or done == total or done % settings.checkpoint_every == 0
        saves = saves or (settings.checkpoint_epochs and epoch_ended)
        if logs or validates or saves:
            self._settle()
        if logs:
            self._log(outcome, progress)
        # Who is asked to stop has little time: the validation of this step waits until the run goes on.
        waits = validates and stopping and done < total
        trainer.standing = replace(trainer.standing, validation_due=waits)
        improved = self._validate() if validates and not waits else False
        if self._gives_up() and not logs:
            self._log(outcome, progress)
        if saves or improved or self._gives_up():
            self._save()
        if stopping and done < total:
            trainer.ranks.wait()
            raise StoppedEarly(f"stopped by a signal after step {done} of {total}; go on with --resume")

    def _save(self) -> None:
        began = time.monotonic()
        self._trainer.save(self._window.tally)
        self._saved_at = time.monotonic()
        # The window's clock leaves checkpoints out, as it does validations.
        self._window.started += self._saved_at - began

    def _log(self, outcome: StepOutcome, progress: Progress) -> None:
        row = self._window.row(self._trainer, outcome.grad_norm)
        self._write(row)
        progress.reach(row.step, _shown(row))
        self._window = Window(self._trainer)

    def _gives_up(self) -> bool:
        patience = self._settings.early_stopping
        return patience is not None and self._trainer.standing.num_without_gain >= patience

    def _validate(self) -> bool:
        """Validate, log it, and return whether the draft is the best so far."""
        trainer, began = self._trainer, time.monotonic()
        tally = trainer.validate()
        row = tally.row("heldout", trainer.loss, trainer.position.step, trainer.epochs_done())
        self._write(row)
        # The window's clock leaves validations out.
        self._window.started += time.monotonic() - began
        standing, length = trainer.standing, row.walked_accept_length
        improved = length is not None and (standing.best_length is None or length > standing.best_length)
        step = trainer.position.step
        if improved:
            changes: dict[str, Any] = {"best_length": length, "best_step": step, "num_without_gain": 0}
        else:
            changes = {"num_without_gain": standing.num_without_gain + 1}
        trainer.standing = replace(standing, validation_due=False, **changes)
        # The draft that a run begins with is no checkpoint, unless it is one that was trained before.
        return improved and (step > 0 or self._settings.init_from is not None)

    def _write(self, row: MetricsRow) -> None:
        """Write a row where there are records: on the first rank."""
        if self._records is not None:
            self._records.write(row)

    def _settle(self, outcome: StepOutcome | None = None) -> None:
        """See whether steps were finite: with ``outcome``, all but the newest on CUDA; without, all.

        The device is thus never waited for: it works on the newest step while the one before is looked at.
        """
        if outcome is not None:
            on_host, event = outcome.is_finite, None
            if on_host.is_cuda:
                on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
                on_host.copy_(outcome.is_finite, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._unsettled.append((outcome, on_host, event))
        keep = 1 if outcome is not None and outcome.is_finite.is_cuda else 0
        while len(self._unsettled) > keep:
            settled, on_host, event = self._unsettled.popleft()
            if event is not None:
                event.synchronize()
            if bool(on_host):
                self._skipped_in_a_row = 0
            else:
                self._skip(settled)

    def _skip(self, outcome: StepOutcome) -> None:
        """Record a step that changed nothing, or end the run over it.

        Raises:
            EagleOfflineError: the run is to stop; names the samples.
        """
        ids = self._trainer.culprits(outcome.samples)
        named = f"{', '.join(map(str, ids[:20]))}{', …' if len(ids) > 20 else ''}"
        said = f"step {outcome.step}: loss or gradient is not finite on samples {named}"
        self._skipped_in_a_row += 1
        if self._settings.on_nonfinite == "stop":
            raise EagleOfflineError(
                f"{said}; the last checkpoint is intact: look at these samples, or go on from it with --resume "
                "--on-nonfinite skip, or with --accept-drift learning-rate and a lower --learning-rate"
            )
        if self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise EagleOfflineError(
                f"{said}, the {_MAX_SKIPPED_IN_A_ROW}th step in a row: the draft itself is not finite any more; "
                "start again with a lower --learning-rate"
            )
        if self._records is not None:
            self._records.skipped.write(SkippedRow(step=outcome.step, sample_ids=ids))


def _shown(row: MetricsRow) -> dict[str, str]:
    return {
        "loss": "-" if row.loss is None else f"{row.loss:.3f}",
        "accept": f"{row.simulated_accept_length:.2f}",
        "tok/s": f"{row.tokens_per_second:.0f}",
        "wait": f"{row.data_wait_share:.0%}",
    }

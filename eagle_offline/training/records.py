"""What a run writes down as it goes: settings, metrics lines, skipped steps, reports elsewhere."""

from __future__ import annotations

import json
import resource
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from eagle_offline.durable import write_bytes
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import METRICS_FILE, SKIPPED_FILE, Logbook, MetricsRow
from eagle_offline.training.reporters import Reporter, closed_at_end, open_reporters
from eagle_offline.training.state import Standing
from eagle_offline.training.tally import Tally
from eagle_offline.training.trainer import Trainer

SETTINGS_FILE = "train.json"


class Records:
    """What the first rank writes about the run.

    Args:
        settings: of the run.
        standing: how the run stands that goes on; None at its start. Rows of later steps are dropped.
        stack: closes the reporters.
    """

    def __init__(self, settings: TrainSettings, standing: Standing | None, stack: ExitStack):
        directory = settings.output_dir
        from_step = -1 if standing is None else standing.position.step
        due_again = standing is not None and standing.validation_due

        def keeps(row: dict[str, Any]) -> bool:
            return row["step"] < from_step + (not due_again or row.get("kind") != "heldout")

        content = settings.model_dump(mode="json")
        write_bytes(directory / SETTINGS_FILE, (json.dumps(content, indent=2) + "\n").encode())
        self._metrics = Logbook(directory / METRICS_FILE, keeps)
        self.skipped = Logbook(directory / SKIPPED_FILE, keeps)
        self._reporters: list[Reporter] = open_reporters(settings.report_to, directory, content, from_step)
        stack.enter_context(closed_at_end(self._reporters))

    def write(self, row: MetricsRow) -> None:
        """Add a metrics line, here and in reports."""
        self._metrics.write(row)
        for reporter in self._reporters:
            reporter.write(row)


class Window:
    """What happened since the last metrics line; its clock starts with it."""

    def __init__(self, trainer: Trainer):
        self.tally = Tally(trainer.loss.num_steps, trainer.device)
        self.num_tokens = 0
        self.restart(trainer)

    def restart(self, trainer: Trainer) -> None:
        """Set the clock to zero."""
        self.started = time.monotonic()
        self.waited_before = trainer.stream.wait_seconds

    def row(self, trainer: Trainer, grad_norm: Tensor) -> MetricsRow:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        num_tokens = torch.tensor(self.num_tokens)
        trainer.ranks.add_up(num_tokens)
        return self.tally.over_all(trainer.ranks).row(
            "train",
            trainer.loss,
            trainer.position.step,
            trainer.epochs_done(),
            learning_rate=trainer.optimizer.param_groups[0]["lr"],
            grad_norm=float(grad_norm) if grad_norm.isfinite() else None,
            tokens_per_second=int(num_tokens) / elapsed,
            data_wait_share=min(1.0, (trainer.stream.wait_seconds - self.waited_before) / elapsed),
            memory_bytes=_peak_memory_bytes(trainer.device),
        )


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Metrics as JSON lines, one object a line, in step order whatever interrupted the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from eagle_offline.durable import explained_os_errors, write_bytes

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"


class MetricsRow(BaseModel):
    """One line of ``metrics.jsonl``.

    Attributes:
        kind: ``train`` for a step, ``heldout`` for a validation.
        step: optimizer steps done. epoch: passes over the cache done.
        loss: the objective, accuracy: right among all supervised slots; both absent where nothing was supervised.
        top1: right among supervised slots, one entry a step of the unroll, or a depth of P-EAGLE.
        conditional_top1: right at step ``k`` among slots valid there and right at every step before it.
        step_loss: mean loss of each step's supervised slots: soft cross-entropy, of P-EAGLE KL.
        survival: share of the slots valid up to step ``k`` that are right at every step up to it. Both reach as far as
            any slot is supervised.
        simulated_accept_length, walked_accept_length: tokens a round, the target's own included, decoding greedily.
        expected_accept_length: the same when tokens are drawn at temperature 1.
        learning_rate, grad_norm, tokens_per_second: of the steps since the last line.
        data_wait_share: share of that time in which the device waited for data.
        memory_bytes: peak device memory on CUDA, else of the process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(pattern="^(train|heldout)$")
    step: int
    epoch: float
    loss: float | None = None
    accuracy: float | None = None
    top1: list[float]
    conditional_top1: list[float]
    step_loss: list[float] | None = None
    survival: list[float] | None = None
    simulated_accept_length: float
    expected_accept_length: float | None = None
    walked_accept_length: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    data_wait_share: float | None = None
    memory_bytes: int | None = None


class SkippedRow(BaseModel):
    """One line of ``skipped.jsonl``: a step whose loss or gradient was not finite and that changed nothing.

    Attributes:
        step: its number. sample_ids: those that are not finite alone; all of the step when none is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    sample_ids: list[int]


class Logbook:
    """Appends rows to a file of JSON lines, each with its ``step``.

    Args:
        path: the file.
        keeps: which of the rows that are there stay; others were written by a run that died before its checkpoint.
    """

    def __init__(self, path: Path, keeps: Callable[[dict[str, Any]], bool]):
        self._path = path
        kept = [row for row in read_rows(path) if keeps(row)]
        if kept or path.exists():
            write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(self, row: BaseModel) -> None:
        """Add a row; it is on disk when this returns, in one write."""
        with explained_os_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(row.model_dump(exclude_none=True)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl`` in order; a torn last line is left out."""
    return read_rows(directory / METRICS_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines in order, none when it is not there; a torn last line is left out."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise
    return rows

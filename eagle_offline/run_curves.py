"""Metrics of runs as they were written down, under names that tell the runs apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_offline.errors import DataError, one_line
from eagle_offline.training.logbook import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class RunCurves:
    """A run's metrics under the name that the legend gives it."""

    name: str
    rows: list[dict[str, Any]]

    def over_steps(self, kind: str, metric: str) -> tuple[list[float], list[float]]:
        """Return steps and values of the rows of ``kind`` that have ``metric``."""
        found = [
            (row["step"], row[metric])
            for row in self.rows
            if row.get("kind") == kind and is_number(row.get("step")) and is_number(row.get(metric))
        ]
        return [step for step, _ in found], [value for _, value in found]

    def over_depths(self, metric: str) -> list[float]:
        """Return ``metric`` at the last validation, one entry a depth; empty without one."""
        values = self.last_heldout().get(metric)
        return values if isinstance(values, list) and all(map(is_number, values)) else []

    def last_heldout(self) -> dict[str, Any]:
        """Return the row of the last validation; empty without one."""
        return next((row for row in reversed(self.rows) if row.get("kind") == "heldout"), {})

    def has(self, metric: str) -> bool:
        """Say whether there is anything to draw."""
        return bool(self.over_depths(metric)) or any(self.over_steps(kind, metric)[0] for kind in ("train", "heldout"))


def read_runs(directories: Sequence[Path]) -> list[RunCurves]:
    """Return each run once, in order, under names that are all unlike.

    Raises:
        DataError: one is missing, has no metrics, or damaged ones.
    """
    by_place: dict[Path, Path] = {}
    for directory in directories:
        by_place.setdefault(directory.resolve(), directory)
    rows = [_read_rows(directory) for directory in by_place.values()]
    return [RunCurves(name, own) for name, own in zip(unlike_names(list(by_place)), rows, strict=True)]


def unlike_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, and as many before it as tell it from paths that end alike.

    ``/a/x/run``, ``/a/y/run`` and ``/a/z/other`` give ``x/run``, ``y/run`` and ``other``.
    """
    names = []
    for path in paths:
        alike = [other for other in paths if other != path and other.name == path.name]
        length = 1
        while any(other.parts[-length:] == path.parts[-length:] for other in alike):
            length += 1
        names.append(str(Path(*path.parts[-length:])))
    return names


def _read_rows(directory: Path) -> list[dict[str, Any]]:
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; name output directories of `train`")
    path = directory / METRICS_FILE
    try:
        rows = read_metrics(directory)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; leave this run out") from error
    except ValueError as error:
        raise DataError(
            f"{path}: damaged ({one_line(error)}); remove the damaged line, or leave this run out"
        ) from error
    if not rows:
        raise DataError(f"{directory}: no metrics here ({METRICS_FILE} is missing or empty); expected a run of `train`")
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected one JSON object a line; remove other lines, or leave this run out")
    return rows


def is_number(value: Any) -> bool:
    """Say whether a value of a row is a number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)

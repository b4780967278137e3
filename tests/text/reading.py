"""Numbered rows written and read back, and errors that fit on one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle_offline.errors import EagleOfflineError
from eagle_offline.text.rows import Row, iter_rows
from eagle_offline.text.sources import resolve_sources


def read(path: Path | str, split: str | None = None) -> list[Row]:
    return [row for source in resolve_sources(str(path), split=split) for row in iter_rows(source)]


def numbers(path: Path | str, split: str | None = None) -> list[int]:
    return [row.value["n"] for row in read(path, split) if row.value is not None]


def numbered(*values: int) -> list[dict[str, int]]:
    return [{"n": value} for value in values]


def assert_one_line(error: pytest.ExceptionInfo[EagleOfflineError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message

"""Being asked to stop: the first signal finishes or drops the unit in hand, the second ends the process."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_PASSED_ON_SECONDS = 5.0


class StopRequest:
    """Watches for SIGTERM, SIGUSR1 and SIGINT while it is entered.

    Args:
        grace_seconds: how long after the first signal a unit of work may still take.
        passed_on: a launcher passes signals on to this process, so that one which was sent to all comes twice: a
            second one within a few seconds is the first.
    """

    def __init__(self, grace_seconds: float, *, passed_on: bool = False):
        self._passed_on = passed_on
        self._grace_seconds = grace_seconds
        self._requested_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._requested_at is not None:
            if self._passed_on and time.monotonic() < self._requested_at + _PASSED_ON_SECONDS:
                return
            # Every file is put in place in one step, so that leaving here loses only the unit in hand.
            os._exit(128 + number)
        self._requested_at = time.monotonic()

    @property
    def requested(self) -> bool:
        """Whether a first signal has come."""
        return self._requested_at is not None

    def leaves_time_for(self, seconds: float) -> bool:
        """Return whether work of about ``seconds`` may still be done: always, until a signal has come."""
        if self._requested_at is None:
            return True
        return time.monotonic() + seconds <= self._requested_at + self._grace_seconds

"""Progress of long work: a bar on a terminal, a plain line every half minute elsewhere; always to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

PLAIN_LINE_SECONDS = 30.0


class Progress:
    """Counts units of work and shows rate, remaining time and a few named values.

    Args:
        label: what is being done.
        total: units in all.
        initial: units done before.
        unit: what is counted.
        enabled: False on ranks other than 0.
    """

    def __init__(self, label: str, total: int, *, initial: int = 0, unit: str = "it", enabled: bool = True):
        self._label, self._total, self._unit = label, total, unit
        self._initial = self._done = initial
        self._enabled = enabled
        self._started = self._last_line = time.monotonic()
        self._values = ""
        terminal = enabled and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=initial, desc=label, unit=unit, dynamic_ncols=True, file=sys.stderr)
            if terminal
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and kind is None and self._done > self._initial:
            self._write_line()

    def advance(self, count: int = 1, values: Mapping[str, str] | None = None) -> None:
        """Count ``count`` more units and show ``values``."""
        self.reach(self._done + count, values)

    def reach(self, done: int, values: Mapping[str, str] | None = None) -> None:
        """Show that ``done`` units are done in all."""
        if values is not None:
            self._values = ", ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._values, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        if self._bar is None and self._enabled and time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = max(self._last_line - self._started, 1e-9)
        rate = (self._done - self._initial) / elapsed
        remaining = f", {(self._total - self._done) / rate:.0f} s left" if rate and self._done < self._total else ""
        values = f", {self._values}" if self._values else ""
        done = f"{self._done}/{self._total}" if self._total else f"{self._done}"
        sys.stderr.write(f"{self._label}: {done} {self._unit}, {rate:.1f}/s{remaining}{values}\n")
        sys.stderr.flush()

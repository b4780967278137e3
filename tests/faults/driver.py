"""Runs of `eagle-offline` in children of one warm process, each with its accident; see `crash_driver`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.builders import SCRATCH

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """How a run ended.

    Attributes:
        code: exit code; a signal's number, negative, when one ended it.
        events: the steps of writing that it took, in order.
        err: what it said on stderr.
        out: what it said on stdout.
    """

    code: int
    events: list[str]
    err: str
    out: str = ""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


class Driver:
    """One warm process, started once and shared by all tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.crash_driver"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the crash driver has ended"
        return line

    def run_together(self, requests: Sequence[dict[str, Any]]) -> list[Run]:
        """Run several at the same time and wait for all of them."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(list(requests)) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._answer())
        return [
            Run(
                code,
                Path(one["log"]).read_text().splitlines(),
                *(Path(one[k]).read_text() for k in ("stderr", "stdout")),
            )
            for code, one in zip(codes, requests, strict=True)
        ]

    def run(self, argv: Sequence[str], accident: dict[str, Any] | None = None, **more: Any) -> Run:
        """Run one to its end."""
        return self.run_together([request(argv, accident, **more)])[0]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)


def request(argv: Sequence[str], accident: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A run for the driver.

    Args:
        argv: of `eagle-offline`.
        accident: names `event` (from 1), `when` and `kind`: `kill`, `terminate`, `stop` (until all other runs have
            ended), `other` (which runs from start to end), `shell` (a `command`), or an error number's name. After
            `other`, `then` is the next accident, its `event` counted from there.
        more: `user`, `umask`, `limits` (by name, such as NOFILE), `kill_after_seconds`, `other_bytes`.
    """
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    folder.chmod(0o777)
    for name in ("log", "stderr", "stdout"):
        (folder / name).touch()
        (folder / name).chmod(0o666)
    return {
        "argv": [str(argument) for argument in argv],
        "accident": accident,
        "log": str(folder / "log"),
        "stderr": str(folder / "stderr"),
        "stdout": str(folder / "stdout"),
        **more,
    }

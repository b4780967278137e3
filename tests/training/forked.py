"""Runs of `eagle-offline` in children of one warm process, which can be killed at a moment or at a step of writing.

Started as a module this is the warm process: it reads one request a line and answers with the child's exit code.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative: the signal), what it said on stderr, its steps of writing."""

    code: int
    err: str
    events: list[str]


class WarmProcess:
    """Has imported what training imports; every run is a fork of it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the warm process has ended"
        return line.strip()

    def run(
        self,
        argv: Sequence[object],
        *,
        kill_at_event: int | None = None,
        kill_after_seconds: float | None = None,
        while_running: Callable[[int], None] | None = None,
    ) -> Ended:
        """Run one to its end.

        Args:
            argv: of `eagle-offline`.
            kill_at_event: SIGKILL before this step of writing (from 1).
            kill_after_seconds: SIGKILL after this time, counted from the fork.
            while_running: called once with the child's process id.
        """
        err, log = self._directory / "stderr", self._directory / "events"
        request = {"argv": [str(arg) for arg in argv], "kill": kill_at_event, "err": str(err), "log": str(log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        child = int(self._read())
        if kill_after_seconds is not None:
            time.sleep(kill_after_seconds)
            os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still the child's
        if while_running is not None:
            while_running(child)
        self._process.stdin.write("wait\n")
        self._process.stdin.flush()
        return Ended(int(self._read()), err.read_text(), log.read_text().splitlines())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)


def _watch(request: dict[str, Any]) -> None:
    """Count the calls that put files in place or take them away, and die before the one asked for."""
    log, count = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            os.write(log, f"{name}\n".encode())
            if count == request["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(owner, name, watched)

    for name in ("fsync", "replace", "rename", "link", "unlink", "mkdir"):
        wrap(os, name)
    for name in ("write_bytes", "write_text", "unlink", "mkdir"):
        wrap(Path, name)
    wrap(shutil, "rmtree")
    from eagle_offline.training import logbook, state

    wrap(state, "save_file")
    wrap(logbook.Logbook, "write")


def _child(request: dict[str, Any]) -> None:
    code = 70
    try:
        err = os.open(request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor, stands_for in ((null, 0), (null, 1), (err, 2)):
            os.dup2(descriptor, stands_for)
        _watch(request)
        from eagle_offline.cli import main

        try:
            main(request["argv"])
        except SystemExit as stop:
            code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _answer(value: object) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


def _serve() -> None:
    import torch

    import eagle_offline.stages
    import eagle_offline.training.loop  # noqa: F401

    torch.set_num_threads(1)
    _answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        for name in ("err", "log"):
            Path(request[name]).write_text("")
        child = os.fork()
        if child == 0:
            _child(request)
        _answer(child)
        assert sys.stdin.readline().strip() == "wait"
        _answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    _serve()

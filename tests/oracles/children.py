"""`eagle-offline` in forked children of the test's own process: several ranks of one run, patched, killed, timed.

A child shares what the test has imported and patched, so that a rank costs a tenth of a second and not ten.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

from eagle_offline.train_settings import TrainSettings


@dataclass(frozen=True)
class Gone:
    """How a child ended: its exit code (negative: the signal), what it said on stderr."""

    code: int
    err: str

    @property
    def errors(self) -> list[str]:
        """Its lines of error."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def command(chosen: TrainSettings) -> list[str]:
    """The command line that gives these settings, switches included."""
    values = chosen.model_dump(mode="json", exclude_unset=True)
    words = ["train"]
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return words


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_children(
    argv: Sequence[object],
    directory: Path,
    size: int = 1,
    *,
    prepare: Callable[[int], None] | None = None,
    while_running: Callable[[list[int]], None] | None = None,
    timeout: float = 90.0,
) -> list[Gone]:
    """Run `eagle-offline argv` in `size` ranks to their ends; whoever is alive after `timeout` seconds is a failure.

    Args:
        argv: of `eagle-offline`.
        directory: where their stderr goes.
        prepare: called with the rank in the child before it begins.
        while_running: called once in the test's process with the children's process ids.
    """

    def work(rank: int) -> int:
        from eagle_offline.cli import main

        if prepare is not None:
            prepare(rank)
        try:
            main([str(arg) for arg in argv])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    codes = _fork(work, directory, size, while_running, timeout)
    return [Gone(code, (directory / f"stderr-{rank}").read_text()) for rank, code in enumerate(codes)]


def run_ranks(work: Callable[[int], None], directory: Path, size: int, timeout: float = 60.0) -> list[int]:
    """Call `work(rank)` in ranks that can talk with gloo; return their exit codes, 70 for an exception."""

    def joined(rank: int) -> int:
        torch.distributed.init_process_group("gloo")
        work(rank)
        torch.distributed.barrier()
        return 0

    return _fork(joined, directory, size, None, timeout)


def _fork(
    work: Callable[[int], int],
    directory: Path,
    size: int,
    while_running: Callable[[list[int]], None] | None,
    timeout: float,
) -> list[int]:
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    directory.mkdir(parents=True, exist_ok=True)
    logs = [directory / f"stderr-{rank}" for rank in range(size)]
    children = []
    for rank, log in enumerate(logs):
        child = os.fork()
        if child == 0:
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ.update({**environment, **ranked} if size > 1 else {})
            _live(work, log, rank)
        children.append(child)
    codes: dict[int, int] = {}
    try:
        if while_running is not None:
            while_running(children)
        deadline = time.monotonic() + timeout
        while len(codes) < size:
            for child in set(children) - codes.keys():
                reaped, status = os.waitpid(child, os.WNOHANG)
                if reaped:
                    codes[child] = os.waitstatus_to_exitcode(status)
            said = [log.read_text() if log.exists() else "" for log in logs]
            assert time.monotonic() < deadline, f"after {timeout} s ranks still run: {codes} of {children}: {said}"
            time.sleep(0.01)
    finally:
        for child in set(children) - codes.keys():
            os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still the child's
            os.waitpid(child, 0)
    return [codes[child] for child in children]


def _live(work: Callable[[int], int], log: Path, rank: int) -> None:
    code = 70
    try:
        err, null = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDWR)
        for descriptor, stands_for in ((null, 0), (null, 1), (err, 2)):
            os.dup2(descriptor, stands_for)
        # Whoever captures output in the test's process keeps its hands off the child's.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        code = work(rank)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_at_call(owner: object, name: str, number: int, *, after: bool = False) -> Callable[[int], None]:
    """What `run_children` may prepare: SIGKILL before (or after) the `number`-th call (from 1) of a function."""

    def prepare(_rank: int) -> None:
        original, count = getattr(owner, name), 0

        def watched(*arguments: object, **named: object) -> object:
            nonlocal count
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, watched)

    return prepare


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return when something holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)

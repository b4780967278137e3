"""A warm process that forks one child a run of `eagle-offline` and lets it meet an accident at a chosen event.

Events are the steps of writing files: `os.fsync`, `os.replace`, `os.rename`, `os.link`, a whole small file, a record
batch, the end of an Arrow file; of a Zarr shard also its directories, its documents, every chunk and index of its
arrays; and a tree that is removed. An accident happens before or after an event, or halfway through one that has a
middle; or at a time, whatever happens then. Requests and answers are JSON lines on stdin and stdout;
`tests.faults.driver` is the other end.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run that takes longer ends, and says on stderr what its threads were doing.
SECONDS_AT_MOST = 240


class Accidents:
    """Counts the events of this process, writes them to a log, and acts at one of them.

    To be made before the run has threads: the others that accidents let run are forked here, and wait.
    """

    def __init__(self, request: dict[str, Any]):
        self.request = request
        self.others = [Waiting(other) for other in others_of(request)]
        self.count = 0
        self.log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def happens(self, number: int, when: str) -> bool:
        accident = self.request.get("accident")
        if accident is None or when != accident["when"]:
            return False
        return number == accident["event"]

    def act(self) -> None:
        accident = self.request["accident"]
        kind = accident["kind"]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "other":
            code = self.others.pop(0).run()
            os.write(self.log, f"other {code}\n".encode())
            # Another accident may follow, so many events later.
            if "then" in accident:
                later = accident["then"]
                self.request["accident"] = {**later, "event": self.count + later["event"]}
        elif kind == "shell":
            subprocess.run(accident["command"], shell=True, check=True)
        else:
            raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    def wrap(
        self,
        owner: Any,
        name: str,
        where: Callable[..., Any],
        *,
        called: str | None = None,
        half: Callable[..., Any] | None = None,
        counts: Callable[[str], bool] = lambda place: True,
    ) -> None:
        """Make an event of every call of `owner.name`; `half` does half of it."""
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            at = where(*arguments)
            if not counts(at):
                return original(*arguments, **named)
            self.count += 1
            number = self.count  # of this one: others may happen inside it
            with suppress(OSError):  # where files may not grow, the log may not either
                os.write(self.log, f"{called or name} {at}\n".encode())
            if self.happens(number, "before"):
                self.act()
            if self.happens(number, "half") and half is not None:
                half(original, *arguments)
                self.act()
            result = original(*arguments, **named)
            if self.happens(number, "after"):
                self.act()
            return result

        setattr(owner, name, watched)


def others_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a run's accidents let happen, in order."""
    others = []
    accident = request.get("accident")
    while accident is not None:
        others += [accident["other"]] if accident["kind"] == "other" else []
        accident = accident.get("then")
    return others


class Waiting:
    """A run that is forked now and begins when it is told to; it ends with whoever was to tell it.

    A process with threads must not fork: what its allocators and pools hold at that moment, the child never gets.
    """

    def __init__(self, request: dict[str, Any]):
        word = told, self._tell = os.pipe()
        self._child = start(request, word)
        os.close(told)

    def run(self) -> int:
        """Let it run; its exit code."""
        os.write(self._tell, b"go")
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])


def place(path: Any, *_: Any, **__: Any) -> str:
    """The file that an event is about."""
    return os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)


def is_written_to_a_file(_: str) -> bool:
    """Whether what calls the writer of an Arrow file writes to disk: the index is made in memory."""
    return sys._getframe(2).f_globals["__name__"] != "eagle_offline.cache.index"


def half_file(original: Callable[..., Any], path: pathlib.Path, content: bytes) -> None:
    original(path, content[: len(content) // 2])


def half_chunk(_: Callable[..., Any], array: Any, content: bytes) -> None:
    array._file.write(content[: len(content) // 2])
    array._file.flush()


def half_tree(_: Callable[..., Any], path: Any, *__: Any) -> None:
    files = sorted(file for file in pathlib.Path(path).rglob("*") if file.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()


def watch(accidents: Accidents) -> None:
    """Make events of the steps of writing."""
    import pyarrow as pa

    from eagle_offline.cache import zarr_shards

    for name in ("fsync", "replace", "rename", "link"):
        accidents.wrap(os, name, place)
    accidents.wrap(os, "mkdir", place, counts=lambda at: ".partial-" in at)
    accidents.wrap(shutil, "rmtree", place, half=half_tree, counts=lambda at: ".partial-" in at or "shard-" in at)
    accidents.wrap(pathlib.Path, "write_bytes", place, half=half_file)
    accidents.wrap(zarr_shards, "_write_durably", place, called="document", half=half_file)
    accidents.wrap(zarr_shards._ArrayWriter, "_put", lambda array, _: array._file.name, called="chunk", half=half_chunk)
    for name in ("write_batch", "close"):
        accidents.wrap(pa.RecordBatchFileWriter, name, lambda *_: "arrow", counts=is_written_to_a_file)


def make_other_bytes() -> None:
    """Let this process compute as another environment might: nearly the same."""
    from eagle_offline.cache import codec

    original = codec.encode

    def encode(field: Any, values: Any, **named: Any) -> Any:
        return original(field, values * (1 + 2**-5), **named)

    codec.encode = encode


def start(request: dict[str, Any], word: tuple[int, int] | None = None) -> int:
    """Fork a child that runs `eagle-offline` with the request's arguments; return its process id.

    Args:
        request: what to run, see `tests.faults.driver.request`.
        word: the two ends of a pipe; it waits there before it does anything, and ends if nobody is left to tell it.
    """
    child = os.fork()
    if child:
        return child
    if word is not None:
        told, tell = word
        os.close(tell)
        if not os.read(told, 2):
            os._exit(0)
    # Whatever happens in the child, it ends here.
    code = 70
    try:
        stderr = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        stdout = os.open(request.get("stdout", os.devnull), os.O_RDWR)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.umask(request.get("umask", 0o022))
        if "user" in request:
            os.setuid(request["user"])
        watch(Accidents(request))
        faulthandler.dump_traceback_later(SECONDS_AT_MOST, exit=True)
        if request.get("other_bytes"):
            make_other_bytes()
        from eagle_offline.cli import main

        for name, limit in request.get("limits", {}).items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
        try:
            main(request["argv"])
        except SystemExit as stop:
            code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Import what a run imports: a child starts at once, and finds it as a user who may not read this Python."""
    import encodings.unicode_escape  # noqa: F401
    import html  # noqa: F401

    import datasets  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import eagle_offline.cache.companions
    import eagle_offline.cache.convert
    import eagle_offline.cache.repair
    import eagle_offline.cache.verify
    import eagle_offline.cache.zarr_shards
    import eagle_offline.cli
    import eagle_offline.precompute.fill
    import eagle_offline.stages
    import eagle_offline.text.token_table
    import eagle_offline.training.loop
    import eagle_offline.training.ranks  # noqa: F401

    torch.set_num_threads(1)


def run_together(requests: list[dict[str, Any]]) -> list[int]:
    """Run several at the same time. One whose accident is to be stopped sleeps until all others have ended."""
    children: list[int] = []
    asleep: list[int] = []
    ended: dict[int, int] = {}
    timers = []

    def wait(child: int) -> None:
        ended[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for request in requests:
        children.append(start(request))
        if (request.get("accident") or {}).get("kind") == "stop":
            _, status = os.waitpid(children[-1], os.WUNTRACED)
            if os.WIFSTOPPED(status):
                asleep.append(children[-1])
            else:
                ended[children[-1]] = os.waitstatus_to_exitcode(status)
    for child, request in zip(children, requests, strict=True):
        if "kill_after_seconds" in request:  # threads only once nothing is forked any more
            timers.append(threading.Timer(request["kill_after_seconds"], os.kill, (child, signal.SIGKILL)))
            timers[-1].start()
    for child in children:
        if child not in ended and child not in asleep:
            # Only a child that was not waited for is killed: its number is nobody else's.
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    for timer in timers:
        timer.cancel()
        timer.join()
    for child in children:
        if child not in ended and child not in asleep:
            wait(child)
    for child in asleep:
        os.kill(child, signal.SIGCONT)
        wait(child)
    return [ended[child] for child in children]


def serve() -> None:
    warm_up()
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(run_together(json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()

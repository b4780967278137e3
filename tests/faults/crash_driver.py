"""A warm process that forks one child a run of `eagle-offline` and lets it meet an accident at a chosen event.

Events are the steps of writing files: `os.fsync`, `os.replace`, `os.rename`, `os.link`, a whole small file, a record
batch, the end of an Arrow file. An accident happens before or after an event, or halfway through a small file. Requests
and answers are JSON lines on stdin and stdout; `tests.faults.driver` is the other end.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


class Accidents:
    """Counts the events of this process, writes them to a log, and acts at one of them."""

    def __init__(self, request: dict[str, Any]):
        self.request = request
        self.count = 0
        self.log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def happens(self, when: str) -> bool:
        accident = self.request.get("accident")
        return accident is not None and self.count == accident["event"] and when == accident["when"]

    def act(self) -> None:
        kind = self.request["accident"]["kind"]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "other":
            child = start(self.request["accident"]["other"])
            _, status = os.waitpid(child, 0)
            os.write(self.log, f"other {os.waitstatus_to_exitcode(status)}\n".encode())
        else:
            raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    def wrap(self, owner: Any, name: str, where: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            os.write(self.log, f"{name} {where(*arguments)}\n".encode())
            if self.happens("before"):
                self.act()
            if self.happens("half") and name == "write_bytes":
                path, content = arguments
                original(path, content[: len(content) // 2])
                self.act()
            result = original(*arguments, **named)
            if self.happens("after"):
                self.act()
            return result

        setattr(owner, name, watched)


def place(path: Any, *_: Any) -> str:
    """The file that an event is about."""
    return os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)


def start(request: dict[str, Any]) -> int:
    """Fork a child that runs `eagle-offline` with the request's arguments; return its process id."""
    child = os.fork()
    if child:
        return child
    # Whatever happens in the child, it ends here.
    code = 70
    try:
        stderr = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(stderr, 2)
        os.umask(request.get("umask", 0o022))
        if "user" in request:
            os.setuid(request["user"])
        import pyarrow as pa

        accidents = Accidents(request)
        for name in ("fsync", "replace", "rename", "link"):
            accidents.wrap(os, name, place)
        accidents.wrap(pathlib.Path, "write_bytes", place)
        accidents.wrap(pa.RecordBatchFileWriter, "write_batch", lambda *_: "arrow")
        accidents.wrap(pa.RecordBatchFileWriter, "close", lambda *_: "arrow")
        from eagle_offline.cli import main

        try:
            main(request["argv"])
        except SystemExit as stop:
            code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Import what a run imports, so that a child starts at once."""
    import datasets  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import eagle_offline.cache.companions
    import eagle_offline.cache.verify
    import eagle_offline.precompute.fill
    import eagle_offline.stages
    import eagle_offline.text.token_table  # noqa: F401

    torch.set_num_threads(1)


def serve() -> None:
    warm_up()
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        children = [start(request) for request in json.loads(line)]
        codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        print(json.dumps([codes[child] for child in children]), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()

"""An S3 server on this machine that counts what is asked of it and fails on demand, and caches made by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.cache.formats import digest_shard
from eagle_offline.cache.layout import FORMAT_NAME, FORMAT_VERSION, CommitRecord, SampleTable, record_file, shard_file
from eagle_offline.cache.manifest import sealed
from eagle_offline.provenance import digest_bytes

# What a user sets; the keys are those of nobody.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

Answer = tuple[str, list[tuple[str, str]], list[bytes]]


@dataclass
class ObjectStore:
    """A running server.

    Attributes:
        endpoint: its address.
        requests: method and path of every request, in order.
        meddle: may change the answer to a request; given method, path and the answer.
    """

    endpoint: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    meddle: Callable[[str, str, Answer], Answer] | None = None
    _conditional: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint}

    def new_bucket(self) -> str:
        """Make a bucket and return its name."""
        import boto3

        name = f"bucket-{uuid.uuid4().hex[:12]}"
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        client.create_bucket(Bucket=name)
        return name

    def downloads(self, name: str) -> int:
        """Return how often objects whose path ends with a name were fetched."""
        return sum(method == "GET" and path.endswith(name) for method, path in self.requests)

    def wrap(self, application: Any) -> Any:
        """Return a WSGI application with counting and meddling around another."""

        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            self.requests.append((method, path))
            began: list[Any] = []

            def begin(status: str, headers: list[tuple[str, str]], _: Any = None) -> None:
                began[:] = [status, headers]

            # The server looks first and writes then; the store it stands for does both in one step.
            with self._conditional if "HTTP_IF_NONE_MATCH" in environ else threading.Lock():
                body = list(application(environ, begin))
            said: Answer = (began[0], began[1], body)
            if self.meddle is not None:
                said = self.meddle(method, path, said)
            start_response(said[0], said[1])
            return said[2]

        return answer


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """Run a server in a thread of this process."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    from moto.moto_server.werkzeug_app import MotoRequestHandler
    from werkzeug.serving import make_server

    store = ObjectStore()
    application = store.wrap(server.DomainDispatcherApplication(server.create_backend_app))
    handler = type("Quiet", (MotoRequestHandler,), {"log": lambda *_: None})
    listening = make_server("127.0.0.1", 0, application, threaded=True, request_handler=handler)
    store.endpoint = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    # Filesystems are remembered by their arguments, and know the server that was in the environment then.
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield store
    finally:
        listening.shutdown()
        thread.join()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def write_shard_by_hand(directory: Path, shard: int, format_: str, content: bytes) -> CommitRecord:
    """Write a shard that only has a digest, and its record; return it."""
    draft = directory / f"draft.{format_}"
    directory.mkdir(parents=True, exist_ok=True)
    if format_ == "arrow":
        draft.write_bytes(content)
    else:
        (draft / "aux_1").mkdir(parents=True)
        (draft / "zarr.json").write_bytes(b"{}")
        (draft / "aux_1" / "c.0.0.0").write_bytes(content)
        (draft / "aux_1" / "c.1.0.0").write_bytes(content[::-1])
    digest = digest_shard(draft)[0]
    file = directory / shard_file(shard, digest, format_)
    draft.rename(file)
    files = [file] if file.is_file() else [path for path in file.rglob("*") if path.is_file()]
    record = CommitRecord(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        identity_digest="0" * 32,
        shard=shard,
        file=file.name,
        file_bytes=sum(path.stat().st_size for path in files),
        digest=digest,
        samples=SampleTable(**{name: [] for name in SampleTable.model_fields}),
        lost=[],
        column_bytes={},
        encoding_errors={},
        finite=True,
        environment={"made": digest_bytes(content)},
    )
    (directory / record_file(shard)).write_text(json.dumps(sealed(record.model_dump(mode="json"))))
    return record


def write_cache_by_hand(directory: Path, num_shards: int = 3, format_: str = "arrow") -> list[CommitRecord]:
    """Write a manifest, companions and shards of which only names, sizes and digests are meant; return the records."""
    records = [write_shard_by_hand(directory, s, format_, bytes([s]) * (1000 + s)) for s in range(num_shards)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").write_text('{"identity": "by hand"}')
    (directory / "head.safetensors").write_bytes(b"head")
    (directory / "vocab").mkdir()
    (directory / "vocab" / "ids.safetensors").write_bytes(b"vocabulary")
    return records


COMPANIONS = ("head.safetensors", "vocab/ids.safetensors")


class Forked:
    """Runs of `eagle-offline`, each a fork of one warm process, killed at a chosen request to the store."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.object_store"],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: Sequence[str], directory: Path, kill_at: int = 0, when: str = "before") -> tuple[int, str]:
        """Return the exit code (negative: the signal) and what was said on stderr.

        Args:
            directory: where to put what it says.
            kill_at: the number, from 1, of the change in the store that is its last; 0: none.
            when: before the change, or after it.
        """
        request = {"argv": list(argv), "err": str(directory / "err.txt"), "kill_at": kill_at, "when": when}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), (directory / "err.txt").read_text()

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _serve() -> None:
    """Answer requests of `Forked`."""
    import torch

    from tests.faults.crash_driver import warm_up

    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _run_once(**json.loads(line))
            finally:
                os._exit(99)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


def _run_once(argv: list[str], err: str, kill_at: int, when: str) -> None:
    from eagle_offline.cache.remote import RemoteCache
    from eagle_offline.cli import main

    descriptor = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    changes = [0]

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: RemoteCache, *arguments: Any) -> Any:
            changes[0] += 1
            if changes[0] == kill_at and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(self, *arguments)
            if changes[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("put", "create", "remove"):
        setattr(RemoteCache, name, watched(getattr(RemoteCache, name)))
    try:
        main(argv)
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(int(stop.code or 0))


if __name__ == "__main__":
    _serve()

"""The three ways of writing a cache that accidents happen to, and what must hold of the directory after one."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from eagle_offline import open_cache
from eagle_offline.errors import DataError
from tests import builders
from tests.faults.driver import Driver, Run, request

KINDS = ["arrow", "zarr", "convert"]


@cache
def source(count: int) -> Path:
    """A cache to convert, which no test changes."""
    return builders.make_cache(
        builders.SCRATCH / f"to-convert-{count}", None, builders.shared_chat(count), shard_size=4, batch_size=2
    )


@dataclass
class Work:
    """A way of writing a cache, at one place: manifests and settings say where things are.

    Attributes:
        kind: `arrow` or `zarr`, of a precompute; or `convert`, into Zarr.
        place: where it writes; beside it stands `reference`, what comes out when nothing happens.
        count, shard_size: of samples.
    """

    kind: str
    place: Path
    count: int = 6
    shard_size: int = 2
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Path:
        return self.place.with_name(f"{self.place.name}-reference")

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def arguments(self, place: Path | None = None, **flags: Any) -> list[str]:
        directory = place or self.place
        flags = {**self.flags, **flags}
        if self.kind == "convert":
            given = {"output_dir": directory, "format": "zarr", "state_encoding": "fp8", **flags}
            argv = ["convert", str(source(self.count)), "--shard-size", str(self.shard_size)]
            for name, value in given.items():
                if value not in (None, False):
                    argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
            return argv
        given = {"shard_size": self.shard_size, "batch_size": 2, "format": self.kind, **flags}
        return builders.precompute_arguments(directory, None, builders.shared_chat(self.count), **given)

    def uninterrupted(self, driver: Driver, **more: Any) -> Run:
        """The run that nothing happens to; made once."""
        if not hasattr(self, "_run"):
            run = driver.run(self.arguments(), **more)
            assert run.code == 0, run.err
            shutil.move(self.place, self.reference)
            self._run = run
        return self._run

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def run(self, driver: Driver, accident: dict[str, Any] | None = None, **more: Any) -> Run:
        """Run or resume it, in one process."""
        return driver.run(self.arguments(resume=True), accident, **more)

    def requests(self, num_processes: int, accidents: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Runs that do it together; `accidents` is what each of them gets besides its arguments."""
        return [
            request(
                self.arguments(resume=True, process_index=n, process_count=num_processes),
                **(accidents[n] if accidents else {}),
            )
            for n in range(num_processes)
        ]


def committed_files(directory: Path) -> dict[str, bytes]:
    """Every file of every committed shard, by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for record in builders.record_contents(directory).values()
        for path in [directory / record["file"], *sorted((directory / record["file"]).rglob("*"))]
        if path.is_file()
    }


def leftovers(directory: Path) -> list[str]:
    """What an interrupted writer left behind, shards that no record names among it."""
    shards = {record["file"] for record in builders.record_contents(directory).values()}
    return [name for name in builders.leftovers(directory) if name.split("/")[0] not in shards]


def check_nothing_wrong_is_readable(directory: Path, reference: Path, num_shards: int) -> None:
    """After an accident: what is committed is whole and right, and what is not whole does not open as if it were."""
    right = committed_files(reference)
    found = committed_files(directory)
    records = builders.record_contents(directory)
    whole = builders.record_contents(reference)
    for name, record in records.items():
        assert record["file"] == whole[name]["file"], name
        expected = {path: content for path, content in right.items() if path.split("/")[0] == record["file"]}
        assert {path: found[path] for path in found if path.split("/")[0] == record["file"]} == expected, name
    if not (directory / "manifest.json").exists() or len(records) < num_shards:
        with pytest.raises(DataError):
            open_cache(directory)


def contents(directory: Path) -> dict[str, str]:
    """A digest of every file but what tells of runs."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith("status")
    }


def check_same(directory: Path, reference: Path) -> None:
    """Byte for byte the same, nothing beside it, and sound."""
    assert leftovers(directory) == []
    ours, theirs = contents(directory), contents(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    ended = builders.run_cli("verify", directory)
    assert ended.code == 0, ended.out
    assert len(open_cache(directory)) == len(open_cache(reference))


def check_one_line(run: Run, *parts: str) -> None:
    """A clean stop: one line, no traceback, naming what it has to."""
    assert len(run.errors) == 1, run.err
    assert "Traceback" not in run.err
    for part in parts:
        assert part in run.errors[0]


def status(directory: Path, process: str = "") -> dict[str, Any]:
    return json.loads((directory / f"status{process}.json").read_text())


def check_status(directory: Path, run: Run) -> None:
    """`status.json` says how the run ended and why."""
    said = status(directory)
    assert said["exit_code"] == run.code
    assert said["state"] == {0: "done", 5: "resumable"}.get(run.code, "failed")
    assert said["why"] == (run.errors[-1].removeprefix("error: ") if run.code else "")

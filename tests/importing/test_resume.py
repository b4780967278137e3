"""An import that is killed goes on, several processes make it together, and the bytes are those of one that was not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import builders
from tests.faults.driver import Driver, Run, request
from tests.importing import written
from tests.importing.test_speculators import FLAGS, assert_refused, dump, rows

TOOLS: dict[str, dict[str, Any]] = {"speculators": {**FLAGS, "shard_size": 3}, "nemo": {"shard_size": 3}}


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    started = Driver()
    yield started
    started.close()


@cache
def states_of(tool: str) -> Path:
    if tool == "speculators":
        return dump()
    return written.write_nemo(builders.SCRATCH / "nemo-resumed", rows(), written.unsorted_vocabulary())


def arguments(tool: str, directory: Path, **flags: Any) -> list[str]:
    return written.import_arguments(states_of(tool), directory, **TOOLS[tool], **flags)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a cache but those that say how a run went."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith("status")
    }


def uninterrupted(driver: Driver, tool: str, directory: Path) -> tuple[Run, dict[str, bytes]]:
    run = driver.run(arguments(tool, directory))
    assert run.code == 0, run.err
    expected = content(directory)
    shutil.rmtree(directory)
    return run, expected


@pytest.mark.parametrize("tool", TOOLS)
def test_a_killed_import_goes_on_to_the_same_bytes(tool: str, driver: Driver, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    run, expected = uninterrupted(driver, tool, directory)
    events = [number for number, event in enumerate(run.events, 1) if str(directory) in event]
    for number in events[:: max(1, len(events) // 4)]:
        killed = driver.run(arguments(tool, directory), {"event": number, "when": "after", "kind": "kill"})
        assert killed.code == -9, killed.err
        resumed = driver.run(arguments(tool, directory, resume=True))
        assert resumed.code == 0, resumed.err
        assert content(directory) == expected
        assert not builders.leftovers(directory)
        shutil.rmtree(directory)


@pytest.mark.parametrize("tool", TOOLS)
def test_several_processes_make_one_cache(tool: str, driver: Driver, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    _, expected = uninterrupted(driver, tool, directory)
    runs = driver.run_together(
        [request(arguments(tool, directory, process_index=index, process_count=2, resume=True)) for index in range(2)]
    )
    assert [run.code for run in runs] == [0, 0], [run.err for run in runs]
    assert content(directory) == expected


def test_a_signal_ends_it_resumable(driver: Driver, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    run, expected = uninterrupted(driver, "speculators", directory)
    number = next(number for number, event in enumerate(run.events, 1) if "manifest" in event)
    flags = {"grace_seconds": 0, "resume": True}
    ended = driver.run(
        arguments("speculators", directory, **flags), {"event": number, "when": "after", "kind": "terminate"}
    )
    assert ended.code == 5, ended.err
    assert json.loads((directory / "status.json").read_text())["state"] == "resumable"
    assert driver.run(arguments("speculators", directory, **flags)).code == 0
    assert content(directory) == expected


def test_what_was_read_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eagle_offline.importing.speculators import SpeculatorsDump

    states = shutil.copytree(dump(), tmp_path / "states")
    scanned: list[str] = []
    own = SpeculatorsDump.scan
    monkeypatch.setattr(
        SpeculatorsDump, "scan", lambda self, file, length: (scanned.append(file.name), own(self, file, length))[1]
    )

    def plan(**flags: Any) -> dict[str, Any]:
        ended = written.run_import(states, tmp_path / "cache", **FLAGS, dry_run=True, resume=True, **flags)
        assert ended.code == 0, ended.err
        found, scanned[:] = list(scanned), []
        return {"scanned": sorted(found)}

    names = sorted(path.name for path in states.iterdir())
    assert plan()["scanned"] == names
    assert plan()["scanned"] == []
    assert plan(rehash=True)["scanned"] == names
    path = states / "hs_3.safetensors"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert plan()["scanned"] == ["hs_3.safetensors"]
    for torn in (b"", b"ARROW1\0\0", builders.SCRATCH.name.encode() * 40):
        for memory in (builders.SCRATCH / "user-cache" / "eagle_offline" / "imports").iterdir():
            memory.write_bytes(torn)
        assert plan()["scanned"] == names


def test_other_states_under_the_same_name_are_drift(tmp_path: Path) -> None:
    states = shutil.copytree(dump(), tmp_path / "states")
    cache = tmp_path / "cache"
    assert written.run_import(states, cache, **FLAGS).code == 0
    tensors = dict(load_file(states / "hs_2.safetensors"))
    tensors["hidden_states"][0, 0, 0] += 1
    save_file(tensors, states / "hs_2.safetensors")
    before = builders.tree(cache)
    assert_refused(
        written.run_import(states, cache, **FLAGS, resume=True), 3, "imported_from.digest: recorded ", "--output-dir"
    )
    flags = {**FLAGS, "aux_layer_ids": [1, 3, 5]}
    assert_refused(written.run_import(states, cache, **flags, resume=True), 3, "aux_layer_ids")
    ended = builders.run_cli(*builders.precompute_arguments(cache, resume=True, aux_layer_ids=[1, 3, 4]))
    assert_refused(ended, 3, "imported_from.tool: recorded 'speculators', now None")
    assert builders.tree(cache) == before


def test_what_a_repair_takes_away_is_imported_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert written.run_import(dump(), cache, **TOOLS["speculators"]).code == 0
    expected = content(cache)
    shard = sorted(cache.glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    ended = builders.run_cli("repair", cache)
    assert "eagle-offline import --config" in ended.out
    command = next(line for line in ended.out.splitlines() if "eagle-offline import" in line)
    words = command[command.index("eagle-offline import") :].split()[1:]
    assert builders.run_cli(*words).code == 0
    assert {name: what for name, what in content(cache).items() if not name.startswith("aside")} == expected


def test_the_settings_that_are_saved_import_the_same_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert written.run_import(dump(), cache, **FLAGS).code == 0
    config = cache / "config.json"
    said = json.loads(config.read_text())
    assert said["states_dir"] == str(dump())
    ended = builders.run_cli("import", "--config", config, "--output-dir", tmp_path / "other")
    assert ended.code == 2  # a cache's own settings lead to where it is
    copied = shutil.copy(config, tmp_path / "import.json")
    ended = builders.run_cli("import", "--config", copied, "--output-dir", tmp_path / "other")
    assert ended.code == 0, ended.err
    assert builders.shard_bytes(tmp_path / "other") == builders.shard_bytes(cache)


def test_a_cache_that_is_not_whole_names_the_import_as_the_way_out(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert written.run_import(dump(), cache, **TOOLS["speculators"]).code == 0
    (cache / "commit-000001.json").unlink()
    ended = builders.run_cli("train", "--cache", cache, "--output-dir", tmp_path / "run", "--device", "cpu")
    assert_refused(ended, 4, "finish it with import --resume")
    (cache / "head.safetensors").unlink()
    page = builders.run_cli("inspect-manifest", cache).out
    assert "head.safetensors: missing; run import --resume to write it again" in page
    assert "eagle-offline import --config" in builders.run_cli("repair", cache).out
    assert written.run_import(dump(), cache, **TOOLS["speculators"], resume=True).code == 0
    assert builders.run_cli("verify", cache).code == 0

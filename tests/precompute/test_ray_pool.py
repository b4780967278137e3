"""A Ray cluster of this machine makes the cache that one process makes, also when it loses a worker on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import builders
from tests.oracles.children import wait_until
from tests.precompute.runs import NUM_SHARDS, alone, arguments, assert_same_bytes, without_launcher

pytest.importorskip("ray")

SOME, MANY = (
    {"data": builders.shared_chat(count), "seq_length": 96, "shard_size": 2, "batch_size": 2} for count in (60, 400)
)


class Driver:
    """`eagle-offline precompute --engine ray` in a process of its own."""

    def __init__(self, words: list[str], directory: Path):
        self.out, self.err = directory / "out", directory / "err"
        environment = {**without_launcher(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "eagle_offline", *words]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)

    def workers(self) -> list[int]:
        """Process ids of the workers that were started under this driver."""
        return [number for number in _descendants(self.process.pid) if b"ray::Worker" in _command_line(number)]

    def wait(self, seconds: float = 120.0) -> int:
        try:
            return self.process.wait(timeout=seconds)
        finally:
            self.process.kill()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.read_text().splitlines() if line.startswith("error: ")]


def _command_line(number: int) -> bytes:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return b""


def _descendants(number: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    except OSError:
        return []
    return [below for child in children for below in (child, *_descendants(child))]


def committed(cache: Path) -> int:
    return len(list(cache.glob("commit-*.json")))


def run(words: list[str], directory: Path, while_running: Callable[[Driver], None] | None = None) -> tuple[int, Driver]:
    driver = Driver(words, directory)
    try:
        if while_running is not None:
            while_running(driver)
        return driver.wait(), driver
    finally:
        driver.process.kill()


def test_a_worker_that_is_killed_is_started_again_and_the_bytes_are_the_same(tmp_path):
    cache = tmp_path / "cache"

    def kill_one(driver: Driver) -> None:
        wait_until(lambda: committed(cache) > 2, 90)
        os.kill(driver.workers()[0], signal.SIGKILL)

    words = builders.precompute_arguments(cache, engine="ray", num_workers=2, **SOME)
    code, driver = run(words, tmp_path, kill_one)
    said = driver.err.read_text()
    assert code == 0, said
    assert "Traceback" not in said
    assert json.loads(driver.out.read_text())["shards_committed"] == 30
    assert json.loads((cache / "status.json").read_text())["state"] == "done"
    assert_same_bytes(cache, builders.make_cache(tmp_path / "alone", **SOME))


@pytest.mark.slow
@pytest.mark.parametrize("grace_seconds", [20, 0])
def test_a_signal_stops_between_shards_or_drops_those_in_hand(grace_seconds, tmp_path):
    cache = tmp_path / "cache"

    def stop(driver: Driver) -> None:
        wait_until(lambda: committed(cache) > 2, 90)
        os.kill(driver.process.pid, signal.SIGTERM)

    words = builders.precompute_arguments(cache, engine="ray", num_workers=2, grace_seconds=grace_seconds, **MANY)
    code, driver = run(words, tmp_path, stop)
    assert code == 5, driver.err.read_text()
    assert len(driver.errors) == 1
    assert "stopped by a signal" in driver.errors[0]
    assert json.loads((cache / "status.json").read_text())["state"] == "resumable"
    assert 2 < committed(cache) < 200
    ended = builders.run_cli(*builders.precompute_arguments(cache, resume=True, **MANY))
    assert ended.code == 0, ended.err
    assert_same_bytes(cache, builders.make_cache(tmp_path / "alone", **MANY))


@pytest.mark.slow
def test_what_a_worker_refuses_is_one_line_with_its_exit_code(tmp_path):
    cache = tmp_path / "cache"
    code, driver = run(arguments(cache, engine="ray", aux_layer_ids=[99]), tmp_path)
    assert code == 2
    assert len(driver.errors) == 1
    assert "--aux-layer-ids 99" in driver.errors[0]
    assert "Traceback" not in driver.err.read_text()
    assert builders.run_cli(*arguments(cache)).code == 0
    before = builders.tree(cache)
    code, driver = run(arguments(cache, engine="ray"), tmp_path)
    assert code == 2
    assert "add --resume" in driver.errors[0]
    assert builders.tree(cache) == before
    code, driver = run(arguments(cache, engine="ray", resume=True), tmp_path)
    assert code == 0
    assert json.loads(driver.out.read_text())["shards_committed"] == NUM_SHARDS
    assert_same_bytes(cache, alone())


@pytest.mark.slow
def test_a_cache_in_a_store_is_staged_by_each_worker(tmp_path):
    store = tmp_path / "store" / "cache"
    store.parent.mkdir()
    staging = tmp_path / "staging"
    words = arguments(f"file://{store}", engine="ray", num_workers=2, staging_dir=staging)
    code, driver = run(words, tmp_path)
    assert code == 0, driver.err.read_text()
    assert json.loads(driver.out.read_text())["cache"] == f"file://{store}"
    assert json.loads((store / "status.json").read_text())["state"] == "done"
    assert_same_bytes(store, alone())
    assert {path.name for path in staging.iterdir()} == {"worker-0", "worker-1", "driver"}
    assert not list(staging.rglob("shard-*"))


@pytest.mark.slow
def test_no_cluster_at_an_address_is_one_line(tmp_path):
    began = time.monotonic()
    code, driver = run(arguments(tmp_path / "cache", engine="ray", ray_address="127.0.0.1:1"), tmp_path)
    assert code == 2, driver.err.read_text()
    assert "--ray-address 127.0.0.1:1: no cluster answers there" in driver.errors[-1]
    assert time.monotonic() - began < 100


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = builders.run_cli(*arguments(tmp_path / "cache", engine="ray"))
    assert ended.code == 2
    assert ended.errors == ["error: --engine ray needs Ray: pip install 'eagle-offline[ray]'"]

"""One builder at a time: what holds when builders of a token table meet, wait, or die."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from eagle_offline.durable import TEMPORARY_MARK
from eagle_offline.errors import DataError
from eagle_offline.text import build_lock, token_builder
from eagle_offline.text.token_builder import TokenTableSettings, ensure_token_table
from eagle_offline.text.token_table import TokenProgress, open_token_table
from tests.text.tiny_tables import TOKENIZER, build, contents, write_chats

ROOT = Path(__file__).parents[2]


def start_process(*arguments: Path | str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.text.build_in_process", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_of_two_processes_one_builds_and_both_open_the_same_table(tmp_path: Path) -> None:
    path, directory, log = write_chats(tmp_path / "a.jsonl", 20), tmp_path / "tokens", tmp_path / "log"
    processes = [start_process(path, directory, log) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    lines = Counter(log.read_text().splitlines())
    assert lines[f"done {open_token_table(directory).meta.key}"] == 2
    assert len([line for line in lines if line.startswith("built")]) == 1
    assert sorted(contents(directory)) == ["quarantine.jsonl", "tokens.arrow", "tokens.json"]


def test_killed_builder_leaves_nothing_readable_and_the_next_one_finishes(tmp_path: Path) -> None:
    path, directory = write_chats(tmp_path / "a.jsonl", 300), tmp_path / "tokens"
    assert start_process(path, directory, tmp_path / "log", "killed").wait(timeout=60) == -9
    assert (directory / "tokens.lock").exists()
    assert list(directory.glob(f".tokens.arrow{TEMPORARY_MARK}*"))
    with pytest.raises(DataError, match=r"tokens\.json: not there"):
        open_token_table(directory)
    started = time.monotonic()
    ensure_token_table(TokenTableSettings(input_data=str(path)), TOKENIZER, directory)
    assert time.monotonic() - started < 10  # the dead holder is noticed, not waited for
    build(path, tmp_path / "fresh")
    assert contents(directory) == contents(tmp_path / "fresh")


def test_lock_of_another_host_is_waited_for_and_taken_over_when_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, directory = write_chats(tmp_path / "a.jsonl", 2), tmp_path / "tokens"
    directory.mkdir()
    lock = directory / "tokens.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "id": "x"}))
    built = build(path, tmp_path / "elsewhere")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 10, "waits for ever"
        if len(naps) == 3:
            shutil.copytree(tmp_path / "elsewhere", directory, dirs_exist_ok=True)

    monkeypatch.setattr(token_builder.time, "sleep", nap)
    settings = TokenTableSettings(input_data=str(path))
    assert ensure_token_table(settings, TOKENIZER, directory).meta == built.meta
    assert len(naps) == 3  # waited until the other host had finished
    shutil.rmtree(directory)
    directory.mkdir()
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "id": "x"}))
    os.utime(lock, (time.time() - 61, time.time() - 61))
    assert ensure_token_table(settings, TOKENIZER, directory).meta == built.meta
    assert len(naps) == 4


def test_holder_keeps_its_lock_fresh_and_leaves_one_that_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_lock, "LOCK_HEARTBEAT_SECONDS", 0.01)
    path, directory = write_chats(tmp_path / "a.jsonl", 2), tmp_path / "tokens"
    lock = directory / "tokens.lock"
    ages = []

    def report(progress: TokenProgress) -> None:
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
        os.utime(lock, (0, 0))
        deadline = time.monotonic() + 5
        while lock.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        ages.append(time.time() - lock.stat().st_mtime)
        lock.write_text("another holder")

    ensure_token_table(TokenTableSettings(input_data=str(path)), TOKENIZER, directory, report)
    assert max(ages) < 5
    assert lock.read_text() == "another holder"

"""Files are there in full or not at all, and a directory is one process's while it is held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_offline.durable import create_exclusively, exclusive, remove_abandoned, replacing, temporary_sibling
from eagle_offline.errors import UsageError

HOLDER = """
import sys, time
from pathlib import Path
from eagle_offline.durable import exclusive
with exclusive(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_held_by_a_process_is_refused_until_it_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process is training here"), exclusive(tmp_path, "training"):
            raise AssertionError("two held it")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with exclusive(tmp_path, "training"):
        assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_file_and_no_rest(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def write_and_fail() -> None:
        with replacing(path) as sibling:
            sibling.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_only_one_creates_a_file(tmp_path):
    path = tmp_path / "file"
    assert create_exclusively(path, b"first")
    assert not create_exclusively(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_rests_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    own = temporary_sibling(tmp_path / "file")
    own.write_text("being written")
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    left = Path(str(own).replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    left.mkdir()
    (left / "inside").write_text("half")
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [own]

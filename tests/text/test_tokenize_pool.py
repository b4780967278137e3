"""Several processes give the bytes of one, say in one line when one of them is lost, and leave nobody behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.durable import is_alive
from eagle_offline.errors import DataError, EagleOfflineError, StoppedEarly
from eagle_offline.text.rows import Source
from eagle_offline.text.sources import resolve_sources
from eagle_offline.text.token_table import TokenProgress
from eagle_offline.text.tokenize_pool import num_workers_for
from tests.text import tiny_tokenizers as tiny
from tests.text.tiny_tables import BAD_ROWS, TOKENIZER, build, chat, contents

ROOT = Path(__file__).parents[2]


def write_many(path: Path, count: int) -> Path:
    rows: list[Any] = [chat(index) for index in range(count)]
    for number, (_, row) in BAD_ROWS.items():
        rows[number * 7] = row
    return tiny.write_jsonl(path, rows)


def children() -> list[int]:
    """Workers that this process has started and that are there still."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"tokenize_worker" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def test_bytes_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path / "in" / "a.jsonl", 700)
    write_many(tmp_path / "in" / "b.jsonl", 90)
    for count in (1, 3):
        build(tmp_path / "in", tmp_path / str(count), seq_length=64, num_workers=count)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")["quarantine.jsonl"].splitlines()) >= 2 * len(BAD_ROWS)
    assert not children()


def test_the_first_row_that_ends_the_build_is_the_one_that_is_told(tmp_path: Path) -> None:
    # Of rows 101 and on every one is untold, so that more than half are from row 201.
    untold = {"messages": tiny.turns("a", "b", "c", "d")}
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [chat(number) if number < 100 else untold for number in range(600)])
    forgetful = tiny.byte_tokenizer(tiny.FORGETFUL)
    for count in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl row 101: chat template: .* \(so in 101 of 201 rows\)$"):
            build(path, tmp_path / "tokens", forgetful, num_workers=count)
        assert contents(tmp_path / "tokens") == {}
    path = write_many(tmp_path / "a.jsonl", 300)
    with pytest.raises(DataError, match=r"a\.jsonl row 15: not-json: .*; stopped as asked"):
        build(path, tmp_path / "tokens", on_bad_row="stop", num_workers=2)
    assert not children()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_lost_worker_ends_the_build_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    path = write_many(tmp_path / "a.jsonl", 2000)

    def kill_one(progress: TokenProgress) -> None:
        for process in children()[:1]:
            os.kill(process, number)

    with pytest.raises(EagleOfflineError, match=rf"was lost \(signal {int(number)}\).*run the same command") as error:
        build(path, tmp_path / "tokens", num_workers=2, report=kill_one)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "tokens") == {}
    assert not children()


def test_worker_that_a_signal_to_all_has_ended_is_a_stop(tmp_path: Path) -> None:
    stopping = []

    def report(progress: TokenProgress) -> None:
        if stopping:
            raise StoppedEarly("stopped by a signal")
        stopping.append(progress)
        for process in children():
            os.kill(process, signal.SIGTERM)

    with pytest.raises(StoppedEarly):
        build(write_many(tmp_path / "a.jsonl", 2000), tmp_path / "tokens", num_workers=2, report=report)
    assert not children()


RUN = """
import os, sys
from pathlib import Path
from eagle_offline.text.token_builder import TokenTableSettings, build_token_table
from tests.text.tiny_tables import TOKENIZER
from tests.text.test_tokenize_pool import children

def report(progress):
    Path(sys.argv[3]).write_text(" ".join(map(str, children())))
    if sys.argv[4] == "killed":
        os.kill(os.getpid(), 9)

settings = TokenTableSettings(input_data=sys.argv[1], num_workers=2)
build_token_table(settings, TOKENIZER, sys.argv[2], report)  # no guard of a main module: it is not run again
print("built")
"""


def run_script(tmp_path: Path, how: str) -> tuple[int, str]:
    """Run it; return its exit code and all it has said, to a file, which keeps nobody waiting for who holds it open."""
    script = tmp_path / "script.py"
    script.write_text(RUN)
    arguments = [write_many(tmp_path / "a.jsonl", 1500), tmp_path / "tokens", tmp_path / "pids", how]
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    with (tmp_path / "said").open("w") as said:
        ended = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=said,
            timeout=120,
            check=False,
        )
    return ended.returncode, (tmp_path / "said").read_text()


def test_nobody_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    assert run_script(tmp_path, "killed")[0] == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if runs(pid)]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


def runs(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    if not is_alive(pid):
        return False
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_script_without_a_guarded_main_module_works_and_nothing_is_said_on_the_way(tmp_path: Path) -> None:
    assert run_script(tmp_path, "whole") == (0, "built\n")


def test_little_input_and_tokenizers_with_code_stay_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (source,) = resolve_sources(str(write_many(tmp_path / "a.jsonl", 100)))
    large = Source("b.jsonl", tmp_path / "b.jsonl", None, None, None, 1 << 30, "")
    assert num_workers_for([source], TOKENIZER) == 1
    assert num_workers_for([source, large], TOKENIZER) == 8
    part = Source("b.jsonl", tmp_path / "b.jsonl", None, "[:9]", None, 1 << 30, "", 0, 9)
    assert num_workers_for([part, part], TOKENIZER) == 1
    assert num_workers_for([part, large], TOKENIZER) == 8

    class Own(type(TOKENIZER)):  # type: ignore[misc]
        pass

    own = Own(tokenizer_object=TOKENIZER.backend_tokenizer, chat_template=tiny.CHATML)
    assert num_workers_for([large], own) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert num_workers_for([large], TOKENIZER) == 2


def test_tokenizer_that_another_process_cannot_have_is_told(tmp_path: Path) -> None:
    class Local(type(TOKENIZER)):  # type: ignore[misc]
        pass

    local = Local(tokenizer_object=TOKENIZER.backend_tokenizer, chat_template=tiny.CHATML)
    with pytest.raises(EagleOfflineError, match="--tokenize-workers 1") as error:
        build(write_many(tmp_path / "a.jsonl", 100), tmp_path / "tokens", local, num_workers=2)
    assert "\n" not in str(error.value)

"""The token table: what goes in, what stays out and why, and what holds when builders die or meet."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_offline.errors import DataError, EagleOfflineError, MismatchError, SpaceError, UsageError
from eagle_offline.text import token_table
from eagle_offline.text.token_table import (
    TokenProgress,
    TokenTable,
    TokenTableSettings,
    build_token_table,
    ensure_token_table,
    open_token_table,
)
from tests.text import tiny_tokenizers as tiny

ROOT = Path(__file__).parents[2]
TOKENIZER = tiny.byte_tokenizer(tiny.CHATML)
BAD_ROWS = {
    2: ("not-json", '{"messages": '),
    3: ("unknown-role", {"messages": [{"role": "wizard", "content": "x"}]}),
    5: ("no-assistant-turn", {"messages": tiny.turns("Hi")}),
    6: ("no-conversation", {"prompt": "Hi"}),
    8: ("supervision-truncated", {"messages": tiny.turns("x" * 100, "too late")}),
}


def chat(index: int) -> dict[str, Any]:
    return {"messages": tiny.turns(f"Question {index}", f"Answer {index}" + "!" * (index % 5))}


def write_chats(path: Path, count: int) -> Path:
    return tiny.write_jsonl(path, [chat(index) for index in range(count)])


def write_mixed(path: Path) -> Path:
    rows: list[Any] = [chat(index) for index in range(1, 10)]
    for number, (_, row) in BAD_ROWS.items():
        rows[number - 1] = row
    return tiny.write_jsonl(path, rows)


def build(input_data: Path, directory: Path, **settings: Any) -> TokenTable:
    return build_token_table(TokenTableSettings(input_data=str(input_data), **settings), TOKENIZER, directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_table_gives_back_every_row_in_order_with_its_mask(tmp_path: Path) -> None:
    write_chats(tmp_path / "data" / "a.jsonl", 300)
    write_chats(tmp_path / "data" / "b.jsonl", 7)
    table = build(tmp_path / "data", tmp_path / "tokens")
    assert len(table) == table.meta.num_rows == 307
    assert table.meta.rows_per_batch < 300  # more than one record batch is looked into
    for index in (0, 255, 256, 299, 300, 306, -1):
        row = table[index]
        assert (row.source, row.row) == ((0, index + 1) if 0 <= index < 300 else (1, index % 307 - 299))
        number = row.row - 1
        told = TOKENIZER.decode(row.input_ids[row.loss_mask == 1])
        assert told == f"Answer {number}" + "!" * (number % 5) + "<|im_end|>"
        assert (row.input_ids.dtype, row.loss_mask.dtype) == (np.int32, np.uint8)
        assert not row.input_ids.flags.owndata
    rows = [table[index] for index in range(len(table))]
    assert table.lengths.dtype == np.int32
    assert table.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert [source.name for source in table.meta.sources] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(IndexError):
        table[307]


def test_counts_in_the_record_are_those_of_the_rows(tmp_path: Path) -> None:
    table = build(write_chats(tmp_path / "a.jsonl", 300), tmp_path / "tokens")
    rows = [table[index] for index in range(len(table))]
    counted = Counter(int(token) for row in rows for token in row.input_ids[row.loss_mask == 1])
    frequencies = table.supervised_counts()
    assert frequencies.dtype == np.int64
    assert {token: int(count) for token, count in enumerate(frequencies) if count} == counted
    meta = table.meta
    assert len(frequencies) == meta.max_token_id + 1 == max(row.input_ids.max() for row in rows) + 1
    assert meta.num_tokens == sum(len(row.input_ids) for row in rows) == table.lengths.sum()
    assert meta.num_supervised == counted.total()
    assert meta.max_length == table.lengths.max()
    assert (meta.truncated_rows, meta.num_quarantined, meta.reasons) == (0, 0, {})


def test_every_row_left_out_is_in_the_quarantine_with_file_row_and_reason(tmp_path: Path) -> None:
    table = build(write_mixed(tmp_path / "mixed.jsonl"), tmp_path / "tokens", seq_length=64)
    lines = [json.loads(line) for line in (tmp_path / "tokens" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["row"]: line["reason"] for line in lines} == {row: reason for row, (reason, _) in BAD_ROWS.items()}
    assert {line["file"] for line in lines} == {"mixed.jsonl"}
    assert all(line["detail"] for line in lines)
    assert [table[index].row for index in range(len(table))] == [1, 4, 7, 9]
    assert table.meta.num_quarantined == 5
    assert table.meta.reasons == dict(Counter(reason for reason, _ in BAD_ROWS.values()))


def test_truncation_keeps_the_first_tokens_and_is_counted(tmp_path: Path) -> None:
    texts = [("Hi", "A long answer"), ("Hi", "Yes"), ("A question too long to be answered", "Yes")]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": tiny.turns(*pair)} for pair in texts])
    whole, cut = (build(path, tmp_path / str(length), seq_length=length) for length in (2048, 34))
    assert len(whole[0].input_ids) > 34 == len(cut[0].input_ids) == cut.meta.max_length
    np.testing.assert_array_equal(cut[0].input_ids, whole[0].input_ids[:34])
    np.testing.assert_array_equal(cut[0].loss_mask, whole[0].loss_mask[:34])
    assert (whole.meta.truncated_rows, cut.meta.truncated_rows) == (0, 1)
    assert cut.meta.reasons == {"supervision-truncated": 1}


def test_stop_at_a_bad_row_names_file_and_row_and_leaves_no_table(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "mixed.jsonl")
    with pytest.raises(DataError, match=r"mixed\.jsonl row 2: not-json: not JSON"):
        build(path, tmp_path / "tokens", on_bad_row="stop")
    assert contents(tmp_path / "tokens") == {}


def test_input_without_a_usable_row_tells_counts_and_the_first_example(tmp_path: Path) -> None:
    rows = [BAD_ROWS[5][1], BAD_ROWS[3][1], BAD_ROWS[3][1]]
    with pytest.raises(DataError) as error:
        build(tiny.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "tokens")
    message = str(error.value)
    assert "3 left out (no-assistant-turn 1, unknown-role 2)" in message
    assert "a.jsonl row 1: roles are user" in message
    assert "\n" not in message
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no rows"):
        build(tmp_path / "blank.jsonl", tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == {}


def test_refused_template_names_the_row_it_failed_on(tmp_path: Path) -> None:
    rows = [chat(1), {"messages": tiny.turns("a", "b", "c", "d")}]
    template = tmp_path / "forgetful.jinja"
    template.write_text(tiny.FORGETFUL)
    with pytest.raises(DataError, match=r"a\.jsonl row 2: chat template: "):
        build(tiny.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "tokens", chat_template_file=template)


def test_template_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    path, template = write_chats(tmp_path / "a.jsonl", 2), tmp_path / "llama.jinja"
    with pytest.raises(UsageError, match=r"--chat-template .*llama\.jinja"):
        build(path, tmp_path / "tokens", chat_template_file=template)
    template.write_text(tiny.LLAMA3)
    table = build(path, tmp_path / "tokens", chat_template_file=template)
    assert TOKENIZER.decode(table[0].input_ids).endswith("Answer 0<|eot_id|>")
    with pytest.raises(MismatchError, match="--chat-template FILE"):
        build_token_table(TokenTableSettings(input_data=str(path)), tiny.byte_tokenizer(None), tmp_path / "none")


def test_same_input_gives_the_same_bytes_anywhere(tmp_path: Path) -> None:
    first = build(write_mixed(tmp_path / "x" / "mixed.jsonl"), tmp_path / "one")
    second = build(write_mixed(tmp_path / "y" / "mixed.jsonl"), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == ["quarantine.jsonl", "tokens.arrow", "tokens.json"]
    assert first.meta.key == second.meta.key
    assert str(tmp_path) not in (tmp_path / "one" / "tokens.json").read_text()


def test_rows_digest_covers_lengths_ids_and_masks(tmp_path: Path) -> None:
    import xxhash

    table = build(write_chats(tmp_path / "a.jsonl", 3), tmp_path / "tokens")
    digest = xxhash.xxh3_128()
    for index in range(3):
        row = table[index]
        digest.update(
            np.array([len(row.input_ids)], "<i8").tobytes() + row.input_ids.tobytes() + row.loss_mask.tobytes()
        )
    assert table.meta.rows_digest == digest.hexdigest()


def test_table_is_reused_until_something_that_shapes_it_changes(tmp_path: Path) -> None:
    path, directory = write_chats(tmp_path / "a.jsonl", 5), tmp_path / "tokens"
    template = tmp_path / "tagged.jinja"
    template.write_text(tiny.CHATML_TAGGED)
    reports: list[TokenProgress] = []

    def builds(tokenizer: Any = TOKENIZER, **settings: Any) -> bool:
        reports.clear()
        table = ensure_token_table(
            TokenTableSettings(input_data=str(path), **settings), tokenizer, directory, reports.append
        )
        assert table.meta == open_token_table(directory).meta
        return bool(reports)

    assert builds()
    assert reports[-1] == TokenProgress("a.jsonl", 5, 5, open_token_table(directory).meta.num_tokens)
    assert not builds()
    other_tokenizer = tiny.byte_tokenizer(tiny.CHATML, merges=(("h", "i"),))
    changes: list[dict[str, Any]] = [
        {"seq_length": 1024},
        {"split": "[:3]"},
        {"on_bad_row": "stop"},
        {"chat_template_file": template},
        {"tokenizer": other_tokenizer},
    ]
    for change in changes:
        assert builds(**change), change
        assert not builds(**change), change
        assert builds(), change  # back again, so that each change is seen alone
    write_chats(path, 6)
    assert builds()
    assert len(open_token_table(directory)) == 6
    assert not list(directory.glob("*.lock"))


@pytest.mark.parametrize("name", ["tokens.arrow", "quarantine.jsonl", "tokens.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_table_is_not_opened_and_is_rebuilt(tmp_path: Path, name: str, damage: str) -> None:
    path, directory = write_mixed(tmp_path / "a.jsonl"), tmp_path / "tokens"
    build(path, directory)
    whole = contents(directory)
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 0x80
    if damage == "remove":
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(
            data if damage == "flip" else whole[name][:-1] if name != "tokens.json" else b"{"
        )
    with pytest.raises(DataError) as error:
        open_token_table(directory)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    ensure_token_table(TokenTableSettings(input_data=str(path)), TOKENIZER, directory)
    assert contents(directory) == whole


def test_table_of_another_format_version_is_refused(tmp_path: Path) -> None:
    build(write_chats(tmp_path / "a.jsonl", 2), tmp_path / "tokens")
    meta = tmp_path / "tokens" / "tokens.json"
    meta.write_text(meta.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(DataError, match="format version 99, expected 1"):
        open_token_table(tmp_path / "tokens")


def test_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a.jsonl", 300)

    def append_once(progress: TokenProgress) -> None:
        write_chats(path, 299)

    with pytest.raises(DataError, match="changed while it was read"):
        build_token_table(TokenTableSettings(input_data=str(path)), TOKENIZER, tmp_path / "tokens", append_once)
    assert contents(tmp_path / "tokens") == {}


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, SpaceError), (errno.EDQUOT, SpaceError), (errno.EROFS, UsageError)]
)
def test_disk_that_refuses_gives_one_line_and_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[EagleOfflineError]
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(expected, match="tokens: "):
        build(write_chats(tmp_path / "a.jsonl", 2), tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == {}


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
    assert list(directory.glob(".tokens.arrow.*.tmp"))
    with pytest.raises(DataError, match=r"tokens\.json: not there"):
        open_token_table(directory)
    started = time.monotonic()
    ensure_token_table(TokenTableSettings(input_data=str(path)), TOKENIZER, directory)
    assert time.monotonic() - started < 10  # the dead holder is noticed, not waited for
    build(path, tmp_path / "fresh")
    assert contents(directory) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("stop_before", ["tokens.arrow", "quarantine.jsonl", "tokens.json"])
def test_builder_stopped_between_renames_never_leaves_a_mixed_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_before: str
) -> None:
    directory = tmp_path / "tokens"
    build(write_mixed(tmp_path / "old.jsonl"), directory)
    before = contents(directory)
    rename = os.replace

    def stop(source: Path, target: Path) -> None:
        if target.name == stop_before:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        build(write_chats(tmp_path / "other.jsonl", 3), directory)
    try:
        open_token_table(directory)
    except DataError:
        assert contents(directory) != before
    else:
        assert contents(directory) == before


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

    monkeypatch.setattr(token_table.time, "sleep", nap)
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
    monkeypatch.setattr(token_table, "LOCK_HEARTBEAT_SECONDS", 0.01)
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

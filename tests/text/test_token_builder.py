"""Building a token table: what goes in, what stays out and why, and what a build that stops leaves behind."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_offline.errors import DataError, EagleOfflineError, MismatchError, SpaceError
from eagle_offline.text.token_builder import TokenTableSettings, build_token_table, ensure_token_table
from eagle_offline.text.token_table import TokenProgress, TokenTable, open_token_table
from tests.text import tiny_tokenizers as tiny
from tests.text.tiny_tables import BAD_ROWS, TOKENIZER, build, chat, contents, write_chats, write_mixed


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


UNTOLD = {"messages": tiny.turns("a", "b", "c", "d")}  # as FORGETFUL renders it
FORGETFUL = tiny.byte_tokenizer(tiny.FORGETFUL)


def test_rows_whose_rendering_does_not_tell_are_left_out_with_an_example(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [UNTOLD, *(chat(number) for number in range(9))])
    table = build(path, tmp_path / "tokens", FORGETFUL)
    assert (len(table), table.meta.reasons) == (9, {"template-disagrees": 1})
    (line,) = (tmp_path / "tokens" / "quarantine.jsonl").read_text().splitlines()
    assert "up to turn 2" in line
    assert "--chat-template FILE" in line
    with pytest.raises(DataError, match=r"a\.jsonl row 1: template-disagrees: chat template: .*; stopped as asked"):
        build(path, tmp_path / "stopped", FORGETFUL, on_bad_row="stop")


@pytest.mark.parametrize(("untold", "usable", "stops"), [(10, 10, False), (11, 9, True), (18, 1, False), (19, 1, True)])
def test_template_is_at_fault_where_more_than_half_of_twenty_rows_are_untold(
    tmp_path: Path, untold: int, usable: int, stops: bool
) -> None:
    rows = [{"messages": [{"role": "wizard"}]}, *[UNTOLD] * untold, *(chat(number) for number in range(usable))]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    if not stops:
        assert len(build(path, tmp_path / "tokens", FORGETFUL)) == usable
        return
    with pytest.raises(
        DataError, match=rf"a\.jsonl row 2: .*--chat-template FILE.*\(so in {untold} of 20 rows\)"
    ) as error:
        build(path, tmp_path / "tokens", FORGETFUL)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "tokens") == {}


def test_template_that_tells_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable row, 3 left out \(template-disagrees 3\); .*--chat-template FILE"):
        build(tiny.write_jsonl(tmp_path / "a.jsonl", [UNTOLD] * 3), tmp_path / "tokens", FORGETFUL)


def test_what_a_template_does_not_render_is_counted_and_not_supervised(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    thought = {"role": "assistant", "content": "Yes?", "reasoning_content": "greet them"}
    asks = {"role": "user", "content": "Hi"}
    in_text = {"role": "assistant", "content": "<think>\ngreet\n</think>Yes?"}
    rows = [[asks, call], [asks, call, asks, thought], [asks, thought], [asks, in_text]]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    table = build(path, tmp_path / "tokens")
    assert table.meta.reasons == {"nothing-rendered": 1}
    assert table.meta.notes == {"reasoning-not-rendered": 2, "tool-calls-not-rendered": 1}
    said = [TOKENIZER.decode(row.input_ids[row.loss_mask == 1]) for row in (table[0], table[1])]
    assert said == ["Yes?<|im_end|>", "Yes?<|im_end|>"]
    shown = build(path, tmp_path / "shown", tiny.byte_tokenizer(tiny.CHATML_REASONING))
    assert (shown.meta.reasons, shown.meta.notes) == ({}, {})


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.CHATML_TAGGED], ids=["plain", "tagged"])
def test_turn_with_weight_0_and_turns_of_a_prompt_are_not_supervised(tmp_path: Path, template: str) -> None:
    tokenizer = tiny.byte_tokenizer(template)
    turns = tiny.turns("a", "First", "b", "Second")
    weighted = [{**turn, "weight": int(turn["content"] != "First")} for turn in turns]
    rows = [{"messages": weighted}, {"prompt": turns[:3], "completion": turns[3:]}, {"messages": turns}]
    rows.append({"messages": [{**turn, "weight": 0} for turn in turns]})
    table = build(tiny.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "tokens", tokenizer)
    said = [tokenizer.decode(table[index].input_ids[table[index].loss_mask == 1]) for index in range(3)]
    assert said == ["Second<|im_end|>", "Second<|im_end|>", "First<|im_end|>Second<|im_end|>"]
    assert table.meta.reasons == {"no-supervised-token": 1}


def test_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="--chat-template FILE"):
        build(write_chats(tmp_path / "a.jsonl", 2), tmp_path / "tokens", tiny.byte_tokenizer(None))


def test_same_input_gives_the_same_bytes_anywhere(tmp_path: Path) -> None:
    first = build(write_mixed(tmp_path / "x" / "mixed.jsonl"), tmp_path / "one")
    second = build(write_mixed(tmp_path / "y" / "mixed.jsonl"), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == ["quarantine.jsonl", "tokens.arrow", "tokens.json"]
    assert first.meta.key == second.meta.key
    assert str(tmp_path) not in (tmp_path / "one" / "tokens.json").read_text()


def test_table_is_reused_until_something_that_shapes_it_changes(tmp_path: Path) -> None:
    path, directory = write_chats(tmp_path / "a.jsonl", 5), tmp_path / "tokens"
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
    changes: list[dict[str, Any]] = [
        {"seq_length": 1024},
        {"split": "[:3]"},
        {"on_bad_row": "stop"},
        {"tokenizer": tiny.byte_tokenizer(tiny.CHATML_TAGGED)},
        {"tokenizer": tiny.byte_tokenizer(tiny.CHATML, merges=(("h", "i"),))},
    ]
    for change in changes:
        assert builds(**change), change
        assert not builds(**change), change
        assert builds(), change  # back again, so that each change is seen alone
    write_chats(path, 6)
    assert builds()
    assert len(open_token_table(directory)) == 6
    assert not list(directory.glob("*.lock"))


def test_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a.jsonl", 300)

    def append_once(progress: TokenProgress) -> None:
        write_chats(path, 299)

    with pytest.raises(DataError, match="changed while it was read"):
        build_token_table(TokenTableSettings(input_data=str(path)), TOKENIZER, tmp_path / "tokens", append_once)
    assert contents(tmp_path / "tokens") == {}


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, SpaceError), (errno.EDQUOT, SpaceError), (errno.EROFS, EagleOfflineError)]
)
def test_disk_that_refuses_gives_one_line_and_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[EagleOfflineError]
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(expected, match=r"tokens/quarantine\.jsonl: "):
        build(write_chats(tmp_path / "a.jsonl", 2), tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == {}


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


def test_tables_are_kept_by_key_and_shared_by_hard_link(tmp_path: Path) -> None:
    path, kept = write_mixed(tmp_path / "mixed.jsonl"), tmp_path / "kept"
    reports: list[TokenProgress] = []

    def ensure(directory: Path | None, **settings: Any) -> TokenTable:
        reports.clear()
        table_settings = TokenTableSettings(input_data=str(path), **settings)
        return ensure_token_table(table_settings, TOKENIZER, directory, reports.append, tokens_dir=kept)

    first = ensure(tmp_path / "one")
    assert reports
    assert first.directory == tmp_path / "one"
    assert [entry.name for entry in kept.iterdir()] == [first.meta.key]
    second = ensure(tmp_path / "two")
    assert not reports
    shared = kept / first.meta.key
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(shared)
    for name in contents(shared):
        assert os.path.samefile(tmp_path / "two" / name, shared / name)
    assert second.meta == first.meta
    # Another one beside it; and the same place taken over by it.
    other = ensure(tmp_path / "two", seq_length=64)
    assert reports
    assert other.meta.seq_length == 64 == open_token_table(tmp_path / "two").meta.seq_length
    assert contents(tmp_path / "one") == contents(shared)
    assert len(list(kept.iterdir())) == 2
    assert ensure(None).directory == shared
    assert not reports
    build(path, tmp_path / "without")
    assert contents(tmp_path / "without") == contents(shared)


def test_where_there_are_no_hard_links_tables_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    settings, kept = TokenTableSettings(input_data=str(write_chats(tmp_path / "a.jsonl", 5))), tmp_path / "kept"
    shared = ensure_token_table(settings, TOKENIZER, None, tokens_dir=kept)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", refuse)
        ensure_token_table(settings, TOKENIZER, tmp_path / "own", tokens_dir=kept)
    assert contents(tmp_path / "own") == contents(shared.directory)
    assert not os.path.samefile(tmp_path / "own" / "tokens.arrow", shared.directory / "tokens.arrow")


def test_damaged_kept_table_is_made_again_and_those_taken_from_it_keep_theirs(tmp_path: Path) -> None:
    settings, kept = TokenTableSettings(input_data=str(write_chats(tmp_path / "a.jsonl", 5))), tmp_path / "kept"
    own = ensure_token_table(settings, TOKENIZER, tmp_path / "own", tokens_dir=kept)
    whole = contents(tmp_path / "own")
    shared = kept / own.meta.key
    damaged = bytearray(whole["tokens.arrow"])
    damaged[len(damaged) // 2] ^= 1
    (shared / "tokens.arrow").unlink()
    (shared / "tokens.arrow").write_bytes(damaged)
    ensure_token_table(settings, TOKENIZER, tmp_path / "next", tokens_dir=kept)
    assert contents(shared) == contents(tmp_path / "next") == contents(tmp_path / "own") == whole


def test_sources_of_a_table_say_what_was_taken_of_each(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a.jsonl", 6)
    inputs = (f"{path}:[4:]", str(write_chats(tmp_path / "x" / "b.jsonl", 2)), f"{path}:[:1]")
    settings = TokenTableSettings(input_data=inputs)
    table = build_token_table(settings, TOKENIZER, tmp_path / "tokens")
    found = [(source.name, source.split, source.first_row, source.stop_row) for source in table.meta.sources]
    assert found == [("a.jsonl", "[4:]", 4, 6), ("b.jsonl", None, 0, None), ("a.jsonl", "[:1]", 0, 1)]
    places = [(table[index].source, table[index].row) for index in range(len(table))]
    assert places == [(0, 5), (0, 6), (1, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize("kept", [1, 2, 5, 6])
def test_an_answer_that_is_cut_short_keeps_what_is_left_of_it(tmp_path: Path, kept: int) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": tiny.turns("Hi", "Yes?")}])
    whole = build(path, tmp_path / "whole")[0]
    prompt = int(whole.loss_mask.argmax())
    assert whole.loss_mask.tolist() == [0] * prompt + [1] * 5 + [0]  # a byte a token, and the line break behind
    cut = build(path, tmp_path / "cut", seq_length=prompt + kept)
    assert cut[0].loss_mask.tolist() == whole.loss_mask.tolist()[: prompt + kept]
    assert cut.meta.num_supervised == min(kept, 5)
    assert cut.meta.truncated_rows == (kept < 6)
    with pytest.raises(DataError, match="supervision-truncated 1"):
        build(path, tmp_path / "none", seq_length=prompt)

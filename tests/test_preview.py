"""A look at chat data: what is shown is what capture would store, and nothing else is read, loaded or acted on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from eagle_offline.capture_settings import PreviewSettings
from eagle_offline.stages import preview
from tests.builders import SCRATCH, run_cli, save_target, shared_chat, shared_target
from tests.text.test_tokenised_rows import WITHOUT_TEMPLATE
from tests.text.tiny_tables import chat
from tests.text.tiny_tokenizers import write_jsonl

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?\nDone"}]
BAD = {"messages": [{"role": "wizard", "content": "x"}]}


def show(*data: Path | str, **flags: Any) -> Any:
    arguments = ["preview", "--target-model", shared_target(), "--input-data", *data]
    for name, value in flags.items():
        arguments += ["--" + name.replace("_", "-"), *([] if value is True else [value])]
    return run_cli(*arguments)


def test_supervised_tokens_are_marked_or_coloured(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    marked = show(path)
    assert marked.code == 0, marked.err
    assert "  | <|im_start|>assistant\n  | [[Yes?\n  | Done<|im_end|>]]\n" in marked.out
    assert "a.jsonl row 1; supervised tokens in [[ ]]" in marked.out
    assert "\x1b" not in marked.out
    coloured = show(path, colour=True).out
    assert "\x1b[1;32mYes?\x1b[0m\n  | \x1b[1;32mDone<|im_end|>\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split("supervised tokens")[1] == (
        " in colour"
        + marked.out.replace("[[", "").replace("]]", "").split("supervised tokens in ")[1].removeprefix(" ")
    )


def test_rows_are_counted_by_source_and_reason(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [chat(1), BAD, "{", BAD, chat(2)])
    second = write_jsonl(tmp_path / "b" / "a.jsonl", [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}])
    ended = show(first, second, json=True, num_samples=0)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    one, two = found["sources"]
    assert (one["rows"], one["taken"], one["left_out"]) == (5, 2, {"unknown-role": 2, "not-json": 1})
    assert [(item["file"], item["row"]) for item in one["examples"]] == [(one["name"], 2), (one["name"], 3)]
    assert (two["rows"], two["taken"], two["tokens"], two["supervised_tokens"]) == (1, 1, 3, 1)
    assert one["name"] != two["name"]
    assert one["whole"]
    assert two["whole"]
    text = show(first, second).out
    assert "2  unknown-role, such as" in text
    assert f"{one['name']} row 2: turn 1: the role is 'wizard'" in text


def test_only_as_many_rows_are_read_as_are_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat(number) for number in range(8)])
    with path.open("ab") as file:
        file.write(b"\xff" * 100 + b"\n")
    settings: dict[str, Any] = {"target_model": str(shared_target()), "input_data": str(path)}
    found = preview(PreviewSettings(**settings, num_rows=8))
    assert (found.sources[0].rows, found.sources[0].left_out, found.whole) == (8, {}, False)
    assert "8, the first of each input" in show(path, num_rows=8).out
    assert preview(PreviewSettings(**settings)).sources[0].left_out == {"not-utf8": 1}
    many = [write_jsonl(tmp_path / "many" / f"{number}.jsonl", [chat(number)]) for number in range(9)]
    found = preview(PreviewSettings(**{**settings, "input_data": str(many[0].parent)}, num_rows=4))
    assert ([source.name for source in found.sources], found.sources_not_read) == (
        ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"], 5,
    )  # fmt: skip


def test_samples_are_chosen_by_seed(tmp_path: Path) -> None:
    settings = {"target_model": str(shared_target()), "input_data": str(shared_chat(24))}

    def shown(seed: int) -> list[int]:
        found = preview(PreviewSettings(**settings, seed=seed, num_samples=4))
        return [sample.sample.index for sample in found.samples]

    assert shown(1) == shown(1) == sorted(shown(1))
    assert len({tuple(shown(seed)) for seed in range(4)}) > 1


def test_with_a_tokens_dir_all_rows_are_counted_and_kept_for_what_comes_after(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat(1), BAD, *(chat(number) for number in range(300))])
    ended = show(path, tokens_dir=tmp_path / "kept", json=True, num_rows=2)
    found = json.loads(ended.out)
    assert (found["sources"][0]["rows"], found["sources"][0]["whole"]) == (302, True)
    assert found["sources"][0]["left_out"] == {"unknown-role": 1}
    again = show(path, tokens_dir=tmp_path / "kept", json=True, num_rows=2)
    assert again.out == ended.out
    assert "tokenize" not in again.err
    (table,) = (tmp_path / "kept").iterdir()
    arguments = ["--target-model", shared_target(), "--input-data", path, "--output-dir", tmp_path / "cache"]
    assert run_cli("tokenize", *arguments, "--tokens-dir", tmp_path / "kept").code == 0
    assert (tmp_path / "cache" / "tokens" / "tokens.arrow").samefile(table / "tokens.arrow")
    seen = json.loads(show(path, json=True, num_rows=1000).out)
    assert seen["samples"] == found["samples"]
    assert seen["sources"][0]["tokens"] == found["sources"][0]["tokens"]


def test_text_of_strangers_does_not_act_on_terminal_or_page(tmp_path: Path) -> None:
    evil = "\x1b[2J\x9b31m\u202e<script>alert(1)</script>\x07"
    rows = [
        {"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": f"a{evil}\rb"}]},
        {"messages": [{"role": evil, "content": "x"}]},
        {evil: 1},
    ]
    path = write_jsonl(tmp_path / "\x1b[31mred.jsonl", rows)
    for ended in (show(path, html=tmp_path / "page.html"), show(path, json=True)):
        assert ended.code == 0, ended.err
        assert all(character.isprintable() or character == "\n" for character in ended.out + ended.err)
    assert "\\x1b[2J" in show(path).out
    coloured = re.sub(r"\x1b\[(1;32|0)m", "", show(path, colour=True).out)
    assert all(character.isprintable() or character == "\n" for character in coloured)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert "<mark" in page


def test_neither_weights_nor_a_template_are_needed(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target", template=None)
    WITHOUT_TEMPLATE.save_pretrained(target)
    (target / "model.safetensors").unlink()
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [40, 41, 42], "loss_mask": [0, 1, 1]}])
    ended = run_cli("preview", "--target-model", target, "--input-data", path)
    assert ended.code == 0, ended.err
    assert "3 tokens" in ended.out
    assert "[[" in ended.out
    refused = run_cli("preview", "--target-model", target, "--input-data", shared_chat())
    assert refused.code == 3
    assert "--chat-template FILE" in refused.err


def test_data_without_a_usable_row_is_shown_and_ends_with_4(tmp_path: Path) -> None:
    ended = show(write_jsonl(tmp_path / "a.jsonl", [BAD, BAD]))
    assert ended.code == 4
    assert "2  unknown-role" in ended.out
    assert ended.err.splitlines()[-1].startswith(
        "error: a.jsonl: no usable row, 2 left out (unknown-role 2); the first: "
    )


def test_what_the_template_leaves_out_is_counted(tmp_path: Path) -> None:
    thought = [TURNS[0], {**TURNS[1], "reasoning_content": "hidden thought"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": thought}])
    found = json.loads(show(path, json=True).out)
    assert found["notes"] == {"reasoning-not-rendered": 1}
    assert re.search(r"reasoning not rendered +of 1 samples", show(path).out)
    kept = json.loads(show(path, json=True, tokens_dir=tmp_path / "kept").out)
    assert kept["notes"] == found["notes"]


def test_nothing_is_written(tmp_path: Path) -> None:
    shutil.copytree(shared_target(), tmp_path / "target")
    path = write_jsonl(tmp_path / "in" / "a.jsonl", [{"messages": TURNS}])
    before = sorted(tmp_path.rglob("*"))
    assert run_cli("preview", "--target-model", tmp_path / "target", "--input-data", path).code == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert SCRATCH.is_dir()

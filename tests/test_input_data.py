"""Chat data from the command line: several inputs, in YAML as on the command line, and processes that tokenise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eagle_offline.cache.manifest import read_manifest
from eagle_offline.cache.reader import open_cache
from eagle_offline.cache.saved_settings import making_command
from eagle_offline.capture_settings import PrecomputeSettings, TokenizeSettings
from eagle_offline.config import build
from eagle_offline.errors import UsageError
from eagle_offline.pipeline import read_pipeline
from tests.builders import make_cache, precompute, run_cli, shard_bytes, shared_chat, shared_target, tree
from tests.text.test_tokenize_pool import runs
from tests.text.tiny_tables import write_chats
from tests.text.tiny_tokenizers import write_jsonl

ROOT = Path(__file__).resolve().parents[1]


def test_one_input_and_several_are_given_alike_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    given = {"target_model": "M", "output_dir": "C"}
    assert build(TokenizeSettings, {**given, "input_data": "a b.jsonl"}).input_data == ("a b.jsonl",)
    assert build(TokenizeSettings, {**given, "input_data": ["a", "b:[:1]"]}).input_data == ("a", "b:[:1]")
    with pytest.raises(UsageError, match="--input-data"):
        build(TokenizeSettings, {**given, "input_data": []})
    inputs = [f"{write_chats(tmp_path / 'a.jsonl', 3)}:[1:]", str(write_chats(tmp_path / "b.jsonl", 2))]
    arguments = ["--target-model", shared_target(), "--seq-length", 96]
    flags = [["--input-data", *inputs], ["--data-path", inputs[0], "--data-path", inputs[1]]]
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"input_data": inputs}))
    keys = set()
    for number, names in enumerate([*flags, ["--config", file]]):
        ended = run_cli("tokenize", *arguments, "--output-dir", tmp_path / str(number), *names)
        assert ended.code == 0, ended.err
        keys.add(json.loads(ended.out)["key"])
    assert len(keys) == 1
    assert json.loads(ended.out)["num_rows"] == 4


def test_cache_of_several_inputs_names_them_and_is_made_again_from_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write_chats(data / "x" / "chat.jsonl", 6)
    write_chats(data / "y" / "chat.jsonl", 5)
    monkeypatch.chdir(data)
    inputs = ["x/chat.jsonl:[2:]", "y", "x/chat.jsonl:[:1]"]
    cache = make_cache(tmp_path / "cache", data=None, input_data=inputs)
    monkeypatch.chdir("/")
    manifest = read_manifest(cache)
    found = [(source.name, source.split) for source in manifest.identity.dataset.sources]
    assert found == [("x/chat.jsonl", "[2:]"), ("y/chat.jsonl", None), ("x/chat.jsonl", "[:1]")]
    assert len(open_cache(cache)) == 10
    saved = json.loads((cache / "config.json").read_text())["input_data"]
    assert saved == [f"{data}/x/chat.jsonl:[2:]", f"{data}/y", f"{data}/x/chat.jsonl:[:1]"]
    elsewhere = shutil.copy(cache / "config.json", tmp_path / "settings.json")
    again = run_cli("precompute", "--config", elsewhere, "--output-dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert shard_bytes(tmp_path / "again") == shard_bytes(cache)
    (cache / "config.json").unlink()
    assert f"--input-data '{saved[0]}' {saved[1]} '{saved[2]}' --seq-length" in making_command(cache, manifest)
    # The same inputs in another order are another corpus.
    before = tree(cache)
    refused = precompute(cache, data=None, input_data=[saved[1], saved[0], saved[2]], resume=True)
    assert (refused.code, len(refused.err.splitlines())) == (3, 1), refused.err
    assert tree(cache) == before


def test_where_tokens_are_kept_and_how_many_make_them_changes_no_cache(tmp_path: Path) -> None:
    plain = make_cache(tmp_path / "plain")
    kept = make_cache(tmp_path / "kept", tokens_dir=tmp_path / "tokens", tokenize_workers=2)
    assert shard_bytes(plain) == shard_bytes(kept)
    assert (plain / "config.json").read_bytes().replace(b"/plain", b"/kept") == (kept / "config.json").read_bytes()
    (table,) = (tmp_path / "tokens").iterdir()
    assert (kept / "tokens" / "tokens.arrow").samefile(table / "tokens.arrow")
    assert {"tokens_dir", "tokenize_workers"} <= PrecomputeSettings.model_fields.keys()
    assert run_cli("verify", kept).code == 0


def test_estimate_keeps_tokens_where_it_is_told(tmp_path: Path) -> None:
    arguments = ["--target-model", shared_target(), "--input-data", shared_chat(), "--seq-length", 96, "--no-probe"]
    ended = run_cli("estimate", *arguments, "--draft-vocab-size", 48, "--tokens-dir", tmp_path / "tokens")
    assert ended.code == 0, ended.err
    (table,) = (tmp_path / "tokens").iterdir()
    cache = make_cache(tmp_path / "cache", tokens_dir=tmp_path / "tokens")
    assert (cache / "tokens" / "tokens.json").samefile(table / "tokens.json")


@pytest.mark.parametrize("to_all", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_while_tokens_are_made_ends_all_processes_and_the_command_goes_on_later(
    tmp_path: Path, to_all: bool
) -> None:
    path = write_chats(tmp_path / "a.jsonl", 20_000)
    command = [
        *(sys.executable, "-m", "eagle_offline", "tokenize", "--target-model", str(shared_target())),
        *("--input-data", str(path), "--output-dir", str(tmp_path / "cache"), "--tokenize-workers", "2"),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    workers: list[int] = []
    while time.monotonic() < deadline and not (len(workers) == 2 and any_written(tmp_path / "cache")):
        workers = workers_of(process.pid)
        time.sleep(0.02)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5, said
    assert said.splitlines()[-1].startswith("error: stopped by a signal while tokens were made")
    assert "Traceback" not in said
    assert len(workers) == 2
    assert not any(map(runs, workers))
    assert not (tmp_path / "cache" / "tokens" / "tokens.json").exists()


def any_written(cache: Path) -> bool:
    return any(path.stat().st_size > 100_000 for path in cache.glob("tokens/.tokens.arrow*"))


def workers_of(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(place.name))
        except OSError:
            continue
    return found


def test_pipeline_puts_its_directory_into_each_of_several_inputs(tmp_path: Path) -> None:
    inputs = ["{work}/a.jsonl:[:1]", "{work}/b.jsonl"]
    stage = {"precompute": {"target_model": "M", "input_data": inputs, "output_dir": "{work}/cache"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"stages": [stage]}))
    (read,) = read_pipeline(tmp_path / "job.yaml", Path("/w"))
    assert read.settings.input_data == ("/w/a.jsonl:[:1]", "/w/b.jsonl")


def test_tokenize_says_what_is_left_out_and_which_splits_are_read_together(tmp_path: Path) -> None:
    thought = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?", "thinking": "not shown"}]
    write_jsonl(tmp_path / "data" / "train-00000-of-00001.jsonl", [{"messages": thought}, {"messages": []}])
    write_chats(tmp_path / "data" / "test.jsonl", 2)
    arguments = ["--target-model", shared_target(), "--input-data", tmp_path / "data", "--output-dir"]
    said = run_cli("tokenize", *arguments, tmp_path / "all").err
    assert "note: reads test, train together; choose with --split\n" in said
    assert said.count("left out 1 of 4 rows (1 empty-conversation): see ") == 1
    assert "note: of 3 rows the chat template leaves something out: reasoning not rendered in 1\n" in said
    chosen = run_cli("tokenize", *arguments, tmp_path / "one", "--split", "test").err
    assert "note:" not in chosen
    assert "left out" not in chosen

"""What a cache is stays what it is: drift is refused by name, with nothing touched; what is lost is recorded."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eagle_offline import open_cache
from tests import builders


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return shutil.copytree(builders.shared_target(), tmp_path / "target")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return Path(shutil.copy(builders.shared_chat(6), tmp_path / "chat.jsonl"))


def change_weight(target: Path, value: float | None = None, name: str = "model.layers.0.mlp.up_proj.weight") -> None:
    tensors = load_file(target / "model.safetensors")
    tensors[name][0, 0] = 7.0 if value is None else value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def change_config(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (target / "config.json").write_text(json.dumps(config))


def change_template(target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = "{# other #}" + tokenizer.chat_template.replace("\\n' + m.content", "\\n ' + m.content")
    tokenizer.save_pretrained(target)


def change_tokenizer(target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(["return"])
    tokenizer.save_pretrained(target)


def edit_row(chat: Path) -> None:
    text = chat.read_text()
    edited = text.replace("because", "therefor", 1) if "because" in text else text.replace("one", "six", 1)
    assert edited != text
    chat.write_text(edited)


def add_row(chat: Path) -> None:
    chat.write_text(chat.read_text() + json.dumps(builders.conversations(1, seed=77)[0]) + "\n")


# What changes, by flags or in files; the field that must be named; what was recorded and what is now, when known.
DRIFTS: dict[str, tuple[dict[str, Any], Callable[[Path, Path], None] | None, str, tuple[Any, Any] | None]] = {
    "seq length": ({"seq_length": 64}, None, "text.seq_length", (96, 64)),
    "layers": ({"aux_layer_ids": [1, 3, 5]}, None, "capture.aux_layer_ids", ([1, 3, 4], [1, 3, 5])),
    "dtype": ({"dtype": "fp16", "state_encoding": "raw"}, None, "capture.dtype", ("bf16", "fp16")),
    "compute dtype": ({"compute_dtype": "bf16"}, None, "capture.compute_dtype", ("fp32", "bf16")),
    "state encoding": ({"state_encoding": "raw"}, None, "capture.state_encoding", ("planes", "raw")),
    "target encoding": ({"target_encoding": "dense"}, None, "capture.target_encoding", ("factored", "dense")),
    "shard size": ({"shard_size": 3}, None, "capture.shard_size", (2, 3)),
    "batch size": ({"batch_size": 1}, None, "batch_plan.batch_size", (3, 1)),
    "shuffle seed": ({"shuffle_seed": 5}, None, "dataset.shuffle_seed", (None, 5)),
    "split": ({"split": "[:5]"}, None, "dataset.sources.chat.jsonl.split", (None, "[:5]")),
    "weights": ({}, lambda target, _: change_weight(target), "target.checkpoint_digest", None),
    "config": ({}, lambda target, _: change_config(target), "target.checkpoint_digest", None),
    "template": ({}, lambda target, _: change_template(target), "text.template_digest", None),
    "tokenizer": ({}, lambda target, _: change_tokenizer(target), "text.tokenizer_digest", None),
    "edited data": ({}, lambda _, chat: edit_row(chat), "dataset.sources.chat.jsonl.digest", None),
    "more data": ({}, lambda _, chat: add_row(chat), "dataset.sources.chat.jsonl.digest", None),
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("name", DRIFTS)
def test_drift_is_refused_by_name_and_touches_nothing(
    name: str, complete: bool, tmp_path: Path, target: Path, chat: Path
) -> None:
    flags, change, field, values = DRIFTS[name]
    cache = builders.make_cache(tmp_path / "cache", target, chat, shard_size=2)
    if not complete:
        (cache / "commit-000001.json").unlink()
    if change is not None:
        change(target, chat)
    before = builders.tree(cache)
    ended = builders.precompute(cache, target, chat, **{"shard_size": 2, **flags}, resume=True)
    assert ended.code == 3, ended.err
    said = ended.errors[-1]
    assert said.startswith("error: ")
    assert field in said
    if values is not None:
        assert f"{field}: recorded {values[0]!r}, now {values[1]!r}" in said
    else:
        assert f"{field}: recorded " in said
        assert ", now " in said
    assert "--output-dir" in said  # the way out
    assert builders.tree(cache) == before
    # A refusal begins nothing: the status of the cache that is there stays.
    assert json.loads((cache / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("complete", [False, True])
def test_another_draft_vocabulary_is_refused_by_name_rather_than_ignored(
    complete: bool, tmp_path: Path, target: Path, chat: Path
) -> None:
    cache = builders.make_cache(tmp_path / "cache", target, chat, shard_size=2)
    if not complete:
        (cache / "commit-000001.json").unlink()
    before = builders.tree(cache)
    ended = builders.precompute(cache, target, chat, shard_size=2, draft_vocab_size=32, resume=True)
    assert ended.code == 3, (ended.err, ended.out)
    assert "draft_vocab" in ended.errors[-1]
    assert builders.tree(cache) == before


def test_all_that_drifted_is_named_at_once(tmp_path: Path, target: Path, chat: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache", target, chat, shard_size=2)
    change_weight(target)
    flags = {"shard_size": 3, "batch_size": 1, "dtype": "fp16", "state_encoding": "raw"}
    ended = builders.precompute(cache, target, chat, **flags, resume=True)
    assert ended.code == 3
    for field in ("checkpoint_digest", "shard_size", "batch_size", "capture.dtype", "state_encoding"):
        assert field in ended.errors[-1]


def test_weights_changed_under_the_same_name_size_and_second_are_noticed_by_rehash(
    tmp_path: Path, target: Path, chat: Path
) -> None:
    cache = builders.make_cache(tmp_path / "cache", target, chat, shard_size=2)
    weights = target / "model.safetensors"
    content, status = bytearray(weights.read_bytes()), weights.stat()
    content[-3] ^= 1
    with weights.open("r+b") as file:
        file.write(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    ended = builders.precompute(cache, target, chat, shard_size=2, resume=True, rehash=True)
    assert ended.code == 3
    assert "checkpoint_digest" in ended.errors[-1]


def test_the_same_content_under_another_path_is_no_drift(tmp_path: Path, target: Path, chat: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache", target, chat, shard_size=2)
    (cache / "commit-000001.json").unlink()
    moved = tmp_path / "moved" / "target"
    shutil.copytree(target, moved)
    ended = builders.precompute(cache, moved, chat, shard_size=2, resume=True)
    assert ended.code == 0, ended.err


def test_a_cache_without_resume_is_left_alone(tmp_path: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache")
    before = builders.tree(cache, without=())
    ended = builders.precompute(cache)
    assert ended.code == 2
    assert "--resume" in ended.errors[0]
    assert builders.tree(cache, without=()) == before


def test_resume_on_an_empty_or_new_directory_is_a_plain_start(tmp_path: Path) -> None:
    plain = builders.make_cache(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        cache = builders.make_cache(tmp_path / name, resume=True)
        assert builders.shard_bytes(cache) == builders.shard_bytes(plain)


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = builders.make_cache(tmp_path / "one"), builders.make_cache(tmp_path / "other")
    assert builders.shard_bytes(one) == builders.shard_bytes(other)
    assert builders.record_contents(one) == builders.record_contents(other)
    assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


@pytest.mark.parametrize("kind", ["cache", "settings"])
def test_a_dry_run_checks_and_plans_and_writes_no_shard_and_no_manifest(kind: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if kind == "settings":
        ended = builders.precompute(cache, dry_run=True, aux_layer_ids=[1, 3, 99])
        assert ended.code == 2
    else:
        ended = builders.precompute(cache, dry_run=True)
        assert ended.code == 0, ended.err
        said = json.loads(ended.out)
        assert (said["samples"], said["shards"], said["shards_committed"]) == (10, 3, 0)
        made = builders.make_cache(cache, resume=True)
        stored = sum(len(content) for content in builders.shard_bytes(made).values())
        assert 0.3 < said["estimated_bytes"] / stored < 3
        shutil.rmtree(cache)
        builders.precompute(cache, dry_run=True)
    assert not (cache / "manifest.json").exists()
    assert not builders.shard_bytes(cache)
    assert not list(cache.glob("commit-*"))
    assert {path.name for path in cache.iterdir()} <= {"tokens", "status.json"}


def poisoned(target: Path, where: str) -> None:
    """Make the target's states NaN: everywhere, or only for conversations that say `Z`."""
    tensors = load_file(target / "model.safetensors")
    if where == "everywhere":
        tensors["model.layers.4.mlp.down_proj.weight"][0, 0] = float("nan")
    else:
        tensors["model.embed_tokens.weight"][builders.make_tokenizer()("Z")["input_ids"][0]] = float("nan")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_states_that_are_not_finite_stop_the_run_naming_file_and_row(tmp_path: Path, target: Path) -> None:
    poisoned(target, "of Z")
    rows = builders.conversations(6)
    rows[4]["messages"] = [{"role": "user", "content": "Z"}, {"role": "assistant", "content": "one two"}]
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", rows)
    cache = tmp_path / "cache"
    ended = builders.precompute(cache, target, chat, shard_size=2)
    assert ended.code == 1
    assert len(ended.errors) == 1 or "NaN" in ended.errors[-1]
    assert "chat.jsonl, row 5" in ended.errors[-1]
    assert "--on-nonfinite drop" in ended.errors[-1]
    assert len(builders.record_contents(cache)) == 2  # the shards before it stay
    assert builders.leftovers(cache) == []
    dropped = builders.precompute(cache, target, chat, shard_size=2, on_nonfinite="drop", resume=True)
    assert dropped.code == 0, dropped.err
    record = builders.record_contents(cache)["commit-000002.json"]
    assert record["lost"] == [{"sample_id": 4, "reason": "non-finite states"}]
    opened = open_cache(cache)
    assert sorted(sample.sample_id for sample in opened) == [0, 1, 2, 3, 5]
    assert all(sample.aux_hidden_states.isfinite().all() for sample in opened)
    inspected = builders.run_cli("inspect-manifest", cache, "--verify")
    assert inspected.code == 0
    assert re.search(r"1 +non-finite states", inspected.out)


def test_a_target_whose_states_are_all_nan_is_not_cached_in_silence(tmp_path: Path, target: Path) -> None:
    poisoned(target, "everywhere")
    ended = builders.precompute(tmp_path / "cache", target)
    assert ended.code == 1, ended.err
    assert "NaN" in ended.errors[-1]
    assert not list((tmp_path / "cache").glob("commit-*"))
    dropped = builders.precompute(tmp_path / "cache", target, on_nonfinite="drop", resume=True)
    assert dropped.code in (0, 1, 4), dropped.err
    lost = [item for record in builders.record_contents(tmp_path / "cache").values() for item in record["lost"]]
    assert len(lost) == (10 if dropped.code == 0 else len(lost))


def test_values_too_large_for_fp16_are_not_stored_as_infinite(tmp_path: Path, target: Path) -> None:
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e6
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    ended = builders.precompute(tmp_path / "cache", target, dtype="fp16", state_encoding="raw")
    assert ended.code == 1
    assert "fp16" in ended.errors[-1]
    assert builders.precompute(tmp_path / "bf16", target).code == 0


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_no_sample_is_left_out_whatever_the_count(count: int, tmp_path: Path) -> None:
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", builders.conversations(count))
    cache = open_cache(builders.make_cache(tmp_path / "cache", None, chat, shard_size=4, batch_size=3))
    assert sorted(sample.sample_id for sample in cache) == list(range(count))


def test_rows_that_cannot_be_used_are_in_quarantine_with_file_and_row(tmp_path: Path) -> None:
    good = builders.conversations(3)
    rows = [
        good[0],
        "{broken",
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"messages": [{"role": "wizard", "content": "?"}, {"role": "assistant", "content": "!"}]},
        good[1],
        {"messages": []},
        [1],
        good[2],
    ]
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", rows)
    cache = builders.make_cache(tmp_path / "cache", None, chat)
    said = [json.loads(line) for line in (cache / "tokens" / "quarantine.jsonl").read_text().splitlines()]
    assert [(item["file"], item["row"]) for item in said] == [("chat.jsonl", n) for n in (2, 3, 4, 6, 7)]
    assert all(item["reason"] and item["detail"] for item in said)
    assert len(open_cache(cache)) == 3
    shown = builders.run_cli("inspect-manifest", cache)
    assert "unknown-role" in shown.out
    assert "no-assistant-turn" in shown.out


def test_long_samples_keep_their_start(tmp_path: Path) -> None:
    cache = open_cache(builders.make_cache(tmp_path / "cache", seq_length=40))
    assert max(len(sample.input_ids) for sample in cache) == 40
    assert all(sample.loss_mask.any() for sample in cache)


def test_a_target_that_was_only_read_is_not_changed(tmp_path: Path, target: Path, chat: Path) -> None:
    before = builders.tree(target)
    builders.make_cache(tmp_path / "cache", target, chat)
    assert builders.tree(target) == before
    assert torch.is_grad_enabled()

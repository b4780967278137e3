"""A P-EAGLE draft's mask token is one that no text holds; whoever asks for another is told where it occurs."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eagle_offline.cache.layout import TOKENS_DIRECTORY
from eagle_offline.cache.reader import Cache, open_cache
from eagle_offline.cache.remote import RemoteCache
from eagle_offline.errors import DataError, UsageError
from eagle_offline.text.token_table import TOKENS_FILE
from eagle_offline.training import mask_token
from eagle_offline.training.mask_token import MaskToken, choose_mask_token
from eagle_offline.training.target_tokens import TargetTokens, read_target_tokens
from eagle_offline.training.token_counts import TOKEN_TABLE, first_sample, token_counts
from tests.builders import run_cli
from tests.training.caches import copied_cache, shared_cache

VOCAB_SIZE = 272  # the tokenizer has 260 tokens: bytes, <s>, <pad>, <|im_start|>, <|im_end|>


def counted(path: Path) -> Counter[int]:
    """How often each token stands in a cache, sample by sample."""
    cache = open_cache(path)
    return Counter(token for index in range(len(cache)) for token in cache[index].input_ids.tolist())


def with_target_files(directory: Path, **files: object) -> Path:
    """A cache whose target's files are these alone."""
    path = copied_cache(directory)
    shutil.rmtree(path / "target")
    (path / "target").mkdir()
    for name, content in files.items():
        (path / "target" / f"{name}.json").write_text(json.dumps(content))
    return path


def model(*names: str, size: int = 260) -> dict[str, Any]:
    """A tokenizer's model: ``size`` plain tokens, then these."""
    return {"vocab": {**{f"plain {token_id}": token_id for token_id in range(size)}, **numbered(names, size)}}


def added(start: int, *names: str) -> list[dict[str, Any]]:
    return [{"id": token_id, "content": name} for name, token_id in numbered(names, start).items()]


def numbered(names: Iterable[str], start: int) -> dict[str, int]:
    return {name: token_id for token_id, name in enumerate(names, start)}


def set_embeddings(path: Path, values: dict[int, float]) -> None:
    file = path / "embeddings.safetensors"
    weight = load_file(file)["weight"].clone()
    for token_id, value in values.items():
        weight[token_id] = value
    save_file({"weight": weight}, file)


def choose(path: Path, requested: int | None = None, *extra: Path, verify: bool = True) -> MaskToken:
    return choose_mask_token([open_cache(path, verify=verify)], requested, [open_cache(other) for other in extra])


# Counting


def test_counts_are_those_of_all_tokens_supervised_or_not():
    paths = shared_cache(), shared_cache(count=10, seed=3)
    expected = counted(paths[0]) + counted(paths[1])
    found = token_counts([open_cache(path) for path in paths])
    assert found.dtype == np.int64
    assert {token: count for token, count in enumerate(found.tolist()) if count} == dict(expected)


def test_without_its_token_table_a_cache_s_samples_are_counted(tmp_path):
    path = copied_cache(tmp_path / "cache")
    whole = token_counts([open_cache(path)])
    shutil.rmtree(path / "tokens")
    assert token_counts([open_cache(path)]).tolist() == whole.tolist()
    (path / "commit-000001.json").unlink()
    assert token_counts([open_cache(path, allow_partial=True)]).sum() < whole.sum()


def test_the_token_table_stands_where_tokenising_puts_it():
    assert f"{TOKENS_DIRECTORY}/{TOKENS_FILE}" == TOKEN_TABLE
    assert (shared_cache() / TOKEN_TABLE).is_file()


@pytest.mark.parametrize("has_table", [True, False])
def test_neither_states_nor_samples_digests_are_read(tmp_path, monkeypatch, has_table):
    path = copied_cache(tmp_path / "cache")
    if not has_table:
        shutil.rmtree(path / "tokens")
    cache = open_cache(path)

    def read(*_arguments: object) -> None:
        raise AssertionError("decoded or checked")

    monkeypatch.setattr("eagle_offline.cache.reader.decode_fields", read)
    monkeypatch.setattr("eagle_offline.cache.arrow.StoredSample.digest", read)
    if has_table:
        monkeypatch.setattr(Cache, "read_stored", read)
    assert token_counts([cache]).sum() == sum(counted_lengths(path))


def counted_lengths(path: Path) -> list[int]:
    return open_cache(path).lengths.tolist()


@pytest.mark.parametrize("has_table", [True, False])
def test_the_first_sample_with_a_token_is_named(tmp_path, has_table):
    path = copied_cache(tmp_path / "cache")
    if not has_table:
        shutil.rmtree(path / "tokens")
    cache = open_cache(path)
    samples = [cache[index] for index in range(len(cache))]
    if has_table:  # else in the order of the shards
        samples.sort(key=lambda sample: sample.sample_id)
    expected: dict[int, int] = {}
    for sample in samples:
        for token in sample.input_ids.tolist():
            expected.setdefault(token, sample.sample_id)
    assert {token: first_sample(cache, token) for token in expected} == expected
    assert first_sample(cache, 271) is None


def test_slices_of_one_cache_share_a_table_that_counts_once(tmp_path):
    for name, samples in (("one", "0:4"), ("two", "4:8")):
        ended = run_cli("convert", shared_cache(), "--output-dir", tmp_path / name, "--samples", samples)
        assert ended.code == 0, ended.err
    slices = [open_cache(tmp_path / name) for name in ("one", "two")]
    assert token_counts(slices).tolist() == token_counts([open_cache(shared_cache())]).tolist()


def test_of_a_store_the_table_is_fetched_and_no_shard(tmp_path, monkeypatch):
    url = f"memory://{uuid.uuid4().hex}/one"
    fsspec.filesystem("memory").put(f"{shared_cache()}/", f"{url}/", recursive=True)
    fetched: list[str] = []
    fetch = RemoteCache.fetch

    def watched(remote: RemoteCache, name: str, *arguments: Any) -> None:
        fetched.append(name)
        fetch(remote, name, *arguments)

    monkeypatch.setattr(RemoteCache, "fetch", watched)
    cache = open_cache(url, local_cache=tmp_path / "local")
    assert token_counts([cache]).tolist() == token_counts([open_cache(shared_cache())]).tolist()
    assert choose_mask_token([cache], None) == choose(shared_cache())
    assert TOKEN_TABLE in fetched
    assert not [name for name in fetched if name.startswith("shard-")]
    fsspec.filesystem("memory").rm(f"{url}/{TOKEN_TABLE}")
    again = open_cache(url, local_cache=tmp_path / "other")
    assert token_counts([again]).sum() == cache.lengths.sum()


def test_a_damaged_table_is_refused(tmp_path):
    path = copied_cache(tmp_path / "cache")
    table = path / TOKEN_TABLE
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    with pytest.raises(DataError, match=r"cache/tokens/tokens.arrow: differs from what the manifest.*repair"):
        choose(path)
    table.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"tokens.arrow: not a readable token table \(eagle-offline repair"):
        choose(path, verify=False)


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("outside", [-1, VOCAB_SIZE])
def test_ids_that_the_target_does_not_have_are_refused(tmp_path, monkeypatch, outside, has_table):
    path = copied_cache(tmp_path / "cache")
    if has_table:
        ids = pa.array([[1, 2], [outside]], pa.list_(pa.int32()))
        with pa.ipc.new_file(path / TOKEN_TABLE, pa.schema([pa.field("input_ids", ids.type)])) as file:
            file.write_batch(pa.record_batch([ids], names=["input_ids"]))
        line = r"its tokens/tokens\.arrow"
    else:
        shutil.rmtree(path / "tokens")
        read = Cache.read_stored

        def meddled(cache: Cache, index: int) -> Any:
            stored = read(cache, index)
            ids = np.where(np.arange(len(stored.input_ids)) == 3, outside, stored.input_ids)
            return type(stored)(**{**vars(stored), "input_ids": ids})

        monkeypatch.setattr(Cache, "read_stored", meddled)
        line = r"sample \d+"
    with pytest.raises(DataError, match=rf"{line} has token ids outside a vocabulary of 272: check it with"):
        choose(path, verify=False)


# A token that was asked for


def test_a_token_that_no_text_holds_is_taken_as_given():
    assert choose(shared_cache(), 265) == MaskToken(265, "as given")


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_token_that_the_target_does_not_have_is_refused(token_id):
    with pytest.raises(UsageError, match=f"--mask-token-id {token_id}: expected 0 to 271, a token of the target's"):
        choose(shared_cache(), token_id)


def test_a_token_that_occurs_is_refused_with_how_often_and_where_and_another():
    cache = open_cache(shared_cache())
    counts, supervised = counted(shared_cache()), Counter[int]()
    for index in range(len(cache)):
        supervised.update(cache[index].input_ids[cache[index].loss_mask].tolist())
    never_supervised = [token for token in counts if not supervised[token]]
    assert never_supervised, "the test needs a token of prompts alone"
    for token in (never_supervised[0], supervised.most_common(1)[0][0]):
        with pytest.raises(UsageError) as refusal:
            choose(shared_cache(), token)
        times = "once" if counts[token] == 1 else f"{counts[token]:,} times"
        assert str(refusal.value) == (
            f"--mask-token-id {token}: it occurs {times} in the data, first in sample {first_sample(cache, token)} of "
            f"{shared_cache()}; P-EAGLE needs a token that no text holds: such as --mask-token-id 260 (beyond the "
            "tokenizer's 260 tokens)"
        )


def test_a_token_of_the_held_out_documents_is_refused_too():
    few, other = shared_cache(count=5), shared_cache()
    new = sorted(counted(other).keys() - counted(few).keys())
    assert new, "the test needs a token that one of the caches has alone"
    assert choose(few, new[0]).token_id == new[0]
    with pytest.raises(UsageError, match=rf"first in sample \d+ of {re.escape(str(other))}"):
        choose(few, new[0], other)


def test_a_token_whose_embedding_is_not_finite_is_refused(tmp_path):
    path = copied_cache(tmp_path / "cache")
    set_embeddings(path, {265: float("nan"), 266: 0.0})
    with pytest.raises(
        UsageError, match=r"265: it has an embedding that is not finite; .* such as --mask-token-id 260"
    ):
        choose(path, 265, verify=False)
    assert choose(path, 266, verify=False).token_id == 266


# A token of our own choice

LLAMA = {
    "tokenizer": {
        "model": model(),
        "added_tokens": added(
            260, "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>",
            "<|eot_id|>", "<|reserved_special_token_2|>", "<|reserved_special_token_3|>",
        ),
    },
    "tokenizer_config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "generation_config": {"eos_token_id": [261, 262, 264]},
}  # fmt: skip
QWEN = {
    "tokenizer": {
        "model": model(),
        "added_tokens": added(260, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<tool_call>"),
    },
    "tokenizer_config": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "bos_token": None},
}
GEMMA = {
    "tokenizer": {
        "model": model("<pad>", "<eos>", "<unused0>", "<mask>", "<unused1>"),
        "added_tokens": added(260, "<pad>", "<eos>", "<unused0>", "<mask>", "<unused1>"),
    },
    "special_tokens_map": {"pad_token": {"content": "<pad>"}, "eos_token": {"content": "<eos>"}},
}
T5 = {
    "tokenizer": {
        "model": {
            "vocab": [
                *([f"▁plain{token_id}", -1.0] for token_id in range(268)),
                *([f"<extra_id_{number}>", 0.0] for number in (3, 2, 1, 0)),
            ]
        }
    },
    "tokenizer_config": {"pad_token": "▁plain267"},
}
WORDPIECE = {
    "tokenizer": {"model": model("[PAD]", "[UNK]", "[unused0]", "reserved", "[CLS]", "[MASK]", "[unused1]")},
    "special_tokens_map": {"unk_token": "[UNK]", "pad_token": "[PAD]"},
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # The first reserved token ends generations here.
        pytest.param(LLAMA, MaskToken(265, "<|reserved_special_token_2|>, a reserved token"), id="llama"),
        pytest.param(QWEN, MaskToken(265, "beyond the tokenizer's 265 tokens"), id="qwen"),
        pytest.param(GEMMA, MaskToken(263, "<mask>, the tokenizer's mask token"), id="gemma"),
        pytest.param(T5, MaskToken(268, "<extra_id_3>, a reserved token"), id="t5"),
        pytest.param(WORDPIECE, MaskToken(265, "[MASK], the tokenizer's mask token"), id="wordpiece"),
    ],
)
def test_tokenizers_of_many_styles_offer_a_token(tmp_path, files, expected):
    path = with_target_files(tmp_path / "cache", **files)
    assert choose(path) == expected
    assert not counted(path)[expected.token_id]


@pytest.mark.parametrize(
    "name",
    [
        "<|reserved_special_token_12|>", "<unused0>", "[unused3]", "<|extra_0|>", "<extra_id_3>", "<reserved_7>",
        "<|dummy_3|>", "<|placeholder1|>", "<|PLACEHOLDER_4|>", "[control_12]", "<SPECIAL_20>", "<|reserved000|>",
        "<｜place▁holder▁no▁0｜>", ">>UNUSED_5<<", "[UNUSED_TOKEN_140]", "<|text_post_train_reserved_special_token_3|>",
    ],
)  # fmt: skip
def test_names_that_say_that_a_token_is_spare(tmp_path, name):
    tokenizer = {"model": model(*(f"word{number}" for number in range(8)), name, size=260)}
    found = choose(with_target_files(tmp_path / "cache", tokenizer=tokenizer))
    assert found == MaskToken(268, f"{name}, a reserved token")


@pytest.mark.parametrize(
    "name",
    ["unused", "reserved_3", "<|image_placeholder|>", "[gMASK]", "<|image_mask|>", "<|special|>", "<reserved",
     "▁extra3", "<|vision_pad|>", "<extra" + "a" * 5000 + ">"],
)  # fmt: skip
def test_names_that_do_not(tmp_path, name):
    tokenizer = {"model": model(name, size=260)}
    found = choose(with_target_files(tmp_path / "cache", tokenizer=tokenizer))
    assert found == MaskToken(261, "beyond the tokenizer's 261 tokens")


@pytest.mark.parametrize("name", ["<mask>", "[MASK]", "<|mask|>", "<MASK_TOKEN>"])
def test_names_of_mask_tokens(tmp_path, name):
    tokenizer = {"model": model("<unused0>", name, size=260)}
    found = choose(with_target_files(tmp_path / "cache", tokenizer=tokenizer))
    assert found == MaskToken(261, f"{name}, the tokenizer's mask token")


def test_a_mask_token_is_known_by_its_role_too(tmp_path):
    tokenizer = {"model": model("<unused0>", "hole", size=260)}
    path = with_target_files(tmp_path / "cache", tokenizer=tokenizer, tokenizer_config={"mask_token": "hole"})
    assert choose(path) == MaskToken(261, "hole, the tokenizer's mask token")


def test_the_pad_token_is_taken_where_it_only_pads(tmp_path):
    tokenizer = {"model": model(size=270), "added_tokens": added(270, "<e>", "<p>")}
    path = with_target_files(
        tmp_path / "one", tokenizer=tokenizer, tokenizer_config={"eos_token": "<e>", "pad_token": "<p>"}
    )
    assert choose(path) == MaskToken(271, "<p>, which pads")
    path = with_target_files(
        tmp_path / "two", tokenizer=tokenizer, tokenizer_config={"eos_token": "<e>", "pad_token": "<e>"}
    )
    free = set(range(270)) - counted(path).keys()
    assert choose(path) == MaskToken(max(free), "it occurs nowhere in the data")


def test_a_pad_id_that_stands_for_none_is_none(tmp_path):
    path = with_target_files(tmp_path / "cache", tokenizer={"model": model(size=272)}, config={"pad_token_id": -1})
    assert choose(path).reason == "it occurs nowhere in the data"


def test_without_a_tokenizer_s_model_nothing_is_taken_to_lie_beyond_it(tmp_path):
    path = with_target_files(tmp_path / "cache", tokenizer_config={"added_tokens_decoder": {"1": {"content": "</s>"}}})
    assert choose(path) == MaskToken(271, "it occurs nowhere in the data")


def test_rows_of_zeros_come_last_of_their_kind_and_rows_that_are_not_finite_never(tmp_path):
    path = copied_cache(tmp_path / "cache")
    set_embeddings(path, {260: float("nan"), 261: 0.0, 262: float("inf")})
    assert choose(path, verify=False).token_id == 263
    set_embeddings(path, dict.fromkeys(range(263, VOCAB_SIZE), 0.0))
    assert choose(path, verify=False) == MaskToken(261, "beyond the tokenizer's 260 tokens")
    set_embeddings(path, dict.fromkeys(range(260, VOCAB_SIZE), float("nan")))
    assert choose(path, verify=False) == MaskToken(257, "<pad>, which pads")


def test_with_no_token_left_the_way_out_is_said(tmp_path, monkeypatch):
    path = with_target_files(tmp_path / "cache", tokenizer={"added_tokens": added(0, *map(str, range(VOCAB_SIZE)))})
    absent = [str(token_id) for token_id in sorted(set(range(VOCAB_SIZE)) - counted(path).keys())]
    with pytest.raises(UsageError, match=f"give --mask-token-id one that .* such as {', '.join(absent[:5])}$"):
        choose(path)
    monkeypatch.setattr(mask_token, "token_counts", lambda _caches: np.ones(VOCAB_SIZE, np.int64))
    with pytest.raises(UsageError, match="the data holds every one of the target's 272 tokens"):
        choose(path)


NAMES = ["<mask>", "[MASK]", "<unused{}>", "<|reserved_special_token_{}|>", "word{}", "<|tool_{}|>"]


@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=30),
    num_added=st.integers(0, 12),
    special=st.sets(st.integers(0, 39), max_size=6),
    pad=st.none() | st.integers(0, 39),
    occurs=st.sets(st.integers(0, 39), max_size=40),
)
def test_the_choice_is_the_first_in_the_order_that_never_occurs(names, num_added, special, pad, occurs):
    """Against the order, spelled out token by token, on a target of 40 tokens."""
    tokens = {f"{name.format(token_id)}": token_id for token_id, name in enumerate(names)}
    special |= set() if pad is None else {pad}
    added_ids = frozenset(list(tokens.values())[-num_added:] if num_added else [])
    known = TargetTokens(tokens, added_ids, tuple(sorted(special)), pad, None, max(tokens.values()) + 1)

    def rank(token_id: int) -> tuple[int, int] | None:
        name = next((name for name, own in tokens.items() if own == token_id), None)
        if token_id in occurs:
            return None
        if token_id in special:
            return (4, 0) if token_id == pad else None
        if name in ("<mask>", "[MASK]"):
            return 1, token_id
        if name is not None and ("unused" in name or "reserved" in name):
            return 2, token_id
        if name is None and token_id > max(tokens.values()):
            return 3, token_id
        return None if token_id in added_ids else (5, -token_id)

    ranked = {token_id: place for token_id in range(40) if (place := rank(token_id)) is not None}

    identity = SimpleNamespace(target=SimpleNamespace(vocab_size=40))
    manifest = SimpleNamespace(identity=identity, files={})
    cache: Any = SimpleNamespace(manifest=manifest, path=Path("unread"), embeddings=torch.ones(40, 3))
    counts = np.array([int(token_id in occurs) for token_id in range(40)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_token, "read_target_tokens", lambda _path: known)
        patch.setattr(mask_token, "token_counts", lambda _caches: counts)
        if not ranked:
            with pytest.raises(UsageError):
                choose_mask_token([cache], None)
        else:
            found = choose_mask_token([cache], None)
            assert found.token_id == min(ranked, key=lambda token_id: ranked[token_id])


def test_what_the_files_say_of_tokens(tmp_path):
    tokens = read_target_tokens(with_target_files(tmp_path / "cache", **LLAMA))
    assert (tokens.size, tokens.pad, tokens.mask) == (267, None, None)
    assert tokens.special == (260, 261, 262, 264)
    assert tokens.added == frozenset(range(260, 267))
    odd = {"added_tokens_decoder": {"²": {"content": "x"}, "9" * 5000: {"content": "y"}}, "pad_token": ["z"]}
    assert read_target_tokens(with_target_files(tmp_path / "odd", tokenizer_config=odd)).ids == {}

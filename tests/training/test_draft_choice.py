"""Which layers a draft reads and which tokens it proposes: chosen from what caches hold, refused with a way out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from eagle_offline.cache import given_vocab
from eagle_offline.cache.reader import open_cache
from eagle_offline.errors import DataError, EagleOfflineError, MismatchError, UsageError
from eagle_offline.training import draft_choice, target_tokens
from eagle_offline.training.draft_choice import (
    choose_aux_layers,
    choose_vocabulary,
)
from eagle_offline.training.target_tokens import special_token_ids
from eagle_offline.training.token_counts import supervised_counts
from eagle_offline.vocab import read_token_ids
from tests.builders import SCRATCH, make_cache, save_target, shared_chat
from tests.training.caches import DRAFT_VOCAB_SIZE, copied_cache, shared_cache

SPECIAL = [256, 257, 259]  # <s>, <pad> and <|im_end|>


def counted(*paths: Path) -> Counter[int]:
    """Supervised tokens of caches, one by one."""
    found: Counter[int] = Counter()
    for path in paths:
        cache = open_cache(path)
        for index in range(len(cache)):
            sample = cache[index]
            found.update(
                token for token, own in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True) if own
            )
    return found


def choose(size: int | None = None, file: Path | None = None, *paths: Path):
    return choose_vocabulary([open_cache(path) for path in paths or (shared_cache(),)], size, file)


def test_layers_are_places_among_the_captured_ones():
    assert choose_aux_layers(None, [1, 15, 28]) == [0, 1, 2]
    assert choose_aux_layers([1, 28], [1, 15, 28]) == [0, 2]
    assert choose_aux_layers([15], [1, 15, 28]) == [1]
    assert choose_aux_layers((1, 15, 28), [1, 15, 28]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("requested", "line"),
    [
        ([1, 9], "--aux-layer-ids 1,9: 9 was not captured; the cache holds 1,15,28: choose"),
        ([2, 9], "--aux-layer-ids 2,9: 2,9 were not captured; the cache holds 1,15,28"),
        ([15, 1], "--aux-layer-ids 15,1: expected ids that increase, each once; the cache holds 1,15,28"),
        ([1, 1], "expected ids that increase"),
        ([], "expected ids that increase"),
    ],
)
def test_layers_that_cannot_be_read_are_named_with_those_that_can(requested, line):
    with pytest.raises(UsageError, match=re.escape(line)):
        choose_aux_layers(requested, [1, 15, 28])


def test_left_alone_it_is_the_cache_s_choice():
    cache = open_cache(shared_cache())
    vocab = choose()
    assert vocab.selected_token_ids.tolist() == cache.selected_token_ids.tolist()
    recorded = cache.manifest.defaults.draft_vocabulary
    assert (vocab.digest, vocab.coverage, vocab.size) == (recorded.digest, recorded.coverage, DRAFT_VOCAB_SIZE)


def test_counting_anew_is_what_precompute_counted():
    assert choose(DRAFT_VOCAB_SIZE).digest == choose().digest
    assert choose(DRAFT_VOCAB_SIZE).coverage == choose().coverage


@pytest.mark.parametrize("size", [3, 8, 20, 272])
def test_a_size_takes_the_most_frequent_supervised_tokens_and_the_special_ones(size):
    vocab, counts = choose(size), counted(shared_cache())
    others = sorted((token for token in range(272) if token not in SPECIAL), key=lambda token: (-counts[token], token))
    expected = sorted([*SPECIAL, *others[: size - 3]])
    assert vocab.selected_token_ids.tolist() == expected
    assert vocab.selected_token_ids.dtype == np.int64
    assert vocab.vocab_size == 272
    assert vocab.coverage == pytest.approx(sum(counts[token] for token in expected) / counts.total(), abs=1e-12)


def test_several_caches_are_counted_together():
    paths = shared_cache(), shared_cache(count=10, seed=3)
    counts = counted(*paths)
    found = supervised_counts([open_cache(path) for path in paths])
    assert {token: count for token, count in enumerate(found.tolist()) if count} == dict(counts)
    assert choose(12, None, *paths).coverage < 1


def test_sizes_that_cannot_be_are_refused():
    for size, line in ((2, "special tokens alone are 3"), (273, "expected 1 to 272"), (0, "expected 1 to 272")):
        with pytest.raises(UsageError, match=f"--draft-vocab-size {size}: .*{line}"):
            choose(size)
    with pytest.raises(UsageError, match="--draft-vocab-size and --draft-vocab exclude each other"):
        choose(12, shared_cache())


def test_caches_of_unlike_choices_need_to_be_told():
    other = made_with(64)
    with pytest.raises(UsageError, match=r"unlike draft vocabularies: .*--draft-vocab .*, or --draft-vocab-size 200"):
        choose(None, None, shared_cache(), other)
    assert choose(None, other, shared_cache(), other).size == 64
    assert choose(None, None, shared_cache(), shared_cache()).size == DRAFT_VOCAB_SIZE


def made_with(draft_vocab_size: int) -> Path:
    path = SCRATCH / f"of-another-size-{draft_vocab_size}"
    return path if path.exists() else make_cache(path, data=shared_chat(6, 1), draft_vocab_size=draft_vocab_size)


def test_a_cache_s_choice_is_taken_over_and_its_coverage_counted_here():
    other, counts = made_with(64), counted(shared_cache())
    vocab = choose(None, other)
    assert vocab.selected_token_ids.tolist() == open_cache(other).selected_token_ids.tolist()
    share = sum(counts[token] for token in vocab.selected_token_ids.tolist()) / counts.total()
    assert vocab.coverage == pytest.approx(share, abs=1e-12)


def test_a_cache_of_another_tokenizer_is_refused(tmp_path):
    target = save_target(tmp_path / "target", vocab_size=280)
    other = make_cache(tmp_path / "other", target=target, data=shared_chat(3))
    with pytest.raises(MismatchError, match=r"its vocabulary size is 280, that of .* 272"):
        choose(None, other)


def test_a_cache_of_another_tokenizer_with_as_many_tokens_is_refused(monkeypatch):
    manifest = open_cache(made_with(64)).manifest
    text = manifest.identity.text.model_copy(update={"tokenizer_digest": "other"})
    identity = manifest.identity.model_copy(update={"text": text})
    altered = manifest.model_copy(update={"identity": identity})
    monkeypatch.setattr(given_vocab, "read_manifest", lambda _path: altered)
    with pytest.raises(MismatchError, match="its tokenizer is other"):
        choose(None, made_with(64))


def test_a_directory_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(UsageError, match="neither a file of token ids nor a cache"):
        choose(None, tmp_path)
    with pytest.raises(UsageError, match=r"--draft-vocab .*absent: No such file"):
        choose(None, tmp_path / "absent")


@pytest.mark.parametrize(
    "content", ["7\n3\n\n  5 \n200", "[7, 3, 5, 200]", "\n[7,\n3,5,200\n]", "3\r\n5\r\n7\r\n200\r\n"]
)
def test_a_file_of_ids_is_put_in_order(tmp_path, content):
    (tmp_path / "ids").write_bytes(content.encode())
    assert read_token_ids(tmp_path / "ids", 272).tolist() == [3, 5, 7, 200]
    vocab, counts = choose(None, tmp_path / "ids"), counted(shared_cache())
    assert vocab.selected_token_ids.tolist() == [3, 5, 7, 200]
    assert vocab.coverage == pytest.approx(sum(counts[token] for token in (3, 5, 7, 200)) / counts.total(), abs=1e-12)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("1\nx\n", "line 2: expected a token id, found 'x'"),
        ("1\n2.5\n", "line 2: expected a token id, found '2.5'"),
        ("1\n-2\n", "line 2: expected a token id, found '-2'"),
        ("1\n٣\n", "line 2: expected a token id"),
        ("1\n" + "9" * 5000, "line 2: expected a token id"),
        ("1\n\n272\n", "line 3: id 272, expected 0 to 271"),
        ("4\n1\n4\n", "line 3: id 4 is there already, in line 1"),
        ("[4, 1, 4]", "entry 3: id 4 is there already, in entry 1"),
        ("[4, true]", "entry 2: expected a token id, found true"),
        ('[4, "1"]', 'entry 2: expected a token id, found "1"'),
        ("[4, -1]", "entry 2: id -1, expected 0 to 271"),
        ("[4, ", "not a JSON list"),
        ("[" * 100_000, "not a JSON list"),
        ("", "no token ids"),
        ("[]", "no token ids"),
    ],
)
def test_a_file_that_is_no_list_of_ids_is_one_line_with_the_place(tmp_path, content, line):
    (tmp_path / "ids").write_text(content)
    with pytest.raises(DataError) as raised:
        read_token_ids(tmp_path / "ids", 272)
    assert str(raised.value).startswith(f"{tmp_path / 'ids'}: {line}")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < len(str(tmp_path)) + 300


def test_a_binary_file_is_refused(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(3))
    with pytest.raises(DataError, match=r"ids\.npy: expected token ids"):
        read_token_ids(tmp_path / "ids.npy", 272)


def test_stored_probabilities_are_over_the_vocabulary_they_were_made_with(tmp_path):
    dense = shared_cache("dense", count=6)
    assert choose(None, None, dense).size == DRAFT_VOCAB_SIZE
    (tmp_path / "ids").write_text("1\n2\n")
    for size, file in ((12, None), (None, tmp_path / "ids"), (None, shared_cache())):
        with pytest.raises(UsageError, match=r"--draft-vocab.*dense.*leave the flag out, or precompute with --target"):
            choose(size, file, dense)
    topk = make_cache(
        tmp_path / "topk", data=shared_chat(4), target_encoding="topk", top_k=8, draft_vocab_size=DRAFT_VOCAB_SIZE
    )
    with pytest.raises(UsageError, match=r"\(--target-encoding topk\); leave the flag out"):
        choose(12, None, topk)


def test_digests_are_left_to_training(tmp_path, monkeypatch):
    """Counting reads ids and masks; the states, most of a cache, are not read for it."""
    cache = open_cache(shared_cache())

    def read(*_arguments: object) -> None:
        raise AssertionError("decoded or checked")

    monkeypatch.setattr("eagle_offline.cache.reader.decode_fields", read)
    monkeypatch.setattr("eagle_offline.cache.arrow.StoredSample.digest", read)
    assert choose_vocabulary([cache], 12, None).size == 12


def test_a_partial_cache_is_counted_as_far_as_it_goes(tmp_path):
    path = copied_cache(tmp_path / "cache")
    (path / "commit-000001.json").unlink()
    part = open_cache(path, allow_partial=True)
    found = choose_vocabulary([part], 272, None)
    assert found.coverage == 1
    assert supervised_counts([part]).sum() < supervised_counts([open_cache(shared_cache())]).sum()


def written(directory: Path, **files: object) -> Path:
    for name, content in files.items():
        path = directory / "target" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return directory


def test_special_tokens_are_those_that_the_tokenizer_names():
    tokenizer = AutoTokenizer.from_pretrained(shared_cache() / "target")
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert special_token_ids(shared_cache()) == sorted(token for token in ids if token is not None) == SPECIAL


ADDED = [{"id": 9, "content": "<s>"}, {"id": 4, "content": "</s>"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"bos_token": "<s>"}, "tokenizer": {"added_tokens": ADDED}}, [9]),
        ({"tokenizer_config": {"bos_token": {"content": "</s>"}}, "tokenizer": {"added_tokens": ADDED}}, [4]),
        ({"special_tokens_map": {"unk_token": "</s>"}, "tokenizer": {"added_tokens": ADDED}}, [4]),
        ({"tokenizer_config": {"eos_token": "x", "added_tokens_decoder": {"7": {"content": "x"}}}}, [7]),
        ({"tokenizer_config": {"eos_token": "b"}, "tokenizer": {"model": {"vocab": {"a": 0, "b": 1}}}}, [1]),
        ({"tokenizer_config": {"eos_token": "b"}, "tokenizer": {"model": {"vocab": [["a", -1], ["b", -2]]}}}, [1]),
        ({"generation_config": {"eos_token_id": [3, 5]}}, [3, 5]),
        ({"generation_config": {"eos_token_id": 3}, "config": {"bos_token_id": 0}}, [0, 3]),
        # A tokenizer of a class with tokens of its own, of which its files do not say the ids.
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 2, "pad_token_id": None}}, [2]),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 8}}, []),
        ({"config": {"text_config": {"eos_token_id": [6, 7]}}}, [6, 7]),
        ({}, []),
        ({"tokenizer": [], "tokenizer_config": "x", "config": {"text_config": 3, "eos_token_id": "x"}}, []),
        ({"tokenizer_config": {"bos_token": ["<s>"], "added_tokens_decoder": {"a": 1}}}, []),
    ],
)
def test_special_tokens_are_found_in_whichever_file_spells_them_out(tmp_path, files, expected):
    assert special_token_ids(written(tmp_path, **files)) == expected


def test_a_tokenizer_file_that_is_no_json_is_named(tmp_path):
    path = written(tmp_path, tokenizer={}) / "target" / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read: .*run precompute --resume"):
        special_token_ids(tmp_path)


def test_every_refusal_is_an_error_that_users_see():
    assert {DataError, MismatchError, UsageError} <= set(EagleOfflineError.__subclasses__())
    assert not [m for m in (draft_choice, target_tokens) if "from_pretrained" in Path(m.__file__).read_text()]

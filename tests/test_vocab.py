"""The draft vocabulary: most frequent first, ties and fillers to the lower id, special tokens always in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.cache.reader import open_cache
from eagle_offline.errors import UsageError
from eagle_offline.vocab import choose_draft_vocab, given_draft_vocab, resolve_size
from tests.builders import make_cache, precompute, run_cli, save_target, shared_chat, tree


def counts_of(pairs: dict[int, int], size: int) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    for token, count in pairs.items():
        counts[token] = count
    return counts


def test_the_most_frequent_are_chosen_and_sorted() -> None:
    vocab = choose_draft_vocab(counts_of({7: 1, 3: 9, 5: 4, 1: 2}, 10), [], 3, 10)
    assert vocab.selected_token_ids.tolist() == [1, 3, 5]
    assert vocab.selected_token_ids.dtype == np.int64
    assert vocab.coverage == pytest.approx(15 / 16)
    assert vocab.selected_token_mask.nonzero()[0].tolist() == [1, 3, 5]


def test_equal_counts_go_to_the_lower_id() -> None:
    assert choose_draft_vocab(counts_of({8: 2, 4: 2, 6: 2, 9: 3}, 10), [], 3, 10).selected_token_ids.tolist() == [
        4,
        6,
        9,
    ]


def test_a_corpus_with_too_few_tokens_is_filled_up_with_the_lowest_unused_ids() -> None:
    assert choose_draft_vocab(counts_of({5: 1}, 6), [], 4, 10).selected_token_ids.tolist() == [0, 1, 2, 5]
    assert choose_draft_vocab(np.zeros(0, np.int64), [9], 3, 10).selected_token_ids.tolist() == [0, 1, 9]


def test_required_ids_push_out_the_most_frequent_last() -> None:
    vocab = choose_draft_vocab(counts_of({0: 5, 1: 4, 2: 3}, 5), [4, 4, -1, 99], 2, 5)
    assert vocab.selected_token_ids.tolist() == [0, 4]


def test_more_required_ids_than_room_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(UsageError, match=r"--draft-vocab-size 2.*3"):
        choose_draft_vocab(np.ones(5, np.int64), [1, 2, 3], 2, 5)


def test_the_full_vocabulary_is_all_ids() -> None:
    vocab = choose_draft_vocab(np.zeros(3, np.int64), [], 7, 7)
    assert vocab.selected_token_ids.tolist() == list(range(7))
    assert vocab.coverage == 1.0


@pytest.mark.parametrize(
    ("requested", "vocab_size", "size"), [(None, 128_256, 32_000), (None, 900, 900), (5, 9, 5), (9, 9, 9)]
)
def test_the_default_size_is_32000_or_all(requested: int | None, vocab_size: int, size: int) -> None:
    assert resolve_size(requested, vocab_size) == size


@pytest.mark.parametrize("requested", [0, -1, 10])
def test_a_size_outside_the_vocabulary_is_refused(requested: int) -> None:
    with pytest.raises(UsageError, match=f"--draft-vocab-size {requested}"):
        resolve_size(requested, 9)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.sets(st.integers(0, 35), max_size=4),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_choice_is_that_of_a_sorted_list(counts: list[int], required: set[int], data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(len(counts), 36))
    inside = {token for token in required if token < vocab_size}
    size = data.draw(st.integers(max(1, len(inside)), vocab_size))
    full = counts + [0] * (vocab_size - len(counts))
    others = sorted(set(range(vocab_size)) - inside, key=lambda token: (-full[token], token))
    expected = sorted([*inside, *others[: size - len(inside)]])
    vocab = choose_draft_vocab(np.array(counts, np.int64), required, size, vocab_size)
    assert vocab.selected_token_ids.tolist() == expected
    assert vocab.size == size
    total = sum(full)
    assert vocab.coverage == pytest.approx(sum(full[t] for t in expected) / total if total else 1.0)
    again = choose_draft_vocab(np.array(counts, np.int64), sorted(required, reverse=True), size, vocab_size)
    assert vocab.digest == again.digest


def test_a_given_choice_is_taken_as_it_is_with_its_coverage() -> None:
    vocab = given_draft_vocab(np.array([1, 4]), counts_of({1: 3, 2: 5}, 3), 6)
    assert (vocab.selected_token_ids.tolist(), vocab.vocab_size) == ([1, 4], 6)
    assert vocab.coverage == pytest.approx(3 / 8)
    assert given_draft_vocab(np.array([1, 4]), np.zeros(0, np.int64), 6).coverage == 1.0


def chosen(cache: Path) -> list[int]:
    return open_cache(cache).selected_token_ids.tolist()


def recount(cache: Path, ids: list[int]) -> float:
    """Share of supervised tokens that are among `ids`, counted one by one."""
    opened = open_cache(cache)
    samples = [opened[number] for number in range(len(opened))]
    tokens = [
        token
        for sample in samples
        for token, mask in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
        if mask
    ]
    return sum(token in ids for token in tokens) / len(tokens)


def test_a_token_that_the_target_does_not_have_is_not_lacking(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, 50256]}))
    ended = precompute(tmp_path / "cache", target)
    assert ended.code == 0, ended.err
    assert "draft vocabulary: " in ended.err
    assert "50256" not in ended.err


@pytest.mark.parametrize("target_encoding", ["factored", "dense"])
def test_precompute_takes_a_file_of_ids(tmp_path: Path, target_encoding: str) -> None:
    ids = [*range(40, 90), 256, 257]
    (tmp_path / "ids.json").write_text(json.dumps(ids[::-1]))
    given = {"draft_vocab": tmp_path / "ids.json", "draft_vocab_size": None, "target_encoding": target_encoding}
    ended = precompute(tmp_path / "cache", **given)
    assert ended.code == 0, ended.err
    assert chosen(tmp_path / "cache") == ids
    coverage = recount(tmp_path / "cache", ids)
    told = json.loads(ended.out)
    assert (told["draft_vocab_size"], told["draft_vocab_coverage"]) == (len(ids), pytest.approx(coverage))
    (line,) = [line for line in ended.err.splitlines() if line.startswith("draft vocabulary: ")]
    assert f"{len(ids)} tokens, {coverage:.2%} of those supervised" in line
    assert "a draft can never propose <|im_end|> (259), which it lacks" in line
    # Its settings make it again, from anywhere, and another choice is not mixed in.
    assert run_cli("precompute", "--config", tmp_path / "cache" / "config.json", "--resume").code == 0
    (tmp_path / "ids.json").write_text(json.dumps(ids[1:]))
    before = tree(tmp_path / "cache")
    refused = run_cli("precompute", "--config", tmp_path / "cache" / "config.json", "--resume")
    assert refused.code == 3, refused.err
    assert tree(tmp_path / "cache") == before


def test_precompute_takes_over_the_choice_of_another_cache(tmp_path: Path) -> None:
    first = make_cache(tmp_path / "first", draft_vocab_size=30)
    taken = precompute(tmp_path / "second", data=shared_chat(6, 1), draft_vocab=first, draft_vocab_size=None)
    assert taken.code == 0, taken.err
    assert chosen(tmp_path / "second") == chosen(first)
    assert json.loads(taken.out)["draft_vocab_coverage"] == pytest.approx(recount(tmp_path / "second", chosen(first)))
    assert "lacks" not in taken.err


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("5 x\n", 4, "line 1"),
        ("[1, 1]", 4, "there already"),
        ("[1, 100000]", 4, "id 100000"),
        (None, 2, "No such file"),
    ],
)
def test_precompute_refuses_what_is_no_choice(tmp_path: Path, content: str | None, code: int, said: str) -> None:
    path = tmp_path / "ids"
    if content is not None:
        path.write_text(content)
    ended = precompute(tmp_path / "cache", draft_vocab=path, draft_vocab_size=None)
    assert (ended.code, len(ended.err.splitlines())) == (code, 1), ended.err
    assert said in ended.err
    assert not (tmp_path / "cache" / "tokens").exists()


def test_precompute_takes_one_of_size_and_choice(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("1\n2\n")
    ended = precompute(tmp_path / "cache", draft_vocab=tmp_path / "ids")
    assert ended.code == 2
    assert "exclude each other" in ended.err
    nowhere = precompute(tmp_path / "cache", draft_vocab=tmp_path, draft_vocab_size=None)
    assert nowhere.code == 2
    assert "neither a file of token ids nor a cache" in nowhere.err

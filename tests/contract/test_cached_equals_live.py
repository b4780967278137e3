"""What is read from a cache is what the target says now: each row alone, by plain forwards, in float64 after them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle_offline import open_cache
from tests import builders

SEQ_LENGTH = 96
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TIE_GAP = 1e-4  # MATH.md: argmax and masks are equal wherever the two best logits are this far apart
PROBABILITY_TOLERANCE = 1e-6  # MATH.md, for H ≤ 256
# The same row in a batch or alone: float32 sums in another order, 1e-7 an operation over eight layers.
BATCHING_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Live:
    """One row through the model alone: ids and mask [T], aux states [T, A·H] and final state [T, H] as computed."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux: torch.Tensor
    last: torch.Tensor


def tokenized(chat: Path, seq_length: int) -> list[tuple[list[int], list[int]]]:
    """Ids and loss masks of a chat file written out turn by turn: answers and what ends them are supervised."""
    tokenizer = builders.make_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = []
    for line in chat.read_text().splitlines():
        tokens: list[int] = []
        mask: list[int] = []
        for turn in json.loads(line)["messages"]:
            said = int(turn["role"] == "assistant")
            for text, supervised in (
                (f"<|im_start|>{turn['role']}\n", 0),
                (turn["content"] + "<|im_end|>", said),
                ("\n", 0),
            ):
                piece = ids(text)
                tokens += piece
                mask += [supervised] * len(piece)
        if any(mask[:seq_length]):
            rows.append((tokens[:seq_length], mask[:seq_length]))
    return rows


def live_row(model: torch.nn.Module, tokens: list[int], mask: list[int], layer_ids: list[int]) -> Live:
    """Run one row alone; what decoder layers put out and what the head is given are caught by hooks of our own."""
    caught: dict[Any, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(
            lambda _m, _i, output, key=index: caught.update({key: output[0] if isinstance(output, tuple) else output})
        )
        for index, layer in enumerate(model.model.layers)
    ]
    handles.append(model.lm_head.register_forward_pre_hook(lambda _m, inputs: caught.update({"last": inputs[0]})))
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    aux = torch.cat([caught[index][0] for index in layer_ids], dim=-1)
    return Live(torch.tensor(tokens), torch.tensor(mask).bool(), aux, caught["last"][0])


@cache
def live_rows(target: Path, chat: Path, compute: torch.dtype, layer_ids: tuple[int, ...]) -> list[Live]:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=compute).eval()
    return [live_row(model, ids, mask, list(layer_ids)) for ids, mask in tokenized(chat, SEQ_LENGTH)]


def head_logits(model: torch.nn.Module, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """z in float64 from the stored state and the head rounded to the stored dtype, by the architecture's formula."""
    logits = hidden.double() @ model.lm_head.weight.to(dtype).double().T
    if model.lm_head.bias is not None:
        logits = logits + model.lm_head.bias.to(dtype).double()
    kind, config = type(model).__name__, model.config
    if kind.startswith("Gemma2"):
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    if kind.startswith("Cohere"):
        logits = logits * config.logit_scale
    if kind.startswith("Granite"):
        logits = logits / config.logits_scaling
    return logits


def chosen_ids(rows: list[tuple[list[int], list[int]]], size: int) -> list[int]:
    """MATH.md: special tokens, then by frequency over supervised tokens, ties and the unused to the lower id."""
    counts = Counter(token for ids, mask in rows for token, m in zip(ids, mask, strict=True) if m)
    special = [256, 257, 259]  # bos, pad, eos of the tests' tokenizer
    others = sorted((i for i in range(builders.VOCAB_SIZE) if i not in special), key=lambda i: (-counts[i], i))
    return sorted([*special, *others[: size - len(special)]])


TARGETS = {
    "llama": ("Llama", torch.float32, ()),
    "llama-tied": ("Llama", torch.float32, (("tie_word_embeddings", True),)),
    "llama-bf16": ("Llama", torch.bfloat16, ()),
    "llama-bf16-tied": ("Llama", torch.bfloat16, (("tie_word_embeddings", True),)),
    "llama-one-kv-head": ("Llama", torch.float32, (("num_key_value_heads", 1), ("attention_bias", True))),
    "qwen2": ("Qwen2", torch.float32, ()),
    "qwen3-bf16": ("Qwen3", torch.bfloat16, ()),
    "mistral": ("Mistral", torch.float32, (("sliding_window", 16),)),
    "gemma2-soft-cap": ("Gemma2", torch.float32, ()),
    "cohere-logit-scale": ("Cohere", torch.float32, ()),
    "granite-scaling": ("Granite", torch.float32, ()),
}


def check_supervision(cache: Any, model: torch.nn.Module, target_dtype: torch.dtype) -> None:
    """Argmax, log-normaliser, masks and probabilities of every sample against float64 from the stored states."""
    selected = cache.selected_token_ids
    counted = 0
    for index in range(len(cache)):
        sample = cache[index]
        mask = sample.loss_mask.tolist()
        positions = [t for t in range(len(mask)) if mask[t] or (t + 1 < len(mask) and mask[t + 1])]
        supervision = sample.supervision
        assert supervision.positions.tolist() == positions
        logits = head_logits(model, supervision.last_hidden_state, target_dtype)
        best = logits.topk(2, dim=-1)
        clear = best.values[:, 0] - best.values[:, 1] > TIE_GAP
        assert clear.float().mean() > 0.9
        assert torch.equal(supervision.target_argmax[clear], best.indices[clear, 0])
        torch.testing.assert_close(
            supervision.target_log_normalizer.double(), logits.logsumexp(dim=-1), rtol=2e-6, atol=2e-6
        )
        probs, position_mask = cache.target_probs(sample)
        assert probs.dtype == torch.float32
        assert probs.shape == (len(mask), len(selected))
        assert position_mask.dtype == torch.bool
        assert position_mask.shape == (len(mask), 1)
        expected = torch.zeros(len(mask), len(selected), dtype=torch.float64)
        expected_mask = torch.zeros(len(mask), dtype=torch.bool)
        known = torch.ones(len(mask), dtype=torch.bool)
        for row, t in enumerate(positions):
            if mask[t]:
                expected[t] = logits[row, selected].softmax(dim=-1)
                expected_mask[t] = int(best.indices[row, 0]) in set(selected.tolist())
                known[t] = clear[row]
        assert (probs.double() - expected).abs().max() <= PROBABILITY_TOLERANCE
        assert torch.equal(position_mask[known, 0], expected_mask[known])
        assert not probs[~sample.loss_mask].any()
        assert not position_mask[~sample.loss_mask].any()
        counted += int(expected_mask.sum())
    assert counted > 0


@pytest.mark.parametrize("name", TARGETS)
def test_supervision_from_the_cache_is_that_of_the_live_target(name: str, tmp_path: Path) -> None:
    target, chat = builders.shared_target(*TARGETS[name]), builders.shared_chat()
    cache = open_cache(builders.make_cache(tmp_path / "cache", target, chat, draft_vocab_size=120))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    rows = live_rows(target, chat, torch.float32, tuple(builders.DEFAULT_AUX_LAYER_IDS))
    assert sorted(sample.sample_id for sample in cache) == list(range(len(rows)))
    for sample in cache:
        live = rows[sample.sample_id]
        assert torch.equal(sample.input_ids, live.input_ids)
        assert torch.equal(sample.loss_mask, live.loss_mask)
        assert_stored(sample.aux_hidden_states, live.aux, torch.bfloat16)
        positions = sample.supervision.positions
        assert_stored(sample.supervision.last_hidden_state, live.last[positions], torch.bfloat16)
    check_supervision(cache, model, torch.bfloat16)


def assert_stored(stored: torch.Tensor, live: torch.Tensor, dtype: torch.dtype) -> None:
    """`stored` is what `live` rounds to, up to what batching moves; nearly always exactly."""
    assert stored.dtype == dtype
    margin = BATCHING_TOLERANCE * live.abs().clamp_min(1)
    low, high = (live - margin).to(dtype), (live + margin).to(dtype)
    assert ((low <= stored) & (stored <= high)).all()
    if dtype != torch.float32:
        assert (stored == live.to(dtype)).float().mean() > 0.99


@pytest.mark.parametrize(("dtype", "encoding"), [("bf16", "planes"), ("bf16", "raw"), ("fp16", "raw"), ("fp32", "raw")])
@pytest.mark.parametrize("checkpoint", ["llama", "llama-bf16-tied"])
def test_states_of_rows_captured_alone_are_exact_to_the_last_bit(
    checkpoint: str, dtype: str, encoding: str, tmp_path: Path
) -> None:
    target, chat = builders.shared_target(*TARGETS[checkpoint]), builders.shared_chat(6)
    path = builders.make_cache(
        tmp_path / "cache", target, chat, batch_size=1, dtype=dtype, state_encoding=encoding, aux_layer_ids=[0, 5, 7]
    )
    rows = live_rows(target, chat, torch.float32, (0, 5, 7))
    cache = open_cache(path)
    for sample in cache:
        live = rows[sample.sample_id]
        assert torch.equal(sample.aux_hidden_states, live.aux.to(DTYPES[dtype]))
        assert torch.equal(
            sample.supervision.last_hidden_state, live.last[sample.supervision.positions].to(DTYPES[dtype])
        )
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    check_supervision(cache, model, DTYPES[dtype])


def test_float32_states_of_a_batch_are_those_of_rows_alone_to_rounding(tmp_path: Path) -> None:
    target, chat = builders.shared_target(), builders.shared_chat()
    path = builders.make_cache(tmp_path / "cache", target, chat, batch_size=4, dtype="fp32", state_encoding="raw")
    rows = live_rows(target, chat, torch.float32, tuple(builders.DEFAULT_AUX_LAYER_IDS))
    for sample in open_cache(path):
        live = rows[sample.sample_id].aux
        assert (sample.aux_hidden_states - live).abs().max() <= 1e-6 * live.abs().max()


def test_a_target_that_runs_in_bf16_is_stored_as_it_ran(tmp_path: Path) -> None:
    target, chat = builders.shared_target(*TARGETS["llama-bf16"]), builders.shared_chat(6)
    path = builders.make_cache(tmp_path / "cache", target, chat, batch_size=1, compute_dtype="bf16")
    rows = live_rows(target, chat, torch.bfloat16, tuple(builders.DEFAULT_AUX_LAYER_IDS))
    cache = open_cache(path)
    for sample in cache:
        assert torch.equal(sample.aux_hidden_states, rows[sample.sample_id].aux)
        assert torch.equal(
            sample.supervision.last_hidden_state, rows[sample.sample_id].last[sample.supervision.positions]
        )
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    check_supervision(cache, model, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "relative"), [("bf16", 2**-8), ("fp16", 2**-10), ("fp32", 1e-6)])
def test_dense_probabilities_are_those_of_the_factored_cache_rounded(
    dtype: str, relative: float, tmp_path: Path
) -> None:
    chat = builders.shared_chat(6)
    given: dict[str, Any] = {"dtype": dtype, "state_encoding": "raw"}
    dense = open_cache(builders.make_cache(tmp_path / "dense", None, chat, target_encoding="dense", **given))
    factored = open_cache(builders.make_cache(tmp_path / "factored", None, chat, **given))
    model = AutoModelForCausalLM.from_pretrained(builders.shared_target(), dtype=torch.float32).eval()
    for one, other in zip(dense, factored, strict=True):
        assert one.supervision.last_hidden_state is None
        assert one.supervision.target_probs.dtype == DTYPES[dtype]
        logits = head_logits(model, other.supervision.last_hidden_state, DTYPES[dtype])
        exact = logits[:, dense.selected_token_ids].softmax(dim=-1)
        assert ((one.supervision.target_probs.double() - exact).abs() <= relative * exact + 1e-7).all()
        assert torch.equal(one.supervision.target_argmax, other.supervision.target_argmax)
        assert torch.equal(one.supervision.target_log_normalizer, other.supervision.target_log_normalizer)
        assert torch.equal(one.aux_hidden_states, other.aux_hidden_states)
        probs, mask = dense.target_probs(one)
        factored_probs, factored_mask = factored.target_probs(other)
        assert ((probs - factored_probs).abs() <= relative * factored_probs + 1e-6).all()
        assert torch.equal(mask, factored_mask)
        assert not probs[~one.loss_mask].any()


@pytest.mark.parametrize("target_encoding", ["factored", "dense"])
def test_planes_and_raw_give_the_same_bits(target_encoding: str, tmp_path: Path) -> None:
    planes, raw = (
        open_cache(builders.make_cache(tmp_path / name, target_encoding=target_encoding, state_encoding=name))
        for name in ("planes", "raw")
    )
    for one, other in zip(planes, raw, strict=True):
        assert torch.equal(one.aux_hidden_states, other.aux_hidden_states)
        assert torch.equal(cache_target(one), cache_target(other))


def cache_target(sample: Any) -> torch.Tensor:
    supervision = sample.supervision
    return supervision.target_probs if supervision.last_hidden_state is None else supervision.last_hidden_state


@pytest.mark.parametrize("size", [3, 17, 40, 120, builders.VOCAB_SIZE])
def test_the_draft_vocabulary_is_the_most_frequent_supervised_tokens(size: int, tmp_path: Path) -> None:
    chat = builders.shared_chat()
    cache = open_cache(builders.make_cache(tmp_path / "cache", None, chat, draft_vocab_size=size))
    rows = tokenized(chat, SEQ_LENGTH)
    expected = chosen_ids(rows, size)
    assert cache.selected_token_ids.tolist() == expected
    assert cache.selected_token_mask.nonzero().squeeze(-1).tolist() == expected
    supervised = [token for ids, mask in rows for token, m in zip(ids, mask, strict=True) if m]
    share = sum(token in set(expected) for token in supervised) / len(supervised)
    assert cache.manifest.defaults.draft_vocabulary.coverage == pytest.approx(share)


def test_tokens_that_end_a_generation_are_always_in_the_draft_vocabulary(tmp_path: Path) -> None:
    target = builders.save_target(tmp_path / "target")
    generation = json.loads((target / "generation_config.json").read_text())
    generation["eos_token_id"] = [262, 263, 5000]  # the last is out of range and left out
    (target / "generation_config.json").write_text(json.dumps(generation))
    cache = open_cache(builders.make_cache(tmp_path / "cache", target, draft_vocab_size=6))
    assert {256, 257, 259, 262, 263} < set(cache.selected_token_ids.tolist())


def test_the_head_and_embeddings_beside_the_shards_are_the_targets(tmp_path: Path) -> None:
    for name, tied in (("llama", False), ("llama-bf16", False), ("llama-bf16-tied", True), ("llama-tied", True)):
        target = builders.shared_target(*TARGETS[name])
        path = builders.make_cache(tmp_path / name, target)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        own_dtype = TARGETS[name][1]
        cache = open_cache(path)
        assert cache.embeddings.dtype == own_dtype
        assert torch.equal(cache.embeddings, model.model.embed_tokens.weight.to(own_dtype))
        assert torch.equal(cache.head.weight, model.lm_head.weight.to(torch.bfloat16))
        once = tied and own_dtype == torch.bfloat16  # as stored they are one matrix only then
        assert ((path / "head.safetensors").stat().st_size < 1000) is once


def test_the_same_corpus_in_parts_and_shuffled_holds_the_same_samples(tmp_path: Path) -> None:
    plain = open_cache(builders.make_cache(tmp_path / "plain", batch_size=1))
    shuffled = open_cache(builders.make_cache(tmp_path / "shuffled", batch_size=1, shuffle_seed=3, shard_size=3))
    assert [s.sample_id for s in plain] != [s.sample_id for s in shuffled]
    by_id = {sample.sample_id: sample for sample in shuffled}
    assert len(by_id) == len(plain)
    for sample in plain:
        assert torch.equal(sample.aux_hidden_states, by_id[sample.sample_id].aux_hidden_states)
        assert torch.equal(sample.supervision.target_argmax, by_id[sample.sample_id].supervision.target_argmax)

"""What a commit record says of its samples: the draft vocabulary's share of the target, and what encoding costs."""

from __future__ import annotations

from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle_offline import open_cache
from eagle_offline.cache.layout import CommitRecord
from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.cache.writer import read_record
from tests.builders import SCRATCH, make_cache, shared_chat, shared_target

TARGETS = {
    "llama": ("Llama", ()),
    "gemma2-soft-cap": ("Gemma2", ()),
    "cohere-logit-scale": ("Cohere", ()),
    "llama-biased-tied": ("Llama", (("tie_word_embeddings", True), ("attention_bias", True))),
}
NUM_SAMPLES, DRAFT_VOCAB_SIZE = 10, 120
SIX_DIGITS = 6e-6  # half a unit of the sixth digit, and float32 on the way
TIE_GAP = 1e-4


def target_of(name: str) -> Path:
    kind, changes = TARGETS[name]
    return shared_target(kind, torch.float32, changes)


@once
def _made(name: str, flags: tuple[tuple[str, Any], ...]) -> Path:
    return make_cache(
        SCRATCH / f"mass-{name}-{'-'.join(str(value) for _, value in flags)}",
        target_of(name),
        shared_chat(NUM_SAMPLES),
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        **dict(flags),
    )


def made(name: str, **flags: Any) -> Path:
    return _made(name, tuple(sorted(flags.items())))


def records(path: Path) -> list[CommitRecord]:
    return [read_record(path, shard) for shard in range(len(list(path.glob("commit-*.json"))))]


def by_sample(path: Path) -> dict[int, tuple[int, float]]:
    """`num_in_vocab` and `vocab_mass` of every sample."""
    return {
        sample_id: (count, mass)
        for record in records(path)
        for sample_id, count, mass in zip(
            record.samples.sample_id, record.samples.num_in_vocab, record.samples.vocab_mass, strict=True
        )
    }


@once
def model_of(name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(target_of(name), dtype=torch.float64).eval()


def plain_logits(name: str, sample: Sample) -> torch.Tensor:
    """What the whole model says of a sample alone, float64 [T, V], by one plain call."""
    with torch.no_grad():
        return model_of(name)(input_ids=sample.input_ids[None], use_cache=False).logits[0].double()


def expected_of(logits: torch.Tensor, cache: Cache, sample: Sample) -> tuple[int, int, float]:
    """Fewest and most supervised positions with their argmax inside, and the mass inside them, position by position."""
    inside = set(cache.selected_token_ids.tolist())
    fewest, most, mass = 0, 0, 0.0
    for row, supervised in zip(logits, sample.loss_mask.tolist(), strict=True):
        if not supervised:
            continue
        weights = torch.exp(row - row.max())
        mass += float(weights[sorted(inside)].sum() / weights.sum())
        best = (row >= row.max() - TIE_GAP).nonzero().squeeze(-1).tolist()
        fewest += all(token in inside for token in best)
        most += any(token in inside for token in best)
    return fewest, most, mass


@pytest.mark.parametrize("name", TARGETS)
def test_records_say_how_much_of_the_target_the_draft_vocabulary_holds(name):
    path = made(name, dtype="fp32", state_encoding="raw")
    cache, found = open_cache(path), by_sample(path)
    assert len(cache) == len(found) == NUM_SAMPLES
    partly = 0
    for sample in cache:
        fewest, most, mass = expected_of(plain_logits(name, sample), cache, sample)
        count, recorded = found[sample.sample_id]
        assert fewest <= count <= most
        assert recorded == pytest.approx(mass, rel=SIX_DIGITS + 1e-5)  # the model in float32 against float64
        assert 0 < recorded <= int(sample.loss_mask.sum())
        partly += 0 < count < int(sample.loss_mask.sum()) and recorded < 0.99 * int(sample.loss_mask.sum())
    assert partly > 0


@pytest.mark.parametrize("flags", [{"target_encoding": "dense"}, {"mantissa_bits": 2}, {"target_encoding": "topk"}])
def test_what_is_recorded_is_of_the_states_before_encoding_whatever_the_encoding(flags):
    assert by_sample(made("gemma2-soft-cap", **flags)) == by_sample(made("gemma2-soft-cap"))


def test_what_is_recorded_is_of_states_and_head_as_stored():
    """In bf16: the float64 softmax of the stored states under the head in bf16, and near the plain model's."""
    path = made("gemma2-soft-cap")
    cache, model = open_cache(path), model_of("gemma2-soft-cap")
    head, cap = model.lm_head.weight.detach().bfloat16().double(), model.config.final_logit_softcapping
    for sample in cache:
        states = torch.zeros(len(sample.input_ids), head.shape[1], dtype=torch.float64)
        assert sample.supervision.last_hidden_state is not None
        states[sample.supervision.positions] = sample.supervision.last_hidden_state.double()
        fewest, most, mass = expected_of(cap * torch.tanh(states @ head.T / cap), cache, sample)
        plain = expected_of(plain_logits("gemma2-soft-cap", sample), cache, sample)[2]
        count, recorded = by_sample(path)[sample.sample_id]
        assert recorded == pytest.approx(mass, rel=SIX_DIGITS)
        assert recorded == pytest.approx(plain, rel=2e-2)
        assert fewest <= count <= most


def test_the_index_says_what_the_records_say():
    path = made("llama", dtype="fp32", state_encoding="raw")
    cache, found = open_cache(path), by_sample(path)
    assert list(path.glob("index-*"))
    for index, sample_id in enumerate(cache.sample_ids.tolist()):
        count, mass = found[sample_id]
        assert int(cache.index.num_in_vocab[index]) == count
        assert float(cache.index.vocab_mass[index]) == float(np.float32(mass))
        assert int(cache.index.num_supervised[index]) == int(cache[index].loss_mask.sum())


def test_a_vocabulary_of_every_token_holds_all(tmp_path):
    path = make_cache(tmp_path / "all", target_of("llama"), shared_chat(NUM_SAMPLES), draft_vocab_size=272)
    cache = open_cache(path)
    for sample in cache:
        count, mass = by_sample(path)[sample.sample_id]
        assert count == int(sample.loss_mask.sum())
        assert mass == pytest.approx(count, rel=SIX_DIGITS)


# --- what encoding costs ---------------------------------------------------------------------------------------------


def rows_of(sample: Sample, width: int) -> dict[str, torch.Tensor]:
    layers = sample.aux_hidden_states.double().split(width, dim=1)
    found = {f"aux {number}": layer for number, layer in enumerate(layers)}
    supervision = sample.supervision
    target = supervision.last_hidden_state if supervision.target_probs is None else supervision.target_probs
    assert target is not None
    return {**found, "target": target.double()}


def costs_by_hand(exact: Path, lossy: Path) -> dict[int, dict[str, tuple[float, float]]]:
    """Σ(x̂ − x)² and Σx² of every field of every shard, from two captures of one target."""
    ours, theirs = open_cache(lossy), open_cache(exact)
    assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for index in range(len(ours)):
        width = ours.manifest.identity.target.hidden_size
        sums = found.setdefault(int(ours.shards[index]), {})
        wide, back = rows_of(theirs[index], width), rows_of(ours[index], width)
        for name, values in wide.items():
            error, size = sums.get(name, (0.0, 0.0))
            sums[name] = (error + float(((back[name] - values) ** 2).sum()), size + float((values**2).sum()))
    return found


LOSSY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4 bits": ({"mantissa_bits": 4}, {}),
    "1 bit": ({"mantissa_bits": 1}, {}),
    "fp8": ({"state_encoding": "fp8"}, {}),
    "fp8 of fp16": ({"state_encoding": "fp8", "dtype": "fp16"}, {"state_encoding": "raw", "dtype": "fp16"}),
    "topk": (
        {"target_encoding": "topk", "top_k": 9, "dtype": "fp32", "state_encoding": "raw"},
        {"target_encoding": "dense", "dtype": "fp32", "state_encoding": "raw"},
    ),
    "topk and 3 bits": (
        {"target_encoding": "topk", "top_k": 9, "mantissa_bits": 3},
        {"target_encoding": "dense"},
    ),
}


@pytest.mark.parametrize("name", LOSSY)
def test_records_say_how_far_lossy_fields_are_from_what_was_encoded(name):
    lossy, exact = (made("llama", **flags) for flags in LOSSY[name])
    by_hand = costs_by_hand(exact, lossy)
    fields = open_cache(lossy).manifest.identity.capture.fields
    kinds = {field.name: f"aux {number}" for number, field in enumerate(fields[:-1])} | {fields[-1].name: "target"}
    told = 0
    for shard, record in enumerate(records(lossy)):
        lost = {field.name for field in fields if field.encoding in ("fp8", "topk") or field.mantissa_bits < 7}
        assert set(record.encoding_errors) == lost
        for field, cost in record.encoding_errors.items():
            error, size = by_hand[shard][kinds[field]]
            # Probabilities come in float32, and those of the exact cache stand in bf16 already.
            is_near = field == "target_probs" and name != "topk"
            assert cost.squared_error == pytest.approx(error, rel=0.05 if is_near else SIX_DIGITS)
            assert cost.squared_values == pytest.approx(size, rel=0.01 if is_near else SIX_DIGITS)
            assert 0 < cost.squared_error < cost.squared_values
            told += 1
    assert told >= len(by_hand)


@pytest.mark.parametrize("flags", [{}, {"target_encoding": "dense"}, {"dtype": "fp32", "state_encoding": "raw"}])
def test_exact_fields_have_no_cost(flags):
    assert [record.encoding_errors for record in records(made("llama", **flags))] == [{}] * 3


def test_fewer_bits_cost_more():
    costs = [
        sum(
            cost.squared_error for record in records(made("llama", **flags)) for cost in record.encoding_errors.values()
        )
        for flags in ({"mantissa_bits": 4}, {"mantissa_bits": 1})
    ]
    assert costs[1] > 20 * costs[0]

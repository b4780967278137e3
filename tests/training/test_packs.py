"""Training on packs read undecoded is training on the samples, bit for bit."""

from __future__ import annotations

from functools import cache as once
from pathlib import Path

import pytest
import torch

from eagle_offline import open_cache
from eagle_offline.cache.reader import Cache
from eagle_offline.data.feed import mapped
from eagle_offline.data.stored_pack import PackReader
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.objectives.ttt_loss import StepWeights, TTTLoss
from eagle_offline.training.objective import UnrollObjective
from eagle_offline.training.packs import TrainingPack, make_pack, pack_parts, plan_pack
from tests.builders import SCRATCH, make_cache, shared_chat

CPU, TTT_STEPS, DRAFT_VOCAB_SIZE = torch.device("cpu"), 3, 200
UNROLL = UnrollObjective(TTTLoss(TTT_STEPS))
KINDS = [
    ("factored", "bf16", "planes"),
    ("dense", "bf16", "planes"),
    ("factored", "fp16", "raw"),
    ("dense", "fp32", "raw"),
]


@once
def cache_path(target: str, dtype: str, encoding: str) -> Path:
    return make_cache(
        SCRATCH / f"run-{target}-{dtype}-{encoding}",
        data=shared_chat(12),
        target_encoding=target,
        dtype=dtype,
        state_encoding=encoding,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
    )


@pytest.fixture(params=KINDS, ids="-".join)
def cache(request) -> Cache:
    return open_cache(cache_path(*request.param))


def chosen(cache: Cache, count: int = 8) -> list[int]:
    """Longest first, the order in which decoded samples are laid."""
    return sorted(range(count), key=lambda index: -cache.lengths[index])


def draft_for(cache: Cache, num_layers: int) -> Eagle3DraftModel:
    torch.manual_seed(0)
    target = cache.manifest.identity.target
    config = Eagle3DraftConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        num_aux_hidden_states=num_layers,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Eagle3DraftModel(config)


def outcome(cache: Cache, pack: TrainingPack, num_layers: int = 3) -> list[torch.Tensor]:
    """Loss, hits and every gradient of a pack run through the same draft."""
    model = draft_for(cache, num_layers)
    factored = cache.manifest.identity.capture.target_encoding == "factored"
    head = cache.head.select(cache.selected_token_ids) if factored else None
    (part,) = pack_parts(model, pack, UNROLL, head, StepWeights(torch.ones(TTT_STEPS)))
    loss, sums = part()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 5
    assert loss > 0
    return [loss.detach(), sums.step_hits, sums.step_overlaps, *gradients]


@pytest.mark.parametrize("gate", ["input", "predicted", "both"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_step_on_stored_bytes_is_the_step_on_decoded_samples(cache, merged, gate):
    mask, order = cache.selected_token_mask, chosen(cache)
    stored = PackReader(merged=merged).read([(cache, index) for index in order])
    ours = plan_pack(stored, mask, UNROLL, CPU, gate)
    theirs = make_pack([cache[index] for index in order], mask, UNROLL, CPU, gate)
    assert (ours.sample_ids, ours.num_tokens) == (theirs.sample_ids, theirs.num_tokens)
    for name in ("input_ids", "position_ids", "loss_mask", "seq_lens"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for found, expected in zip(outcome(cache, ours), outcome(cache, theirs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_a_draft_on_some_layers_reads_those_columns(merged):
    cache = open_cache(cache_path(*KINDS[0]))
    mask, order, layers = cache.selected_token_mask, chosen(cache), [0, 2]
    reader = PackReader(layers, merged=merged)
    ours = plan_pack(reader.read([(cache, index) for index in order]), mask, UNROLL, CPU)
    samples = [cache[index] for index in order]
    width = cache.manifest.identity.target.hidden_size
    cut = [
        sample.__class__(
            **{**vars(sample), "aux_hidden_states": sample.aux_hidden_states.view(-1, 3, width)[:, layers].flatten(1)}
        )
        for sample in samples
    ]
    theirs = make_pack(cut, mask, UNROLL, CPU)
    for found, expected in zip(outcome(cache, ours, 2), outcome(cache, theirs, 2), strict=True):
        assert torch.equal(found, expected)


def test_moving_a_pack_moves_every_tensor():
    cache = open_cache(cache_path(*KINDS[0]))
    stored = PackReader(merged=False).read([(cache, index) for index in range(3)])
    pack = plan_pack(stored, cache.selected_token_mask, UNROLL, CPU)
    for moved in (pack.to("meta"), mapped(pack, lambda tensor: tensor.to("meta"))):
        devices: set[str] = set()
        mapped(moved, lambda tensor: devices.add(tensor.device.type) or tensor)  # noqa: B023
        assert devices == {"meta"}
        assert moved.sample_ids == pack.sample_ids
        assert moved.aux_states[0].fields == pack.aux_states[0].fields

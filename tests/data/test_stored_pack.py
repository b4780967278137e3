"""A pack read undecoded is the samples end to end, bit for bit, however it was read and by how many."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle_offline import open_cache
from eagle_offline.cache import codec, reader
from eagle_offline.cache.arrow import ArrowShardReader
from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.cache.samples import StoredSample
from eagle_offline.data.buffers import HostBuffers
from eagle_offline.data.stored_pack import PackReader, StoredPack, _supervised_slots
from eagle_offline.errors import DataError
from eagle_offline.supervision import supervised_positions
from tests.builders import SCRATCH, make_cache, shared_chat

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
KINDS = [
    (target, dtype, encoding)
    for target in ("factored", "dense")
    for dtype, encoding in (("bf16", "planes"), ("bf16", "raw"), ("fp16", "raw"), ("fp32", "raw"))
]


@once
def cache_path(target: str, dtype: str, encoding: str) -> Path:
    return make_cache(
        SCRATCH / f"packed-{target}-{dtype}-{encoding}",
        data=shared_chat(16),
        target_encoding=target,
        dtype=dtype,
        state_encoding=encoding,
        draft_vocab_size=200,
    )


@pytest.fixture(params=KINDS, ids="-".join)
def cache(request) -> Cache:
    return open_cache(cache_path(*request.param))


def merged(states) -> torch.Tensor:
    return torch.cat([part.merge() for part in states])


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    kind = INTEGERS[expected.dtype]
    return found.dtype == expected.dtype and torch.equal(found.view(kind), expected.contiguous().view(kind))


def stored_rows(sample: Sample) -> torch.Tensor:
    rows = sample.supervision.last_hidden_state
    return sample.supervision.target_probs if rows is None else rows


def assert_holds(pack: StoredPack, samples: list[Sample], aux_layers: list[int] | None = None) -> None:
    """The pack is these samples, one after the other."""
    assert pack.sample_ids == tuple(sample.sample_id for sample in samples)
    assert pack.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert torch.equal(pack.input_ids, torch.cat([sample.input_ids for sample in samples]))
    assert torch.equal(pack.loss_mask, torch.cat([sample.loss_mask for sample in samples]))
    assert torch.equal(pack.target_argmax, torch.cat([sample.supervision.target_argmax for sample in samples]))
    aux = torch.cat([sample.aux_hidden_states for sample in samples])
    if aux_layers is not None:
        by_layer = aux.view(len(aux), 3, -1)
        aux = by_layer[:, aux_layers].reshape(len(aux), -1)
    assert same_bits(merged(pack.aux_states), aux)
    assert same_bits(merged(pack.target_states), torch.cat([stored_rows(sample) for sample in samples]))
    start, slots = 0, []
    for sample in samples:
        slots.append(start + supervised_positions(sample.loss_mask).nonzero().squeeze(-1))
        start += len(sample.input_ids)
    assert torch.equal(pack.target_slots, torch.cat(slots))


ORDER = [3, 11, 0, 7, 7, 15, 2]


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("aux_layers", [None, [0, 2], [1], [0, 1, 2]])
def test_a_pack_is_its_samples_bit_for_bit(cache, is_merged, aux_layers):
    pack = PackReader(aux_layers, merged=is_merged).read([(cache, index) for index in ORDER])
    assert_holds(pack, [cache[index] for index in ORDER], aux_layers)
    encodings = {field.encoding for states in (*pack.aux_states, *pack.target_states) for field in states.fields}
    assert encodings == {"raw" if is_merged else cache.manifest.identity.capture.fields[0].encoding}


def test_rows_chosen_before_merging_are_those_chosen_after(cache):
    (states,) = PackReader(merged=False).read([(cache, index) for index in ORDER]).aux_states
    whole = states.merge()
    for index in ([], [0], [4, 1, 1, len(whole) - 1], list(range(len(whole)))):
        rows = torch.tensor(index, dtype=torch.int64)
        chosen = states.rows(rows)
        assert chosen.num_rows == len(index)
        assert same_bits(chosen.merge(), whole[rows])


@pytest.mark.parametrize("is_merged", [False, True])
def test_layers_that_are_not_asked_for_are_not_unpacked(is_merged, monkeypatch):
    cache, unpacked = open_cache(cache_path(*KINDS[0])), []
    name = "unpack" if is_merged else "unpack_into"
    original = getattr(codec, name)
    monkeypatch.setattr(codec, name, lambda field, *a, **k: unpacked.append(field.name) or original(field, *a, **k))
    PackReader([0, 2], merged=is_merged).read([(cache, index) for index in range(4)])
    ids = cache.aux_layer_ids
    assert unpacked == [f"aux_{ids[0]}", f"aux_{ids[2]}", "last_hidden_state"] * 4


@pytest.mark.parametrize("is_merged", [False, True])
def test_caches_stored_in_unlike_ways_mix_in_one_pack(is_merged):
    planes, raw = (open_cache(cache_path("factored", "bf16", encoding)) for encoding in ("planes", "raw"))
    chosen = [(planes, 0), (raw, 1), (raw, 2), (planes, 3), (planes, 4)]
    pack = PackReader(merged=is_merged).read(chosen)
    assert_holds(pack, [cache[index] for cache, index in chosen])
    assert [states.num_rows for states in pack.aux_states] == (
        [sum(pack.lengths)] if is_merged else [pack.lengths[0], sum(pack.lengths[1:3]), sum(pack.lengths[3:])]
    )


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=6))
def test_supervision_stops_at_a_documents_end(masks):
    """A document that begins with an answer says nothing about the one before it."""
    starts = np.cumsum([0, *(len(mask) for mask in masks[:-1])])
    expected = torch.cat([supervised_positions(torch.tensor(mask)) for mask in masks]).nonzero().squeeze(-1)
    assert _supervised_slots(np.concatenate(masks).astype(bool), starts).tolist() == expected.tolist()


def test_a_damaged_sample_is_refused_by_name():
    cache = open_cache(cache_path(*KINDS[0]))
    cache.index = dataclasses.replace(cache.index, digest=np.where(np.arange(len(cache)) == 5, 0, cache.index.digest))
    with pytest.raises(DataError, match=rf"sample {cache.sample_ids[5]} does not match its digest"):
        PackReader().read([(cache, 4), (cache, 5)])


def test_a_loss_mask_that_calls_for_other_supervision_is_refused_even_unverified(monkeypatch):
    """What is laid out by it would be laid out wrong."""
    cache, original = open_cache(cache_path(*KINDS[0]), verify=False), ArrowShardReader.read

    def read(shard: ArrowShardReader, record_batch: int, row: int) -> StoredSample:
        stored = original(shard, record_batch, row)
        return dataclasses.replace(stored, loss_mask=np.zeros_like(stored.loss_mask))

    monkeypatch.setattr(ArrowShardReader, "read", read)
    with pytest.raises(DataError, match="supervision at other positions"):
        PackReader().read([(cache, 0)])


@pytest.mark.parametrize("is_merged", [False, True])
def test_many_threads_read_one_cache_with_few_shards_open(is_merged, monkeypatch):
    monkeypatch.setattr(reader, "_MAX_OPEN_SHARDS", 2)
    cache = open_cache(cache_path(*KINDS[0]))
    assert len(cache.index.entries) == 4
    samples = [cache[index] for index in range(len(cache))]
    pack_reader = PackReader(merged=is_merged)
    generator = np.random.default_rng(0)
    orders = [generator.integers(0, len(cache), 6).tolist() for _ in range(150)]

    def read(order: list[int]) -> None:
        assert_holds(pack_reader.read([(cache, index) for index in order]), [samples[index] for index in order])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(read, orders))
    assert len(cache._open) <= 2


# Memory that packs lie in.


def buffer_of(size: int, buffers: HostBuffers, fill: int) -> tuple[torch.Tensor, int]:
    tensor = buffers.take(size).fill_(fill)
    return tensor, tensor.data_ptr()


VIEWS: dict[str, Callable[[torch.Tensor], object]] = {
    "slice": lambda tensor: tensor[17:90],
    "dtype": lambda tensor: tensor[:64].view(torch.bfloat16),
    "numpy": lambda tensor: tensor.numpy()[5:],
    "graph": lambda tensor: (tensor[:8].view(torch.float32) * torch.ones(2, requires_grad=True)).grad_fn,
}


def test_memory_is_used_again_when_nothing_views_it(monkeypatch):
    allocated, original = [], np.empty
    monkeypatch.setattr(np, "empty", lambda *arguments: allocated.append(arguments) or original(*arguments))
    buffers = HostBuffers(pinned=False)
    first, place = buffer_of(3 << 20, buffers, 1)
    del first
    again, found = buffer_of((3 << 20) - 5, buffers, 2)
    assert found == place
    assert len(allocated) == 1
    other, elsewhere = buffer_of(3 << 20, buffers, 3)
    assert elsewhere != place
    assert len(allocated) == 2
    assert set(again.tolist()[:9]) == {2}
    assert len(other) == 3 << 20


@pytest.mark.parametrize("view", VIEWS)
def test_memory_that_is_still_viewed_is_left_alone(view):
    buffers = HostBuffers(pinned=False)
    tensor, place = buffer_of(2 << 20, buffers, 1)
    kept = VIEWS[view](tensor)
    del tensor
    gc.collect()
    other, elsewhere = buffer_of(2 << 20, buffers, 2)
    assert elsewhere != place
    del kept, other
    gc.collect()
    assert {buffer_of(2 << 20, buffers, 3)[1] for _ in range(4)} <= {place, elsewhere}


def test_many_threads_never_share_memory():
    buffers = HostBuffers(pinned=False)

    def work(number: int) -> bool:
        tensor = buffers.take(1 << 20).fill_(number % 251)
        return bool((tensor == number % 251).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))

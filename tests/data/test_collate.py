"""Samples are laid into rows without losing or moving anything, and shifted into the slot frame once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import open_cache
from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.data.collate import PackedBatch, collate, lay_rows, slot_batch
from eagle_offline.errors import DataError
from tests.training.caches import shared_cache


@pytest.fixture(scope="module", params=["factored", "dense"])
def cache(request) -> Cache:
    return open_cache(shared_cache(request.param))


def samples_of(cache: Cache, count: int = 7) -> list[Sample]:
    return [cache[index] for index in range(3, 3 + count)]


def head_of(cache: Cache):
    factored = cache.manifest.identity.capture.target_encoding == "factored"
    return cache.head.select(cache.selected_token_ids) if factored else None


def placed(pack: PackedBatch, samples: list[Sample]) -> list[tuple[Sample, int, int]]:
    """Each sample of a pack with its row and first slot, read off `seq_lens` and `sample_ids`."""
    by_id = {sample.sample_id: sample for sample in samples}
    ids, places = iter(pack.sample_ids), []
    for row, lengths in enumerate(pack.seq_lens.tolist()):
        start = 0
        for length in lengths:
            if length:
                sample = by_id[next(ids)]
                assert len(sample.input_ids) == length
                places.append((sample, row, start))
                start += length
    assert len(places) == len(samples)
    return places


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=40), st.integers(64, 200))
def test_rows_hold_every_sample_once_and_never_overflow(lengths, row_slots):
    rows = lay_rows(lengths, row_slots)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(sum(lengths[index] for index in row) <= row_slots for row in rows)
    # First fit leaves at most one row half empty.
    assert sum(2 * sum(lengths[index] for index in row) <= row_slots for row in rows) <= 1


def test_rows_are_laid_longest_first():
    assert lay_rows([3, 5, 2], row_slots=5) == [[1], [0, 2]]
    assert lay_rows([], row_slots=5) == []


@pytest.mark.parametrize("row_slots", [None, 200, 4000])
def test_a_pack_holds_its_samples_unshifted(cache, row_slots):
    samples = samples_of(cache)
    pack = collate(samples, row_slots)
    num_slots = row_slots or max(len(sample.input_ids) for sample in samples)
    assert pack.input_ids.shape[1] == num_slots
    assert pack.num_tokens == sum(len(sample.input_ids) for sample in samples)
    covered = torch.zeros(pack.input_ids.shape, dtype=torch.bool)
    slots, rows, argmax = [], [], []
    for sample, row, start in placed(pack, samples):
        here = slice(start, start + len(sample.input_ids))
        assert torch.equal(pack.input_ids[row, here], sample.input_ids)
        assert torch.equal(pack.loss_mask[row, here], sample.loss_mask)
        assert torch.equal(pack.aux_hidden_states[row, here], sample.aux_hidden_states)
        covered[row, here] = True
        slots.append(row * num_slots + start + sample.supervision.positions)
        stored = sample.supervision.last_hidden_state
        rows.append(sample.supervision.target_probs if stored is None else stored)
        argmax.append(sample.supervision.target_argmax)
    assert torch.equal(pack.target_slots, torch.cat(slots))
    assert torch.equal(pack.target_rows, torch.cat(rows))
    assert torch.equal(pack.target_argmax, torch.cat(argmax))
    for tensor in (pack.input_ids, pack.loss_mask, pack.aux_hidden_states):
        assert not tensor[~covered].any()
    assert pack.aux_hidden_states.dtype == samples[0].aux_hidden_states.dtype


def test_moving_a_pack_moves_every_tensor(cache):
    pack = collate(samples_of(cache, 2))
    moved = pack.to("meta")
    tensors = [getattr(moved, field.name) for field in dataclasses.fields(moved) if field.name != "sample_ids"]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.sample_ids == pack.sample_ids


def test_a_sample_without_supervision_is_refused_by_name(cache):
    sample = cache[0]
    bare = dataclasses.replace(sample.supervision, last_hidden_state=None, target_probs=None)
    with pytest.raises(DataError, match=f"sample {sample.sample_id} "):
        collate([dataclasses.replace(sample, supervision=bare)])


@pytest.mark.parametrize("row_slots", [None, 4000, 97])
def test_the_slot_frame_is_the_one_of_the_definition(cache, row_slots):
    """Slot `t` reads `a_t` and `x_{t+1}` is supervised by `m_{t+1}`, `p_{t+1}`, `c_{t+1}`, at document ends too."""
    samples = samples_of(cache)
    pack = collate(samples, row_slots)
    batch = slot_batch(pack, head_of(cache), cache.selected_token_mask)
    num_rows, num_slots = pack.input_ids.shape
    in_use = torch.zeros(num_rows, num_slots, dtype=torch.bool)
    for sample, row, start in placed(pack, samples):
        probs, mask = cache.target_probs(sample)
        length = len(sample.input_ids)
        for t in range(length):
            slot = start + t
            in_use[row, slot] = True
            assert torch.equal(batch.aux_hidden_states[row, slot], sample.aux_hidden_states[t])
            assert batch.position_ids[row, slot] == t
            assert batch.doc_remaining[row, slot] == length - 1 - t
            if t + 1 < length:
                assert batch.input_ids[row, slot] == sample.input_ids[t + 1]
                assert batch.loss_mask[row, slot] == sample.loss_mask[t + 1]
                assert batch.position_mask[row, slot] == mask[t + 1, 0]
                # One matrix product over all rows of a pack, or over one sample's: float32 sums in another order.
                torch.testing.assert_close(batch.target_probs[row, slot], probs[t + 1], rtol=1e-5, atol=1e-7)
        last = start + length - 1
        assert not batch.counting_slots(batch.position_mask, 0)[row, last]
        assert not batch.counting_slots(batch.loss_mask, 0)[row, last]
    assert torch.equal(batch.attention_mask.bool(), in_use)
    assert torch.equal(batch.seq_lens, pack.seq_lens)
    assert not batch.position_ids[~in_use].any()
    assert not batch.doc_remaining[~in_use].any()
    counted = torch.stack([batch.counting_slots(mask, 0) for mask in (batch.position_mask, batch.loss_mask)])
    assert not (counted & ~in_use).any()


def test_cached_supervision_is_what_training_reads_after_the_shift(cache):
    """`Cache.target_probs` and `slot_batch` agree on a sample alone, zeros included."""
    for index in range(0, len(cache), 5):
        sample = cache[index]
        probs, mask = cache.target_probs(sample)
        batch = slot_batch(collate([sample]), head_of(cache), cache.selected_token_mask)
        assert torch.equal(batch.position_mask[0, :-1], mask[1:, 0])
        assert not batch.position_mask[0, -1]
        torch.testing.assert_close(batch.target_probs[0, :-1], probs[1:], rtol=1e-6, atol=1e-8)
        assert not batch.target_probs[0, -1].any()
        assert torch.equal(batch.target_probs[0, :-1].any(-1), sample.loss_mask[1:])
        supervised = batch.target_probs[0][batch.loss_mask[0]]
        # Dense probabilities are stored in bf16: 8 bits of mantissa each.
        torch.testing.assert_close(supervised.sum(-1), torch.ones(len(supervised)), rtol=4e-3, atol=0)

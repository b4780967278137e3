"""The unroll that training runs equals the plain one in every sum, hit and gradient, and does no more than it must."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.plan import UnrollPlan, plan_unroll
from eagle_offline.objectives.ttt import UnrollSums, supervised_counts, unroll
from eagle_offline.supervision import Head

VOCAB_SIZE, HIDDEN_SIZE = 37, 16
FORMS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "three layers": {"num_hidden_layers": 3},
    "one head a key": {"num_key_value_heads": 4},
}


def make_draft(form: str, dtype: torch.dtype = torch.float64) -> Eagle3DraftModel:
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Eagle3DraftModel(Eagle3DraftConfig(**{"vocab_size": VOCAB_SIZE, **shape, **FORMS[form]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter) if parameter.dim() == 1 else parameter * 10)
    return model.to(dtype)


def make_batch(
    lengths: list[int], loss_mask: np.ndarray, gate: np.ndarray, dtype: torch.dtype = torch.float64
) -> SlotBatch:
    """Documents end to end in one row, masks in the slot frame."""
    generator = torch.Generator().manual_seed(1)
    num_slots, seq_lens = sum(lengths), torch.tensor([lengths])
    mask = torch.from_numpy(loss_mask)[None]
    return SlotBatch(
        input_ids=torch.randint(VOCAB_SIZE, (1, num_slots), generator=generator),
        attention_mask=torch.ones(1, num_slots),
        loss_mask=mask,
        aux_hidden_states=torch.randn(1, num_slots, 3 * HIDDEN_SIZE, generator=generator, dtype=torch.float64).to(
            dtype
        ),
        target_probs=torch.randn(1, num_slots, VOCAB_SIZE, generator=generator, dtype=torch.float64)
        .mul(3)
        .softmax(-1)
        .to(dtype),
        position_mask=mask & torch.from_numpy(gate)[None],
        position_ids=position_ids(seq_lens, num_slots),
        seq_lens=seq_lens,
        doc_remaining=doc_remaining(seq_lens, num_slots),
    )


def plan_of(batch: SlotBatch, lengths: list[int], ttt_steps: int, longest_chunk: int = 7) -> UnrollPlan:
    rows = np.arange(sum(lengths))
    return plan_unroll(
        lengths, batch.loss_mask[0].numpy(), batch.position_mask[0].numpy(), rows, ttt_steps, longest_chunk
    )


def run_packed(
    model: Eagle3DraftModel, batch: SlotBatch, plan: UnrollPlan, weights: torch.Tensor
) -> tuple[torch.Tensor, UnrollSums]:
    work = PackedUnroll(model, plan, batch.input_ids[0], batch.position_ids[0])
    targets = TargetRows(batch.target_probs[0], None)
    return unroll_packed(
        work, model.before_head, model.lm_head.weight, plan, batch.aux_hidden_states[0], targets, weights
    )


def gradients(model: Eagle3DraftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_equal(form: str, lengths: list[int], batch: SlotBatch, ttt_steps: int, longest_chunk: int) -> None:
    model = make_draft(form)
    weights = torch.rand(ttt_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = unroll(model, batch, ttt_steps, with_overlap=True)
    expected = gradients(model, (plain.losses * weights).sum())
    loss, sums = run_packed(model, batch, plan_of(batch, lengths, ttt_steps, longest_chunk), weights)
    torch.testing.assert_close(loss.detach(), (plain.losses * weights).sum().detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.losses, plain.losses.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.overlaps, plain.overlaps.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(sums.counts, plain.counts)
    assert torch.equal(sums.counts, supervised_counts(batch, ttt_steps))
    assert torch.equal(sums.step_hits, plain.step_hits)
    assert torch.equal(sums.step_valid, plain.step_valid)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-9, atol=1e-9, msg=lambda said, name=name: f"{name}: {said}"
        )


def random_masks(lengths: list[int], seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    num_slots = sum(lengths)
    return generator.random(num_slots) < share, generator.random(num_slots) < 0.8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "lengths", [[1], [2], [9], [1, 2, 3, 5, 8, 13, 21], [300, 40, 2, 7, 270, 31]], ids=lambda lengths: str(len(lengths))
)
def test_packed_unroll_equals_the_plain_one_in_sums_hits_and_gradients(form, lengths):
    assert_equal(form, lengths, make_batch(lengths, *random_masks(lengths, 0, 0.5)), 4, 37)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ttt_steps=st.integers(1, 5),
    longest_chunk=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_packed_unroll_equals_the_plain_one_for_any_masks(lengths, seed, share, ttt_steps, longest_chunk):
    batch = make_batch(lengths, *random_masks(lengths, seed, share))
    assert_equal("three layers" if seed % 2 else "eagle3.1", lengths, batch, ttt_steps, longest_chunk)


def test_float32_agrees_to_a_hundred_thousandth():
    lengths = [40, 7, 90, 1, 23]
    masks = random_masks(lengths, 3, 0.5)
    model, batch = make_draft("eagle3", torch.float32), make_batch(lengths, *masks, torch.float32)
    weights = torch.full((4,), 0.25)
    plain = unroll(model, batch, 4)
    expected = gradients(model, (plain.losses * weights).sum())
    loss, sums = run_packed(model, batch, plan_of(batch, lengths, 4), weights)
    torch.testing.assert_close(sums.losses, plain.losses.detach(), rtol=1e-5, atol=0)
    for name, gradient in gradients(model, loss).items():
        error = float((gradient - expected[name]).abs().max())
        assert error <= 1e-5 * float(expected[name].abs().max()), name


def test_supervision_from_final_states_equals_that_from_probabilities():
    lengths = [12, 30, 5]
    batch = make_batch(lengths, *random_masks(lengths, 4, 0.6))
    generator = torch.Generator().manual_seed(5)
    head = Head(torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator, dtype=torch.float64), soft_cap=9.0)
    states = torch.randn(sum(lengths), HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    batch.target_probs = head.logits(states).softmax(dim=-1)[None]
    model, plan, weights = make_draft("eagle3"), plan_of(batch, lengths, 3), torch.ones(3, dtype=torch.float64)
    _, stored = run_packed(model, batch, plan, weights)
    work = PackedUnroll(model, plan, batch.input_ids[0], batch.position_ids[0])
    _, made = unroll_packed(
        work,
        model.before_head,
        model.lm_head.weight,
        plan,
        batch.aux_hidden_states[0],
        TargetRows(states, head),
        weights,
    )
    torch.testing.assert_close(made.losses, stored.losses, rtol=1e-9, atol=0)


def test_without_gradients_none_are_made():
    lengths = [12, 30]
    model, batch = make_draft("eagle3"), make_batch(lengths, *random_masks(lengths, 4, 0.6))
    weights = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        loss, sums = run_packed(model, batch, plan_of(batch, lengths, 3), weights)
    assert not loss.requires_grad
    torch.testing.assert_close(sums.losses, unroll(model, batch, 3).losses.detach(), rtol=1e-9, atol=0)


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    seed=st.integers(0, 10_000),
    ttt_steps=st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_a_plan_computes_what_counts_and_nothing_else(lengths, seed, ttt_steps):
    batch = make_batch(lengths, *random_masks(lengths, seed, 0.05))
    plan = plan_of(batch, lengths, ttt_steps)
    mask = batch.position_mask[0].numpy()
    remaining, columns = batch.doc_remaining[0].numpy(), batch.position_ids[0].numpy()
    num_slots = sum(lengths)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    counts = [
        {slot for slot in range(num_slots) if step < remaining[slot] and slot + step < num_slots and mask[slot + step]}
        for step in range(ttt_steps)
    ]
    for step, planned in enumerate(plan.steps):
        slots = planned.slots.tolist()
        assert set(slots) == set().union(*counts[step:])
        assert {slots[row] for row in planned.supervised.tolist()} == counts[step]
        covered = [row for call in planned.calls for row in call.real_rows.tolist()]
        assert sorted(covered) == list(range(len(slots))), "every active slot attends once"
        for call in planned.calls:
            queries = call.query_rows.flatten()[call.real]
            assert torch.equal(queries, call.real_rows)
            for row, last, keys in zip(call.query_rows, call.query_columns, call.key_rows, strict=True):
                read = plan.key_slots[keys].numpy()
                for query, column in zip(row.tolist(), last.tolist(), strict=True):
                    slot = slots[query]
                    assert column == columns[slot]
                    assert (documents[read[: column + 1]] == documents[slot]).all()
                    assert read[: column + 1].tolist() == list(range(slot - column, slot + 1))
    needed = {
        slot
        for slot in range(num_slots)
        if any(documents[a] == documents[slot] and a >= slot for a in plan.steps[0].slots.tolist())
    }
    assert set(plan.key_slots.tolist()) == needed

"""The unroll that training runs equals the plain one in every sum, hit and gradient, and does no more than it must."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids
from eagle_offline.draft import ragged_attention, ragged_flash
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.objectives import attention_calls
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.plan import UnrollPlan, plan_unroll
from eagle_offline.objectives.ttt import UnrollSums, supervised_counts, unroll
from eagle_offline.objectives.ttt_loss import StepWeights, TTTLoss
from eagle_offline.supervision import Head
from tests.objectives.attention_cases import stand_in_for_the_flash_kernel

VOCAB_SIZE, HIDDEN_SIZE = 37, 16
FORMS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "three layers": {"num_hidden_layers": 3},
    "one head a key": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "qwen3": {"layer_style": "qwen3"},
}


def make_draft(form: str, dtype: torch.dtype = torch.float64) -> Eagle3DraftModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
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


def plan_of(
    batch: SlotBatch, lengths: list[int], ttt_steps: int, longest_chunk: int = 7, ragged: bool = False
) -> UnrollPlan:
    rows = np.arange(sum(lengths))
    masks = batch.loss_mask[0].numpy(), batch.position_mask[0].numpy()
    return plan_unroll(lengths, *masks, rows, ttt_steps, longest_chunk, ragged=ragged)


def run_packed(
    model: Eagle3DraftModel,
    batch: SlotBatch,
    plan: UnrollPlan,
    weights: torch.Tensor | StepWeights,
    recompute: bool = False,
) -> tuple[torch.Tensor, UnrollSums]:
    work = PackedUnroll(model, plan, batch.input_ids[0], batch.position_ids[0], recompute)
    targets = TargetRows.of(batch.target_probs[0], None)
    head_weight, given = model.lm_head.weight, StepWeights(weights) if isinstance(weights, torch.Tensor) else weights
    return unroll_packed(work, model.before_head, head_weight, plan, lambda: batch.aux_hidden_states[0], targets, given)


def gradients(model: Eagle3DraftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_equal(
    form: str,
    lengths: list[int],
    batch: SlotBatch,
    ttt_steps: int,
    longest_chunk: int,
    ragged: bool = False,
    recompute: bool = False,
) -> None:
    model, plan = make_draft(form), plan_of(batch, lengths, ttt_steps, longest_chunk, ragged)
    weights = torch.rand(ttt_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = unroll(model, batch, ttt_steps, with_overlap=True)
    expected = gradients(model, (plain.losses * weights).sum())
    loss, sums = run_packed(model, batch, plan, weights, recompute)
    torch.testing.assert_close(loss.detach(), (plain.losses * weights).sum().detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.losses, plain.losses.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.overlaps, plain.overlaps.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(sums.counts, plain.counts)
    assert torch.equal(sums.counts, supervised_counts(batch, ttt_steps))
    assert torch.equal(sums.step_hits, plain.step_hits)
    assert torch.equal(sums.step_valid, plain.step_valid)
    torch.testing.assert_close(sums.log_overlaps, plain.log_overlaps.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.step_overlaps, plain.step_overlaps, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-9, atol=1e-9, msg=lambda said, name=name: f"{name}: {said}"
        )


def random_masks(lengths: list[int], seed: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    num_slots = sum(lengths)
    return generator.random(num_slots) < share, generator.random(num_slots) < 0.8


@pytest.fixture(params=["padded", "ragged", "flash"])
def ragged(request, monkeypatch) -> Iterator[bool]:
    """Whether attention is planned in runs: by the twin of the CUDA kernel, or by a stand-in for it."""
    if request.param == "flash":
        monkeypatch.setattr(ragged_attention, "_kernel", lambda queries: ragged_flash)
    with stand_in_for_the_flash_kernel() if request.param == "flash" else nullcontext():
        yield request.param != "padded"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "lengths", [[1], [2], [9], [1, 2, 3, 5, 8, 13, 21], [300, 40, 2, 7, 270, 31]], ids=lambda lengths: str(len(lengths))
)
def test_packed_unroll_equals_the_plain_one_in_sums_hits_and_gradients(form, lengths, ragged):
    assert_equal(form, lengths, make_batch(lengths, *random_masks(lengths, 0, 0.5)), 4, 37, ragged)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ttt_steps=st.integers(1, 5),
    longest_chunk=st.integers(1, 9),
    ragged=st.booleans(),
    recompute=st.booleans(),
    filled_gap=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_packed_unroll_equals_the_plain_one_for_any_masks(
    lengths, seed, share, ttt_steps, longest_chunk, ragged, recompute, filled_gap
):
    batch = make_batch(lengths, *random_masks(lengths, seed, share))
    form = "three layers" if seed % 2 else "eagle3.1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_calls, "_FILLED_GAP", filled_gap)
        assert_equal(form, lengths, batch, ttt_steps, longest_chunk, ragged, recompute)


def turns(lengths: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """User and assistant by turns of so many slots, and now and then a slot that does not count."""
    columns = np.concatenate([np.arange(count) for count in lengths])
    return columns // length % 2 == 1, columns % 17 != 5


@pytest.mark.parametrize("length", [3, 25, 90])
def test_documents_of_many_turns_equal_the_plain_unroll(length, ragged):
    lengths = [120, 400]
    batch = make_batch(lengths, *turns(lengths, length))
    assert_equal("eagle3", lengths, batch, 4, 50, ragged)
    runs = [len(call.runs) for step in plan_of(batch, lengths, 4, ragged=True).steps for call in step.calls]
    assert (max(runs) > len(lengths)) == (length > 64), "short gaps are filled, long ones are not"


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
        lambda: batch.aux_hidden_states[0],
        TargetRows.of(states, head),
        StepWeights(weights),
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


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", ["eagle3", "three layers"])
def test_recomputed_steps_have_the_same_bits(form, autocast, share, ragged):
    lengths = [40, 7, 90, 1, 23]
    model, batch = make_draft(form, torch.float32), make_batch(lengths, *random_masks(lengths, 3, share), torch.float32)
    plan, found = plan_of(batch, lengths, 4, ragged=ragged), []
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, sums = run_packed(model, batch, plan, torch.full((4,), 0.25), recompute)
        found.append([loss.detach(), sums.losses, *gradients(model, loss).values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert share == 0 or any(tensor.any() for tensor in found[1][2:])


def test_autocast_in_runs_stays_close_to_float32():
    lengths = [40, 7, 90, 1, 23]
    model, batch = make_draft("eagle3", torch.float32), make_batch(lengths, *random_masks(lengths, 3, 0.6))
    weights = torch.full((4,), 0.25)
    expected, _ = run_packed(model, batch, plan_of(batch, lengths, 4), weights)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = run_packed(model, batch, plan_of(batch, lengths, 4, ragged=True), weights)
    # bf16 has eight bits; the loss is a mean over hundreds of rows.
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


class LiveBytes(TorchDispatchMode):
    """Bytes of everything that operators have made and that is still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known and id(storage) not in known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, num_bytes: int) -> None:
        self.live -= num_bytes


@dataclass
class Memory:
    kept: int
    peak: int


def memory_of(model: Eagle3DraftModel, batch: SlotBatch, plan: UnrollPlan, recompute: bool) -> Memory:
    """Bytes kept between forward and backward, and at most."""
    model.zero_grad(set_to_none=True)
    weights = torch.full((len(plan.steps),), 0.25)
    with LiveBytes() as memory:
        loss, _ = run_packed(model, batch, plan, weights, recompute)
        kept = memory.live
        loss.backward()
    return Memory(kept, memory.peak)


def saved_bytes(model: Eagle3DraftModel, batch: SlotBatch, plan: UnrollPlan, recompute: bool) -> int:
    """Bytes that autograd saves, each storage once, the weights aside."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_packed(model, batch, plan, torch.full((len(plan.steps),), 0.25), recompute)
    return sum(saved.values())


def test_recomputation_keeps_states_keys_and_values_alone():
    lengths, ttt_steps = [90, 160, 50], 7
    model = make_draft("eagle3", torch.float32)
    batch = make_batch(lengths, *turns(lengths, 25), torch.float32)
    plan = plan_of(batch, lengths, ttt_steps)
    whole, less = (memory_of(model, batch, plan, recompute) for recompute in (False, True))
    rows = sum(len(step.slots) for step in plan.steps)
    supervised = sum(len(step.supervised) for step in plan.steps)
    fed_back, keys_and_values = rows * HIDDEN_SIZE, (len(plan.key_slots) + rows) * 2 * 2 * 8
    # The loss outside the steps keeps states before and after their norm, and the gradients that it made already.
    outside = supervised * 4 * HIDDEN_SIZE
    assert less.kept <= 4 * (fed_back + keys_and_values + outside)
    assert less.kept < 0.45 * whole.kept
    assert less.peak < 0.6 * whole.peak
    assert saved_bytes(model, batch, plan, True) < 0.3 * saved_bytes(model, batch, plan, False)


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


@pytest.mark.parametrize("share", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_every_loss_type_equals_the_plain_one_in_value_and_gradients(lk_loss_type, share):
    lengths = [12, 30, 5, 41]
    model, batch = make_draft("eagle3"), make_batch(lengths, *random_masks(lengths, 4, share))
    ttt_loss = TTTLoss(4, 0.7, lk_loss_type, lk_kl_scale=0.9, lk_kl_decay=2.0)
    plain = unroll(model, batch, 4, with_overlap=True)
    expected_loss = ttt_loss.loss(plain)
    expected = gradients(model, expected_loss)
    plan = plan_of(batch, lengths, 4)
    loss, sums = run_packed(model, batch, plan, ttt_loss.weights(plain.counts, plain.overlaps.detach()))
    torch.testing.assert_close(ttt_loss.loss(sums), expected_loss.detach(), rtol=1e-9, atol=1e-9)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    if lk_loss_type != "lambda":  # whose weights leave a constant out
        torch.testing.assert_close(loss.detach(), expected_loss.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_in_bf16_the_packed_unroll_is_as_near_to_the_exact_one_as_the_plain_unroll(form):
    """Neither is exact; the fast one must not be the worse: errors of loss and gradients against float64."""
    lengths, weights = [40, 7, 90, 1, 23], torch.full((4,), 0.25, dtype=torch.float64)
    masks = random_masks(lengths, 3, 0.5)
    batch, exact_batch = (make_batch(lengths, *masks, dtype) for dtype in (torch.float32, torch.float64))
    exact_model, model = make_draft(form), make_draft(form, torch.float32)
    exact = unroll(exact_model, exact_batch, 4)
    expected = gradients(exact_model, (exact.losses * weights).sum())
    with torch.autocast("cpu", torch.bfloat16):
        plain = unroll(model, batch, 4)
        rough = gradients(model, (plain.losses * weights).sum())
        loss, sums = run_packed(model, batch, plan_of(batch, lengths, 4), weights)
    ours = gradients(model, loss)

    def error(found: torch.Tensor, right: torch.Tensor) -> float:
        return float((found.double() - right).norm() / right.norm().clamp_min(1e-12))

    assert error(sums.losses, exact.losses.detach()) <= 2 * error(plain.losses.detach(), exact.losses.detach()) + 1e-3
    for name, right in expected.items():
        assert error(ours[name], right) <= 1.5 * error(rough[name], right) + 1e-3, name
        assert error(ours[name], right) < 0.1, name

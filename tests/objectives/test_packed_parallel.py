"""The parallel forward that training runs is what element by element says, in any number of parts, and stays small."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import element_attention
from eagle_offline.draft import ragged_attention, ragged_flash
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.parallel import PackedParallel
from eagle_offline.errors import UsageError
from eagle_offline.objectives import attention_calls
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_parallel import PackedParallelLoss
from eagle_offline.objectives.parallel_loss import ParallelLoss
from eagle_offline.objectives.parallel_plan import (
    Elements,
    ParallelPlan,
    every_element,
    plan_parallel,
    sample_elements,
)
from eagle_offline.objectives.peagle_plan import CodSampling
from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.supervision import Head
from tests.objectives.attention_cases import stand_in_for_the_flash_kernel
from tests.objectives.test_packed_ttt import LiveBytes
from tests.oracles import drafts
from tests.oracles import peagle as oracle
from tests.oracles.ttt import gradients as oracle_gradients
from tests.oracles.ttt import row_documents

DEPTHS, MASK_TOKEN = 5, 3
FORMS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "three layers": {"num_hidden_layers": 3},
    "qwen3": {"num_hidden_layers": 2, "layer_style": "qwen3"},
    "fc_norm": {"fc_norm": True, "num_key_value_heads": 1},
    "norm_output": {"norm_output": True},
}
LLAMA = [name for name, changes in FORMS.items() if "layer_style" not in changes]


def make_draft(form: str) -> Eagle3DraftModel:
    """A float64 draft whose every parameter is far from its neutral value."""
    config = drafts.make_config(drafts.Shape()).to_dict() | FORMS[form]
    # The flash kernel's heads are multiples of 8 wide.
    config |= {"parallel_drafting": True, "mask_token_id": MASK_TOKEN, "head_dim": 8}
    torch.manual_seed(0)
    model = Eagle3DraftModel(Eagle3DraftConfig(**config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 1.5 * noise / parameter.shape[-1] ** 0.5)
    return model


class Case:
    """Documents end to end, slot frame, and the elements drawn of them."""

    def __init__(self, lengths: list[int], share: float, seed: int = 0, ratio: float = 0.8):
        rng = np.random.default_rng(seed)
        self.lengths, num_slots = lengths, sum(lengths)
        mask = rng.random(num_slots) < share
        documents = row_documents(lengths, num_slots)
        ends = np.cumsum(lengths) - 1
        self.supervised = mask.copy()
        self.supervised[ends] = False
        self.inside = rng.random(num_slots) < 0.8
        self.sampling = CodSampling(DEPTHS, ratio, 0.3)
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(lengths))]
        self.elements = sample_elements(lengths, self.supervised, self.sampling, generators)
        drawn, start = [], 0
        for index, length in enumerate(lengths):
            permutation = oracle.permutations_of(torch.Generator().manual_seed(seed + index))
            own = self.supervised[start : start + length].tolist()
            drawn += [
                (anchor + start, depth) for anchor, depth in oracle.cod_elements(own, DEPTHS, ratio, 0.3, permutation)
            ]
            start += length
        self.drawn = oracle.Drawn(documents, self.supervised.tolist(), drawn)
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(drafts.VOCAB_SIZE, (num_slots,), generator=generator)
        aux_size = drafts.NUM_AUX * drafts.TARGET_HIDDEN_SIZE
        self.aux = torch.randn(num_slots, aux_size, generator=generator, dtype=torch.float64)
        logits = torch.randn(num_slots, drafts.DRAFT_VOCAB_SIZE, generator=generator, dtype=torch.float64)
        self.probs = logits.mul(3).softmax(-1)

    @property
    def position_ids(self) -> torch.Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths])

    def plan(self, num_segments: int = 1, ragged: bool = False, elements: Elements | None = None) -> ParallelPlan:
        chosen = self.elements if elements is None else elements
        rows = np.arange(sum(self.lengths))
        return plan_parallel(
            self.lengths, self.supervised, self.inside, rows, chosen, DEPTHS, 7, num_segments, ragged=ragged
        )

    def oracle(self, model: Eagle3DraftModel, drawn: oracle.Drawn) -> tuple[oracle.Parallel, dict[str, torch.Tensor]]:
        draft = drafts.twin(model)
        found = oracle.parallel_loss(
            draft,
            [drawn],
            input_ids=self.input_ids[None],
            aux_hidden_states=self.aux[None],
            target_probs=self.probs[None],
            inside=torch.from_numpy(self.inside)[None],
            num_depths=DEPTHS,
            mask_token_id=MASK_TOKEN,
        )
        return found, oracle_gradients(draft, found.loss)


def loss_of(model: Eagle3DraftModel, case: Case, plan: ParallelPlan, loss: ParallelLoss, recompute: bool = False):
    return PackedParallelLoss(
        PackedParallel(model, plan, case.input_ids, case.position_ids, recompute),
        model.before_head,
        model.lm_head.weight,
        plan,
        lambda: case.aux.to(model.dtype),
        TargetRows.of(case.probs.to(model.dtype), None),
        loss.weights(plan.step_counts),
    )


def run(
    model: Eagle3DraftModel,
    case: Case,
    plan: ParallelPlan,
    loss: ParallelLoss | None = None,
    recompute: bool = False,
) -> tuple[float, list[UnrollSums], dict[str, torch.Tensor]]:
    """Loss, sums of the parts that have any, and gradients, zero where none arrived."""
    model.zero_grad(set_to_none=True)
    total, found = 0.0, []
    for part in loss_of(model, case, plan, loss or ParallelLoss(DEPTHS), recompute).parts():
        value, sums = part()
        value.backward()
        total += float(value.detach())
        found += [] if sums is None else [sums]
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return total, found, grads


def assert_is_the_oracle_s(form: str, case: Case, num_segments: int, ragged: bool, recompute: bool = False) -> None:
    model = make_draft(form)
    expected, gradients = case.oracle(model, case.drawn)
    total, sums, found = run(model, case, case.plan(num_segments, ragged), recompute=recompute)
    assert total == pytest.approx(float(expected.loss.detach()), rel=1e-9, abs=1e-12)
    drafts.assert_same_gradients(found, gradients, relative=1e-9)
    zeros = torch.zeros(DEPTHS, dtype=torch.int64)
    assert sum((part.counts for part in sums), zeros).sum() == expected.count
    assert sum((part.hits for part in sums), zeros).sum() == round(expected.accuracy * expected.count)
    assert sum((part.prefix_hits() for part in sums), zeros).tolist() == expected.prefix_hits
    assert sum((part.prefix_valid() for part in sums), zeros).tolist() == expected.valid


@pytest.fixture(params=[False, "plain", "flash"], ids=["padded", "ragged", "flash"])
def ragged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """How attention is called: padded, or in runs, by their definition or by a strict stand-in for the kernel."""
    if request.param != "flash":
        yield bool(request.param)
        return
    monkeypatch.setattr(ragged_attention, "_kernel", lambda queries: ragged_flash)
    with stand_in_for_the_flash_kernel():
        yield True


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("form", LLAMA)
def test_loss_gradients_and_counts_are_those_of_every_element_by_itself(form, num_segments, ragged):
    assert_is_the_oracle_s(form, Case([7, 2, 12, 1], 0.75), num_segments, ragged)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    st.integers(0, 10_000),
    st.integers(1, 30),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_masks_any_documents_and_any_number_of_parts(lengths, share, seed, num_segments, ragged):
    assert_is_the_oracle_s("one layer", Case(lengths, share, seed), num_segments, ragged)


@pytest.mark.parametrize("form", list(FORMS))
def test_parts_and_recomputation_change_no_gradient(form):
    case = Case([14, 3, 20], 0.8, seed=4)
    model = make_draft(form)
    whole, _, expected = run(model, case, case.plan())
    assert all(bool(gradient.any()) for gradient in expected.values())
    for num_segments, ragged, recompute in ((2, False, False), (5, True, True), (100, False, True)):
        total, sums, found = run(model, case, case.plan(num_segments, ragged), recompute=recompute)
        assert total == pytest.approx(whole, rel=1e-12)
        assert min(num_segments, 6) <= len(sums) <= num_segments
        drafts.assert_same_gradients(found, expected, relative=1e-10)


def test_a_document_in_a_pack_is_the_document_alone():
    lengths = [9, 4, 13]
    case, model = Case(lengths, 0.8, seed=2), make_draft("three layers")
    together = run(model, case, case.plan())[1][0]
    losses, counts, start = torch.zeros(DEPTHS, dtype=torch.float64), torch.zeros(DEPTHS, dtype=torch.int64), 0
    for length in lengths:
        alone = Case([length], 0.8)
        slots = slice(start, start + length)
        alone.supervised, alone.inside = case.supervised[slots], case.inside[slots]
        alone.input_ids, alone.aux, alone.probs = case.input_ids[slots], case.aux[slots], case.probs[slots]
        mine = (case.elements.anchors >= start) & (case.elements.anchors < start + length)
        alone.elements = Elements(case.elements.anchors[mine] - start, case.elements.depths[mine])
        (sums,) = run(model, alone, alone.plan())[1]
        losses, counts, start = losses + sums.losses, counts + sums.counts, start + length
    torch.testing.assert_close(together.losses, losses, rtol=1e-9, atol=1e-12)
    assert torch.equal(together.counts, counts)


def test_what_is_validated_on_is_every_chain():
    case = Case([11, 1, 8], 0.7, seed=5)
    elements = every_element(case.supervised, DEPTHS)
    found = set(zip(elements.anchors.tolist(), elements.depths.tolist(), strict=True))
    num_slots, supervised = sum(case.lengths), case.supervised.tolist()
    expected = {
        (anchor, depth)
        for anchor in range(num_slots)
        for depth in range(1, DEPTHS)
        if all(supervised[anchor : anchor + depth + 1]) and anchor + depth < num_slots
    }
    assert found == expected
    assert len(found) > 5
    drawn = oracle.Drawn(case.drawn.documents, supervised, [(slot, 0) for slot in range(num_slots)] + sorted(expected))
    model = make_draft("one layer")
    judged, _ = case.oracle(model, drawn)
    with torch.no_grad():
        for num_segments in (1, 4):
            parts = loss_of(model, case, case.plan(num_segments, elements=elements), ParallelLoss(DEPTHS)).parts()
            sums = [part()[1] for part in parts]
            total = sum((part.prefix_hits() for part in sums if part is not None), torch.zeros(DEPTHS))
            assert total.tolist() == judged.prefix_hits
            losses = sum(float(part.losses.sum()) for part in sums if part is not None)
            assert losses / judged.count == pytest.approx(float(judged.loss.detach()), rel=1e-9)


@pytest.mark.parametrize("form", ["one layer", "three layers"])
def test_attention_among_elements_gives_what_padded_calls_give(form, monkeypatch):
    """What runs on CUDA, here without its compiler: that has no backward on a CPU."""
    case, model = Case([60, 1, 90, 33], 0.8, seed=8), make_draft(form)
    found = []
    monkeypatch.setattr(element_attention, "flex_takes", lambda queries: True)
    monkeypatch.setattr(element_attention, "_compiled", lambda function: function)
    for ragged in (False, True):
        with torch.no_grad():
            parts = loss_of(model, case, case.plan(3, ragged), ParallelLoss(DEPTHS)).parts()
            found.append([part()[1].losses for part in parts])  # type: ignore[union-attr]
    assert len(found[0]) == 3
    for padded, among in zip(*found, strict=True):
        torch.testing.assert_close(among, padded, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("queries", "values"), [(1, 1 << 22), (3, 200), (5, 1 << 22), (8, 2000), (64, 1)])
def test_blocks_of_chains_are_cut_between_chains_and_change_nothing(queries, values, monkeypatch):
    monkeypatch.setattr(attention_calls, "_CHAIN_BLOCK_QUERIES", queries)
    monkeypatch.setattr(attention_calls, "_CALL_VALUES", values)
    case = Case([30, 2, 41, 1, 7], 0.9, seed=2)
    plan = case.plan(2)
    for segment in plan.segments:
        calls = segment.calls
        rows = torch.cat([call.real_rows for call in calls])
        assert sorted(rows.tolist()) == list(range(len(segment.anchors)))
        blocks = [call.query_rows[i].unique() for call in calls for i in range(len(call.query_rows))]
        anchors = [set(segment.anchors[block].tolist()) for block in blocks]
        assert sum(map(len, anchors)) == len(set(segment.anchors.tolist()))
        # No longer than asked for, but for a chain that is longer by itself.
        assert all(len(block) <= queries or len(found) == 1 for block, found in zip(blocks, anchors, strict=True))
        assert all(
            call.query_rows.numel() * call.key_rows.shape[1] <= values or len(call.query_rows) == 1 for call in calls
        )
    assert_is_the_oracle_s("three layers", case, 2, ragged=False)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_supervised(share):
    case, model = Case([6, 1, 1, 5], share), make_draft("one layer")
    plan = case.plan(2)
    total, sums, gradients = run(model, case, plan)
    assert np.isfinite(total)
    if not share:
        assert not sums
        assert not plan.step_counts.any()
        assert not any(gradient.any() for gradient in gradients.values())
    else:
        assert plan.step_counts[0] == 5 + 4
        assert plan.first.slots.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]


def test_supervision_from_final_states_equals_that_from_probabilities():
    case, model = Case([12, 30, 5], 0.6, seed=3), make_draft("one layer")
    generator = torch.Generator().manual_seed(5)
    head = Head(torch.randn(drafts.DRAFT_VOCAB_SIZE, 9, generator=generator, dtype=torch.float64), soft_cap=9.0)
    states = torch.randn(47, 9, generator=generator, dtype=torch.float64)
    case.probs = head.logits(states).softmax(dim=-1)
    plan = case.plan(2)
    expected = run(model, case, plan)[0]
    work = loss_of(model, case, plan, ParallelLoss(DEPTHS))
    work._targets = TargetRows.of(states, head)
    with torch.no_grad():
        assert sum(float(part()[0]) for part in work.parts()) == pytest.approx(expected, rel=1e-9)


def test_bf16_is_close_to_float64():
    case, model = Case([40, 7, 90, 1, 23], 0.7, seed=3), make_draft("three layers")
    expected, _, gradients = run(model, case, case.plan())
    model = model.float()
    for num_segments, ragged in ((1, False), (3, True)):
        with torch.autocast("cpu", torch.bfloat16):
            parts = loss_of(model, case, case.plan(num_segments, ragged), ParallelLoss(DEPTHS)).parts()
        model.zero_grad()
        total = 0.0
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16):
                value, _ = part()
            value.backward()
            total += float(value.detach())
        assert total == pytest.approx(expected, rel=2e-2)
        assert model.mask_hidden is not None
        assert model.mask_hidden.grad is not None
        found, wanted = model.mask_hidden.grad.double().flatten(), gradients["mask_hidden"].flatten()
        assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.99


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 0.0, 2.0, 3.0)])
@pytest.mark.parametrize("mean_by_depth", [False, True])
def test_depths_weigh_what_they_are_said_to(weights, mean_by_depth):
    case, model = Case([9, 4, 13], 0.7, seed=6), make_draft("one layer")
    loss = ParallelLoss(DEPTHS, weights, mean_by_depth)
    total, (sums,), gradients = run(model, case, case.plan(), loss)
    losses, counts, chosen = sums.losses.tolist(), sums.counts.tolist(), weights or (1.0,) * DEPTHS
    assert min(counts) > 0
    if mean_by_depth:
        expected = sum(w * s / n for w, s, n in zip(chosen, losses, counts, strict=True)) / sum(chosen)
    else:
        weighed = sum(w * n for w, n in zip(chosen, counts, strict=True))
        expected = sum(w * s for w, s in zip(chosen, losses, strict=True)) / weighed
    assert total == pytest.approx(expected, rel=1e-12)
    assert float(loss.loss(sums)) == pytest.approx(expected, rel=1e-12)
    # By a difference in one weight, in float64.
    parameter, step = model.mask_hidden, 1e-6
    with torch.no_grad():
        parameter[0, 0, 1] += step
    above = run(model, case, case.plan(), loss)[0]
    assert (above - total) / step == pytest.approx(float(gradients["mask_hidden"][0, 0, 1]), rel=1e-3, abs=1e-7)


def test_depths_without_elements_are_left_out_of_their_mean():
    sums: Any = SimpleNamespace(losses=torch.tensor([4.0, 9.0, 0.0]), counts=torch.tensor([2, 3, 0]))
    assert float(ParallelLoss(3, None, True).loss(sums)) == pytest.approx((2 + 3) / 2)
    assert float(ParallelLoss(3, None, False).loss(sums)) == pytest.approx(13 / 5)
    nothing: Any = SimpleNamespace(losses=torch.zeros(3), counts=torch.zeros(3, dtype=torch.int64))
    assert [float(ParallelLoss(3, None, by).loss(nothing)) for by in (False, True)] == [0, 0]


def test_only_what_weights_are_to_each_other_counts():
    sums: Any = SimpleNamespace(losses=torch.tensor([4.0, 9.0, 7.0]), counts=torch.tensor([2, 3, 1]))
    for by_depth in (False, True):
        plain, huge = (ParallelLoss(3, weights, by_depth) for weights in ((1.0, 2.0, 4.0), (4e307, 8e307, 16e307)))
        assert float(plain.loss(sums)) == pytest.approx(float(huge.loss(sums)), rel=1e-12)


@pytest.mark.parametrize(
    "weights", [(1.0, 2.0), (1.0, -1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, float("inf"), 1.0)]
)
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(UsageError, match="weight"):
        ParallelLoss(3, weights)


def peak_bytes(model: Eagle3DraftModel, case: Case, plan: ParallelPlan, recompute: bool) -> int:
    model.zero_grad(set_to_none=True)
    with LiveBytes() as memory:
        for part in loss_of(model, case, plan, ParallelLoss(DEPTHS), recompute).parts():
            part()[0].backward()
    return memory.peak


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_of_a_pack_outlives_it(recompute):
    """Not even until Python next looks for circles: a run of thousands of packs would not have room for them."""
    case, model = Case([30, 20], 1.0), make_draft("three layers")
    plan = case.plan(3)
    run(model, case, plan, recompute=recompute)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as memory:
            model.zero_grad(set_to_none=True)
            for part in loss_of(model, case, plan, ParallelLoss(DEPTHS), recompute).parts():
                part()[0].backward()
            del part
            kept = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
            assert memory.live <= 1.5 * kept
    finally:
        gc.enable()


def test_parts_bound_the_memory_and_logits_are_never_whole():
    case, model = Case([300, 200], 1.0, ratio=1.0), make_draft("three layers")
    elements = every_element(case.supervised, DEPTHS)
    plans = [case.plan(num_segments, elements=elements) for num_segments in (1, 2, 8)]
    whole, halves, eighths = (peak_bytes(model, case, plan, recompute=False) for plan in plans)
    # Four fifths of the elements are in chains; of these an eighth is there at a time.
    assert halves < 0.72 * whole
    assert eighths < 0.45 * whole
    assert peak_bytes(model, case, plans[2], recompute=True) < 0.8 * eighths

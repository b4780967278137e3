"""The P-EAGLE module against its definition in float64, and the equalities between its ways of computing one loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from eagle_offline import PEagleTrainerModule, kl_div_loss
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.errors import UsageError
from eagle_offline.objectives.peagle_plan import PEaglePlan, PEagleUnit
from tests.draft import styles
from tests.oracles import peagle as oracle
from tests.oracles.children import run_ranks
from tests.oracles.drafts import assert_same_gradients
from tests.oracles.samples import (
    VOCAB_SIZE,
    Document,
    batch_of_rows,
    draw_document,
    draw_selection,
    with_logits,
    with_probs,
)
from tests.oracles.ttt import gradients

RELATIVE = 1e-9  # float64; sums in another order over a few hundred terms stay far below this
MASK_TOKEN_ID = VOCAB_SIZE - 1
SELECTION = draw_selection(torch.Generator().manual_seed(0))
DEPTHS, RATIO, RATIO_MIN = 4, 0.8, 0.3
FORMS = [("narrow", 1), ("narrow", 3), ("qwen3", 1), ("qwen3, three layers, 3.1", 3)]
# Lengths of the documents of each row of a batch of 13 slots.
ROWS = {"single": [[9], [13], [1]], "packed": [[5, 8], [4, 1, 2], [13]]}
NUM_SLOTS = 13

Batch = dict[str, torch.Tensor]


def make_module(form: str = "narrow", num_layers: int = 1, **options: Any) -> PEagleTrainerModule:
    draft = styles.make_draft(
        form, 7, num_hidden_layers=num_layers, parallel_drafting=True, mask_token_id=MASK_TOKEN_ID
    )
    chosen = {"down_sample_ratio": RATIO, "down_sample_ratio_min": RATIO_MIN, **options}
    return PEagleTrainerModule(draft, *SELECTION, DEPTHS, MASK_TOKEN_ID, **chosen)


def draw_rows(lengths: list[list[int]], seed: int = 3, share: float = 0.8) -> list[list[Document]]:
    generator = torch.Generator().manual_seed(seed)
    return [[draw_document(generator, length, share) for length in row] for row in lengths]


def make_batch(rows: list[list[Document]], packed: bool, fold_padding: bool = False) -> Batch:
    """Slot-frame tensors with float64 targets, both supervisions among them."""
    batch = batch_of_rows(rows, NUM_SLOTS, SELECTION, packed=packed, fold_padding=fold_padding)
    batch["target_logits"] = batch["target_logits"].double()
    batch["target_probs"] = batch["target_logits"][..., SELECTION[0]].softmax(-1)
    batch.pop("doc_remaining", None)
    return batch


def seeded(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backward(module: PEagleTrainerModule, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every parameter's gradient; each must have one, as `DistributedDataParallel` wants it."""
    module.zero_grad()
    loss.backward()
    found = {name: parameter.grad for name, parameter in module.draft_model.named_parameters()}
    assert all(grad is not None for grad in found.values()), [name for name, grad in found.items() if grad is None]
    return {name: grad.clone() for name, grad in found.items()}  # type: ignore[union-attr]


def expected_of(module: PEagleTrainerModule, rows: list[list[Document]], batch: Batch, seed: int = 11) -> Any:
    """The definition's loss, counts and gradients, elements drawn from the same generator."""
    permutation = oracle.permutations_of(seeded(seed))
    drawn = [
        oracle.draw_row([len(doc) for doc in row], mask.bool().tolist(), DEPTHS, RATIO, RATIO_MIN, permutation)
        for row, mask in zip(rows, batch["loss_mask"], strict=True)
    ]
    draft = styles.twin(module.draft_model)
    inside = SELECTION[1][batch["target_logits"].argmax(-1)]
    found = oracle.parallel_loss(
        draft, drawn, input_ids=batch["input_ids"], aux_hidden_states=batch["aux_hidden_states"],
        target_probs=batch["target_probs"], inside=inside, num_depths=DEPTHS, mask_token_id=MASK_TOKEN_ID,
    )  # fmt: skip
    return found, gradients(draft, found.loss)


def assert_same_metrics(found: Any, expected: oracle.Parallel) -> None:
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=RELATIVE, abs=1e-15)
    assert found.accuracy.item() == pytest.approx(expected.accuracy)
    assert found.valid_tokens.item() == expected.count
    assert found.step_prefix_hits.tolist() == expected.prefix_hits
    assert found.step_valid.tolist() == expected.valid


@pytest.mark.parametrize("supervision", [with_probs, with_logits])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("form", "num_layers"), FORMS)
def test_loss_gradients_and_counts_are_those_of_the_definition(form, num_layers, kind, supervision):
    module, rows = make_module(form, num_layers), draw_rows(ROWS[kind])
    batch = make_batch(rows, packed=kind == "packed")
    expected, wanted = expected_of(module, rows, batch)
    assert expected.count > 30
    assert expected.valid[0] > expected.valid[DEPTHS - 1] > 0
    metrics = module(**supervision(batch), generator=seeded())
    assert_same_metrics(metrics, expected)
    assert_same_gradients(backward(module, metrics.loss), wanted)
    assert wanted["mask_hidden"].abs().max() > 0


def agree_with_chains(module: PEagleTrainerModule, rows: list[list[Document]], batch: Batch) -> None:
    """Make the target say what the draft says along every fourth chain that `seeded()` draws, all the way."""
    permutation, draft = oracle.permutations_of(seeded()), styles.twin(module.draft_model)
    for b, mask in enumerate(batch["loss_mask"].bool().tolist()):
        row = oracle.draw_row([len(doc) for doc in rows[b]], mask, DEPTHS, RATIO, RATIO_MIN, permutation)
        logits = oracle.row_logits(draft, row, batch["input_ids"][b], batch["aux_hidden_states"][b], MASK_TOKEN_ID)
        for (anchor, depth), said in zip(row.elements, logits, strict=True):
            if anchor % DEPTHS == 0:
                batch["target_logits"][b, anchor + depth, SELECTION[0][said.argmax()]] += 30
    batch["target_probs"] = batch["target_logits"][..., SELECTION[0]].softmax(-1)
    batch["position_mask"] = SELECTION[1][batch["target_logits"].argmax(-1)][..., None]


def test_hits_of_the_definition_are_met_by_a_draft_that_is_often_right():
    module, rows = make_module("qwen3", 3), draw_rows([[13], [13]], share=1.0)
    batch = make_batch(rows, packed=False)
    agree_with_chains(module, rows, batch)
    expected, _ = expected_of(module, rows, batch)
    assert all(0 < hits < valid for hits, valid in zip(expected.prefix_hits, expected.valid, strict=True))
    assert_same_metrics(module(**with_logits(batch), generator=seeded()), expected)


def test_a_target_outside_the_vocabulary_is_a_miss_and_still_a_loss():
    module, rows = make_module(), draw_rows(ROWS["single"])
    batch = with_probs(make_batch(rows, packed=False))
    everywhere = {**batch, "position_mask": torch.ones_like(batch["position_mask"])}
    nowhere = {**batch, "position_mask": torch.zeros_like(batch["position_mask"])}
    without = {name: value for name, value in batch.items() if name != "position_mask"}
    some, none, unsaid = (module(**given, generator=seeded()) for given in (everywhere, nowhere, without))
    assert some.loss == none.loss == unsaid.loss
    assert some.accuracy == none.accuracy == unsaid.accuracy > 0
    assert some.step_prefix_hits.tolist() == unsaid.step_prefix_hits.tolist()
    assert some.step_prefix_hits[0] > 0
    assert none.step_prefix_hits.tolist() == [0] * DEPTHS


def test_loss_is_the_divergence_between_logits_without_a_weight_by_depth():
    """One full document, one depth: the mean of KL over all supervised slots."""
    module, rows = make_module(), draw_rows([[13]], share=1.0)
    batch = make_batch(rows, packed=False)
    logits: list[torch.Tensor] = []
    module.draft_model.lm_head.register_forward_hook(lambda _module, _given, out: logits.append(out))
    metrics = module(**with_logits(batch), generator=seeded())
    plan = module.build_peagle_plan(batch["loss_mask"], batch["attention_mask"], generator=seeded())
    (unit,) = plan.units
    slots = (unit.anchor_pos + unit.depth)[unit.loss_positions]
    divergence = kl_div_loss(logits[0], batch["target_logits"][0, slots][:, SELECTION[0]])
    torch.testing.assert_close(metrics.loss, divergence.mean(), rtol=1e-12, atol=0)


def test_padding_folded_into_the_last_document_changes_nothing():
    module, rows = make_module(), draw_rows([[5, 4], [3, 2, 1]])
    told = module(**with_probs(make_batch(rows, packed=True)), generator=seeded())
    batch = with_probs(make_batch(rows, packed=True, fold_padding=True))
    unmasked = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    for given in (batch, unmasked):
        folded = module(**given, generator=seeded())
        for name, value in vars(told).items():
            torch.testing.assert_close(getattr(folded, name), value, rtol=RELATIVE, atol=0, msg=name)


@pytest.mark.parametrize("folded", [None, False, True], ids=["single", "packed", "folded"])
def test_what_stands_on_padding_is_never_read(folded):
    module, rows = make_module(), draw_rows([[6], [9]])
    batch = make_batch(rows, packed=folded is not None, fold_padding=bool(folded))
    metrics = module(**with_probs(batch), generator=seeded())
    expected = backward(module, metrics.loss)
    padding = batch["attention_mask"] == 0
    spoiled = {name: value.clone() for name, value in batch.items()}
    for name in ("aux_hidden_states", "target_probs"):
        spoiled[name][padding] = torch.nan
    spoiled["loss_mask"][padding] = 1
    again = module(**with_probs(spoiled), generator=seeded())
    assert torch.equal(again.loss, metrics.loss)
    assert_same_gradients(backward(module, again.loss), expected)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_packed_row_is_its_documents_one_by_one(num_layers):
    module, rows = make_module(num_layers=num_layers), draw_rows([[5, 1, 7]])
    batch = make_batch(rows, packed=True)
    # The first slot of the second document is supervised; the last of the first must not take that as its own.
    batch["loss_mask"][0, :6] = 1
    packed = module(**with_probs(batch), generator=seeded())
    wanted = backward(module, packed.loss)
    losses, count, hits, start, generator = [], 0, torch.zeros(DEPTHS, dtype=torch.int64), 0, seeded()
    for document in rows[0]:
        here = slice(start, start + len(document))
        alone = {name: value[:, here] for name, value in with_probs(batch).items() if name != "seq_lens"}
        metrics = module(**alone, generator=generator)
        losses.append(metrics.loss * metrics.valid_tokens)
        count += int(metrics.valid_tokens)
        hits += metrics.step_prefix_hits
        start += len(document)
    loss = torch.stack(losses).sum() / count
    assert count == packed.valid_tokens
    assert packed.loss.item() == pytest.approx(loss.item(), rel=RELATIVE)
    assert hits.tolist() == packed.step_prefix_hits.tolist()
    assert_same_gradients(backward(module, loss), wanted)


def test_positions_are_counted_in_documents_when_they_are_not_given():
    module, batch = make_module(), with_probs(make_batch(draw_rows([[5, 8]]), packed=True))
    given = module(**batch, generator=seeded())
    counted = module(**{name: value for name, value in batch.items() if name != "position_ids"}, generator=seeded())
    assert torch.equal(given.loss, counted.loss)
    plans = [
        module.build_peagle_plan(batch["loss_mask"], None, positions, batch["seq_lens"], seeded())
        for positions in (batch["position_ids"], None)
    ]
    assert torch.equal(plans[0].units[0].position_ids, plans[1].units[0].position_ids)
    # Rotary angles are relative: what moves all of a document's positions alike changes nothing but rounding.
    moved = module(**{**batch, "position_ids": batch["position_ids"] + 5}, generator=seeded())
    assert moved.loss.item() == pytest.approx(given.loss.item(), rel=RELATIVE)
    spread = module(**{**batch, "position_ids": 3 * batch["position_ids"]}, generator=seeded())
    assert spread.loss.item() != pytest.approx(given.loss.item(), rel=1e-4)


def run_plan(module: PEagleTrainerModule, batch: Batch, plan: PEaglePlan) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Every unit forward and backward, gradients added up."""
    found, sums = [], {}
    for index in range(len(plan.units)):
        metrics = module(**batch, peagle_segment=(plan, index))
        for name, grad in backward(module, metrics.loss).items():
            sums[name] = sums.get(name, 0) + grad
        found.append(metrics)
    return found, sums


@pytest.mark.parametrize("partitions", range(1, NUM_SLOTS + 2))
@pytest.mark.parametrize("kind", ROWS)
def test_segments_add_up_to_the_flat_forward(kind, partitions):
    module = make_module("qwen3", 3 if partitions in (2, 5) else 1, sequence_partitions=partitions)
    rows = draw_rows(ROWS[kind])
    batch = make_batch(rows, packed=kind == "packed")
    agree_with_chains(module, rows, batch)
    batch = with_probs(batch)
    flat = module(**batch, generator=seeded())
    assert flat.step_prefix_hits[2] > 0
    wanted = backward(module, flat.loss)
    masks = {name: batch[name] for name in ("loss_mask", "attention_mask", "position_ids", "seq_lens") if name in batch}
    plan = module.build_peagle_plan(**masks, generator=seeded())
    assert plan.total_den == flat.valid_tokens
    lengths = [sum(row) for row in ROWS[kind]]
    assert len(plan.units) == sum(min(partitions, length) for length in lengths)
    found, sums = run_plan(module, batch, plan)
    assert sum(one.loss.item() for one in found) == pytest.approx(flat.loss.item(), rel=RELATIVE)
    for name in ("valid_tokens", "step_prefix_hits", "step_valid"):
        assert torch.equal(sum(getattr(one, name) for one in found), getattr(flat, name)), name
    right = sum(one.accuracy.item() * one.valid_tokens.item() for one in found)
    assert right == pytest.approx(flat.accuracy.item() * flat.valid_tokens.item())
    assert_same_gradients(sums, wanted)


def test_units_own_every_element_once_and_read_no_further_than_they_must():
    module = make_module(sequence_partitions=4)
    batch = make_batch(draw_rows([[13]], share=1.0), packed=False)
    plan = module.build_peagle_plan(batch["loss_mask"], generator=seeded())
    (flat,) = make_module().build_peagle_plan(batch["loss_mask"], generator=seeded()).units

    def pairs(unit: PEagleUnit, chosen: torch.Tensor) -> list[tuple[int, int]]:
        return list(zip(unit.anchor_pos[chosen].tolist(), unit.depth[chosen].tolist(), strict=True))

    owned = [element for unit in plan.units for element in pairs(unit, unit.owned)]
    assert sorted(owned) == sorted(pairs(flat, flat.owned))
    for segment, unit in enumerate(plan.units):
        assert all(oracle.segment_of(element, 13, 4) == segment for element in pairs(unit, unit.owned))
        left = [(slot, 0) for slot in range(13) if oracle.segment_of((slot, 0), 13, 4) < segment]
        assert sorted(pairs(unit, ~unit.owned)) == left


@pytest.mark.parametrize("partitions", [1, 3])
def test_order_of_elements_changes_nothing(partitions):
    module = make_module(num_layers=3, sequence_partitions=partitions)
    batch = with_probs(make_batch(draw_rows([[5, 8]]), packed=True))
    plan = module.build_peagle_plan(batch["loss_mask"], None, batch["position_ids"], batch["seq_lens"], seeded())
    orders = [torch.randperm(len(unit.depth), generator=seeded(index)) for index, unit in enumerate(plan.units)]
    shuffled = PEaglePlan(
        [unit.selected(order, unit.owned) for unit, order in zip(plan.units, orders, strict=True)], plan.total_den
    )
    found, sums = run_plan(module, batch, shuffled)
    expected, wanted = run_plan(module, batch, plan)
    for one, other in zip(found, expected, strict=True):
        assert one.loss.item() == pytest.approx(other.loss.item(), rel=RELATIVE)
        assert one.step_prefix_hits.tolist() == other.step_prefix_hits.tolist()
    assert_same_gradients(sums, wanted)


def test_the_caller_may_set_the_count_of_a_larger_mean():
    module = make_module(sequence_partitions=2)
    batch = with_probs(make_batch(draw_rows([[13]]), packed=False))
    plan = module.build_peagle_plan(batch["loss_mask"], generator=seeded())
    once, _ = run_plan(module, batch, plan)
    plan.total_den = 3 * plan.total_den
    thrice, _ = run_plan(module, batch, plan)
    assert [3 * one.loss.item() for one in thrice] == pytest.approx([one.loss.item() for one in once])


def assert_nothing_learned(module: PEagleTrainerModule, metrics: Any) -> None:
    assert metrics.loss == 0
    assert metrics.accuracy == 0
    assert metrics.valid_tokens == 0
    assert metrics.step_valid.tolist() == metrics.step_prefix_hits.tolist() == [0] * DEPTHS
    found = backward(module, metrics.loss)
    assert "mask_hidden" in found
    assert not any(grad.any() for grad in found.values())


@pytest.mark.parametrize("form", ["narrow", "qwen3, three layers, 3.1"])
@pytest.mark.parametrize("real", [NUM_SLOTS, 0])
def test_without_supervision_the_loss_is_zero_and_every_parameter_has_a_gradient(form, real):
    module = make_module(form, sequence_partitions=2)
    batch = with_probs(make_batch(draw_rows([[13], [13]]), packed=False))
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    batch["attention_mask"][:, real:] = 0
    assert_nothing_learned(module, module(**batch, generator=seeded()))
    plan = module.build_peagle_plan(batch["loss_mask"], batch["attention_mask"], generator=seeded())
    assert plan.total_den == 0
    assert len(plan.units) == (4 if real else 0)
    for index in range(5):
        assert_nothing_learned(module, module(**batch, peagle_segment=(plan.padded(5), index)))


def test_units_that_pad_a_plan_teach_nothing_and_read_nothing_of_the_batch():
    module = make_module(num_layers=3, sequence_partitions=2)
    batch = with_probs(make_batch(draw_rows([[13]]), packed=False))
    plan = module.build_peagle_plan(batch["loss_mask"], generator=seeded())
    padded = plan.padded(4)
    assert len(padded.units) == 4
    assert padded.total_den == plan.total_den > 0
    assert plan.padded(1).units == plan.units
    spoiled = {**batch, **{name: batch[name] * torch.nan for name in ("aux_hidden_states", "target_probs")}}
    for index in (2, 3):
        assert_nothing_learned(module, module(**spoiled, peagle_segment=(padded, index)))


@pytest.mark.parametrize("slots", [[0], [0, 1], [12], [5]])
def test_lone_supervised_slots_are_safe(slots):
    module, rows = make_module(), draw_rows([[13]])
    batch = make_batch(rows, packed=False)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    batch["loss_mask"][0, slots] = 1
    expected, wanted = expected_of(module, rows, batch)
    metrics = module(**with_probs(batch), generator=seeded())
    assert_same_metrics(metrics, expected)
    assert_same_gradients(backward(module, metrics.loss), wanted)


def test_float32_and_bfloat16_give_finite_losses_near_that_of_float64():
    batch = with_probs(make_batch(draw_rows(ROWS["packed"]), packed=True))
    expected = make_module()(**batch, generator=seeded()).loss.item()
    for dtype, share in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        module = make_module().to(dtype)
        found = module(**batch, generator=seeded())
        assert found.loss.dtype == torch.float32
        assert found.loss.item() == pytest.approx(expected, rel=share)
        assert all(grad.isfinite().all() for grad in backward(module, found.loss).values())
    module = make_module().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(**batch, generator=seeded())
    assert found.loss.item() == pytest.approx(expected, rel=5e-2)
    assert all(grad.isfinite().all() for grad in backward(module, found.loss).values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_depths": 0}, "num_depths: expected at least 1, found 0"),
        ({"down_sample_ratio": 1.5}, "down_sample_ratio: expected a number from 0 to 1, found 1.5"),
        ({"down_sample_ratio_min": -0.1}, "down_sample_ratio_min: expected a number from 0 to 1, found -0.1"),
        ({"sequence_partitions": 0}, "sequence_partitions: expected at least 1, found 0"),
        ({"mask_token_id": 3}, f"mask_token_id: the draft's is {MASK_TOKEN_ID}, found 3"),
        ({"draft_model": styles.make_draft("narrow")}, "draft_model has no mask_hidden"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused_in_one_line(changes, said):
    draft = make_module().draft_model
    given = {"draft_model": draft, "num_depths": DEPTHS, "mask_token_id": MASK_TOKEN_ID, **changes}
    with pytest.raises(UsageError, match=said) as refused:
        PEagleTrainerModule(selected_token_ids=SELECTION[0], selected_token_mask=SELECTION[1], **given)
    assert "\n" not in str(refused.value)


def test_exactly_one_supervision_is_asked_for():
    module, batch = make_module(), make_batch(draw_rows([[13]]), packed=False)
    neither = {name: value for name, value in batch.items() if not name.startswith(("target", "position_mask"))}
    for given in (batch, neither):
        with pytest.raises(UsageError, match="pass exactly one of target_logits and target_probs"):
            module(**given)


def forked_gradients(rank: int, directory: Any) -> None:
    """Two ranks with unlike numbers of units; rank 0 stores what DDP makes of them."""
    module = make_module("qwen3", 3, sequence_partitions=3)
    rows = draw_rows([[13], [9], [2]])
    batch = with_probs(make_batch(rows[:2] if rank == 0 else rows[2:], packed=False))
    plan = module.build_peagle_plan(batch["loss_mask"], batch["attention_mask"], generator=seeded(rank))
    assert len(plan.units) == (6 if rank == 0 else 2)
    most = torch.tensor(len(plan.units))
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(plan.total_den)
    plan = plan.padded(int(most))
    wrapped = DistributedDataParallel(module)
    for index in range(len(plan.units)):
        wrapped(**batch, peagle_segment=(plan, index)).loss.backward()
    # DDP takes the mean over ranks; losses are shares of one mean already.
    grads = {name: 2 * parameter.grad for name, parameter in module.draft_model.named_parameters()}  # type: ignore[operator]
    torch.save(grads, directory / f"rank-{rank}")


def test_ranks_with_unlike_numbers_of_units_learn_what_one_process_would(tmp_path):
    assert run_ranks(lambda rank: forked_gradients(rank, tmp_path), tmp_path / "err", 2) == [0, 0]
    module, rows = make_module("qwen3", 3), draw_rows([[13], [9], [2]])
    loss, count = 0, 0
    for rank, some in enumerate((rows[:2], rows[2:])):
        metrics = module(**with_probs(make_batch(some, packed=False)), generator=seeded(rank))
        loss, count = loss + metrics.loss * metrics.valid_tokens, count + metrics.valid_tokens
    expected = backward(module, loss / count)
    for rank in range(2):
        assert_same_gradients(torch.load(tmp_path / f"rank-{rank}"), expected)


def test_the_draft_alone_in_parallel_is_the_unroll_at_depth_zero():
    """Depth 0 by itself is step 0 of the EAGLE-3 unroll: an ordinary causal forward."""
    draft: Eagle3DraftModel = make_module("qwen3, three layers, 3.1", 3).draft_model
    batch = make_batch(draw_rows([[13], [13]]), packed=False)
    states = draft.project_hidden_states(batch["aux_hidden_states"])
    expected = draft(batch["input_ids"], states, batch["attention_mask"])
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    found = draft.forward_parallel(
        batch["input_ids"], states, torch.arange(13).expand(2, -1),
        lambda *parts: torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=causal, enable_gqa=True),
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=1e-12)

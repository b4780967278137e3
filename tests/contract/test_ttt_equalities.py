"""The EAGLE-3 unroll equals its definition, however documents are laid out in a batch."""

from __future__ import annotations

import inspect

import pytest
import torch

from eagle_offline import Eagle3TargetBatch, Eagle3TrainerModule, HFEagle3TargetModel, compute_target_distribution
from eagle_offline.errors import UsageError
from tests.oracles import ttt
from tests.oracles.drafts import (
    RELATIVE,
    SHAPES,
    Shape,
    assert_same_gradients,
    make_draft,
    make_trainer,
    run_with_gradients,
    twin,
)
from tests.oracles.samples import (
    NUM_AUX,
    TARGET_HIDDEN_SIZE,
    VOCAB_SIZE,
    Document,
    batch_of_rows,
    draw_document,
    draw_selection,
    with_logits,
    with_probs,
)

DECAY = 0.8
Batch = dict[str, torch.Tensor]
Selection = tuple[torch.Tensor, torch.Tensor]


def draw(seed: int, lengths: tuple[int, ...]) -> tuple[Selection, list[Document]]:
    generator = torch.Generator().manual_seed(seed)
    selection = draw_selection(generator)
    return selection, [draw_document(generator, length) for length in lengths]


def padded(documents: list[Document], selection: Selection, extra: int = 2, padding_seed: int = 0) -> Batch:
    num_slots = max(map(len, documents)) + extra
    rows = [[document] for document in documents]
    return batch_of_rows(rows, num_slots, selection, packed=False, padding_seed=padding_seed)


def packed(documents: list[Document], selection: Selection, **options: object) -> Batch:
    """The first document alone in a row, the others in a second one, padding after both."""
    rows = [documents[:1], documents[1:]]
    num_slots = max(sum(map(len, row)) for row in rows) + 2
    return batch_of_rows(rows, num_slots, selection, packed=True, **options)


def close(actual: torch.Tensor | float, expected: torch.Tensor | float, relative: float = RELATIVE) -> bool:
    return abs(float(actual) - float(expected)) <= relative * abs(float(expected)) + 1e-15


def assert_same_metrics(metrics: object, expected: ttt.Unroll) -> None:
    assert close(metrics.loss.detach(), expected.loss.detach())
    assert float(metrics.accuracy) == pytest.approx(expected.accuracy, rel=1e-6)  # a ratio, perhaps kept in float32
    assert metrics.step_prefix_hits.tolist() == expected.prefix_hits
    assert metrics.step_valid.tolist() == expected.valid


CASES = [
    # shape, ttt steps, seed
    ("plain", 1, 0),
    ("plain", 2, 1),
    ("plain", 5, 2),
    ("no_grouping", 4, 3),
    ("one_key_head", 3, 4),
    ("two_layers", 4, 5),
    ("two_layers", 1, 6),
    ("fc_norm", 3, 7),
    ("norm_output", 3, 8),
    ("all_at_once", 4, 9),
    ("all_at_once", 3, 10),
]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("shape", "ttt_steps", "seed"), CASES)
def test_module_equals_the_slot_by_slot_unroll_in_loss_counts_and_gradients(
    shape: str, ttt_steps: int, seed: int, layout: str
) -> None:
    selection, documents = draw(seed, (6, 9, 2))
    batch = with_probs({"padded": padded, "packed": packed}[layout](documents, selection))
    model = make_draft(SHAPES[shape], seed)
    draft = twin(model)
    expected = ttt.unroll(draft, ttt_steps=ttt_steps, **batch)
    metrics, found = run_with_gradients(make_trainer(model, selection, ttt_steps), batch)
    assert min(expected.step_counts) > 0, "a step without supervision proves nothing"
    assert_same_metrics(metrics, expected)
    assert int(metrics.valid_tokens) == expected.supervised_pairs
    assert_same_gradients(found, ttt.gradients(draft, expected.loss))


@pytest.mark.parametrize(
    "options",
    [
        {"lk_loss_type": "alpha"},
        {"lk_loss_type": "lambda"},
        {"lk_loss_type": "lambda", "lk_kl_scale": 0.6, "lk_kl_decay": 1.25},
        {"lk_loss_type": "lambda", "lk_kl_scale": 0.0},
        {"lk_loss_type": "lambda", "lk_kl_decay": 0.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("shape", ["plain", "all_at_once"])
def test_overlap_losses_equal_their_definition(shape: str, options: dict[str, object]) -> None:
    selection, documents = draw(20, (6, 4, 3))
    batch = with_probs(packed(documents, selection))
    model = make_draft(SHAPES[shape], 21)
    draft = twin(model)
    expected = ttt.unroll(draft, ttt_steps=4, **batch, **options)
    metrics, found = run_with_gradients(make_trainer(model, selection, 4, **options), batch)
    assert_same_metrics(metrics, expected)
    assert_same_gradients(found, ttt.gradients(draft, expected.loss))


def test_lambda_loss_without_decay_is_the_soft_cross_entropy() -> None:
    selection, documents = draw(22, (6, 4))
    batch = with_probs(padded(documents, selection))
    model = make_draft(SHAPES["plain"], 22)
    blend, blend_grads = run_with_gradients(
        make_trainer(model, selection, 3, lk_loss_type="lambda", lk_kl_decay=0.0), batch
    )
    plain, plain_grads = run_with_gradients(make_trainer(model, selection, 3), batch)
    assert close(blend.loss.detach(), plain.loss.detach())
    assert_same_gradients(blend_grads, plain_grads)


def test_overlap_losses_stay_finite_where_target_and_draft_share_no_mass() -> None:
    """A position with no overlap adds 0 to the sum of logs, is counted, and passes no NaN back."""
    selection, documents = draw(23, (6,))
    batch = with_probs(padded(documents, selection, extra=0))
    one_hot = torch.zeros_like(batch["target_probs"])
    one_hot[..., 0] = 1.0
    batch["target_probs"] = one_hot
    batch["position_mask"] = batch["loss_mask"][:, :, None].bool()
    model = make_draft(SHAPES["plain"], 23)
    with torch.no_grad():  # logits of the id that holds all target mass fall far below the others at some slots
        model.lm_head.weight[0] *= 4000.0
    draft = twin(model)
    expected = ttt.unroll(draft, ttt_steps=2, lk_loss_type="alpha", **batch)
    alphas = [
        alpha
        for k in range(2)
        for alpha in ttt.overlaps(
            expected.step_logits[k].flatten(0, 1),
            ttt.shifted(batch["target_probs"], k).flatten(0, 1),
            ttt.shifted(batch["position_mask"], k).flatten(),
        )
    ]
    assert any(alpha == 0 for alpha in alphas)
    assert any(alpha > 0 for alpha in alphas)
    for kind in ("alpha", "lambda"):
        metrics, found = run_with_gradients(make_trainer(model, selection, 2, lk_loss_type=kind), batch)
        expected = ttt.unroll(draft, ttt_steps=2, lk_loss_type=kind, **batch)
        assert close(metrics.loss.detach(), expected.loss.detach())
        assert all(torch.isfinite(grad).all() for grad in found.values())


def later_keys_of_the_past(step: int, slot: int, documents: list[int], padding: list[bool]) -> list[tuple[int, int]]:
    """Wrong on purpose: keys of later steps read from every past slot, not from the query's own alone."""
    base = ttt.base_and_diagonal(0, slot, documents, padding)
    return base + [(i, s) for i in range(1, step + 1) for _, s in base]


def latest_diagonal_only(step: int, slot: int, documents: list[int], padding: list[bool]) -> list[tuple[int, int]]:
    """Wrong on purpose: the keys of the steps in between are forgotten."""
    return ttt.base_and_diagonal(0, slot, documents, padding) + ([(step, slot)] if step else [])


def no_diagonals(step: int, slot: int, documents: list[int], padding: list[bool]) -> list[tuple[int, int]]:
    """Wrong on purpose: K unrelated single steps."""
    return ttt.base_and_diagonal(0, slot, documents, padding)


def every_document(step: int, slot: int, documents: list[int], padding: list[bool]) -> list[tuple[int, int]]:
    """Wrong on purpose: documents of a row read each other."""
    return [(0, s) for s in range(slot + 1) if not padding[s]] + [(i, slot) for i in range(1, step + 1)]


@pytest.mark.parametrize(
    ("wrong", "ttt_steps"),
    [
        ({"visible": no_diagonals}, 2),
        ({"visible": latest_diagonal_only}, 3),
        ({"visible": later_keys_of_the_past}, 2),
        ({"visible": every_document}, 1),
        ({"rope_advances": False}, 2),
        ({"doc_remaining": None}, 4),
    ],
    ids=["no_diagonals", "latest_diagonal", "later_keys_of_the_past", "every_document", "fixed_rope", "no_gate"],
)
def test_module_differs_from_unrolls_that_are_wrong_in_one_point(wrong: dict[str, object], ttt_steps: int) -> None:
    selection, documents = draw(30, (9, 8, 10))
    batch = with_probs(packed(documents, selection))
    model = make_draft(SHAPES["plain"], 30)
    loss = make_trainer(model, selection, ttt_steps)(**batch).loss.detach()
    right = ttt.unroll(twin(model), ttt_steps=ttt_steps, **batch).loss.detach()
    mistaken = ttt.unroll(twin(model), ttt_steps=ttt_steps, **{**batch, **wrong}).loss.detach()
    assert close(loss, right)
    assert not close(loss, mistaken, 1e-4)


def one_by_one(
    model: torch.nn.Module, selection: Selection, documents: list[Document], ttt_steps: int
) -> tuple[float, dict[str, torch.Tensor], list[int], list[int]]:
    """Loss and gradients of documents run alone, their numerators and counts added before dividing.

    A call returns a weighted mean over its steps, so the mean of step k alone comes from calls with k and k + 1 steps.
    """
    weights = [DECAY**k for k in range(ttt_steps)]
    numerators = [0.0] * ttt_steps
    grads = [{name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(ttt_steps)]
    counts, hits, valid = [0] * ttt_steps, [0] * ttt_steps, [0] * ttt_steps
    for document in documents:
        batch = with_probs(padded([document], selection, extra=0))
        before, before_grads = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for k in range(ttt_steps):
            metrics, found = run_with_gradients(make_trainer(model, selection, k + 1), batch)
            scale = sum(weights[: k + 1])
            total, total_grads = float(metrics.loss.detach()) * scale, {name: g * scale for name, g in found.items()}
            count = int(ttt.shifted(batch["position_mask"], k).sum())
            numerators[k] += (total - before) / weights[k] * count
            for name, grad in total_grads.items():
                grads[k][name] += (grad - before_grads[name]) / weights[k] * count
            counts[k] += count
            before, before_grads = total, total_grads
        for k in range(ttt_steps):
            hits[k] += int(metrics.step_prefix_hits[k])
            valid[k] += int(metrics.step_valid[k])
    shares = [w / sum(weights) / n if n else 0.0 for w, n in zip(weights, counts, strict=True)]
    loss = sum(share * numerator for share, numerator in zip(shares, numerators, strict=True))
    names = grads[0].keys()
    combined = {name: sum(share * g[name] for share, g in zip(shares, grads, strict=True)) for name in names}
    return loss, combined, hits, valid


@pytest.mark.parametrize(("shape", "ttt_steps", "seed"), [("plain", 4, 40), ("all_at_once", 3, 41), ("fc_norm", 5, 42)])
def test_padded_and_packed_batches_equal_their_documents_one_by_one(shape: str, ttt_steps: int, seed: int) -> None:
    selection, documents = draw(seed, (6, 3, 9, 1))
    model = make_draft(SHAPES[shape], seed)
    loss, grads, hits, valid = one_by_one(model, selection, documents, ttt_steps)
    assert loss > 0
    layouts = {
        "padded": padded(documents, selection),
        "packed in two rows": packed(documents, selection),
        "packed in one row": batch_of_rows([documents], sum(map(len, documents)), selection, packed=True),
        "packed in another order": batch_of_rows([documents[::-1]], 24, selection, packed=True),
        "padding folded into the last document": packed(documents, selection, fold_padding=True),
        "padded with packing metadata": batch_of_rows([[d] for d in documents], 9, selection, packed=True),
    }
    for layout, batch in layouts.items():
        metrics, found = run_with_gradients(make_trainer(model, selection, ttt_steps), with_probs(batch))
        assert close(metrics.loss.detach(), loss), layout
        assert metrics.step_prefix_hits.tolist() == hits, layout
        assert metrics.step_valid.tolist() == valid, layout
        assert_same_gradients(found, grads)


def test_packed_padding_beyond_the_documents_is_known_without_an_attention_mask_that_says_so() -> None:
    selection, documents = draw(43, (4, 5, 3))
    batch = with_probs(packed(documents, selection))
    model = make_draft(SHAPES["plain"], 43)
    trainer = make_trainer(model, selection, 3)
    stated, stated_grads = run_with_gradients(trainer, batch)
    silent, silent_grads = run_with_gradients(
        trainer, {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    )
    assert close(silent.loss.detach(), stated.loss.detach())
    assert_same_gradients(silent_grads, stated_grads)


def test_step_zero_of_a_longer_unroll_is_a_single_step_run() -> None:
    """Later steps read step 0 and never change it: the first entry of every per-step count stays."""
    selection, documents = draw(44, (9, 7))
    batch = with_probs(padded(documents, selection))
    model = make_draft(SHAPES["plain"], 44)
    single = make_trainer(model, selection, 1)(**batch)
    longer = make_trainer(model, selection, 5)(**batch)
    assert longer.step_valid.tolist()[:1] == single.step_valid.tolist()
    assert longer.step_prefix_hits.tolist()[:1] == single.step_prefix_hits.tolist()
    assert longer.step_prefix_hits.tolist() == sorted(longer.step_prefix_hits.tolist(), reverse=True)


def changed_document(document: Document, seed: int) -> Document:
    generator = torch.Generator().manual_seed(seed)
    other = draw_document(generator, len(document))
    return Document(other.input_ids, document.loss_mask, other.aux, other.logits)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_document_is_untouched_by_the_others_of_its_row(changed: int) -> None:
    selection, documents = draw(50, (4, 5, 4))
    silenced = [
        Document(d.input_ids, torch.zeros_like(d.loss_mask) if i == changed else d.loss_mask, d.aux, d.logits)
        for i, d in enumerate(documents)
    ]
    replaced = list(silenced)
    replaced[changed] = changed_document(silenced[changed], 51)
    model = make_draft(SHAPES["two_layers"], 50)
    trainer = make_trainer(model, selection, 4)
    before, before_grads = run_with_gradients(
        trainer, with_probs(batch_of_rows([silenced], 14, selection, packed=True))
    )
    after, after_grads = run_with_gradients(trainer, with_probs(batch_of_rows([replaced], 14, selection, packed=True)))
    assert float(before.loss.detach()) > 0
    assert close(after.loss.detach(), before.loss.detach(), 1e-13)  # the same numbers, masked sums may be regrouped
    assert_same_gradients(after_grads, before_grads, 1e-12)
    assert after.step_prefix_hits.tolist() == before.step_prefix_hits.tolist()


@pytest.mark.parametrize("layout", ["padded", "packed", "folded"])
def test_padding_content_changes_nothing(layout: str) -> None:
    selection, documents = draw(52, (4, 7, 3))
    model = make_draft(SHAPES["two_layers"], 52)
    trainer = make_trainer(model, selection, 4)

    def run(padding_seed: int) -> tuple[object, dict[str, torch.Tensor]]:
        if layout == "padded":
            batch = padded(documents, selection, padding_seed=padding_seed)
        else:
            batch = packed(documents, selection, padding_seed=padding_seed, fold_padding=layout == "folded")
        return run_with_gradients(trainer, with_probs(batch))

    before, before_grads = run(1)
    after, after_grads = run(2)
    assert close(after.loss.detach(), before.loss.detach(), 1e-13)
    assert_same_gradients(after_grads, before_grads, 1e-12)
    assert after.step_prefix_hits.tolist() == before.step_prefix_hits.tolist()
    assert after.step_valid.tolist() == before.step_valid.tolist()


def test_a_fully_padded_row_adds_nothing_and_no_nan() -> None:
    selection, documents = draw(53, (5, 6))
    model = make_draft(SHAPES["all_at_once"], 53)
    trainer = make_trainer(model, selection, 3)
    for is_packed in (False, True):
        rows = [[document] for document in documents]
        without = batch_of_rows(rows, 7, selection, packed=is_packed)
        with_row = batch_of_rows([*rows, []], 7, selection, packed=is_packed)
        expected, expected_grads = run_with_gradients(trainer, with_probs(without))
        metrics, found = run_with_gradients(trainer, with_probs(with_row))
        assert close(metrics.loss.detach(), expected.loss.detach())
        assert_same_gradients(found, expected_grads)
        assert metrics.step_valid.tolist() == expected.step_valid.tolist()


@pytest.mark.parametrize("kind", [None, "alpha", "lambda"])
@pytest.mark.parametrize("empty", ["all padding", "all padding, packed", "no supervision"])
def test_a_batch_without_supervision_has_loss_zero_and_zero_gradients(empty: str, kind: str | None) -> None:
    selection, documents = draw(54, (5, 6))
    if empty == "no supervision":
        silent = [Document(d.input_ids, torch.zeros_like(d.loss_mask), d.aux, d.logits) for d in documents]
        batch = padded(silent, selection)
    else:
        batch = batch_of_rows([[], []], 6, selection, packed=empty.endswith("packed"))
    model = make_draft(SHAPES["plain"], 54)
    metrics, found = run_with_gradients(make_trainer(model, selection, 3, lk_loss_type=kind), with_probs(batch))
    assert float(metrics.loss.detach()) == 0
    assert float(metrics.accuracy) == 0
    assert metrics.step_valid.tolist() == metrics.step_prefix_hits.tolist() == [0, 0, 0]
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found.values())


def test_steps_beyond_every_document_add_zero_loss_but_keep_their_weight() -> None:
    selection, documents = draw(55, (3,))
    documents = [Document(d.input_ids, torch.ones_like(d.loss_mask), d.aux, d.logits) for d in documents]
    batch = with_probs(padded(documents, selection))
    batch["position_mask"] = batch["loss_mask"][:, :, None].bool()
    model = make_draft(SHAPES["plain"], 55)
    short = make_trainer(model, selection, 2)(**batch)
    long = make_trainer(model, selection, 6)(**batch)
    weights = [DECAY**k for k in range(6)]
    assert long.step_valid.tolist() == [2, 1, 0, 0, 0, 0]
    assert close(long.loss.detach(), short.loss.detach() * sum(weights[:2]) / sum(weights))


def test_a_target_token_outside_the_draft_vocabulary_is_a_miss_and_not_absent() -> None:
    selection, documents = draw(56, (12, 12))
    batch = with_probs(padded(documents, selection))
    assert batch["position_mask"].sum() < batch["loss_mask"].sum()
    model = make_draft(SHAPES["plain"], 56)
    gated = make_trainer(model, selection, 3)(**batch)
    free = make_trainer(model, selection, 3)(**{**batch, "position_mask": batch["loss_mask"][:, :, None].bool()})
    assert gated.step_valid.tolist() == free.step_valid.tolist()
    assert int(gated.step_valid[0]) == int(batch["loss_mask"].sum())
    assert int(gated.step_prefix_hits[0]) < int(free.step_prefix_hits[0])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_live_logits_give_what_the_projected_distribution_gives(layout: str) -> None:
    selection, documents = draw(60, (5, 7, 4))
    batch = {"padded": padded, "packed": packed}[layout](documents, selection)
    probs, positions = compute_target_distribution(batch["target_logits"], *selection, batch["loss_mask"])
    projected = {**with_probs(batch), "target_probs": probs, "position_mask": positions}
    model = make_draft(SHAPES["plain"], 60)
    trainer = make_trainer(model, selection, 3)
    live, live_grads = run_with_gradients(trainer, with_logits(batch))
    cached, cached_grads = run_with_gradients(trainer, projected)
    assert close(live.loss.detach(), cached.loss.detach(), 1e-12)
    assert_same_gradients(live_grads, cached_grads, 1e-12)
    assert live.step_prefix_hits.tolist() == cached.step_prefix_hits.tolist()
    assert live.step_valid.tolist() == cached.step_valid.tolist()
    exact = ttt.unroll(twin(model), ttt_steps=3, **with_probs(batch))
    assert close(live.loss.detach(), exact.loss.detach(), 1e-6)  # probabilities are float32


def supervision(batch: Batch, *names: str) -> Batch:
    return {k: v for k, v in batch.items() if k not in ("target_logits", "target_probs", "position_mask") or k in names}


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("target_logits", "target_probs", "position_mask"),
        ("target_logits", "target_probs"),
        ("target_probs",),
        ("position_mask",),
    ],
    ids=["none", "both", "both_without_mask", "probs_without_mask", "mask_alone"],
)
def test_a_call_without_exactly_one_supervision_is_refused(names: tuple[str, ...]) -> None:
    selection, documents = draw(61, (5,))
    batch = padded(documents, selection)
    trainer = make_trainer(make_draft(SHAPES["plain"], 61), selection, 2)
    with pytest.raises((ValueError, UsageError)):
        trainer(**supervision(batch, *names))


@pytest.mark.parametrize("names", [(), ("target_logits", "target_probs", "position_mask"), ("target_probs",)])
def test_a_target_batch_without_exactly_one_supervision_is_refused(names: tuple[str, ...]) -> None:
    selection, documents = draw(62, (5,))
    chosen = supervision(padded(documents, selection), *names)
    if "target_logits" in chosen:
        chosen["logits"] = chosen.pop("target_logits")
    with pytest.raises((ValueError, UsageError)):
        Eagle3TargetBatch(**chosen)


@pytest.mark.parametrize("encoding", ["logits", "probs"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_target_batch_hands_the_trainer_everything_it_carries(layout: str, encoding: str) -> None:
    selection, documents = draw(63, (5, 4, 3))
    batch = {"padded": padded, "packed": packed}[layout](documents, selection)
    inputs = with_logits(batch) if encoding == "logits" else with_probs(batch)
    fields = dict(inputs)
    if encoding == "logits":
        fields["logits"] = fields.pop("target_logits")
    handed = Eagle3TargetBatch(**fields).to_trainer_inputs()
    given = {name: value for name, value in handed.items() if value is not None}
    assert given.keys() == inputs.keys()
    assert all(given[name] is inputs[name] for name in inputs)
    trainer = make_trainer(make_draft(SHAPES["plain"], 63), selection, 2)
    assert torch.equal(trainer(**handed).loss, trainer(**inputs).loss)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_may_be_of_any_kind_of_zero_and_one(dtype: torch.dtype) -> None:
    selection, documents = draw(69, (6, 5, 4))
    batch = with_probs(packed(documents, selection))
    expected = make_trainer(make_draft(SHAPES["plain"], 69), selection, 3)(**batch)
    cast = {name: batch[name].to(dtype) for name in ("attention_mask", "loss_mask", "position_mask")}
    metrics = make_trainer(make_draft(SHAPES["plain"], 69), selection, 3)(**{**batch, **cast})
    assert torch.equal(metrics.loss, expected.loss)
    assert torch.equal(metrics.accuracy, expected.accuracy)
    assert metrics.step_prefix_hits.tolist() == expected.step_prefix_hits.tolist()
    assert metrics.step_valid.tolist() == expected.step_valid.tolist()


def test_a_call_leaves_its_inputs_as_they_were() -> None:
    selection, documents = draw(64, (5, 4, 3))
    batch = with_probs(packed(documents, selection))
    copies = {name: value.clone() for name, value in batch.items()}
    run_with_gradients(make_trainer(make_draft(SHAPES["plain"], 64), selection, 4), batch)
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


def test_repeated_calls_start_each_unroll_anew() -> None:
    selection, documents = draw(65, (5, 4))
    batch = with_probs(padded(documents, selection))
    trainer = make_trainer(make_draft(SHAPES["plain"], 65), selection, 3)
    assert torch.equal(trainer(**batch).loss, trainer(**batch).loss)


def test_the_trainer_drives_the_draft_with_one_cache_that_grows_by_an_entry_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selection, documents = draw(66, (5, 4))
    batch = with_probs(padded(documents, selection))
    model = make_draft(SHAPES["plain"], 66)
    seen: list[tuple[int, int, int]] = []
    forward = model.forward

    def recording(*args: object, **options: object) -> torch.Tensor:
        cache = inspect.signature(forward).bind(*args, **options).arguments["cache_hidden"]
        seen.append((id(cache), len(cache[0]), len(cache[1])))
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", recording)
    make_trainer(model, selection, 4)(**batch)
    assert [entry[1:] for entry in seen] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert len({entry[0] for entry in seen}) == 1


def test_a_float32_run_agrees_with_the_float64_unroll() -> None:
    selection, documents = draw(67, (6, 5, 4))
    batch = with_probs(packed(documents, selection))
    model = make_draft(Shape(), 67)
    draft = twin(model)
    expected = ttt.unroll(draft, ttt_steps=3, **batch)
    batch["aux_hidden_states"] = batch["aux_hidden_states"].float()
    metrics, found = run_with_gradients(make_trainer(model.float(), selection, 3), batch)
    assert close(metrics.loss.detach(), expected.loss.detach(), 1e-5)
    assert_same_gradients({n: g.double() for n, g in found.items()}, ttt.gradients(draft, expected.loss), 1e-4)


def test_trainer_names_follow_the_reference_signature() -> None:
    selection, _ = draw(68, (3,))
    model = make_draft(SHAPES["plain"], 68)
    ids, mask = selection
    with pytest.raises(TypeError):  # everything but the draft model is keyword-only
        Eagle3TrainerModule(model, ids, mask, 2)


def tiny_target(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=TARGET_HIDDEN_SIZE * 2,
        intermediate_size=16,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_live_target_captures_layer_outputs_unshifted_and_supervision_shifted_once() -> None:
    target = tiny_target(70)
    generator = torch.Generator().manual_seed(71)
    ids = torch.randint(0, VOCAB_SIZE, (2, 6), generator=generator)
    loss_mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 0]])
    batch = HFEagle3TargetModel(target).generate_batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), loss_mask=loss_mask
    )
    with torch.no_grad():
        reference = target(input_ids=ids, output_hidden_states=True)
    outputs = reference.hidden_states[1:]  # entry 0 is the embedding
    expected_aux = torch.cat([outputs[layer] for layer in (1, 2, 3)], dim=-1)
    assert batch.aux_hidden_states.shape[-1] == NUM_AUX * target.config.hidden_size
    torch.testing.assert_close(batch.aux_hidden_states, expected_aux)
    torch.testing.assert_close(batch.logits, ttt.shifted(reference.logits, 1))
    assert torch.equal(batch.input_ids, ttt.shifted(ids, 1))
    assert torch.equal(batch.loss_mask.long(), ttt.shifted(loss_mask, 1))
    assert not batch.aux_hidden_states.requires_grad
    assert not batch.logits.requires_grad


def test_live_target_keeps_packed_documents_apart() -> None:
    target = tiny_target(72)
    generator = torch.Generator().manual_seed(73)
    ids = torch.randint(0, VOCAB_SIZE, (1, 9), generator=generator)
    mask = torch.ones_like(ids)
    model = HFEagle3TargetModel(target)
    together = model.generate_batch(
        input_ids=ids,
        attention_mask=mask,
        loss_mask=mask,
        position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
        seq_lens=torch.tensor([[4, 5]]),
        doc_remaining=torch.tensor([[3, 2, 1, 0, 4, 3, 2, 1, 0]]),
    )
    alone = [
        model.generate_batch(input_ids=ids[:, a:b], attention_mask=mask[:, a:b], loss_mask=mask[:, a:b])
        for a, b in ((0, 4), (4, 9))
    ]
    aux = torch.cat([batch.aux_hidden_states for batch in alone], dim=1)
    torch.testing.assert_close(together.aux_hidden_states, aux, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.logits[:, :3], alone[0].logits[:, :3], rtol=1e-5, atol=1e-5)
    assert together.doc_remaining.tolist() == [[3, 2, 1, 0, 4, 3, 2, 1, 0]]
    assert together.seq_lens.tolist() == [[4, 5]]


@pytest.mark.parametrize("ids", [[1, 1, 2], [2, 1, 3], [1, 2, 7], [-1, 2, 3]])
def test_live_target_refuses_layer_ids_that_do_not_increase_within_the_model(ids: list[int]) -> None:
    with pytest.raises((ValueError, UsageError)):
        HFEagle3TargetModel(tiny_target(74), aux_layer_ids=ids)

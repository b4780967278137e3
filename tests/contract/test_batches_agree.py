"""The same cached samples give the same sums and gradients however they are laid out, and however often a step cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle_offline import open_cache
from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.data.collate import PackedBatch, collate, slot_batch
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import draft_config, initial_draft, read_target_config
from eagle_offline.objectives.ttt import supervised_counts, unroll
from eagle_offline.training.optimizer import build_optimizer
from eagle_offline.training.packs import make_pack
from eagle_offline.training.state import Position
from eagle_offline.training.stream import LoadedStep
from eagle_offline.training.tally import Tally
from tests.oracles import ttt
from tests.training.caches import settings, shared_cache, trainer_of

TTT_STEPS = 4
RELATIVE = 1e-9  # float64; sums in another order


@dataclass(frozen=True)
class Sums:
    """What an unroll yields, added over batches: tensors `[K]`, and a gradient a parameter."""

    losses: torch.Tensor
    counts: torch.Tensor
    hits: torch.Tensor
    prefix_hits: torch.Tensor
    prefix_valid: torch.Tensor
    gradients: dict[str, torch.Tensor]


def draft_for(cache: Cache, **options: bool | int) -> Eagle3DraftModel:
    """A float64 draft with every parameter trained, its states wide enough that attention and norms matter."""
    config = draft_config(
        read_target_config(cache.path / "target" / "config.json"),
        draft_vocab_size=len(cache.selected_token_ids),
        num_aux_hidden_states=3,
        **options,
    )
    draft = initial_draft(
        config, cache.embeddings, cache.head, cache.selected_token_ids, seed=5, train_embeddings=True
    ).double()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return draft


def widened(pack: PackedBatch) -> PackedBatch:
    """Target rows in float64, so that the head's product does not depend on how many rows there are."""
    return dataclasses.replace(pack, target_rows=pack.target_rows.double())


def add_up(draft: Eagle3DraftModel, cache: Cache, packs: Sequence[PackedBatch]) -> Sums:
    """Sums over packs; gradients of `Σ_k 0.8^k losses_k`."""
    factored = cache.manifest.identity.capture.target_encoding == "factored"
    head = cache.head.to("cpu", torch.float64).select(cache.selected_token_ids) if factored else None
    draft.zero_grad(set_to_none=True)
    found = []
    for pack in packs:
        batch = slot_batch(widened(pack) if factored else pack, head, cache.selected_token_mask)
        sums = unroll(draft, batch, TTT_STEPS)
        assert torch.equal(sums.counts, supervised_counts(batch, TTT_STEPS))
        (0.8 ** torch.arange(len(sums.losses)) * sums.losses).sum().backward()
        found.append(
            (sums.losses.detach(), sums.counts, sums.step_hits.sum((1, 2)), sums.prefix_hits(), sums.prefix_valid())
        )
    totals = [torch.stack(column).sum(0) for column in zip(*found, strict=True)]
    return Sums(*totals, {name: parameter.grad.clone() for name, parameter in draft.named_parameters()})


def assert_same(ours: Sums, theirs: Sums) -> None:
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=RELATIVE, atol=0)
    for name in ("counts", "hits", "prefix_hits", "prefix_valid"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name, gradient in theirs.gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name} has no gradient to compare"
        assert float((ours.gradients[name] - gradient).abs().max()) <= RELATIVE * scale, name


def chosen_samples(cache: Cache) -> list[Sample]:
    return [cache[index] for index in (0, 4, 5, 6, 12, 13, 20)]


def layouts(samples: list[Sample]) -> dict[str, list[PackedBatch]]:
    lengths = [len(sample.input_ids) for sample in samples]
    return {
        "padded": [collate([sample], max(lengths) + 3) for sample in samples],
        "one row each": [collate(samples)],
        "one row": [collate(samples, sum(lengths))],
        "one long row": [collate(samples, sum(lengths) + 17)],
        "several rows": [collate(samples, 2 * max(lengths))],
        "several batches": [collate(samples[:3]), collate(samples[3:], sum(lengths))],
        "another order": [collate(samples[::-1], sum(lengths))],
    }


@pytest.mark.parametrize("options", [{}, {"fc_norm": True, "norm_output": True, "num_layers": 2}], ids=["3", "3.1"])
@pytest.mark.parametrize("encoding", ["factored", "dense"])
def test_padded_packed_and_single_samples_give_the_same_sums_and_gradients(encoding, options):
    cache = open_cache(shared_cache(encoding))
    samples, draft = chosen_samples(cache), draft_for(cache, **options)
    expected = add_up(draft, cache, [collate([sample]) for sample in samples])
    assert (expected.counts > 0).all()
    assert (expected.counts < expected.prefix_valid[0]).all(), "no target token outside the draft vocabulary"
    for name, packs in layouts(samples).items():
        shapes = {tuple(pack.input_ids.shape) for pack in packs}
        try:
            assert_same(add_up(draft, cache, packs), expected)
        except AssertionError as error:
            raise AssertionError(f"{name} {shapes}: {error}") from error


def test_layouts_that_are_compared_do_differ():
    cache = open_cache(shared_cache())
    found = layouts(chosen_samples(cache))
    shapes = {name: [tuple(pack.input_ids.shape) for pack in packs] for name, packs in found.items()}
    assert len(shapes["padded"]) == 7
    assert shapes["one row each"][0][0] > 4
    assert shapes["one row"][0][0] == 1
    assert 1 < shapes["several rows"][0][0] < 7
    assert (found["one row"][0].seq_lens > 0).sum() == 7


def test_a_neighbour_in_the_row_changes_nothing():
    """What another document holds, its states and tokens included, is out of reach."""
    cache = open_cache(shared_cache())
    draft = draft_for(cache)
    first, second = cache[0], cache[5]
    silent = dataclasses.replace(
        second, loss_mask=torch.zeros_like(second.loss_mask), aux_hidden_states=second.aux_hidden_states * -3
    )
    row_slots = len(first.input_ids) + len(second.input_ids)
    for neighbour in (second, silent):
        pack = collate([first, neighbour], row_slots)
        pack.loss_mask[0, :] = False
        start = 0 if pack.sample_ids[0] == first.sample_id else len(neighbour.input_ids)
        pack.loss_mask[0, start : start + len(first.input_ids)] = first.loss_mask
        packed, alone = (add_up(draft, cache, [each]) for each in (pack, collate([first])))
        torch.testing.assert_close(packed.losses, alone.losses, rtol=RELATIVE, atol=0)
        assert torch.equal(packed.counts, alone.counts)


def test_factored_and_dense_caches_train_alike():
    """Stored in float32, both encodings hold the same distribution; only the softmax was taken at another time."""
    sums = []
    for encoding in ("factored", "dense"):
        cache = open_cache(shared_cache(encoding, "fp32"))
        sums.append(add_up(draft_for(cache), cache, [collate(chosen_samples(cache))]))
    factored, dense = sums
    assert torch.equal(factored.counts, dense.counts)
    assert torch.equal(factored.prefix_valid, dense.prefix_valid)
    torch.testing.assert_close(factored.losses, dense.losses, rtol=1e-6, atol=0)
    for name, gradient in dense.gradients.items():
        difference = float((factored.gradients[name] - gradient).abs().max())
        assert difference <= 1e-5 * float(gradient.abs().max()), name


def test_a_cached_sample_unrolls_as_the_definition_says():
    """One short sample, its slot frame written out by hand, against the float64 oracle."""
    cache = open_cache(shared_cache())
    sample = cache[int(cache.lengths.argmin())]
    draft = draft_for(cache)
    head = cache.head.to("cpu", torch.float64)
    length = len(sample.input_ids)
    probs = torch.zeros(1, length, len(cache.selected_token_ids), dtype=torch.float64)
    position_mask = torch.zeros(1, length, 1, dtype=torch.bool)
    for row, position in enumerate(sample.supervision.positions.tolist()):
        if position == 0 or not sample.loss_mask[position]:
            continue
        logits = head.weight @ sample.supervision.last_hidden_state[row].double()
        probs[0, position - 1] = logits[cache.selected_token_ids].softmax(-1)
        position_mask[0, position - 1, 0] = cache.selected_token_mask[logits.argmax()]
    following = torch.cat([sample.input_ids[1:], torch.zeros(1, dtype=torch.int64)])
    loss_mask = torch.cat([sample.loss_mask[1:], torch.zeros(1, dtype=torch.bool)])
    place = torch.arange(length)
    expected = ttt.unroll(
        ttt.read_draft(dict(draft.named_parameters()), draft.config),
        input_ids=following[None],
        attention_mask=torch.ones(1, length, dtype=torch.int64),
        loss_mask=loss_mask[None],
        aux_hidden_states=sample.aux_hidden_states[None].double(),
        target_probs=probs,
        position_mask=position_mask,
        position_ids=place[None],
        seq_lens=torch.tensor([[length]]),
        doc_remaining=(length - 1 - place)[None],
        ttt_steps=TTT_STEPS,
    )
    found = add_up(draft, cache, [collate([sample])])
    assert found.counts.tolist() == expected.step_counts
    assert found.prefix_hits.tolist() == expected.prefix_hits
    assert found.prefix_valid.tolist() == expected.valid
    for ours, count, theirs in zip(found.losses, expected.step_counts, expected.step_losses, strict=True):
        assert float(ours) / count == pytest.approx(float(theirs.detach()), rel=RELATIVE)


def double_trainer(directory: Path, **changes: object):
    """A trainer in float64 on a dense cache, whose probabilities do not depend on the layout."""
    chosen = settings(directory, cache=shared_cache("dense"), train_embeddings=True, max_grad_norm=1e9, **changes)
    trainer = trainer_of(chosen)
    trainer.model.double()
    trainer.optimizer = build_optimizer(trainer.model, chosen)
    return trainer


def one_step(trainer, packs: list[list[Sample]]) -> tuple[Tally, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tally = Tally(trainer.settings.ttt_steps)
    mask = trainer.corpus.cache.selected_token_mask
    made = tuple(make_pack(pack, mask, trainer.objective, trainer.device) for pack in packs)
    counts = np.sum([pack.plan.step_counts.numpy() for pack in made], axis=0)
    num_tokens = sum(pack.num_tokens for pack in made)
    trainer.step(LoadedStep(Position(1, 0, 1), np.empty(0, np.int64), made, len(made), counts, num_tokens), tally)
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    return tally, gradients, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_step_of_several_packs_is_the_step_of_one_pack(tmp_path):
    """The means are over the whole optimizer step, so packs with few supervised slots do not count more."""
    trainers = [double_trainer(tmp_path) for _ in range(2)]
    samples = chosen_samples(trainers[0].corpus.cache)
    cut = [samples[:1], samples[1:3], samples[3:]]
    one, several = (one_step(trainer, packs) for trainer, packs in zip(trainers, [[samples], cut], strict=True))
    totals = [found[0].totals for found in (several, one)]
    torch.testing.assert_close(totals[0].losses, totals[1].losses, rtol=RELATIVE, atol=0)
    for name in ("counts", "hits", "prefix_hits", "prefix_valid"):
        assert torch.equal(getattr(totals[0], name), getattr(totals[1], name)), name
    for name, gradient in one[1].items():
        assert float((several[1][name] - gradient).abs().max()) <= RELATIVE * float(gradient.abs().max()), name
    # Adam's first step is about lr · sign(g): a gradient near its epsilon is blown up: a tolerance in units of lr.
    for name, weight in one[2].items():
        torch.testing.assert_close(several[2][name], weight, rtol=0, atol=1e-6 * 3e-3)


def test_a_step_s_gradient_is_that_of_the_mean_over_the_step(tmp_path):
    trainer = double_trainer(tmp_path)
    samples = chosen_samples(trainer.corpus.cache)
    cache = trainer.corpus.cache
    trainer.model.zero_grad(set_to_none=True)
    totals, counts = 0, 0
    for sample in samples:
        sums = unroll(trainer.model, slot_batch(collate([sample]), None, cache.selected_token_mask), 3)
        totals, counts = totals + sums.losses, counts + sums.counts
    weights = torch.tensor([1.0, 0.8, 0.8**2], dtype=torch.float64)
    ((totals / counts) @ weights / weights.sum()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    _, gradients, _ = one_step(trainer, [samples[:2], samples[2:]])
    for name, gradient in expected.items():
        assert float((gradients[name] - gradient).abs().max()) <= RELATIVE * float(gradient.abs().max()), name

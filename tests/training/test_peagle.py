"""Training a P-EAGLE draft from a cache: the reference's numbers, draws that depend on nothing but their key."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eagle_offline.alignment import shift_left_with_zero
from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.objectives.parallel_loss import ParallelLoss
from eagle_offline.objectives.parallel_plan import ParallelPlan
from eagle_offline.objectives.peagle import PEagleTrainerModule
from eagle_offline.objectives.peagle_plan import CodSampling
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.objective import PackSlots, ParallelObjective
from eagle_offline.training.tally import Tally
from eagle_offline.training.token_counts import token_counts
from eagle_offline.training.trainer import Trainer
from tests.training.caches import checkpoint_tensors, latest, settings, shared_cache, train, trainer_of

D = 4


def chosen_for(run: Path, **changes: Any) -> TrainSettings:
    values = {"objective": "peagle", "num_depths": D, "num_draft_layers": 2, "max_grad_norm": 1e9}
    return settings(run, **{**values, **changes})


def reference_of(
    trainer: Trainer, indices: np.ndarray, epoch: int
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor], PEagleTrainerModule]:
    """Each sample as a slot-frame row of its own, its elements' generator, and the reference module."""
    cache, sampling = trainer.corpus.cache, trainer.objective.sampling  # type: ignore[attr-defined]
    choice = trainer.choice
    assert choice.mask_token is not None
    module = PEagleTrainerModule(
        trainer.model,
        choice.selected_token_ids,
        choice.selected_token_mask,
        D,
        choice.mask_token.token_id,
        sampling.down_sample_ratio,
        sampling.down_sample_ratio_min,
    )
    rows, generators = [], []
    for index in indices:
        sample = cache[int(index)]
        probs, position_mask = cache.target_probs(sample)
        ids = sample.input_ids[None].long()
        rows.append(
            {
                "input_ids": shift_left_with_zero(ids),
                "attention_mask": torch.ones_like(ids),
                "loss_mask": shift_left_with_zero(sample.loss_mask[None]),
                "aux_hidden_states": sample.aux_hidden_states[None].float(),
                "target_probs": shift_left_with_zero(probs[None]),
                "position_mask": shift_left_with_zero(position_mask[None]),
            }
        )
        generators.append(trainer.objective._generator(epoch, int(cache.sample_ids[int(index)])))  # type: ignore[attr-defined]
    return rows, generators, module


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("encoding", ["factored", "dense", "topk"])
def test_a_step_is_the_reference_module_s_over_the_same_samples(encoding, partitions, tmp_path):
    cache = shared_cache(encoding)
    trainer = trainer_of(
        chosen_for(tmp_path, cache=(cache,), sequence_partitions=partitions, global_batch=3, tokens_per_batch=150)
    )
    loaded = trainer.stream.load(next(trainer.remaining_steps()))
    rows, generators, module = reference_of(trainer, loaded.samples, epoch=0)
    trainer.model.zero_grad()
    plans = [
        module.build_peagle_plan(row["loss_mask"], generator=generator)
        for row, generator in zip(rows, generators, strict=True)
    ]
    total, losses = sum(int(plan.total_den) for plan in plans), 0.0
    for row, plan in zip(rows, plans, strict=True):
        plan.total_den = torch.tensor(total)
        for unit in range(len(plan.units)):
            loss = module(**row, peagle_segment=(plan, unit)).loss
            loss.backward()
            losses += float(loss.detach())
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    tally = Tally(D)
    trainer.step(loaded, tally)
    row = tally.row("train", trainer.loss, 1, 0.1)
    assert int(loaded.step_counts.sum()) == total > 100
    assert row.loss == pytest.approx(losses, rel=2e-5)
    assert {"mask_hidden", "fc.weight", "layers.1.self_attn.q_proj.weight"} <= expected.keys()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            size = float(expected[name].abs().max())
            assert float((parameter.grad - expected[name]).abs().max()) <= 5e-5 * size, name


def plans_of(objective: ParallelObjective, lengths: list[int], ids: tuple[int, ...], epoch: int | None) -> ParallelPlan:
    num_slots = sum(lengths)
    everything = np.ones(num_slots, bool)
    slots = PackSlots(ids, np.array(lengths), everything, everything, np.arange(num_slots), epoch)
    return objective.plan(slots, 64, ragged=False)


def elements_by_document(plan: ParallelPlan, lengths: list[int]) -> list[list[tuple[int, int]]]:
    starts = np.cumsum([0, *lengths])
    pairs = [
        (int(anchor), int(depth))
        for segment in plan.segments
        for anchor, depth in zip(segment.anchors, segment.depths, strict=True)
    ]
    return [
        sorted((anchor - int(low), depth) for anchor, depth in pairs if low <= anchor < high)
        for low, high in pairwise(starts)
    ]


def test_what_is_drawn_of_a_sample_depends_on_seed_epoch_and_sample_alone():
    objective = ParallelObjective(ParallelLoss(D), CodSampling(D, 0.5, 0.1), seed=3, num_segments=2)
    lengths, ids = [40, 60, 30], (7, 11, 5)
    drawn = elements_by_document(plans_of(objective, lengths, ids, 0), lengths)
    assert all(len(elements) > 10 for elements in drawn)
    backwards = elements_by_document(plans_of(objective, lengths[::-1], ids[::-1], 0), lengths[::-1])
    assert backwards[::-1] == drawn
    alone = elements_by_document(plans_of(objective, [60], (11,), 0), [60])
    assert alone == [drawn[1]]
    others = [
        plans_of(objective, lengths, ids, 1),
        plans_of(objective, lengths, (8, 12, 6), 0),
        plans_of(ParallelObjective(objective.loss, objective.sampling, 4, 2), lengths, ids, 0),
    ]
    for other in others:
        found = elements_by_document(other, lengths)
        assert all(one != two for one, two in zip(found, drawn, strict=True))
        assert [len(elements) for elements in found] == [len(elements) for elements in drawn]


@pytest.mark.parametrize("epoch", [0, None])
def test_a_document_s_last_slot_predicts_nothing_of_the_next_document(epoch):
    """Where the next one begins with a token that the assistant wrote, as all do here."""
    objective = ParallelObjective(ParallelLoss(D), CodSampling(D, 1.0, 1.0), seed=3, num_segments=2)
    plan = plans_of(objective, [5, 1, 7], (7, 11, 5), epoch)
    ends = {4, 5, 12}
    assert not ends & set(plan.first.slots.tolist())
    for segment in plan.segments:
        assert not ends & set((segment.anchors + segment.depths).tolist())
    assert plan.step_counts.tolist()[:2] == [4 + 6, 3 + 5]


def test_an_epoch_s_last_step_still_draws_by_that_epoch(tmp_path):
    trainer = trainer_of(chosen_for(tmp_path, num_epochs=2, tokens_per_batch=400))
    steps = list(trainer.remaining_steps())
    last = next(number for number, (position, _) in enumerate(steps) if position.next_pack == 0)
    assert steps[last][0].epoch == 1
    loaded = trainer.stream.load(steps[last])
    (pack,) = loaded.packs
    again = trainer.stream.pack(trainer.corpus.samples, loaded.samples, "input", 0)
    later = trainer.stream.pack(trainer.corpus.samples, loaded.samples, "input", 1)
    drawn = [torch.cat([segment.anchors for segment in each.plan.segments]) for each in (pack, again, later)]  # type: ignore[union-attr]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_metrics_by_depth_and_a_draft_that_learns(tmp_path):
    run = tmp_path / "run"
    train(chosen_for(run, num_epochs=4, max_grad_norm=0.5, learning_rate=1e-2))
    rows = [row for row in read_metrics(run) if row["kind"] == "heldout"]
    for row in rows:
        assert all(len(row[name]) == D for name in ("top1", "step_loss", "survival", "conditional_top1"))
        assert 1 + sum(row["survival"]) == pytest.approx(row["simulated_accept_length"])
        assert sorted(row["survival"], reverse=True) == row["survival"]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["step_loss"][D - 1] < rows[0]["step_loss"][D - 1]
    tensors = checkpoint_tensors(run)
    assert "model.safetensors:mask_hidden" in tensors


def test_validation_does_not_depend_on_parts_or_epoch(tmp_path):
    found = []
    for partitions in (1, 4):
        trainer = trainer_of(chosen_for(tmp_path, sequence_partitions=partitions))
        found.append(trainer.validate().row("heldout", trainer.loss, 0, 0.0))
    for name in ("loss", "survival", "top1", "step_loss", "walked_accept_length"):
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name), rel=1e-5)


def test_the_mask_token_is_in_the_config_and_pinned_for_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    train(chosen_for(run, max_steps=1))
    said = capsys.readouterr().err
    trainer = trainer_of(chosen_for(run))
    token = trainer.model.config.mask_token_id
    assert f"mask token {token} (" in said
    assert f'"mask_token_id": {token}' in (latest(run) / "config.json").read_text()
    counts = token_counts(trainer.corpus.samples.caches)
    other = next(other for other in range(len(counts) - 1, 0, -1) if other != token and not counts[other])
    with pytest.raises(MismatchError, match="mask_token_id"):
        train(chosen_for(run, max_steps=3, resume=True, mask_token_id=other))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "peagle", "ttt_steps": 3}, "--ttt-steps"),
        ({"objective": "peagle", "norm_output": True}, "--norm-output"),
        ({"objective": "peagle", "lk_loss_type": "alpha"}, "--lk-loss-type"),
        ({"num_depths": 5}, "--num-depths"),
        ({"mask_token_id": 5}, "--mask-token-id"),
        ({"sequence_partitions": 2}, "--sequence-partitions"),
        ({"objective": "peagle", "depth_weights": (1.0, 2.0)}, "--depth-weights has 2 values for --num-depths 8"),
        ({"objective": "peagle", "depth_weights": (0.0, *(1.0,) * 7)}, "the first above it"),
        ({"objective": "peagle", "depth_weights": (1.0, *(-1.0,) * 7)}, "numbers from 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, named, tmp_path):
    with pytest.raises(UsageError, match=named):
        TrainSettings(cache=("c",), output_dir=tmp_path, **changes)

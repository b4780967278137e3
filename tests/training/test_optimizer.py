"""The learning rate's shape, and what AdamW works on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.optimizer import build_optimizer, learning_rate
from eagle_offline.training.tally import Tally
from tests.training.caches import settings, train, trainer_of


def rates(total: int, **changes: float) -> list[float]:
    chosen = TrainSettings(cache=Path("c"), output_dir=Path("o"), **changes)
    return [learning_rate(step, total, chosen) for step in range(total)]


def test_the_rate_rises_linearly_then_falls_along_a_cosine_to_its_final_share():
    found = rates(100, learning_rate=2.0, warmup_ratio=0.1, min_learning_rate_ratio=0.25)
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    expected = [2.0 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / 90))) for step in range(90)]
    assert found[10:] == pytest.approx(expected)
    assert found[55] == pytest.approx(2.0 * 0.625)
    assert max(found) == 2.0


def test_the_rate_is_never_zero_before_the_end_and_never_above_its_peak():
    for total in (1, 2, 3, 7, 50):
        for warmup in (0.0, 0.03, 0.5, 1.0):
            found = rates(total, learning_rate=1e-3, warmup_ratio=warmup, min_learning_rate_ratio=0.0)
            assert all(0 < rate <= 1e-3 for rate in found), (total, warmup)


def test_a_rate_past_the_last_step_stays_at_the_final_share():
    chosen = TrainSettings(cache=Path("c"), output_dir=Path("o"), learning_rate=1.0, min_learning_rate_ratio=0.1)
    assert learning_rate(50, 50, chosen) == learning_rate(500, 50, chosen) == pytest.approx(0.1)


def test_every_weight_is_float32_and_only_matrices_decay(tmp_path):
    trainer = trainer_of(settings(tmp_path, weight_decay=0.3, beta1=0.8, beta2=0.9))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    decayed, spared = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in (decayed, spared)] == [0.3, 0.0]
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in spared["params"]} == {1}
    assert {tuple(group["betas"]) for group in (decayed, spared)} == {(0.8, 0.9)}
    named = {parameter: name for name, parameter in trainer.model.named_parameters()}
    optimized = {named[parameter] for group in (decayed, spared) for parameter in group["params"]}
    assert optimized == set(named.values()) - {"embed_tokens.weight"}


def test_asking_for_it_puts_the_embeddings_among_the_trained_weights(tmp_path):
    trainer = trainer_of(settings(tmp_path, train_embeddings=True))
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert id(trainer.model.embed_tokens.weight) in optimized


def test_a_first_step_is_adamw_s_by_hand():
    """Bias-corrected, decay apart from the gradient: w − lr·(g / (|g| + eps) + decay·w)."""
    model = torch.nn.Linear(2, 2, bias=False)
    chosen = TrainSettings(cache=Path("c"), output_dir=Path("o"), learning_rate=0.01, weight_decay=0.5)
    before, gradient = model.weight.detach().clone(), torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    optimizer = build_optimizer(model, chosen)
    model.weight.grad = gradient.clone()
    optimizer.step()
    expected = before - 0.01 * (gradient.sign() + 0.5 * before)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-7)


def test_recorded_rates_are_the_schedule_s(tmp_path):
    chosen = settings(tmp_path / "run", warmup_ratio=0.3, num_epochs=1)
    train(chosen)
    rows = [row for row in read_metrics(chosen.output_dir) if row["kind"] == "train"]
    assert [row["learning_rate"] for row in rows] == [learning_rate(s, len(rows), chosen) for s in range(len(rows))]


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path):
    trainer = trainer_of(settings(tmp_path, max_grad_norm=0.01))
    recorded = trainer.step(trainer.stream.load(next(trainer.remaining_steps())), Tally(3)).grad_norm
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    assert torch.stack([gradient.norm() for gradient in gradients]).norm().item() == pytest.approx(0.01, rel=1e-4)
    assert recorded > 1, "the norm before clipping is recorded"

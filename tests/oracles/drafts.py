"""Small random draft models in float64, as the package makes them, and their twins for the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagle_offline import Eagle3DraftModel, Eagle3StepMetrics, Eagle3TrainerModule
from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from tests.oracles.samples import DRAFT_VOCAB_SIZE, NUM_AUX, TARGET_HIDDEN_SIZE, VOCAB_SIZE
from tests.oracles.ttt import Draft, read_draft

RELATIVE = 1e-9  # float64 keeps about 1e-15; sums in another order over a few hundred terms stay far below this


@dataclass(frozen=True)
class Shape:
    """What varies between the drafts under test."""

    num_layers: int = 1
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 4
    fc_norm: bool = False
    norm_output: bool = False
    rope_theta: float = 10000.0


SHAPES = {
    "plain": Shape(),
    "no_grouping": Shape(num_heads=2, num_key_value_heads=2, head_dim=6),
    "one_key_head": Shape(num_key_value_heads=1, rope_theta=50.0),
    "two_layers": Shape(num_layers=2),
    "fc_norm": Shape(fc_norm=True),
    "norm_output": Shape(norm_output=True),
    "all_at_once": Shape(num_layers=2, fc_norm=True, norm_output=True, head_dim=6),
}


def make_config(shape: Shape) -> Eagle3DraftConfig:
    return Eagle3DraftConfig(
        vocab_size=VOCAB_SIZE,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        target_hidden_size=TARGET_HIDDEN_SIZE,
        num_aux_hidden_states=NUM_AUX,
        fc_norm=shape.fc_norm,
        norm_output=shape.norm_output,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=64,
    )


def make_draft(shape: Shape, seed: int) -> Eagle3DraftModel:
    """A float64 draft whose every parameter, norm weights included, is far from its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    model = Eagle3DraftModel(make_config(shape)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            parameter.requires_grad_(True)
    return model


def twin(model: Eagle3DraftModel) -> Draft:
    return read_draft(dict(model.named_parameters()), model.config)


def make_trainer(
    model: Eagle3DraftModel, selection: tuple[torch.Tensor, torch.Tensor], ttt_steps: int, **options: object
) -> Eagle3TrainerModule:
    ids, mask = selection
    return Eagle3TrainerModule(model, selected_token_ids=ids, selected_token_mask=mask, ttt_steps=ttt_steps, **options)


def run_with_gradients(
    trainer: Eagle3TrainerModule, batch: dict[str, torch.Tensor]
) -> tuple[Eagle3StepMetrics, dict[str, torch.Tensor]]:
    """One call, its backward pass, and the gradient of every draft parameter (zero where none arrived)."""
    model = trainer.draft_model
    model.zero_grad(set_to_none=True)
    metrics = trainer(**batch)
    metrics.loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return metrics, found


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = RELATIVE
) -> None:
    """Every gradient equal, relative to the largest entry of the expected one."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        size = float(grad.abs().max())
        worst = float((actual[name] - grad).abs().max())
        assert worst <= relative * size + 1e-15, f"{name}: off by {worst:.3g} of {size:.3g}"

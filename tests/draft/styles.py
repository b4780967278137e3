"""Drafts of Qwen3's layers and of another width, in float64, and the unroll's definition for both."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from tests.oracles import ttt
from tests.oracles.samples import DRAFT_VOCAB_SIZE, NUM_AUX, TARGET_HIDDEN_SIZE, VOCAB_SIZE

# The target's states are TARGET_HIDDEN_SIZE wide; "own width" is a Llama draft of another.
FORMS: dict[str, dict[str, Any]] = {
    "qwen3": {"layer_style": "qwen3"},
    "qwen3, three layers, 3.1": {
        "layer_style": "qwen3", "num_hidden_layers": 3, "fc_norm": True, "norm_output": True, "head_dim": 6,
    },
    "qwen3, one key head": {"layer_style": "qwen3", "num_key_value_heads": 1},
    "narrow": {"hidden_size": 8},
    "wide": {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "layer_style": "qwen3"},
}  # fmt: skip


class Qwen3Draft(ttt.Draft):
    """The definition with each query and key normed on its own, before it is rotated."""

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        out = super().linear(name, x)
        for part in ("q", "k"):
            if name.endswith(f".{part}_proj"):
                heads = out.reshape(*out.shape[:-1], -1, self.head_size)
                return self.norm(name.replace("_proj", "_norm"), heads).reshape(out.shape)
        return out


def make_config(form: str, **changes: Any) -> Eagle3DraftConfig:
    values = {
        "vocab_size": VOCAB_SIZE, "draft_vocab_size": DRAFT_VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 20,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "target_hidden_size": TARGET_HIDDEN_SIZE,
        "num_aux_hidden_states": NUM_AUX, "rms_norm_eps": 1e-3, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }  # fmt: skip
    return Eagle3DraftConfig(**{**values, **FORMS[form], **changes})


def scattered(model: Eagle3DraftModel, seed: int, scale: float = 1.5) -> Eagle3DraftModel:
    """The model with every parameter, norm weights included, far from its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            neutral = parameter.dim() == 1
            parameter.copy_(1 + 0.3 * noise if neutral else scale * noise / parameter.shape[-1] ** 0.5)
    return model


def make_draft(form: str, seed: int = 0, **changes: Any) -> Eagle3DraftModel:
    return scattered(Eagle3DraftModel(make_config(form, **changes)).double(), seed)


def twin(model: Eagle3DraftModel) -> ttt.Draft:
    """The definition of a draft, of either style."""
    draft = ttt.read_draft(dict(model.named_parameters()), model.config)
    if model.config.layer_style == "llama":
        return draft
    return Qwen3Draft(**{field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)})

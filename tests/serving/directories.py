"""Draft directories written down by hand, as the layouts are described, and the models that they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.origin import DraftOrigin

HIDDEN_SIZE, MIDDLE_SIZE, HEADS, KEY_HEADS, HEAD_DIM = 16, 20, 4, 2, 4
VOCAB_SIZE, NUM_TARGET_LAYERS = 40, 8
SELECTED = [0, 2, 3, 7, 11, 12, 20, 21, 33, 39]
OUTPUTS, EXECUTED = [1, 3, 4], [2, 4, 5]  # 8 layers: 1, 8 // 2 - 1, 8 - 4; one more each
AUX_IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass
class Directory:
    """The content of a draft directory, to be changed and written."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    origin: dict[str, Any] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The Llama fields of either layout."""
        return self.config.get("transformer_layer_config", self.config)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, directory / "model.safetensors")
        if self.origin is not None:
            (directory / "origin.json").write_text(json.dumps(self.origin))
        return directory


@dataclass(frozen=True)
class Kind:
    """What varies between drafts."""

    num_layers: int = 1
    num_aux: int = 3
    fc_norm: bool = False
    norm_output: bool = False
    full_vocabulary: bool = False
    embeddings_trained: bool = False
    target_hidden_size: int = HIDDEN_SIZE
    layer_style: str = "llama"
    mask_token_id: int | None = None
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    @property
    def outputs(self) -> list[int]:
        return OUTPUTS if self.num_aux == 3 else list(range(self.num_aux))

    @property
    def selected(self) -> list[int]:
        return list(range(VOCAB_SIZE)) if self.full_vocabulary else SELECTED


PLAIN = Kind()
KINDS = {
    "plain": PLAIN,
    "eagle31": Kind(fc_norm=True, norm_output=True),
    "two_layers": Kind(num_layers=2),
    "full_vocabulary": Kind(full_vocabulary=True),
    "trained_embeddings": Kind(embeddings_trained=True),
    "four_aux_layers": Kind(num_aux=4),
    "llama3_rope": Kind(
        rope={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "linear_rope": Kind(rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "qwen3": Kind(layer_style="qwen3"),
    "qwen3_two_layers_31": Kind(layer_style="qwen3", num_layers=2, fc_norm=True, norm_output=True),
    "peagle": Kind(mask_token_id=5),
    "peagle_four_layers": Kind(mask_token_id=0, num_layers=4, num_aux=4),
    "peagle_qwen3": Kind(mask_token_id=39, layer_style="qwen3", full_vocabulary=True),
}
# Another width than the target's, and P-EAGLE with normed aux states: flat directories alone hold them, the former with
# their own embeddings.
NARROW = Kind(target_hidden_size=24)
FLAT_KINDS = {
    **KINDS,
    "narrow": NARROW,
    "narrow_qwen3": Kind(target_hidden_size=24, layer_style="qwen3"),
    "peagle_narrow": Kind(target_hidden_size=24, mask_token_id=5),
    "peagle_normed": Kind(mask_token_id=5, fc_norm=True),
}


def make_model(kind: Kind = PLAIN, seed: int = 0) -> Eagle3DraftModel:
    """A random float32 draft, norms away from 1."""
    config = Eagle3DraftConfig(
        vocab_size=VOCAB_SIZE,
        draft_vocab_size=len(kind.selected),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MIDDLE_SIZE,
        num_hidden_layers=kind.num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_DIM,
        target_hidden_size=kind.target_hidden_size,
        num_aux_hidden_states=kind.num_aux,
        fc_norm=kind.fc_norm,
        norm_output=kind.norm_output,
        layer_style=kind.layer_style,
        parallel_drafting=kind.mask_token_id is not None,
        mask_token_id=kind.mask_token_id,
        rope_parameters=dict(kind.rope),
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = Eagle3DraftModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def make_origin(kind: Kind = PLAIN, **changes: Any) -> DraftOrigin:
    values = {
        "target_id": "org/target",
        "target_revision": None,
        "target_digest": "d" * 32,
        "target_architecture": "LlamaForCausalLM",
        "target_num_layers": NUM_TARGET_LAYERS,
        "target_hidden_size": kind.target_hidden_size,
        "target_vocab_size": VOCAB_SIZE,
        "tokenizer_digest": "a" * 32,
        "template_digest": "b" * 32,
        "aux_layer_ids": kind.outputs,
        "cache_digest": "c" * 32,
        "dataset": {"sources": [{"name": "chat.jsonl", "digest": "e" * 32}], "num_samples": 7},
        "draft_vocab_digest": "f" * 32,
        "draft_vocab_coverage": 0.97,
        **(
            {"objective": "eagle3", "ttt_steps": 3}
            if kind.mask_token_id is None
            else {"objective": "peagle", "num_depths": 4}
        ),
        "embeddings_trained": kind.embeddings_trained,
        "step": 12,
        "heldout": {"simulated_accept_length": 2.5, "top1": [0.5, 0.25]},
    }
    return DraftOrigin(**{**values, **changes})


def llama_fields(kind: Kind = PLAIN) -> dict[str, Any]:
    """Llama's or Qwen3's fields of a draft without RoPE scaling, in float32."""
    fields = {
        "model_type": kind.layer_style,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": MIDDLE_SIZE,
        "num_hidden_layers": kind.num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "num_aux_hidden_states": kind.num_aux,
    }
    return fields | ({"use_sliding_window": False} if kind.layer_style == "qwen3" else {"mlp_bias": False})


def parallel_fields(kind: Kind) -> dict[str, Any]:
    """What a P-EAGLE config says beside the rest."""
    return {} if kind.mask_token_id is None else {"parallel_drafting": True, "mask_token_id": kind.mask_token_id}


def vocabulary(kind: Kind = PLAIN) -> dict[str, Tensor]:
    """The two tensors of a draft vocabulary; none for a full one."""
    if kind.full_vocabulary:
        return {}
    return {
        "d2t": torch.tensor([token_id - draft_id for draft_id, token_id in enumerate(kind.selected)]),
        "t2d": torch.tensor([token_id in kind.selected for token_id in range(VOCAB_SIZE)]),
    }


def flat(kind: Kind = PLAIN) -> Directory:
    """A flat directory with the weights of `make_model`."""
    tensors = {
        name.replace("layers.0.", "midlayer."): tensor.clone()
        for name, tensor in make_model(kind).state_dict().items()
        if name != "embed_tokens.weight" or kind.target_hidden_size != HIDDEN_SIZE
    }
    for index in range(1, kind.num_layers):
        tensors[f"layers.{index}.hidden_norm.weight"] = tensors[f"layers.{index}.input_layernorm.weight"].clone()
    config = {
        "architectures": ["Eagle3Qwen3ForCausalLM" if kind.layer_style == "qwen3" else "LlamaForCausalLMEagle3"],
        **llama_fields(kind),
        "draft_vocab_size": len(kind.selected),
        "fc_norm": kind.fc_norm,
        "norm_output": kind.norm_output,
        AUX_IDS: [layer_id + 1 for layer_id in kind.outputs],
        "eagle_config": {AUX_IDS: kind.outputs, "use_aux_hidden_state": True},
        **parallel_fields(kind),
    }
    if kind.mask_token_id is not None:
        config["pard_token"] = kind.mask_token_id
    if kind.target_hidden_size != HIDDEN_SIZE:
        config["target_hidden_size"] = kind.target_hidden_size
    return Directory(config, tensors | vocabulary(kind))


def speculators(kind: Kind = PLAIN) -> Directory:
    """A speculators directory with the weights of `make_model`."""
    tensors = {name: tensor.clone() for name, tensor in make_model(kind).state_dict().items()}
    config = {
        "architectures": ["Eagle3DraftModel" if kind.mask_token_id is None else "PEagleDraftModel"],
        "speculators_model_type": "eagle3" if kind.mask_token_id is None else "peagle",
        "dtype": "float32",
        "draft_vocab_size": len(kind.selected),
        "fc_norm": kind.fc_norm,
        "norm_output": kind.norm_output,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "tie_word_embeddings": False,
        AUX_IDS: [layer_id + 1 for layer_id in kind.outputs],
        "transformer_layer_config": llama_fields(kind),
        "speculators_config": {
            "algorithm": "eagle3" if kind.mask_token_id is None else "peagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        **parallel_fields(kind),
    }
    return Directory(config, tensors | vocabulary(kind))


LAYOUTS = {"flat": flat, "speculators": speculators}

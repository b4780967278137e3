"""The two directories that serving engines read, as pure functions of a draft: a config and named tensors.

*flat* is a Llama or Qwen3 config with a draft's fields at top level (vLLM, SGLang, the original EAGLE code);
*speculators* nests that config and names its verifier (vLLM, speculators). The tensors are the same but for the name of
layer 0.
Here, and nowhere else, our 0-based outputs become numbers of layers executed, and a draft vocabulary becomes offsets.
This module knows no files; what each engine makes of a layout is said in `eagle_offline.serving.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.layers import LayerStyle, head_dim

ExportLayout = Literal["flat", "speculators"]

FLAT_ARCHITECTURE: Final = "LlamaForCausalLMEagle3"
# What a flat config calls a draft, by the style of its layers; speculators tells them by the nested model_type alone.
FLAT_ARCHITECTURES: Final[dict[LayerStyle, str]] = {"llama": FLAT_ARCHITECTURE, "qwen3": "Eagle3Qwen3ForCausalLM"}
# What a speculators config calls a draft, and its class there, by whether it drafts in parallel.
SPECULATORS_KINDS: Final = {False: ("eagle3", "Eagle3DraftModel"), True: ("peagle", "PEagleDraftModel")}
AUX_IDS_FIELD: Final = "eagle_aux_hidden_state_layer_ids"
OFFSETS_TENSOR: Final = "d2t"
MEMBERS_TENSOR: Final = "t2d"
EMBEDDINGS_TENSOR: Final = "embed_tokens.weight"
HEAD_TENSOR: Final = "lm_head.weight"
MASK_TENSOR: Final = "mask_hidden"

# How the names of Qwen3's norms of queries and keys end.
HEAD_NORM_SUFFIXES: Final = ("q_norm.weight", "k_norm.weight")

# Layer 0's prefix: the original EAGLE code knows only the first, speculators only the second, engines both.
FLAT_FIRST_LAYER: Final = "midlayer."
FIRST_LAYER: Final = "layers.0."

DTYPES: Final[dict[str, tuple[str, torch.dtype]]] = {
    "bf16": ("bfloat16", torch.bfloat16),
    "fp16": ("float16", torch.float16),
    "fp32": ("float32", torch.float32),
}

# RoPE scalings that the original EAGLE code knows; it wants exactly the fields `type` and `factor`.
ORIGINAL_ROPE_TYPES: Final = ("linear", "dynamic")

_LLAMA_FIELDS: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def layers_executed(aux_layer_ids: Sequence[int]) -> list[int]:
    """Return how many target layers have run when each aux state is taken, from 0-based outputs.

    Example:
        >>> layers_executed([1, 15, 28])
        [2, 16, 29]
    """
    return [layer_id + 1 for layer_id in aux_layer_ids]


def outputs_of(executed: Sequence[int]) -> list[int]:
    """Return 0-based outputs from numbers of layers executed; the inverse of `layers_executed`."""
    return [count - 1 for count in executed]


def offsets_of(selected_token_ids: Tensor) -> Tensor:
    """Return ``d2t`` int64 ``[Vd]``: what to add to a draft id for the target's id.

    Example:
        >>> offsets_of(torch.tensor([0, 2, 5])).tolist()
        [0, 1, 3]
    """
    ids = selected_token_ids.to(torch.int64)
    return ids - torch.arange(len(ids))


def ids_of(offsets: Tensor) -> Tensor:
    """Return the target's ids int64 ``[Vd]`` from ``d2t``; the inverse of `offsets_of`."""
    return offsets.to(torch.int64) + torch.arange(len(offsets))


def members_of(selected_token_ids: Tensor, vocab_size: int) -> Tensor:
    """Return ``t2d`` bool ``[V]``: whether a target's id is in the draft vocabulary."""
    members = torch.zeros(vocab_size, dtype=torch.bool)
    members[selected_token_ids] = True
    return members


def rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """Return the RoPE settings that training used, for readers of either generation of configs.

    ``rope_parameters`` is the whole truth. ``rope_theta`` and ``rope_scaling`` say the same for readers of older
    configs; without scaling, ``rope_scaling`` is left out. With the default type only the base is kept: a draft rotates
    every dimension by plain positions then, whatever else was copied from its target.
    """
    parameters = {key: value for key, value in dict(config.rope_parameters or {}).items() if key != "type"}
    rope_type, theta = parameters.get("rope_type", "default"), parameters["rope_theta"]
    if rope_type == "default":
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}
    if rope_type in ORIGINAL_ROPE_TYPES and parameters.keys() == {"rope_type", "rope_theta", "factor"}:
        scaling = {"type": rope_type, "factor": parameters["factor"]}
    else:
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {"rope_parameters": parameters, "rope_theta": theta, "rope_scaling": scaling}


def flat_layout(
    model: Eagle3DraftModel,
    selected_token_ids: Tensor,
    aux_layer_ids: Sequence[int],
    *,
    include_embeddings: bool,
    dtype: str = "bf16",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of the flat directory.

    Args:
        model: the draft.
        selected_token_ids: int64 ``[Vd]``, strictly increasing.
        aux_layer_ids: 0-based outputs, low first.
        include_embeddings: whether ``embed_tokens.weight`` goes along; engines share the target's otherwise.
        dtype: of floating-point tensors: bf16, fp16 or fp32.
    """
    config = {
        "architectures": [FLAT_ARCHITECTURES[model.config.layer_style]],
        **_layer_config(model.config, dtype),
        "draft_vocab_size": model.config.draft_vocab_size,
        "fc_norm": model.config.fc_norm,
        "norm_output": model.config.norm_output,
        AUX_IDS_FIELD: layers_executed(aux_layer_ids),
        "eagle_config": {AUX_IDS_FIELD: list(aux_layer_ids), "use_aux_hidden_state": True},
        **_parallel_fields(model.config),
    }
    if model.config.parallel_drafting:
        # What vLLM's older runners call the mask token.
        config["pard_token"] = model.config.mask_token_id
    if model.config.target_hidden_size != model.config.hidden_size:
        config["target_hidden_size"] = model.config.target_hidden_size
    tensors = _tensors(model, selected_token_ids, include_embeddings, DTYPES[dtype][1])
    named = {name.replace(FIRST_LAYER, FLAT_FIRST_LAYER): tensor for name, tensor in tensors.items()}
    for index in range(1, model.config.num_hidden_layers):
        # SGLang norms a further layer's input by this name, vLLM by the other.
        named[f"layers.{index}.hidden_norm.weight"] = named[f"layers.{index}.input_layernorm.weight"].clone()
    return config, named


def speculators_layout(
    model: Eagle3DraftModel,
    selected_token_ids: Tensor,
    aux_layer_ids: Sequence[int],
    *,
    include_embeddings: bool,
    target_name: str,
    target_architectures: Sequence[str],
    num_draft_tokens: int,
    dtype: str = "bf16",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of the speculators directory.

    Args:
        model, selected_token_ids, aux_layer_ids, include_embeddings, dtype: as in `flat_layout`.
        target_name: hub id or path under which the target is found.
        target_architectures: class names from the target's config.
        num_draft_tokens: how many tokens a serving engine drafts a round.
    """
    algorithm, architecture = SPECULATORS_KINDS[model.config.parallel_drafting]
    config = {
        "architectures": [architecture],
        "speculators_model_type": algorithm,
        "dtype": DTYPES[dtype][0],
        "draft_vocab_size": model.config.draft_vocab_size,
        "fc_norm": model.config.fc_norm,
        "norm_output": model.config.norm_output,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "tie_word_embeddings": False,
        AUX_IDS_FIELD: layers_executed(aux_layer_ids),
        "transformer_layer_config": _layer_config(model.config, dtype),
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}],
            "verifier": {"name_or_path": target_name, "architectures": list(target_architectures)},
        },
        **_parallel_fields(model.config),
    }
    if model.config.target_hidden_size != model.config.hidden_size:
        config["target_hidden_size"] = model.config.target_hidden_size
    return config, _tensors(model, selected_token_ids, include_embeddings, DTYPES[dtype][1])


def draft_config(fields: Mapping[str, Any], **changes: Any) -> Eagle3DraftConfig:
    """Return our config from the layer fields of either layout; ``changes`` are a draft's own.

    Raises:
        Exception: whatever transformers raises for values it does not take.
    """
    names = (*_LLAMA_FIELDS, "head_dim", "rope_parameters", "rope_theta", "rope_scaling")
    # A copy: transformers completes RoPE dicts in place.
    given = {name: deepcopy(fields[name]) for name in names if fields.get(name) is not None}
    return Eagle3DraftConfig(**{"num_hidden_layers": 1, **given, **changes, "tie_word_embeddings": False})


def expected_shapes(config: Eagle3DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter of a draft by our name with its shape, without making any."""
    size, middle = config.hidden_size, config.intermediate_size
    aux, target_size = config.num_aux_hidden_states, config.target_hidden_size
    width = config.head_dim or size // config.num_attention_heads
    queries, keys = (
        config.num_attention_heads * width,
        (config.num_key_value_heads or config.num_attention_heads) * width,
    )
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDINGS_TENSOR: (config.vocab_size, size),
        "fc.weight": (size, aux * target_size),
        "norm.weight": (size,),
        HEAD_TENSOR: (config.draft_vocab_size or config.vocab_size, size),
    }
    if config.parallel_drafting:
        shapes[MASK_TENSOR] = (1, 1, aux * target_size)
    if config.fc_norm:
        shapes |= {f"fc_norm.{index}.weight": (target_size,) for index in range(aux)}
    for index in range(config.num_hidden_layers):
        prefix, reads = f"layers.{index}.", 2 * size if index == 0 else size
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (queries, reads),
            f"{prefix}self_attn.k_proj.weight": (keys, reads),
            f"{prefix}self_attn.v_proj.weight": (keys, reads),
            f"{prefix}self_attn.o_proj.weight": (size, queries),
            f"{prefix}mlp.gate_proj.weight": (middle, size),
            f"{prefix}mlp.up_proj.weight": (middle, size),
            f"{prefix}mlp.down_proj.weight": (size, middle),
            f"{prefix}input_layernorm.weight": (size,),
            f"{prefix}post_attention_layernorm.weight": (size,),
        }
        if index == 0:
            shapes[f"{prefix}hidden_norm.weight"] = (size,)
        if config.layer_style == "qwen3":
            shapes |= {f"{prefix}self_attn.{suffix}": (width,) for suffix in HEAD_NORM_SUFFIXES}
    return shapes


def parameter_name(name: str) -> str:
    """Return our name of an engine's tensor."""
    return FIRST_LAYER + name.removeprefix(FLAT_FIRST_LAYER) if name.startswith(FLAT_FIRST_LAYER) else name


def _layer_config(config: Eagle3DraftConfig, dtype: str) -> dict[str, Any]:
    """Return the fields of a Llama or Qwen3 config, every one written out: not every reader fills in defaults."""
    return {
        "model_type": config.layer_style,
        **{name: getattr(config, name) for name in _LLAMA_FIELDS},
        "head_dim": head_dim(config),
        **rope_fields(config),
        "attention_bias": False,
        **({"use_sliding_window": False} if config.layer_style == "qwen3" else {"mlp_bias": False}),
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": DTYPES[dtype][0],
        "torch_dtype": DTYPES[dtype][0],
        "num_aux_hidden_states": config.num_aux_hidden_states,
    }


def _parallel_fields(config: Eagle3DraftConfig) -> dict[str, Any]:
    """Return what a P-EAGLE draft's config says beside an EAGLE-3 draft's; speculators leaves the first unread."""
    return {"parallel_drafting": True, "mask_token_id": config.mask_token_id} if config.parallel_drafting else {}


def _tensors(
    model: Eagle3DraftModel, selected_token_ids: Tensor, include_embeddings: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return tensors under our names, floating-point ones in ``dtype``, with the draft vocabulary unless it is full."""
    tensors = {
        name: tensor.detach().cpu().to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if include_embeddings or name != EMBEDDINGS_TENSOR
    }
    if model.config.draft_vocab_size != model.config.vocab_size:
        ids = selected_token_ids.cpu()
        tensors[OFFSETS_TENSOR] = offsets_of(ids)
        tensors[MEMBERS_TENSOR] = members_of(ids, model.config.vocab_size)
    return tensors

"""Where a causal LM keeps its decoder, its decoder layers and its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.supervision import Head

# Where the module that owns the decoder layers stands in a model that does not say so itself, and what it calls
# them. Order matters: a multimodal wrapper has both `model` and `model.language_model`.
_OWNERS = ("model.language_model", "language_model.model", "model", "transformer", "")
_LAYER_LISTS = ("layers", "h", "blocks")

# What architectures call the factors and the bound between their head's product and their logits.
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# These multiply by what others divide by.
_MULTIPLIES_LOGITS_SCALING = ("hyperclovax",)

# Rows of an identity matrix that go through a quantised head at once.
_IDENTITY_ROWS = 256


def find_decoder(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Return the module that runs the decoder without its head, and its layers in order.

    Layers may be a ``ModuleList`` or a ``ModuleDict`` keyed by ``str(i)``.

    Raises:
        MismatchError: no such list under any known name.
    """
    for owner in _possible_owners(model):
        for attribute in _LAYER_LISTS:
            layers = getattr(owner, attribute, None)
            if isinstance(layers, nn.ModuleDict):
                return owner, [layers[str(index)] for index in range(len(layers))]
            if isinstance(layers, nn.ModuleList):
                return owner, list(layers)
    owners = ", ".join(filter(None, _OWNERS))
    raise MismatchError(
        f"{type(model).__name__} has no list of decoder layers, {' or '.join(_LAYER_LISTS)}, in any of: {owners}; "
        "encoders, and models that run their layers in another way, cannot be captured"
    )


def _possible_owners(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what the model calls its decoder, the innermost last, then what stands at known places."""
    owner: Any = model
    while hasattr(owner, "get_decoder"):
        inner = owner.get_decoder()
        if inner is owner or not isinstance(inner, nn.Module):
            break
        yield inner
        owner = inner
    for path in _OWNERS:
        module: Any = model
        for name in path.split(".") if path else ():
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            yield module


def default_aux_layer_ids(num_layers: int) -> list[int]:
    """Return ``[1, L//2 - 1, L - 4]`` for a target of ``L`` layers, 0-based outputs of decoder layers.

    Raises:
        UsageError: too shallow for three distinct ids in range.

    Example:
        >>> default_aux_layer_ids(32)
        [1, 15, 28]
    """
    ids = [1, num_layers // 2 - 1, num_layers - 4]
    if not ids[0] < ids[1] < ids[2]:
        raise UsageError(
            f"a target of {num_layers} layers is too shallow for the default aux layers {ids}: pass --aux-layer-ids, "
            f"strictly increasing numbers from 0 to {num_layers - 1}"
        )
    return ids


def validate_aux_layer_ids(aux_layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """Return the ids as a list.

    Raises:
        UsageError: empty, not strictly increasing, or out of range.
    """
    ids = [int(layer_id) for layer_id in aux_layer_ids]
    increasing = all(low < high for low, high in pairwise(ids))
    if not ids or not increasing or ids[0] < 0 or ids[-1] >= num_layers:
        raise UsageError(
            f"--aux-layer-ids {' '.join(map(str, ids)) or '(none)'}: expected strictly increasing layer numbers from 0 "
            f"to {num_layers - 1}, this target has {num_layers} decoder layers"
        )
    return ids


def read_head(model: nn.Module) -> Head:
    """Return what ``model`` applies to its final hidden state, in the dtype it is loaded in.

    Raises:
        MismatchError: the model has no output embeddings.
    """
    causal_lm = cast(Any, model)
    output = causal_lm.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        raise MismatchError(f"{type(model).__name__} has no language-model head")
    config = causal_lm.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    bias = getattr(output, "bias", None)
    return Head(
        weight=_head_rows(output, config),
        bias=None if bias is None else bias.detach(),
        scale=_logit_scale(config),
        soft_cap=next((cap for name in _LOGIT_CAPS if (cap := getattr(config, name, None))), None),
    )


def _logit_scale(config: Any) -> float:
    scale = 1.0
    for name in (*_LOGIT_FACTORS, *_LOGIT_DIVISORS):
        value = getattr(config, name, None)
        if not isinstance(value, int | float) or not value:
            continue
        multiplies = name in _LOGIT_FACTORS or str(config.model_type).startswith(_MULTIPLIES_LOGITS_SCALING)
        scale *= value if multiplies else 1.0 / value
    return scale


def _head_rows(output: nn.Module, config: Any) -> Tensor:
    """Return ``[V, H]``; of a quantised head, packed in whatever way, what it makes of the unit vectors."""
    weight = getattr(output, "weight", None)
    if isinstance(weight, Tensor) and is_plain(weight):
        return weight.detach()
    place = next(iter([*output.parameters(), *output.buffers()])).device
    unit_vectors = torch.eye(config.hidden_size, dtype=config.dtype, device=place)
    bias = getattr(output, "bias", None)
    with torch.inference_mode():
        columns = [output(rows) - (0 if bias is None else bias) for rows in unit_vectors.split(_IDENTITY_ROWS)]
        return torch.cat(columns).T.contiguous()


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight is stored as the numbers that it is multiplied by."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype.itemsize > 1 and weight.is_floating_point()


def embedding_rows(model: nn.Module) -> Tensor:
    """Return ``[V, H]``: the input embeddings, before any scale that the model applies to them."""
    weight: Any = input_embeddings(model).weight
    return weight.detach() if is_plain(weight) else weight.dequantize()


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """Return the model's input embeddings; token ids must go to their device."""
    return cast(Any, model).get_input_embeddings()

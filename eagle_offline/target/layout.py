"""Where a causal LM keeps its decoder, its decoder layers and its head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from torch import nn

from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.supervision import Head

# Paths from the model to the module that owns the decoder layers, and that module's attribute. Order matters:
# a multimodal wrapper has both `model` and `model.language_model`.
_LAYER_PATHS = (
    ("model.language_model", "layers"),
    ("language_model.model", "layers"),
    ("model", "layers"),
    ("transformer", "h"),
    ("", "layers"),
)


def _follow(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module


def find_decoder(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Return the module that runs the decoder without its head, and its layers in order.

    Layers may be a ``ModuleList`` or a ``ModuleDict`` keyed by ``str(i)``.

    Raises:
        MismatchError: no such list under any known name.
    """
    for path, attribute in _LAYER_PATHS:
        owner = _follow(model, path)
        layers = getattr(owner, attribute, None)
        if isinstance(layers, nn.ModuleDict):
            return owner, [layers[str(index)] for index in range(len(layers))]  # type: ignore[return-value]
        if isinstance(layers, nn.ModuleList):
            return owner, list(layers)  # type: ignore[return-value]
    known = ", ".join(".".join(filter(None, pair)) for pair in _LAYER_PATHS)
    raise MismatchError(f"{type(model).__name__} has no list of decoder layers under any of: {known}")


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
    divisor = getattr(config, "logits_scaling", None)
    scale = 1.0 / divisor if divisor else float(getattr(config, "logit_scale", None) or 1.0)
    bias = getattr(output, "bias", None)
    return Head(
        weight=output.weight.detach(),
        bias=None if bias is None else bias.detach(),
        scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """Return the model's input embeddings; token ids must go to their device."""
    return cast(Any, model).get_input_embeddings()

"""Embeddings and head of a target that is cut into parts or spread, made whole: both are stored with a cache."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from eagle_offline.target.layout import input_embeddings


def gather_ends(model: nn.Module, *, leads: bool) -> None:
    """Make the embeddings whole on every process and the head on the first, as on a single one.

    Supervision is computed from the head, and both are stored with a cache; a sharded head would not be run by the
    others, who know of the decoder only.
    """
    embeddings, head = input_embeddings(model), cast(Any, model).get_output_embeddings()
    whole: dict[int, nn.Parameter] = {}
    for module in (embeddings, head) if head is not None else (embeddings,):
        for name, part in list(module.named_parameters(recurse=False)):
            if id(part) not in whole:
                tensor = part.full_tensor() if hasattr(part, "full_tensor") else part
                whole[id(part)] = nn.Parameter(tensor.detach(), requires_grad=False)
            if leads or module is embeddings:
                module.register_parameter(name, whole[id(part)])
        if leads or module is embeddings:
            # What transformers put in its place handles parts.
            vars(module).pop("forward", None)


def bring_ends_back(model: nn.Module) -> None:
    """Keep embeddings and head in memory where they were put away: both are stored with a cache, and used beside it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    from accelerate.utils import align_module_device, has_offloaded_params

    for module in (input_embeddings(model), cast(Any, model).get_output_embeddings()):
        if module is None or not has_offloaded_params(module):
            continue
        with align_module_device(module, torch.device("cpu")):
            whole = {name: part.detach().clone() for name, part in module.named_parameters(recurse=False)}
        remove_hook_from_module(module)
        for name, part in whole.items():
            module.register_parameter(name, nn.Parameter(part, requires_grad=False))
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))

"""The target without its decoder layers: what it applies to the last one's output, its head and its embeddings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from eagle_offline.errors import EagleOfflineError, MismatchError, one_line
from eagle_offline.target.layout import find_decoder, input_embeddings
from eagle_offline.target.load import TargetSource, load_config, load_model


def load_without_layers(source: TargetSource, device: str, compute_dtype: str | None) -> nn.Module:
    """Load a target for its norm, head and embeddings; no decoder layer is read where its class allows for none.

    Raises:
        DataError, MismatchError: as for `load_model`.
    """
    if source.adapter is not None:  # it is of the layers, for the most part
        return load_model(source, device, compute_dtype)
    config = without_layers(load_config(source))
    try:
        with _quiet():
            model = load_model(source, device, compute_dtype, config=config)
        find_final_norm(model)
    except (EagleOfflineError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        # Classes that count on a layer fail in ways of their own; with all of them, a defect of the files shows too.
        sys.stderr.write(f"loading the whole target, for it does not do without its layers: {one_line(error)}\n")
        model = load_model(source, device, compute_dtype)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from listing the weights of all layers as unexpected."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def without_layers(config: Any) -> Any:
    """Return a target's config with no decoder layers."""
    config = deepcopy(config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = 0
    # One entry a layer, where there is one.
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text_config, name, None) is not None:
            setattr(text_config, name, [])
    return config


def find_final_norm(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what the decoder applies to the output of its last layer, found by what it returns.

    Raises:
        MismatchError: what it returns is not the output of one of its modules.
    """
    decoder, _ = find_decoder(model)
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: outputs.update({name: output})

    handles = [child.register_forward_hook(keep(name)) for name, child in decoder.named_children()]
    try:
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.int64, device=input_embeddings(model).weight.device)
            returned = decoder(token, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    last = returned.last_hidden_state if hasattr(returned, "last_hidden_state") else returned[0]
    for name, child in decoder.named_children():
        if outputs.get(name) is last:
            return child
    raise MismatchError(
        f"{type(model).__name__} returns something else than its final norm gives: states from before that norm cannot "
        "be imported for it"
    )

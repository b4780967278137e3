"""Which class loads a checkpoint, and the fastest implementations of attention and experts that it offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eagle_offline.errors import MismatchError

_HALF = (torch.float16, torch.bfloat16)

# Fastest first; where none of them is offered, every architecture has "eager".
_FLASH = ("flash_attention_3", "flash_attention_2")

# What configs call the number of experts in a layer.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Implementations:
    """What transformers computes attention and, in a mixture of experts, the experts with; ``experts`` else None."""

    attention: str
    experts: str | None


def auto_class(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the Auto class of transformers that loads a whole language model for a config.

    Text-only classes come first; a multimodal one is loaded whole, and only text goes through it.

    Raises:
        MismatchError: an encoder-decoder, an encoder, or anything else that writes no text from left to right.
    """
    import transformers

    kind = (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder:
        raise MismatchError(f"{kind} is an encoder-decoder model; a draft needs a decoder-only target")
    masked = transformers.AutoModelForMaskedLM._model_mapping
    if type(config) in masked and getattr(masked[type(config)], "__name__", None) == kind:
        raise MismatchError(f"{kind} is an encoder model; a draft needs a decoder-only target")
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForCausalLM
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
    ):
        if type(config) in auto._model_mapping:
            return auto
    raise MismatchError(f"{kind} (model type {config.model_type}) is not a causal language model in transformers")


def implementations(config: Any, device: str, dtype: torch.dtype) -> Implementations:
    """Return the fastest implementations that transformers offers an architecture on a device.

    Args:
        config: the checkpoint's.
        device: torch device.
        dtype: what the target runs in.
    """
    kind = _model_class(config)
    on_cuda = torch.device(device).type == "cuda"
    return Implementations(_attention(kind, on_cuda, dtype), _experts(config, kind, on_cuda))


def _model_class(config: Any) -> Any:
    """Return the class that runs a config's text, None for code that comes with a checkpoint."""
    from transformers import AutoModel

    text_config = config.get_text_config()
    try:
        for auto, of in ((AutoModel, text_config), (auto_class(config), config)):
            if type(of) in auto._model_mapping:
                kind = auto._model_mapping[type(of)]
                return kind[0] if isinstance(kind, tuple) else kind
    except MismatchError:
        pass
    return None


def _attention(kind: Any, on_cuda: bool, dtype: torch.dtype) -> str:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if kind is None:
        return "sdpa"
    if on_cuda and dtype in _HALF and kind._supports_flash_attn:
        # A class with sinks lists the few kernels that know them; the packages' own do not.
        listed = getattr(kind, "_compatible_flash_implementations", None)
        installed = {_FLASH[0]: is_flash_attn_3_available, _FLASH[1]: is_flash_attn_2_available}
        for name in _FLASH:
            if (listed is None or name in listed) and installed[name]():
                return name
    if kind._supports_sdpa:
        return "sdpa"
    # Soft-capped scores and sinks are not in torch's own kernels. Uncompiled, on a CPU, flex is slower than eager.
    return "flex_attention" if on_cuda and kind._supports_flex_attn else "eager"


def _experts(config: Any, kind: Any, on_cuda: bool) -> str | None:
    text_config = config.get_text_config()
    if not any(_is_count(getattr(text_config, name, None)) for name in _EXPERT_COUNTS):
        return None
    # Measured on a CPU: the plain loop is as fast as grouped products or faster, and 20 times as fast as batched ones.
    return "grouped_mm" if on_cuda and kind is not None and kind._can_set_experts_implementation() else "eager"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 1

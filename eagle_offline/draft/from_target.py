"""The draft that fits a target: its config from the target's, its embeddings and head rows to start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.layers import LayerStyle, RotaryEmbedding
from eagle_offline.errors import DataError, UsageError, one_line
from eagle_offline.supervision import Head

HeadStart = Literal["target", "random"]

_COPIED = (
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# What a draft and its checks ask of a target's config, under the names that most architectures use.
_ASKED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
)
# What some call them and transformers does not translate.
_OTHER_NAMES = {
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_key_value_heads": ("num_kv_heads",),
    "max_position_embeddings": ("max_seq_len", "seq_length"),
}
_ROPE_NAMES = ("rope_parameters", "rope_theta", "rope_scaling")
# Of a target that has no feed-forward of one width: what most have.
_MIDDLE_FACTOR = 4

_HEADS_FLAG = "--draft-num-attention-heads"
_KEY_VALUE_HEADS_FLAG = "--draft-num-key-value-heads"

# Rows widened to float64 at once: 128 MiB at a width of 4096.
_CHUNK_ROWS = 4096


def read_target_config(path: Path) -> dict[str, Any]:
    """Read the text part of a target's ``config.json``, its sizes under the names that most architectures use.

    Files leave out what is their architecture's default, and some have names of their own: ``n_embd``, ``n_head``.

    Raises:
        DataError: missing or not JSON.
    """
    try:
        config = json.loads(path.read_bytes())
        stated = config.get("text_config") or config
        merged = {**config, **stated}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: the target's config cannot be read: {error}") from error
    known = _known_config(config)
    for name in _ASKED:
        if stated.get(name) is None:
            names = (name, *_OTHER_NAMES.get(name, ()))
            values = (value for called in names for value in (stated.get(called), getattr(known, called, None)))
            found = next((value for value in values if value is not None), None)
            merged |= {} if found is None else {name: found}
    rope = getattr(known, "rope_parameters", None)
    if rope is not None and not any(merged.get(name) is not None for name in _ROPE_NAMES):
        merged["rope_parameters"] = rope
    return merged


def _known_config(config: Mapping[str, Any]) -> Any:
    """Return the text part of a config as its class in transformers reads it; None for a class that is not there."""
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).get_text_config()
    except Exception:  # a class refuses what it does not like in a way of its own; what the file says is left
        return None


def draft_config(
    target: Mapping[str, Any],
    *,
    draft_vocab_size: int,
    num_aux_hidden_states: int,
    num_layers: int = 1,
    fc_norm: bool = False,
    norm_output: bool = False,
    layer_style: LayerStyle = "llama",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    mask_token_id: int | None = None,
) -> Eagle3DraftConfig:
    """Return the config of a draft with the target's rotary positions; sizes left out are the target's.

    A head is as wide as the target's, whatever the draft's width, so that its rotary positions are the target's and a
    narrower draft needs nothing but ``hidden_size``. With ``num_attention_heads`` given, the heads share the draft's
    width among them.

    Args:
        target: the text part of the target's config.
        draft_vocab_size: ``Vd``.
        num_aux_hidden_states: ``A``.
        num_layers: of the draft.
        fc_norm, norm_output: EAGLE-3.1.
        layer_style: of all its layers.
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads: of the draft.
        mask_token_id: of a draft that drafts in parallel; None for one that does not.

    Raises:
        UsageError: sizes that make no model, or that the target does not have; names the flag.
        DataError: the target's config does not say how wide it is.
    """
    copied = {name: target[name] for name in (*_COPIED, *_ROPE_NAMES) if target.get(name) is not None}
    target_width = _size(target, "hidden_size")
    if target_width is None or _size(target, "vocab_size") is None:
        lacking = "hidden_size" if target_width is None else "vocab_size"
        raise DataError(f"the target's config has no {lacking}: no draft can be made to fit it")
    width = target_width if hidden_size is None else hidden_size
    middle = intermediate_size or _size(target, "intermediate_size") or _MIDDLE_FACTOR * target_width
    config = Eagle3DraftConfig(
        **copied,
        **_head_sizes(target, width, num_attention_heads, num_key_value_heads),
        hidden_size=width,
        intermediate_size=middle,
        target_hidden_size=target_width,
        draft_vocab_size=draft_vocab_size,
        num_aux_hidden_states=num_aux_hidden_states,
        num_hidden_layers=num_layers,
        fc_norm=fc_norm,
        norm_output=norm_output,
        layer_style=layer_style,
        parallel_drafting=mask_token_id is not None,
        mask_token_id=mask_token_id,
        tie_word_embeddings=False,
    )
    if num_attention_heads is not None:
        _refuse_heads_that_rope_cannot_turn(config)
    return config


def _size(target: Mapping[str, Any], name: str) -> int | None:
    """Return a size of the target, None where its config has none, or one a layer."""
    value = target.get(name)
    return value if isinstance(value, int) and value > 0 else None


def _head_sizes(
    target: Mapping[str, Any], width: int, num_attention_heads: int | None, num_key_value_heads: int | None
) -> dict[str, Any]:
    """Return number and width of the attention heads.

    Raises:
        UsageError: see `draft_config`.
    """
    heads = num_attention_heads or _size(target, "num_attention_heads")
    if heads is None:
        raise UsageError(
            f"the target's config has no num_attention_heads to take over: give {_HEADS_FLAG} a divisor of {width}"
        )
    if width % heads:  # whatever a head's own width is: Llama's config wants it so, with us and in every engine
        given = f"--draft-hidden-size {width}" if num_attention_heads is None else f"{_HEADS_FLAG} {heads}"
        raise UsageError(
            f"{given}: a width of {width} is no multiple of {heads} attention heads; give {_HEADS_FLAG} a divisor of "
            f"{width}, or another --draft-hidden-size"
        )
    head_width = width // heads
    if num_attention_heads is None:
        head_width = _size(target, "head_dim") or target["hidden_size"] // heads
    if head_width % 2:
        raise UsageError(
            f"{_HEADS_FLAG} {heads}: heads of {head_width} values, expected an even number, since rotary positions "
            "turn pairs"
        )
    shared = _size(target, "num_key_value_heads") or _size(target, "num_attention_heads") or heads
    shared = shared if num_key_value_heads is None else num_key_value_heads
    if heads % shared:
        given = f"{_KEY_VALUE_HEADS_FLAG} {shared}" if num_key_value_heads else f"{_HEADS_FLAG} {heads}"
        divisors = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise UsageError(
            f"{given}: {heads} attention heads cannot share {shared} key-value heads; give {_KEY_VALUE_HEADS_FLAG} "
            f"one of {divisors}"
        )
    return {"num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": head_width}


def _refuse_heads_that_rope_cannot_turn(config: Eagle3DraftConfig) -> None:
    """Raise `UsageError` for a target whose RoPE holds one factor a frequency, and heads of another width."""
    try:
        RotaryEmbedding(config)(torch.zeros(1, 1, dtype=torch.int64), torch.float32)
    except Exception as error:  # each RoPE type fails in a way of its own
        raise UsageError(
            f"{_HEADS_FLAG} {config.num_attention_heads}: the target's RoPE settings do not fit heads of "
            f"{config.head_dim} values ({one_line(error, 80)}); leave it out to keep the target's heads"
        ) from error


def initial_draft(
    config: Eagle3DraftConfig,
    embeddings: torch.Tensor,
    head: Head,
    selected_token_ids: torch.Tensor,
    *,
    seed: int,
    train_embeddings: bool = False,
    head_start: HeadStart = "target",
) -> Eagle3DraftModel:
    """Return a float32 draft that starts from the target's embeddings and head rows, the rest random by ``seed``.

    A draft of another width starts from the target's rows brought to that width by `of_width`.

    Args:
        embeddings: ``[V, H]``, the target's.
        head: the target's; its scale is folded into the rows, since the draft's head has none.
        selected_token_ids: int64 ``[Vd]``.
        head_start: ``random`` leaves the head's rows to the seed too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = Eagle3DraftModel(config)
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(of_width(embeddings, config.hidden_size))
        if head_start == "target":
            rows = head.select(selected_token_ids).weight.float() * head.scale
            draft.lm_head.weight.copy_(of_width(rows, config.hidden_size))
    draft.embed_tokens.weight.requires_grad_(train_embeddings)
    return draft


def embeddings_differ(draft: Eagle3DraftModel, embeddings: torch.Tensor) -> bool:
    """Return whether a draft as wide as its target has embeddings of its own; False for one of another width.

    Args:
        embeddings: ``[V, H]``, the target's.
    """
    ours = draft.embed_tokens.weight.detach()
    return ours.shape == embeddings.shape and not torch.equal(ours, embeddings.to(ours))


def of_width(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return float32 ``[N, width]`` rows whose inner products are those of ``rows`` ``[N, H]``, as nearly as can be.

    Wider rows have zeros after their own values, and every inner product stays what it was. Narrower ones are the
    coordinates along the ``width`` principal directions of all rows: of all maps to that width, this one leaves out
    the least of their squares. Directions are the eigenvectors of the rows' second moments in float64, the strongest
    first, each with its largest coordinate positive, so that the same rows give the same result.

    Embeddings and head rows are each brought to a narrower width along directions of their own. Nothing asks for
    shared ones: in a draft, embeddings enter attention beside the state and never the state itself.
    """
    size = rows.shape[1]
    if width == size:
        return rows.detach().float()
    if width > size:
        return torch.nn.functional.pad(rows.detach().float(), (0, width - size))
    chunks = rows.detach().split(_CHUNK_ROWS)
    moments = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
    for chunk in chunks:
        moments.addmm_(chunk.double().T, chunk.double())
    directions = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :width]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    return torch.cat([(chunk.double() @ directions).float() for chunk in chunks])

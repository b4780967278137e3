"""The draft that fits a target: its config from the target's, its embeddings and head rows to start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.errors import DataError
from eagle_offline.supervision import Head

_COPIED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def read_target_config(path: Path) -> dict[str, Any]:
    """Read the text part of a target's ``config.json``.

    Raises:
        DataError: missing or not JSON.
    """
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the target's config cannot be read: {error}") from error
    return {**config, **config.get("text_config", {})}


def draft_config(
    target: Mapping[str, Any],
    *,
    draft_vocab_size: int,
    num_aux_hidden_states: int,
    num_layers: int = 1,
    fc_norm: bool = False,
    norm_output: bool = False,
) -> Eagle3DraftConfig:
    """Return the config of a draft as wide as its target, with the target's rotary positions.

    Args:
        target: the text part of the target's config.
        draft_vocab_size: ``Vd``.
        num_aux_hidden_states: ``A``.
        num_layers: of the draft.
        fc_norm, norm_output: EAGLE-3.1.
    """
    copied = {name: target[name] for name in _COPIED if target.get(name) is not None}
    for name in ("rope_parameters", "rope_theta", "rope_scaling"):
        if target.get(name) is not None:
            copied[name] = target[name]
    return Eagle3DraftConfig(
        **copied,
        draft_vocab_size=draft_vocab_size,
        num_aux_hidden_states=num_aux_hidden_states,
        num_hidden_layers=num_layers,
        fc_norm=fc_norm,
        norm_output=norm_output,
        tie_word_embeddings=False,
    )


def initial_draft(
    config: Eagle3DraftConfig,
    embeddings: torch.Tensor,
    head: Head,
    selected_token_ids: torch.Tensor,
    *,
    seed: int,
    train_embeddings: bool = False,
) -> Eagle3DraftModel:
    """Return a float32 draft that starts from the target's embeddings and head rows, the rest random by ``seed``.

    Args:
        embeddings: ``[V, H]``, the target's.
        head: the target's; its scale is folded into the rows, since the draft's head has none.
        selected_token_ids: int64 ``[Vd]``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = Eagle3DraftModel(config)
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(embeddings)
        draft.lm_head.weight.copy_(head.select(selected_token_ids).weight.float() * head.scale)
    draft.embed_tokens.weight.requires_grad_(train_embeddings)
    return draft

"""A draft as a directory of our own: config, weights, the ids of its vocabulary and its origin."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.origin import ORIGIN_FILE, DraftOrigin

MODEL_FILE = "model.safetensors"
VOCAB_FILE = "draft_vocab.safetensors"
VOCAB_TENSOR = "selected_token_ids"


def write_draft(
    directory: Path, model: Eagle3DraftModel, selected_token_ids: torch.Tensor, origin: DraftOrigin
) -> None:
    """Write a draft into an existing directory; making it durable is the caller's part.

    Args:
        directory: where ``config.json``, ``model.safetensors``, ``draft_vocab.safetensors`` and ``origin.json`` go.
        model: the draft.
        selected_token_ids: int64 ``[Vd]``.
        origin: what it was trained for and from.
    """
    model.config.save_pretrained(directory)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / MODEL_FILE, metadata={"format": "pt"})
    save_file({VOCAB_TENSOR: selected_token_ids.cpu()}, directory / VOCAB_FILE)
    (directory / ORIGIN_FILE).write_text(origin.to_json(), encoding="utf-8")

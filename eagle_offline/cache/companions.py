"""What a cache brings along besides shards, so that nobody needs the target again: head, embeddings, vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from eagle_offline.cache.layout import EMBEDDINGS_FILE, HEAD_FILE, VOCAB_DIRECTORY
from eagle_offline.errors import DataError
from eagle_offline.provenance import plain_size
from eagle_offline.supervision import Head
from eagle_offline.vocab import digest_ids

_HEAD_ENTRY = "head"


def head_bytes(head: Head, *, tied: bool) -> bytes:
    """Return ``head.safetensors``: ``weight`` (left out when ``tied`` to the embeddings), ``bias``, and the rest."""
    tensors = {} if tied else {"weight": head.weight.contiguous().cpu()}
    if head.bias is not None:
        tensors["bias"] = head.bias.contiguous().cpu()
    # One entry: safetensors writes several in an order of its own, and these bytes have a digest.
    after = {"scale": head.scale, "soft_cap": head.soft_cap, "tied": tied}
    return save(tensors, metadata={_HEAD_ENTRY: json.dumps(after, sort_keys=True)})


def embeddings_bytes(weight: torch.Tensor) -> bytes:
    """Return ``embeddings.safetensors``: the target's raw token embeddings ``[V, H]`` as ``weight``."""
    return save({"weight": weight.detach().contiguous().cpu()})


def vocab_bytes(selected_token_ids: np.ndarray) -> bytes:
    """Return a vocabulary file: ``selected_token_ids`` int64 ``[Vd]``."""
    return save({"selected_token_ids": torch.from_numpy(selected_token_ids.astype(np.int64))})


def vocab_file(digest: str) -> str:
    """Return the path, inside a cache, of the draft vocabulary with the given digest."""
    return f"{VOCAB_DIRECTORY}/{digest}.safetensors"


def read_head(directory: Path) -> Head:
    """Read the target's head from a cache.

    Raises:
        DataError: missing or not readable.
    """
    tensors, metadata = _read(directory / HEAD_FILE)
    try:
        after = json.loads(metadata[_HEAD_ENTRY])
        scale, soft_cap = float(after["scale"]), after["soft_cap"]
        weight = read_embeddings(directory) if after["tied"] else tensors["weight"]
        return Head(weight, tensors.get("bias"), scale, None if soft_cap is None else float(soft_cap))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{directory / HEAD_FILE}: holds no head weight, scale and soft-cap") from error


def read_embeddings(directory: Path) -> torch.Tensor:
    """Read the target's raw token embeddings ``[V, H]`` from a cache.

    Raises:
        DataError: missing or not readable.
    """
    tensors, _ = _read(directory / EMBEDDINGS_FILE)
    if "weight" not in tensors:
        raise DataError(f"{directory / EMBEDDINGS_FILE}: holds no embedding weight")
    return tensors["weight"]


def read_vocab(directory: Path, digest: str, vocab_size: int) -> torch.Tensor:
    """Read a draft vocabulary, int64 ``[Vd]``.

    Raises:
        DataError: missing, not what its digest says, unsorted or out of range.
    """
    path = directory / vocab_file(digest)
    tensors, _ = _read(path)
    ids = tensors.get("selected_token_ids")
    if ids is None or ids.dtype != torch.int64 or ids.ndim != 1 or digest_ids(ids.numpy()) != digest:
        raise DataError(f"{path}: not the draft vocabulary it is named after")
    if not len(ids) or ids[0] < 0 or ids[-1] >= vocab_size or (ids.diff() <= 0).any():
        raise DataError(f"{path}: token ids are not strictly increasing below {vocab_size}")
    return ids


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        plain_size(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; run precompute --resume to write it again") from error
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: not a readable safetensors file: {error}") from error

"""How many bytes does a real token take on disk, beside what others store?

An 8B shape (H 4096, V 128256, Vd 32000, 3 layers), lengths as in chat data, half of the tokens supervised. The
alternatives' layouts are written by plain code in the same run: NeMo AutoModel's (rows padded to the sequence
length; aux states, dense probabilities, ids and masks at every slot, bf16) as the bytes its tensors have, and
DeepSpec/SpecForge's (raw bf16 aux and final states at every real position).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.caches import write_synthetic_shard
from benchmarks.harness import Figures
from benchmarks.states import DRAFT_VOCAB_SIZE, HIDDEN_SIZE, NUM_AUX_LAYERS, chat_lengths

NAME = "cache_size"
QUESTION = __doc__

_SEQ_LENGTH = 2048


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case an encoding; they use no device."""
    if device != "cpu":
        return {}
    return {encoding: lambda encoding=encoding: measure(encoding) for encoding in ("planes", "raw")}


def measure(encoding: str, num_samples: int = 12, hidden_size: int = HIDDEN_SIZE) -> Figures:
    """Return KiB a real token and its share of the alternatives'."""
    lengths = chat_lengths(num_samples, seed=0, longest=_SEQ_LENGTH)
    with tempfile.TemporaryDirectory() as directory:
        _, num_bytes, _ = write_synthetic_shard(Path(directory) / "shard", lengths, encoding, hidden_size)
    tokens = int(lengths.sum())
    per_token = num_bytes / tokens / 1024
    nemo = _nemo_kib_per_token(lengths, hidden_size)
    deepspec = (NUM_AUX_LAYERS + 1) * hidden_size * 2 / 1024
    return {
        "share_of_nemo": per_token / nemo,
        "share_of_deepspec": per_token / deepspec,
        "kib_per_token": per_token,
        "nemo_kib_per_token": nemo,
        "deepspec_kib_per_token": deepspec,
        "tokens": tokens,
    }


def _nemo_kib_per_token(lengths: np.ndarray, hidden_size: int) -> float:
    slot = 2 * (NUM_AUX_LAYERS * hidden_size + DRAFT_VOCAB_SIZE) + 3 * 8 + 1
    return len(lengths) * _SEQ_LENGTH * slot / int(lengths.sum()) / 1024

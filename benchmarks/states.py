"""Synthetic states of an 8B shape: heavy tails and a few massive channels, lengths as in chat data."""

from __future__ import annotations

import numpy as np
import torch

HIDDEN_SIZE = 4096
DRAFT_VOCAB_SIZE = 32000
NUM_AUX_LAYERS = 3

# Channels whose values are hundreds of times the rest: what decoder layers of trained models show.
_MASSIVE_CHANNELS = 4
_MASSIVE_SCALE = 300.0


def hidden_states(num_rows: int, seed: int, hidden_size: int = HIDDEN_SIZE) -> torch.Tensor:
    """Return bf16 ``[num_rows, hidden_size]``: Student-t values with per-channel scales and massive channels."""
    generator = np.random.Generator(np.random.PCG64(seed))
    scales = np.exp(generator.normal(0, 0.5, hidden_size)).astype(np.float32)
    scales[generator.choice(hidden_size, _MASSIVE_CHANNELS, replace=False)] *= _MASSIVE_SCALE
    values = generator.standard_t(5, (num_rows, hidden_size)).astype(np.float32) * scales
    return torch.from_numpy(values).bfloat16()


def chat_lengths(count: int, seed: int, longest: int = 2048) -> np.ndarray:
    """Return int64 ``[count]`` log-normal lengths, cut at ``longest``: median about 500, a long tail."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.clip(np.exp(generator.normal(6.2, 0.8, count)), 16, longest).astype(np.int64)

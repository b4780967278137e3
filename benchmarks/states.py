"""Synthetic states of an 8B shape, and a head whose distributions look like a language model's.

Aux states have heavy tails, channels of unlike scale and a few massive channels; lengths are as in chat data. The head
reads every channel in units of its scale: ``W[v, c] = 2 · n[v, c] / (√H · scale[c])`` with ``n`` uniform of variance 1,
so that the logits of all tokens but a few are noise of standard deviation 2. Final states are noise like aux states,
plus what lifts twelve candidate tokens, frequent ones mostly, to chosen logits: the first about 18, the others below it
by gaps whose size differs from position to position. Over 128256 tokens that is an entropy of about 1.5 nats and a
likeliest token of about 0.6, from near certainty to wide open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

HIDDEN_SIZE = 4096
VOCAB_SIZE = 128256
DRAFT_VOCAB_SIZE = 32000
NUM_AUX_LAYERS = 3

# Channels whose values are hundreds of times the rest: what decoder layers of trained models show.
_MASSIVE_CHANNELS = 4
_MASSIVE_SCALE = 300.0

_DEGREES_OF_FREEDOM = 5

_NOISE_LOGIT = 2.0
_NUM_CANDIDATES = 12
_TOP_LOGIT, _TOP_LOGIT_SPREAD = 19.5, 2.0
_LOG_GAP, _LOG_GAP_SPREAD = 0.6, 1.2

# Standard deviation of a signed byte drawn uniformly.
_BYTE_SPREAD = (256**2 / 12) ** 0.5

_HEAD_ROWS = 4096


def _channels(generator: np.random.Generator, hidden_size: int) -> tuple[np.ndarray, np.ndarray]:
    scales = np.exp(generator.normal(0, 0.5, hidden_size)).astype(np.float32)
    massive = generator.choice(hidden_size, _MASSIVE_CHANNELS, replace=False)
    scales[massive] *= _MASSIVE_SCALE
    return scales, massive


def massive_channels(seed: int, hidden_size: int = HIDDEN_SIZE) -> np.ndarray:
    """Return bool ``[hidden_size]``: the massive channels of `hidden_states` with that seed."""
    chosen = np.zeros(hidden_size, bool)
    chosen[_channels(np.random.Generator(np.random.PCG64(seed)), hidden_size)[1]] = True
    return chosen


def hidden_states(num_rows: int, seed: int, hidden_size: int = HIDDEN_SIZE) -> torch.Tensor:
    """Return bf16 ``[num_rows, hidden_size]``: Student-t values with per-channel scales and massive channels."""
    generator = np.random.Generator(np.random.PCG64(seed))
    scales, _ = _channels(generator, hidden_size)
    return torch.from_numpy(_noise(generator, num_rows, hidden_size) * scales).bfloat16()


def _noise(generator: np.random.Generator, num_rows: int, hidden_size: int) -> np.ndarray:
    return generator.standard_t(_DEGREES_OF_FREEDOM, (num_rows, hidden_size)).astype(np.float32)


def chat_lengths(count: int, seed: int, longest: int = 2048) -> np.ndarray:
    """Return int64 ``[count]`` log-normal lengths, cut at ``longest``: median about 500, a long tail."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.clip(np.exp(generator.normal(6.2, 0.8, count)), 16, longest).astype(np.int64)


def token_ids(count: int, seed: int, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Return int32 ``[count]``, lower ids more often: about nine in ten lie in a first quarter."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return _frequent(generator, (count,), vocab_size).astype(np.int32)


def _frequent(generator: np.random.Generator, shape: tuple[int, ...], vocab_size: int) -> np.ndarray:
    return np.minimum(vocab_size ** (generator.random(shape) ** 1.3), vocab_size).astype(np.int64) - 1


@dataclass(frozen=True)
class SyntheticHead:
    """A head, a byte a weight.

    Attributes:
        codes: int8 ``[V, H]``.
        factors: float32 ``[H]``; a weight is its code times its channel's factor.
    """

    codes: np.ndarray
    factors: torch.Tensor

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 ``[N, V]``."""
        wide = hidden.float() * self.factors
        codes = torch.from_numpy(self.codes)
        starts = range(0, len(codes), _HEAD_ROWS)
        return torch.cat([wide @ codes[start : start + _HEAD_ROWS].float().T for start in starts], dim=1)


def final_states(
    num_rows: int, seed: int, hidden_size: int = HIDDEN_SIZE, vocab_size: int = VOCAB_SIZE
) -> tuple[torch.Tensor, SyntheticHead]:
    """Return final states, bf16 ``[num_rows, hidden_size]``, and the head that reads them."""
    generator = np.random.Generator(np.random.PCG64(seed))
    scales, _ = _channels(generator, hidden_size)
    drawn = bytearray(generator.bytes(vocab_size * hidden_size))
    codes = np.frombuffer(drawn, np.int8).reshape(vocab_size, hidden_size)
    noise = _noise(generator, num_rows, hidden_size) * ((_DEGREES_OF_FREEDOM - 2) / _DEGREES_OF_FREEDOM) ** 0.5
    candidates = _frequent(generator, (num_rows, _NUM_CANDIDATES), vocab_size)
    again = np.tril(candidates[:, :, None] == candidates[:, None, :], -1).any(axis=2)
    wanted = _candidate_logits(generator, num_rows)
    # In units of its scale, a channel of the head's row is worth this much of a logit.
    unit = _NOISE_LOGIT / hidden_size**0.5
    for start in range(0, num_rows, 64):
        part = slice(start, start + 64)
        rows = codes[candidates[part]].astype(np.float32) / np.float32(_BYTE_SPREAD)
        missing = wanted[part] - unit * np.einsum("nh,njh->nj", noise[part], rows)
        missing[again[part]] = 0
        noise[part] += np.einsum("nj,njh->nh", missing / (unit * hidden_size), rows)
    factors = torch.from_numpy((unit / _BYTE_SPREAD / scales).astype(np.float32))
    return torch.from_numpy(noise * scales).bfloat16(), SyntheticHead(codes, factors)


def _candidate_logits(generator: np.random.Generator, num_rows: int) -> np.ndarray:
    top = generator.normal(_TOP_LOGIT, _TOP_LOGIT_SPREAD, (num_rows, 1))
    scale = np.exp(generator.normal(_LOG_GAP, _LOG_GAP_SPREAD, (num_rows, 1)))
    steps = generator.exponential(1, (num_rows, _NUM_CANDIDATES)) / np.arange(1, _NUM_CANDIDATES + 1) ** 0.5
    steps[:, 0] = 0
    return (top - scale * steps.cumsum(axis=1)).astype(np.float32)

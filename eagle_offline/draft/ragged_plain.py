"""Attention of runs from its definition, in any dtype and on any device: dense scores, a block of queries at a time.

It defines what `eagle_offline.draft.ragged_flash` must equal, and runs where that does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

# Queries whose scores are in memory at once.
_BLOCK_QUERIES = 512


class Runs(Protocol):
    """Queries and keys of each run; see `eagle_offline.draft.ragged_attention.RaggedCall`."""

    @property
    def runs(self) -> tuple[tuple[int, int], ...]: ...


def forward(runs: Runs, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output ``[Q, heads, d]`` and the log-sum-exp ``[Q, heads]``, float32 or float64.

    Args:
        runs: one run after the other.
        query: ``[Q, heads, d]``.
        key, value: ``[S, kv_heads, d]``.
    """
    wide = _wide(query.dtype)
    output = torch.empty_like(query)
    logsumexp = query.new_empty(query.shape[:2], dtype=wide)
    for queries, keys, before in _blocks(runs):
        scores = _scores(query[queries], key[keys], before)
        sums = scores.logsumexp(dim=-1)
        weights = (scores - sums.unsqueeze(-1)).exp()
        found = weights @ value[keys].to(wide).movedim(0, 1).unsqueeze(1)
        output[queries] = found.flatten(0, 1).transpose(0, 1).to(output.dtype)
        logsumexp[queries] = sums.flatten(0, 1).transpose(0, 1)
    return output, logsumexp


def backward(
    runs: Runs, upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    Output and log-sum-exp may be those of a softmax over more than these keys: with ``P = exp(scores − logsumexp)``,
    ``∂scores = P (upstream · value − upstream · output)`` holds for any part of its keys.
    """
    wide, num_kv_heads, scale = _wide(query.dtype), key.shape[1], query.shape[-1] ** -0.5
    delta = (upstream.to(wide) * output.to(wide)).sum(-1)
    grad_query = torch.zeros_like(query, dtype=wide)
    grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    for queries, keys, before in _blocks(runs):
        one_query, one_key, one_value, one_upstream = (
            _by_head(states.to(wide), num_kv_heads)
            for states in (query[queries], key[keys], value[keys], upstream[queries])
        )
        one_sums, one_delta = (
            _by_head(rows[queries].unsqueeze(-1).to(wide), num_kv_heads) for rows in (logsumexp, delta)
        )
        weights = (_scores(query[queries], key[keys], before) - one_sums).exp()
        grad_scores = weights * (one_upstream @ one_value.mT - one_delta) * scale
        grad_query[queries] = (grad_scores @ one_key).flatten(0, 1).transpose(0, 1)
        grad_key[keys] += (grad_scores.mT @ one_query).sum(1).transpose(0, 1)
        grad_value[keys] += (weights.mT @ one_upstream).sum(1).transpose(0, 1)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _blocks(runs: Runs) -> Iterator[tuple[slice, slice, int]]:
    """Yield places of some queries, places of the keys that their run has up to the last of them, and how many of
    these keys the first query reads."""
    first_query = first_key = 0
    for num_queries, num_keys in runs.runs:
        for start in range(0, num_queries, _BLOCK_QUERIES):
            stop = min(start + _BLOCK_QUERIES, num_queries)
            read = num_keys - num_queries + 1
            yield (
                slice(first_query + start, first_query + stop),
                slice(first_key, first_key + read + stop - 1),
                read + start,
            )
        first_query += num_queries
        first_key += num_keys


def _scores(query: Tensor, key: Tensor, before: int) -> Tensor:
    """Return scaled scores ``[kv_heads, group, Q, S]``, minus infinity where query ``i`` is past ``before + i``."""
    wide = _wide(query.dtype)
    one_query, one_key = (_by_head(states.to(wide), key.shape[1]) for states in (query, key))
    scores = one_query @ one_key.mT * query.shape[-1] ** -0.5
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(before - 1)
    return scores.masked_fill(~visible, -torch.inf)


def _by_head(rows: Tensor, num_kv_heads: int) -> Tensor:
    """Return ``[kv_heads, group, n, d]`` from ``[n, heads, d]``."""
    return rows.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Attention of one unroll step over packed documents: causal over step 0's keys, merged with the own slot's later keys.

The two parts meet by their log-sum-exp. Going back, the merged output and log-sum-exp are what the causal part's own
kernel needs, as in ring attention; so no score outlives its call, and memory is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from eagle_offline.draft import padded_attention, ragged_attention
from eagle_offline.draft.padded_attention import PaddedCall
from eagle_offline.draft.ragged_attention import RaggedCall

Call = PaddedCall | RaggedCall


def merged_attention(
    queries: Tensor, keys: Tensor, values: Tensor, own: Sequence[tuple[Tensor, Tensor]], calls: Sequence[Call]
) -> Tensor:
    """Return the attention output ``[R, heads, head_dim]`` of one step.

    Args:
        queries: ``[R, heads, head_dim]``.
        keys, values: ``[S, kv_heads, head_dim]`` that the calls read: of step 0, and of chains where calls say so.
        own: keys and values ``[R, kv_heads, head_dim]`` of the own slot at each later step, this one last.
        calls: which queries read which of ``keys``; every query in one call.
    """
    flat = [tensor for pair in own for tensor in pair]
    return _MergedAttention.apply(calls, queries, keys, values, *flat)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: Sequence[Call], queries: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            output, logsumexp = _attend(calls, queries, keys, values)
            if own:
                output, logsumexp = _with_own(output, logsumexp, queries, own[0::2], own[1::2])
        ctx.calls = calls
        ctx.save_for_backward(queries, keys, values, output, logsumexp, *own)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        queries, keys, values, output, logsumexp, *own = ctx.saved_tensors
        upstream = gradients[0].contiguous()
        # Many runs may read one key: their shares are added up wide.
        wide = _wide(queries.dtype)
        totals = tuple(torch.zeros_like(tensor, dtype=wide) for tensor in (queries, keys, values))
        for call in ctx.calls:
            _way(call).add_gradients(call, upstream, (queries, keys, values), (output, logsumexp), totals)
        grad_own = _add_own_gradients(totals[0], upstream, queries, (output, logsumexp), own) if own else []
        return (None, *(total.to(queries.dtype) for total in totals), *grad_own)


def _attend(calls: Sequence[Call], queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output ``[R, heads, head_dim]`` and the log-sum-exp ``[R, heads]`` over the calls' keys, wide."""
    output = torch.empty_like(queries)
    logsumexp = queries.new_empty(queries.shape[:2], dtype=_wide(queries.dtype))
    for call in calls:
        found, sums = _way(call).attend(call, queries, keys, values)
        output.index_copy_(0, call.real_rows, found)
        logsumexp.index_copy_(0, call.real_rows, sums.to(logsumexp.dtype))
    return output, logsumexp


def _way(call: Call) -> ModuleType:
    return ragged_attention if isinstance(call, RaggedCall) else padded_attention


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(states: Tensor, keys: Tensor) -> Tensor:
    """Return ``[R, kv_heads, group, …]``, a view: the query heads that share a key-value head side by side."""
    return states.unflatten(1, (keys.shape[1], -1))


def _own_scores(grouped: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """Return wide ``[R, kv_heads, group, k]``: each query with its own slot's key of every later step."""
    wide, scale = _wide(grouped.dtype), grouped.shape[-1] ** -0.5
    return torch.stack([(grouped * key.unsqueeze(2)).sum(-1, dtype=wide) for key in keys], dim=-1) * scale


def _with_own(
    output: Tensor, logsumexp: Tensor, queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over step 0's keys and the own slot's, from those over step 0's."""
    grouped, causal = _grouped(output, keys[0]), _grouped(logsumexp, keys[0]).unsqueeze(-1)
    scores = _own_scores(_grouped(queries, keys[0]), keys)
    merged = torch.logsumexp(torch.cat([causal, scores], dim=-1), dim=-1, keepdim=True)
    weights = (scores - merged).exp().to(output.dtype)
    found = grouped * (causal - merged).exp().to(output.dtype)
    for weight, value in zip(weights.unbind(-1), values, strict=True):
        found.addcmul_(weight.unsqueeze(-1), value.unsqueeze(2))
    return found.flatten(1, 2), merged.squeeze(-1).flatten(1, 2)


def _add_own_gradients(
    grad_queries: Tensor, upstream: Tensor, queries: Tensor, merged: tuple[Tensor, Tensor], own: Sequence[Tensor]
) -> list[Tensor]:
    """Add the own slots' share to the gradient of the queries; return that of each own key and value."""
    keys, values = own[0::2], own[1::2]
    wide, scale = grad_queries.dtype, queries.shape[-1] ** -0.5
    query, output, gradient, total = (
        _grouped(states, keys[0]) for states in (queries, merged[0], upstream, grad_queries)
    )
    logsumexp = _grouped(merged[1], keys[0]).unsqueeze(-1)
    weights = (_own_scores(query, keys) - logsumexp).exp()
    delta = (gradient * output).sum(-1, dtype=wide)
    found: list[Tensor] = []
    for key, value, weight in zip(keys, values, weights.unbind(-1), strict=True):
        pulled = (gradient * value.unsqueeze(2)).sum(-1, dtype=wide)
        grad_score = (weight * (pulled - delta) * scale).unsqueeze(-1).to(query.dtype)
        total += grad_score * key.unsqueeze(2)
        found.append((grad_score * query).sum(2))
        found.append((weight.unsqueeze(-1).to(gradient.dtype) * gradient).sum(2))
    return found

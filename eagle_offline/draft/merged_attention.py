"""Attention of one unroll step over packed documents: causal over step 0's keys, merged with the own slot's later keys.

The two parts meet by their log-sum-exp. Going back, the merged output and log-sum-exp are what the causal part's own
kernel needs, as in ring attention; so no score outlives its call, and memory is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Call(Protocol):
    """One padded call over step 0's keys; see `eagle_offline.objectives.plan.AttentionCall`."""

    @property
    def query_rows(self) -> Tensor: ...
    @property
    def query_columns(self) -> Tensor: ...
    @property
    def real(self) -> Tensor: ...
    @property
    def real_rows(self) -> Tensor: ...
    @property
    def key_rows(self) -> Tensor: ...


def merged_attention(
    queries: Tensor, keys: Tensor, values: Tensor, own: Sequence[tuple[Tensor, Tensor]], calls: Sequence[Call]
) -> Tensor:
    """Return the attention output ``[R, heads, head_dim]`` of one step.

    Args:
        queries: ``[R, heads, head_dim]``.
        keys, values: ``[S, kv_heads, head_dim]`` of step 0.
        own: keys and values ``[R, kv_heads, head_dim]`` of the own slot at each later step, this one last.
        calls: which queries read which of step 0's keys.
    """
    flat = [tensor for pair in own for tensor in pair]
    return _MergedAttention.apply(calls, queries, keys, values, *flat)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: Sequence[Call], queries: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        output = torch.empty_like(queries)
        logsumexp = queries.new_empty(queries.shape[:2], dtype=_wide(queries.dtype))
        for call in calls:
            found, sums = _causal(*_gathered(call, queries, keys, values))
            output[call.real_rows] = found.transpose(1, 2).flatten(0, 1)[call.real]
            logsumexp[call.real_rows] = sums.transpose(1, 2).flatten(0, 1)[call.real].to(logsumexp.dtype)
        if own:
            scores = _own_scores(queries, own[0::2])
            merged = torch.logsumexp(torch.cat([logsumexp.unsqueeze(-1), scores], dim=-1), dim=-1)
            weights = (scores - merged.unsqueeze(-1)).exp().to(queries.dtype)
            output = output * (logsumexp - merged).exp().to(queries.dtype).unsqueeze(-1)
            for number, value in enumerate(own[1::2]):
                output = output + weights[..., number, None] * _spread(value, queries)
            logsumexp = merged
        ctx.calls = calls
        ctx.save_for_backward(queries, keys, values, output, logsumexp, *own)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        queries, keys, values, output, logsumexp, *own = ctx.saved_tensors
        (gradient,) = gradients
        grad_queries = torch.zeros_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for call in ctx.calls:
            _add_causal_gradients(
                call, gradient, (queries, keys, values), (output, logsumexp), (grad_queries, grad_keys, grad_values)
            )
        grad_own: list[Tensor] = []
        if own:
            scale = queries.shape[-1] ** -0.5
            weights = (_own_scores(queries, own[0::2]) - logsumexp.unsqueeze(-1)).exp()
            delta = (gradient * output).sum(-1)
            for number, (key, value) in enumerate(zip(own[0::2], own[1::2], strict=True)):
                weight = weights[..., number].to(queries.dtype)
                grad_score = (weight * ((gradient * _spread(value, queries)).sum(-1) - delta) * scale).unsqueeze(-1)
                grad_queries += grad_score * _spread(key, queries)
                grad_own.append(_gathered_heads(grad_score * queries, key))
                grad_own.append(_gathered_heads(weight.unsqueeze(-1) * gradient, value))
        return (None, grad_queries, grad_keys, grad_values, *grad_own)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spread(states: Tensor, queries: Tensor) -> Tensor:
    """Return ``[…, heads, head_dim]`` from ``[…, kv_heads, head_dim]``: each key-value head for its group."""
    return states.repeat_interleave(queries.shape[-2] // states.shape[-2], dim=-2)


def _gathered_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """Return the sum over each key-value head's group; the reverse of `_spread`."""
    return gradient.unflatten(-2, (like.shape[-2], -1)).sum(-2)


def _own_scores(queries: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """Return float ``[R, heads, k]``: each query with its own slot's key of every later step."""
    scores = torch.stack([(queries * _spread(key, queries)).sum(-1) for key in keys], dim=-1)
    return scores.to(_wide(queries.dtype)) * queries.shape[-1] ** -0.5


def _gathered(call: Call, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return padded queries ``[G, heads, Q, d]``, keys and values ``[G, heads, S, d]``, the mask ``[G, 1, Q, S]``."""
    num_keys = call.key_rows.shape[1]
    hidden = torch.arange(num_keys, device=queries.device) > call.query_columns.unsqueeze(-1)
    mask = torch.zeros(hidden.shape, dtype=queries.dtype, device=queries.device).masked_fill_(hidden, -torch.inf)
    key, value = (_spread(states[call.key_rows], queries).transpose(1, 2) for states in (keys, values))
    return queries[call.query_rows].transpose(1, 2), key, value, mask.unsqueeze(1)


def _causal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return output ``[G, heads, Q, d]`` and log-sum-exp ``[G, heads, Q]`` of a flash kernel."""
    if query.is_cuda:
        output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, _aligned(mask, query), True
        )
        return output, logsumexp[..., : query.shape[2]]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)


def _add_causal_gradients(
    call: Call,
    gradient: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    merged: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add one call's gradients to those of queries, keys and values, from the merged output and log-sum-exp."""
    query, key, value, mask = _gathered(call, *states)
    output, logsumexp = (tensor[call.query_rows].transpose(1, 2).contiguous() for tensor in merged)
    upstream = gradient.new_zeros(call.query_rows.numel(), *gradient.shape[1:])
    upstream[call.real] = gradient[call.real_rows]
    upstream = upstream.unflatten(0, call.query_rows.shape).transpose(1, 2)
    grad_query, grad_key, grad_value = _causal_backward(upstream, query, key, value, output, logsumexp, mask)
    gradients[0].index_add_(0, call.real_rows, grad_query.transpose(1, 2).flatten(0, 1)[call.real])
    rows = call.key_rows.flatten()
    for total, part in ((gradients[1], grad_key), (gradients[2], grad_value)):
        total.index_add_(0, rows, _gathered_heads(part.transpose(1, 2).flatten(0, 1), total))


def _causal_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if query.is_cuda:
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        padded = torch.nn.functional.pad(logsumexp, (0, -logsumexp.shape[-1] % 32))
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            upstream, query, key, value, _aligned(mask, query), output, padded, seed, seed, 0.0,
            [True, True, True, False],
        )  # fmt: skip
        return grads[0], grads[1], grads[2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        upstream, query, key, value, output, logsumexp, 0.0, False, attn_mask=mask
    )


def _aligned(mask: Tensor, query: Tensor) -> Tensor:
    """Return the mask for every head, its rows starting at multiples of 16 bytes as the kernel asks for."""
    width = mask.shape[-1]
    stored = torch.nn.functional.pad(mask, (0, -width % 8))[..., :width]
    return stored.expand(-1, query.shape[1], -1, -1)

"""Attention over step 0's keys, and chains' own, in padded calls, by PyTorch's flash kernel for CPUs."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class PaddedCall(Protocol):
    """One call; see `eagle_offline.objectives.attention_calls.PaddedCall`."""

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
    @property
    def own_columns(self) -> Tensor | None: ...


def attend(call: PaddedCall, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output ``[n, heads, d]`` and the log-sum-exp ``[n, heads]`` of the call's real rows.

    Args:
        call: which queries read which keys.
        queries: ``[R, heads, d]``.
        keys, values: ``[S, kv_heads, d]``.
    """
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_gathered(call, queries, keys, values), attn_mask=_mask(call, queries)
    )
    return _real(output, call), _real(logsumexp, call)


def add_gradients(
    call: PaddedCall,
    upstream: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    merged: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add one call's gradients to those of queries, keys and values.

    Args:
        call: which queries read which keys.
        upstream: ``[R, heads, d]``, the gradient of the merged output.
        states: queries, keys and values.
        merged: the merged output ``[R, heads, d]`` and log-sum-exp ``[R, heads]``.
        gradients: added to, in the shapes of the states.
    """
    query, key, value = _gathered(call, *states)
    output, logsumexp = (_taken(tensor, call.query_rows).contiguous() for tensor in merged)
    padded = upstream.new_zeros(call.query_rows.numel(), *upstream.shape[1:])
    padded.index_copy_(0, call.real, upstream.index_select(0, call.real_rows))
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        padded.unflatten(0, call.query_rows.shape).transpose(1, 2),
        query, key, value, output, logsumexp, 0.0, False, attn_mask=_mask(call, query),
    )  # fmt: skip
    # Every query is in one call.
    gradients[0].index_copy_(0, call.real_rows, _real(grad_query, call).to(gradients[0].dtype))
    rows = call.key_rows.flatten()
    for total, part in ((gradients[1], grad_key), (gradients[2], grad_value)):
        by_head = part.transpose(1, 2).flatten(0, 1)
        total.index_add_(0, rows, by_head.unflatten(1, (total.shape[1], -1)).sum(2).to(total.dtype))


def _real(states: Tensor, call: PaddedCall) -> Tensor:
    """Return the rows ``[n, heads, …]`` that are not padding, of states ``[G, heads, Q, …]``."""
    return states.transpose(1, 2).flatten(0, 1).index_select(0, call.real)


def _gathered(call: PaddedCall, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded queries ``[G, heads, Q, d]``, keys and values ``[G, heads, S, d]``, each head's for its group."""
    groups = queries.shape[1] // keys.shape[1]
    key, value = (_taken(states, call.key_rows).repeat_interleave(groups, dim=1) for states in (keys, values))
    return _taken(queries, call.query_rows), key, value


def _taken(states: Tensor, rows: Tensor) -> Tensor:
    """Return ``[G, heads, n, …]``, the states ``[R, heads, …]`` of rows ``[G, n]``."""
    return states.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _mask(call: PaddedCall, queries: Tensor) -> Tensor:
    """Return ``[G, 1, Q, S]`` to be added to the scores: 0 or minus infinity."""
    columns = torch.arange(call.key_rows.shape[1], device=queries.device)
    hidden = columns > call.query_columns.unsqueeze(-1)
    if call.own_columns is not None:
        first, last = call.own_columns.unsqueeze(-1)
        hidden &= (columns < first) | (columns > last)
    return (
        torch.zeros(hidden.shape, dtype=queries.dtype, device=queries.device)
        .masked_fill_(hidden, -torch.inf)
        .unsqueeze(1)
    )

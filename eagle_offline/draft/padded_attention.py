"""Causal attention over step 0's keys in padded calls, by PyTorch's flash kernel for CPUs."""

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
    return output.transpose(1, 2).flatten(0, 1)[call.real], logsumexp.transpose(1, 2).flatten(0, 1)[call.real]


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
    output, logsumexp = (tensor[call.query_rows].transpose(1, 2).contiguous() for tensor in merged)
    padded = upstream.new_zeros(call.query_rows.numel(), *upstream.shape[1:])
    padded[call.real] = upstream[call.real_rows]
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        padded.unflatten(0, call.query_rows.shape).transpose(1, 2),
        query, key, value, output, logsumexp, 0.0, False, attn_mask=_mask(call, query),
    )  # fmt: skip
    by_row = grad_query.transpose(1, 2).flatten(0, 1)[call.real]
    gradients[0].index_add_(0, call.real_rows, by_row.to(gradients[0].dtype))
    rows = call.key_rows.flatten()
    for total, part in ((gradients[1], grad_key), (gradients[2], grad_value)):
        by_head = part.transpose(1, 2).flatten(0, 1)
        total.index_add_(0, rows, by_head.unflatten(1, (total.shape[1], -1)).sum(2).to(total.dtype))


def _gathered(call: PaddedCall, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded queries ``[G, heads, Q, d]``, keys and values ``[G, heads, S, d]``, each head's for its group."""
    groups = queries.shape[1] // keys.shape[1]
    key, value = (states[call.key_rows].repeat_interleave(groups, dim=2).transpose(1, 2) for states in (keys, values))
    return queries[call.query_rows].transpose(1, 2), key, value


def _mask(call: PaddedCall, queries: Tensor) -> Tensor:
    """Return ``[G, 1, Q, S]`` to be added to the scores: 0 or minus infinity."""
    columns = torch.arange(call.key_rows.shape[1], device=queries.device)
    hidden = columns > call.query_columns.unsqueeze(-1)
    return (
        torch.zeros(hidden.shape, dtype=queries.dtype, device=queries.device)
        .masked_fill_(hidden, -torch.inf)
        .unsqueeze(1)
    )

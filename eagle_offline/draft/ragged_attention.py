"""Causal attention over step 0's keys without padding: rows gathered into runs, a kernel for runs, rows put back.

A run is consecutive columns ``[a, b)`` of one document as queries and the document's keys ``[0, b)``: causality
aligned at the bottom right, so no mask is needed. Heads stay grouped.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from eagle_offline.draft import ragged_flash, ragged_plain


@runtime_checkable
class RaggedCall(Protocol):
    """One call; see `eagle_offline.objectives.attention_calls.RaggedCall`."""

    @property
    def query_rows(self) -> Tensor: ...
    @property
    def real(self) -> Tensor: ...
    @property
    def real_rows(self) -> Tensor: ...
    @property
    def key_rows(self) -> Tensor: ...
    @property
    def query_bounds(self) -> Tensor: ...
    @property
    def key_bounds(self) -> Tensor: ...
    @property
    def runs(self) -> tuple[tuple[int, int], ...]: ...


def attend(call: RaggedCall, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output ``[n, heads, d]`` and the log-sum-exp ``[n, heads]`` of the call's real rows.

    Args:
        call: which queries read which keys.
        queries: ``[R, heads, d]``.
        keys, values: ``[S, kv_heads, d]``.
    """
    output, logsumexp = _kernel(queries).forward(call, *_gathered(call, queries, keys, values))
    return output.index_select(0, call.real), logsumexp.index_select(0, call.real)


def add_gradients(
    call: RaggedCall,
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
    output, logsumexp = (tensor.index_select(0, call.query_rows) for tensor in merged)
    # What fills a gap repeats the next row: a query that reads more keys than the gap does, so that no score exceeds
    # its log-sum-exp; and nothing comes from above.
    padded = upstream.new_zeros(len(call.query_rows), *upstream.shape[1:])
    padded.index_copy_(0, call.real, upstream.index_select(0, call.real_rows))
    grad_query, grad_key, grad_value = _kernel(upstream).backward(
        call, padded, *_gathered(call, *states), output, logsumexp
    )
    rows = ((call.real_rows, grad_query.index_select(0, call.real)), (call.key_rows, grad_key))
    for total, (places, part) in zip(gradients, (*rows, (call.key_rows, grad_value)), strict=True):
        total.index_add_(0, places, part.to(total.dtype))


def _gathered(call: RaggedCall, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        queries.index_select(0, call.query_rows),
        keys.index_select(0, call.key_rows),
        values.index_select(0, call.key_rows),
    )


def _kernel(queries: Tensor) -> ModuleType:
    """Return the module that computes runs of such queries."""
    if not (queries.is_cuda and ragged_flash.supports(queries.dtype, queries.shape[-1])):
        return ragged_plain
    # The kernel came with Ampere.
    return ragged_flash if torch.cuda.get_device_capability(queries.device) >= (8, 0) else ragged_plain

"""Attention over keys that stand in several places, each with its own calls, merged by log-sum-exp.

Going back, the merged output and log-sum-exp are what each part's kernel needs, as in ring attention; so no score
outlives its call, and memory is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle_offline.draft.merged_attention import Call, attend_calls, gradients_of_calls


class Part(NamedTuple):
    """Keys and values ``[S, kv_heads, head_dim]``, and which queries read which of them: every query in one call."""

    keys: Tensor
    values: Tensor
    calls: Sequence[Call]


def parted_attention(queries: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return the attention output ``[R, heads, head_dim]`` over the keys of all parts together.

    Args:
        queries: ``[R, heads, head_dim]``.
        parts: at least one.
    """
    flat = [tensor for part in parts for tensor in (part.keys, part.values)]
    return _PartedAttention.apply([part.calls for part in parts], queries, *flat)


class _PartedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: Sequence[Sequence[Call]], queries: Tensor, *states: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            parts = [
                attend_calls(of_part, queries, keys, values)
                for of_part, keys, values in zip(calls, states[0::2], states[1::2], strict=True)
            ]
            logsumexp = torch.logsumexp(torch.stack([sums for _, sums in parts]), dim=0)
            output = torch.zeros_like(queries)
            for found, sums in parts:
                output.addcmul_(found, (sums - logsumexp).exp().unsqueeze(-1).to(found.dtype))
        ctx.calls = calls
        ctx.save_for_backward(queries, output, logsumexp, *states)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        queries, output, logsumexp, *states = ctx.saved_tensors
        upstream, total, found = gradients[0].contiguous(), None, []
        for calls, keys, values in zip(ctx.calls, states[0::2], states[1::2], strict=True):
            total, *of_part = gradients_of_calls(
                calls, upstream, (queries, keys, values), (output, logsumexp), grad_queries=total
            )
            found += of_part
        assert total is not None
        return (None, total.to(queries.dtype), *(part.to(queries.dtype) for part in found))

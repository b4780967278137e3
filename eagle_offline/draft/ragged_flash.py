"""Attention of runs by PyTorch's flash kernel for CUDA: half precision, nothing quadratic in memory.

Its two functions take and return what those of `eagle_offline.draft.ragged_plain` do, which is its twin.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8
# With one query a run the kernel reshapes its inputs and hands back a log-sum-exp of another layout on the way. The
# bound only sizes its grid: a larger one is as right, and keeps to the path that everything else takes.
_LEAST_MAX_QUERIES = 2


class Runs(Protocol):
    """Bounds of runs, on the device and on the host; see `eagle_offline.draft.ragged_attention.RaggedCall`."""

    @property
    def query_bounds(self) -> Tensor: ...
    @property
    def key_bounds(self) -> Tensor: ...
    @property
    def runs(self) -> tuple[tuple[int, int], ...]: ...


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernel computes heads of this width in this dtype."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and head_dim <= _LARGEST_HEAD and head_dim % _HEAD_MULTIPLE == 0


def forward(runs: Runs, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output ``[Q, heads, d]`` and the log-sum-exp, float32 ``[Q, heads]``."""
    max_queries, max_keys = _longest(runs)
    output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        runs.query_bounds,
        runs.key_bounds,
        max_queries,
        max_keys,
        0.0,
        True,
        False,
        scale=query.shape[-1] ** -0.5,
    )
    return output, logsumexp.transpose(0, 1)


def backward(
    runs: Runs, upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from the merged output and log-sum-exp."""
    max_queries, max_keys = _longest(runs)
    # Dropout's; without it nothing reads them.
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    gradients = torch.ops.aten._flash_attention_backward(
        upstream,
        query,
        key,
        value,
        output,
        # The kernel takes whole rows of a head for granted.
        logsumexp.transpose(0, 1).clone(memory_format=torch.contiguous_format),
        runs.query_bounds,
        runs.key_bounds,
        max_queries,
        max_keys,
        0.0,
        True,
        random_state,
        random_state,
        scale=query.shape[-1] ** -0.5,
    )
    return gradients[0], gradients[1], gradients[2]


def _longest(runs: Runs) -> tuple[int, int]:
    """Return the most queries and the most keys of a run, on the host."""
    max_queries = max(num_queries for num_queries, _ in runs.runs)
    return max(_LEAST_MAX_QUERIES, max_queries), max(num_keys for _, num_keys in runs.runs)

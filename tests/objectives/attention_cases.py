"""Queries of packed documents, attention over them from its definition, and a stand-in for the CUDA kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_offline.objectives.attention_calls import AttentionCall

HEAD_DIM = 8


@dataclass(frozen=True)
class Case:
    """Documents whose keys stand end to end, and queries at some of their columns.

    Attributes:
        documents, columns: int64 ``[R]``, of each query.
        key_starts: int64 ``[D]``.
        num_keys: ``S``.
    """

    documents: np.ndarray
    columns: np.ndarray
    key_starts: np.ndarray
    num_keys: int

    def calls(self, plan: Callable[..., tuple[AttentionCall, ...]]) -> tuple[AttentionCall, ...]:
        return plan(self.documents, self.columns, self.key_starts)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, own: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One softmax over a document's keys up to the query's column and the query's own keys."""
        places = torch.arange(self.num_keys)
        first = torch.from_numpy(self.key_starts[self.documents])[:, None]
        visible = (places >= first) & (places <= first + torch.from_numpy(self.columns)[:, None])
        eye = torch.eye(len(queries), dtype=torch.bool)
        return by_definition(
            queries,
            torch.cat([keys, *(key for key, _ in own)]),
            torch.cat([values, *(value for _, value in own)]),
            torch.cat([visible, *[eye] * len(own)], dim=1),
        )[0]


def make_case(lengths: Sequence[int], is_active: Callable[[np.ndarray], np.ndarray]) -> Case:
    """Documents of such lengths, queries where ``is_active`` of all columns says so."""
    documents = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    active = np.flatnonzero(is_active(columns))
    starts = np.cumsum(lengths) - np.asarray(lengths)
    return Case(documents[active], columns[active], starts, sum(lengths))


def random_states(num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in float64."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, heads: int) -> Tensor:
        states = torch.randn(count, heads, HEAD_DIM, generator=generator, dtype=torch.float64).mul_(2)
        return states.requires_grad_()

    return rows(num_queries, num_heads), rows(num_keys, num_kv_heads), rows(num_keys, num_kv_heads)


def own_states(num_rows: int, count: int, num_kv_heads: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the own slot at so many later steps, in float64."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(count, 2, num_rows, num_kv_heads, HEAD_DIM, generator=generator, dtype=torch.float64)
    return [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in states]


def by_definition(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[Q, heads, d]`` and log-sum-exp ``[Q, heads]`` under a mask bool ``[Q, S]``."""
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,shd->hqs", query, key.repeat_interleave(group, dim=1)) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    output = torch.einsum("hqs,shd->qhd", scores.softmax(-1), value.repeat_interleave(group, dim=1))
    return output, scores.logsumexp(-1).T


@contextmanager
def stand_in_for_the_flash_kernel() -> Iterator[None]:
    """PyTorch's CUDA flash attention of ragged batches, on the CPU, from its contract and strict about it."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _flash_forward, "CPU")
    library.impl("_flash_attention_backward", _flash_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _visible(query: Tensor, key: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int) -> Tensor:
    assert cum_q.dtype == cum_k.dtype == torch.int32
    assert cum_q.is_contiguous()
    assert cum_k.is_contiguous()
    assert len(cum_q) == len(cum_k) > 1
    assert int(cum_q[0]) == int(cum_k[0]) == 0
    assert (int(cum_q[-1]), int(cum_k[-1])) == (len(query), len(key))
    counts_q, counts_k = cum_q.diff().tolist(), cum_k.diff().tolist()
    assert min(counts_q) > 0
    assert all(keys >= queries for queries, keys in zip(counts_q, counts_k, strict=True))
    # max_q 1 makes the kernel take another path, which nothing here is to take.
    assert max_q >= max(2, *counts_q)
    assert max_k >= max(counts_k)
    visible = torch.zeros(len(query), len(key), dtype=torch.bool)
    for run, (queries, keys) in enumerate(zip(counts_q, counts_k, strict=True)):
        rows, columns = slice(int(cum_q[run]), int(cum_q[run + 1])), slice(int(cum_k[run]), int(cum_k[run + 1]))
        # Aligned at the bottom right: the last query reads every key.
        visible[rows, columns] = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    return visible


def _checked(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool) -> None:
    assert query.dtype == key.dtype == value.dtype
    assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in (query, key, value))
    assert query.shape[-1] % 8 == 0
    assert dropout == 0
    assert is_causal


def _flash_forward(query, key, value, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug_mask, *, scale=None):
    _checked(query, key, value, dropout, is_causal)
    assert not debug_mask
    visible = _visible(query, key, cum_q, cum_k, max_q, max_k)
    wide_query, wide_key, wide_value = (_wide(tensor) for tensor in (query, key, value))
    # The definition divides by the root of the width; the call may scale otherwise.
    output, sums = by_definition(wide_query * (scale * query.shape[-1] ** 0.5), wide_key, wide_value, visible)
    random_state, none = torch.empty(2, dtype=torch.uint64), torch.empty(0, dtype=torch.uint64)
    return output.to(query.dtype).contiguous(), sums.T.contiguous(), random_state, none, query.new_empty(0)


def _flash_backward(
    upstream, query, key, value, out, sums, cum_q, cum_k, max_q, max_k, dropout, is_causal, seed, offset, *, scale=None
):  # fmt: skip
    _checked(query, key, value, dropout, is_causal)
    assert sums.shape == (query.shape[1], len(query))
    assert all(tensor.is_contiguous() for tensor in (upstream, out, sums))
    assert seed.dtype == offset.dtype == torch.uint64
    assert sums.dtype == _wide(query).dtype
    assert upstream.dtype == out.dtype == query.dtype
    dtype = query.dtype
    group = query.shape[1] // key.shape[1]
    upstream, query, key, value, out = (_wide(tensor) for tensor in (upstream, query, key, value, out))
    keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,shd->hqs", query, keys) * scale
    scores = scores.masked_fill(~_visible(query, key, cum_q, cum_k, max_q, max_k), -torch.inf)
    weights = (scores - sums.unsqueeze(-1)).exp()
    pulled = torch.einsum("qhd,shd->hqs", upstream, values) - (upstream * out).sum(-1).T.unsqueeze(-1)
    slopes = weights * pulled * scale
    by_head = (torch.einsum("hqs,qhd->shd", slopes, query), torch.einsum("hqs,qhd->shd", weights, upstream))
    grad_key, grad_value = (part.unflatten(1, (-1, group)).sum(2).to(dtype) for part in by_head)
    return torch.einsum("hqs,shd->qhd", slopes, keys).to(dtype), grad_key, grad_value


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

"""Who reads which keys, cut into calls of an attention kernel, on the host: slots of a step those of step 0, and
elements of a chain its own as well.

Padded calls suit a CPU, whose kernel takes masks and whose small products want like sizes; ragged ones a GPU, whose
kernel takes runs of any length and no masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Queries of one document that share a block of attention: keys right of a block's last query are never touched.
_BLOCK_QUERIES = 256
# The same of chains, which bring as many keys of their own.
_CHAIN_BLOCK_QUERIES = 128
# Blocks share one padded call while their keys differ in number by no more than this.
_KEY_RATIO = 0.8
# Largest mask of one call, in values.
_CALL_VALUES = 1 << 20
# A gap between active slots of no more than this is filled with queries nobody asks for, instead of reading the
# document's keys once more for the slots behind it: flash kernels take 64 to 128 queries at a time anyway.
_FILLED_GAP = 64
# Keys gathered for one ragged call, unless a single run has more: what bounds the memory of copies.
_CALL_KEYS = 1 << 16


@dataclass(frozen=True)
class PaddedCall:
    """One padded call of attention: ``G`` blocks of up to ``Q`` queries and ``S`` keys.

    A query reads the first keys of its block, step 0's, up to a column; and, where ``own_columns`` says so, more behind
    these.

    Attributes:
        query_rows: int64 ``[G, Q]``, rows among the step's active slots; padding repeats a row.
        query_columns: int64 ``[G, Q]``, the last key column that each query reads.
        real: int64 ``[n]``, flat places in ``G·Q`` that are not padding.
        real_rows: int64 ``[n]``, the active row of each of them.
        key_rows: int64 ``[G, S]``, rows among the key slots; padding repeats a row that no query of the block reads.
        own_columns: int64 ``[2, G, Q]``, the first and the last key column of a query's own chain; or None.
    """

    query_rows: Tensor
    query_columns: Tensor
    real: Tensor
    real_rows: Tensor
    key_rows: Tensor
    own_columns: Tensor | None = None


@dataclass(frozen=True)
class RaggedCall:
    """One call of causal attention over step 0's keys without padding: ``G`` runs, one after the other.

    A run is consecutive columns ``[a, b)`` of a document as queries and the document's keys ``[0, b)``: its ``i``-th
    of ``q`` queries reads the first ``b - q + 1 + i`` of them.

    Attributes:
        query_rows: int64 ``[Q]``, rows among the step's active slots; a slot that is not active, in a gap of a run,
            has the row of the next one that is.
        real: int64 ``[n]``, places in ``Q`` of active slots.
        real_rows: int64 ``[n]``, the active row of each of them.
        key_rows: int64 ``[S]``, rows among the key slots.
        query_bounds, key_bounds: int32 ``[G + 1]``, where runs begin in ``Q`` and in ``S``.
        runs: queries and keys of each run, on the host.
    """

    query_rows: Tensor
    real: Tensor
    real_rows: Tensor
    key_rows: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    runs: tuple[tuple[int, int], ...]


AttentionCall = PaddedCall | RaggedCall


def plan_ragged(documents: np.ndarray, columns: np.ndarray, key_starts: np.ndarray) -> tuple[RaggedCall, ...]:
    """Cut queries, sorted by document and column, into runs, and these into calls.

    Args:
        documents, columns: int64 ``[R]``, of each query.
        key_starts: int64 ``[D]``, the row of each document's first key among the key slots.
    """
    steps = np.diff(columns, prepend=-1)
    breaks = (np.diff(documents, prepend=-1) != 0) | (steps > _FILLED_GAP + 1)
    starts = np.flatnonzero(breaks)
    stops = np.append(starts[1:], len(columns))
    num_keys = columns[stops - 1] + 1 if len(starts) else starts
    calls, low = [], 0
    for high in range(1, len(starts) + 1):
        if high == len(starts) or num_keys[low : high + 1].sum() > _CALL_KEYS:
            calls.append(_ragged_call(starts[low:high], stops[low:high], documents, columns, key_starts))
            low = high
    return tuple(calls)


def _ragged_call(
    starts: np.ndarray, stops: np.ndarray, documents: np.ndarray, columns: np.ndarray, key_starts: np.ndarray
) -> RaggedCall:
    first_column, num_keys = columns[starts], columns[stops - 1] + 1
    num_queries = num_keys - first_column
    query_bounds, key_bounds = (np.concatenate([[0], np.cumsum(counts)]) for counts in (num_queries, num_keys))
    rows = np.arange(starts[0], stops[-1])
    run = np.repeat(np.arange(len(starts)), stops - starts)
    real = query_bounds[run] + columns[rows] - first_column[run]
    query_rows = rows[np.searchsorted(real, np.arange(query_bounds[-1]))]
    key_rows = np.arange(key_bounds[-1]) + np.repeat(key_starts[documents[starts]] - key_bounds[:-1], num_keys)
    return RaggedCall(
        query_rows=torch.from_numpy(query_rows),
        real=torch.from_numpy(real),
        real_rows=torch.from_numpy(rows),
        key_rows=torch.from_numpy(key_rows),
        query_bounds=torch.from_numpy(query_bounds.astype(np.int32)),
        key_bounds=torch.from_numpy(key_bounds.astype(np.int32)),
        runs=tuple(zip(num_queries.tolist(), num_keys.tolist(), strict=True)),
    )


def plan_padded(documents: np.ndarray, columns: np.ndarray, key_starts: np.ndarray) -> tuple[PaddedCall, ...]:
    """Cut queries, sorted by document and column, into blocks and gather blocks of like size into calls.

    Args:
        documents, columns: int64 ``[R]``, of each query.
        key_starts: int64 ``[D]``, the row of each document's first key among the key slots.
    """
    every_row = np.arange(len(documents) + 1)
    return tuple(
        _padded_call(blocks, documents, columns, key_starts)
        for blocks in _like_blocks(_blocks(documents, columns, every_row, _BLOCK_QUERIES))
    )


def plan_padded_chains(
    documents: np.ndarray, columns: np.ndarray, key_starts: np.ndarray, chain_starts: np.ndarray, num_keys: int
) -> tuple[PaddedCall, ...]:
    """Cut elements of chains into calls over step 0's keys and, behind them all, the elements' own.

    Args:
        documents, columns: int64 ``[R]``, of each element's anchor, sorted; what is of one chain has one column.
        key_starts: int64 ``[D]``, the row of each document's first key among the key slots.
        chain_starts: int64 ``[C]``, the first element of each chain.
        num_keys: key slots; element ``i`` has the key row ``num_keys + i``.
    """
    edges = np.append(chain_starts, len(documents))
    blocks = _blocks(documents, columns, edges, _CHAIN_BLOCK_QUERIES)
    calls = []
    for group in _like_blocks(blocks, own_keys=True):
        call = _padded_call(group, documents, columns, key_starts)
        rows, width = call.query_rows.numpy(), call.key_rows.shape[1]
        first = chain_starts[np.searchsorted(chain_starts, rows, side="right") - 1]
        own_columns = width + np.stack([first, rows]) - rows[:, :1]
        key_rows = torch.cat([call.key_rows, num_keys + call.query_rows], dim=1)
        calls.append(replace(call, key_rows=key_rows, own_columns=torch.from_numpy(own_columns)))
    return tuple(calls)


# The keys of step 0 that a block reads, and its queries: from one to before another.
_Block = tuple[int, int, int]


def _blocks(documents: np.ndarray, columns: np.ndarray, edges: np.ndarray, longest: int) -> list[_Block]:
    """Return blocks of documents, cut at edges, each as long as may be or from one edge to the next, widest first."""
    blocks = []
    bounds = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
    for low, high in pairwise(bounds.tolist()):
        first = low
        while first < high:
            place = np.searchsorted(edges, first + longest, side="right") - 1
            last = int(edges[max(place, np.searchsorted(edges, first, side="right"))])
            last = min(last, high)
            blocks.append((int(columns[last - 1]) + 1, first, last))
            first = last
    return sorted(blocks, key=lambda block: (-block[0], block[1]))


def _like_blocks(blocks: list[_Block], own_keys: bool = False) -> Iterator[list[_Block]]:
    """Yield blocks of like size together, as many as one call may have."""
    group: list[_Block] = []
    for block in blocks:
        widest = max(last - first for _, first, last in [*group, block])
        num_keys = group[0][0] if group else block[0]
        fits = (len(group) + 1) * widest * (num_keys + own_keys * widest) <= _CALL_VALUES
        if group and not (block[0] >= _KEY_RATIO * num_keys and fits):
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _padded_call(group: list[_Block], documents: np.ndarray, columns: np.ndarray, key_starts: np.ndarray) -> PaddedCall:
    num_keys, widest = group[0][0], max(last - first for _, first, last in group)
    first = np.array([block[1] for block in group])[:, None]
    last = np.array([block[2] for block in group])[:, None]
    places = np.arange(widest)
    query_rows = np.minimum(first + places, last - 1)
    real = (first + places < last).ravel()
    counts = np.array([block[0] for block in group])[:, None]
    key_rows = key_starts[documents[first]] + np.minimum(np.arange(num_keys), counts - 1)
    return PaddedCall(
        query_rows=torch.from_numpy(query_rows),
        query_columns=torch.from_numpy(columns[query_rows]),
        real=torch.from_numpy(np.flatnonzero(real)),
        real_rows=torch.from_numpy(query_rows.ravel()[real]),
        key_rows=torch.from_numpy(key_rows),
    )

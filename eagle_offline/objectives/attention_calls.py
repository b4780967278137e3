"""Who reads which keys, cut into calls of an attention kernel, on the host: slots of a step those of step 0, and
elements of a chain the chain's own.

Padded calls suit a CPU, whose kernel takes masks and whose small products want like sizes; ragged ones a GPU, whose
kernel takes runs of any length and no masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Queries of one document that share a block of attention: keys right of a block's last query are never touched.
_BLOCK_QUERIES = 256
# Blocks share one padded call while their keys differ in number by no more than this.
_KEY_RATIO = 0.8
# Largest mask of one call, in values.
_CALL_VALUES = 1 << 22
# A gap between active slots of no more than this is filled with queries nobody asks for, instead of reading the
# document's keys once more for the slots behind it: flash kernels take 64 to 128 queries at a time anyway.
_FILLED_GAP = 64
# Keys gathered for one ragged call, unless a single run has more: what bounds the memory of copies.
_CALL_KEYS = 1 << 16


@dataclass(frozen=True)
class PaddedCall:
    """One padded call of causal attention over step 0's keys: ``G`` blocks of up to ``Q`` queries and ``S`` keys.

    Attributes:
        query_rows: int64 ``[G, Q]``, rows among the step's active slots; padding repeats a row.
        query_columns: int64 ``[G, Q]``, the last key column that each query reads.
        real: int64 ``[n]``, flat places in ``G·Q`` that are not padding.
        real_rows: int64 ``[n]``, the active row of each of them.
        key_rows: int64 ``[G, S]``, rows among the key slots; padding repeats a row that no query of the block reads.
    """

    query_rows: Tensor
    query_columns: Tensor
    real: Tensor
    real_rows: Tensor
    key_rows: Tensor


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

    A column that does not grow begins another run: so several sorted sequences may follow each other.

    Args:
        documents, columns: int64 ``[R]``, of each query.
        key_starts: int64 ``[D]``, the row of each document's first key among the key slots.
    """
    steps = np.diff(columns, prepend=-1)
    breaks = (np.diff(documents, prepend=-1) != 0) | (steps > _FILLED_GAP + 1) | (steps <= 0)
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
    blocks = []
    bounds = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
    for low, high in pairwise(bounds.tolist()):
        for first in range(low, high, _BLOCK_QUERIES):
            last = min(first + _BLOCK_QUERIES, high)
            blocks.append((int(columns[last - 1]) + 1, first, last))
    blocks.sort(key=lambda block: (-block[0], block[1]))
    calls: list[PaddedCall] = []
    group: list[tuple[int, int, int]] = []
    for block in blocks:
        if group and not _fits(group, block):
            calls.append(_padded_call(group, documents, columns, key_starts))
            group = []
        group.append(block)
    if group:
        calls.append(_padded_call(group, documents, columns, key_starts))
    return tuple(calls)


def plan_ragged_chains(
    documents: np.ndarray, columns: np.ndarray, depths: np.ndarray, key_starts: np.ndarray
) -> tuple[RaggedCall, ...]:
    """Cut elements of chains, in any order, into runs over depth 0's keys: one depth after the other."""
    order = np.lexsort((columns, documents, depths))
    rows = torch.from_numpy(order)
    return tuple(
        replace(call, query_rows=rows[call.query_rows], real_rows=rows[call.real_rows])
        for call in plan_ragged(documents[order], columns[order], key_starts)
    )


def plan_own_ragged(lengths: np.ndarray) -> tuple[RaggedCall, ...]:
    """Return the calls in which elements read their own chain up to themselves.

    Args:
        lengths: int64 ``[C]``, elements of each chain; chains follow each other.
    """
    if not len(lengths):
        return ()
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    rows = torch.arange(int(lengths.sum()))
    runs = tuple((length, length) for length in lengths.tolist())
    return (RaggedCall(rows, rows, rows, rows, bounds, bounds, runs),)


def plan_own_padded(lengths: np.ndarray) -> tuple[PaddedCall, ...]:
    """Return the calls in which elements read their own chain up to themselves: chains of one length together.

    Args:
        lengths: int64 ``[C]``, elements of each chain; chains follow each other.
    """
    starts, calls = np.cumsum(lengths) - lengths, []
    for length in np.unique(lengths).tolist():
        places = np.arange(length)
        rows = starts[lengths == length][:, None] + places
        longest = max(1, _CALL_VALUES // length**2)
        for low in range(0, len(rows), longest):
            block = torch.from_numpy(rows[low : low + longest])
            columns = torch.from_numpy(np.broadcast_to(places, block.shape).copy())
            calls.append(PaddedCall(block, columns, torch.arange(block.numel()), block.flatten(), block))
    return tuple(calls)


def _fits(group: list[tuple[int, int, int]], block: tuple[int, int, int]) -> bool:
    num_keys, first, last = block
    widest = max(last - first, *(high - low for _, low, high in group)) if group else last - first
    return num_keys >= _KEY_RATIO * group[0][0] and (len(group) + 1) * widest * group[0][0] <= _CALL_VALUES


def _padded_call(
    group: list[tuple[int, int, int]], documents: np.ndarray, columns: np.ndarray, key_starts: np.ndarray
) -> PaddedCall:
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

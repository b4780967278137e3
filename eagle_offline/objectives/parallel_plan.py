"""What a parallel forward over packed documents has to compute, settled from masks before any of it runs (P-EAGLE).

Depth 0 runs once, up to the last slot of a document that anything reads. The elements of depths ≥ 1 are chains, each
behind its anchor; they run in segments, one after the other, and read depth 0's keys and their own chain's. A slot's
depth 0 is in the loss with the segment that holds its chain, so that a segment knows whole chains. All index tensors
are made on the CPU, beside the reading of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_offline.objectives.attention_calls import (
    AttentionCall,
    PaddedCall,
    plan_padded,
    plan_padded_chains,
    plan_ragged,
)
from eagle_offline.objectives.cod import generate_cod_sample_indices
from eagle_offline.objectives.fused_loss import LossRows, chunk_rows
from eagle_offline.objectives.peagle_plan import CodSampling
from eagle_offline.objectives.plan import StepPlan


@dataclass(frozen=True)
class Elements:
    """Elements of depths ≥ 1, sorted by anchor and depth; a chain has every depth up to its last.

    Attributes:
        anchors: int64 ``[R]``, flat slots. depths: int64 ``[R]``.
    """

    anchors: np.ndarray
    depths: np.ndarray


@dataclass(frozen=True)
class ChainSegment:
    """Chains that run together, ``R`` elements, and the loss of their anchors and of themselves.

    Attributes:
        first_rows: int64 ``[n]``, of the slots that count at depth 0, those that count here.
        anchors: int64 ``[R]``, flat slots, sorted. depths: int64 ``[R]``, growing along a chain.
        calls: attention over depth 0's keys and the segment's own behind them; none where `ElementAttention` does it.
        loss_rows: of the ``n`` rows at depth 0 and the ``R`` elements after them.
        loss_slots: int64 ``[n + R]``, their flat places in ``D·N``, by depth and anchor.
        known: bool ``[n + R]``, the target's choice is in the draft vocabulary.
        step_counts: int64 ``[D]``.
    """

    first_rows: Tensor
    anchors: Tensor
    depths: Tensor
    calls: tuple[PaddedCall, ...]
    loss_rows: LossRows
    loss_slots: Tensor
    known: Tensor
    step_counts: Tensor


@dataclass(frozen=True)
class ParallelPlan:
    """A whole parallel forward.

    Attributes:
        key_slots: int64 ``[S]``, flat slots that run at depth 0.
        key_calls: attention of all of them among themselves, which every draft layer but the last needs.
        first: the slots that count at depth 0.
        segments: what follows, in this order.
        step_counts: int64 ``[D]``, elements that count at each depth.
        lengths: int64, slots of each document. num_slots: ``N``.
    """

    key_slots: Tensor
    key_calls: tuple[AttentionCall, ...]
    first: StepPlan
    segments: tuple[ChainSegment, ...]
    step_counts: Tensor
    lengths: Tensor
    num_slots: int


def sample_elements(
    lengths: Sequence[int] | np.ndarray,
    supervised: np.ndarray,
    sampling: CodSampling,
    generators: Sequence[torch.Generator],
) -> Elements:
    """Draw the elements of depths ≥ 1, each document by itself.

    Args:
        lengths: tokens of each document.
        supervised: bool ``[N]``, slots whose prediction counts.
        sampling: how many are drawn.
        generators: one a document.

    Source: P-EAGLE, arXiv 2602.01469.
    """
    anchors, depths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    start = 0
    for length, generator in zip(np.asarray(lengths).tolist(), generators, strict=True):
        anchor, depth = generate_cod_sample_indices(
            length,
            torch.from_numpy(supervised[start : start + length]),
            sampling.num_depths,
            sampling.down_sample_ratio,
            sampling.down_sample_ratio_min,
            generator=generator,
        )
        deeper = depth > 0
        anchors.append(anchor[deeper].numpy() + start)
        depths.append(depth[deeper].numpy())
        start += length
    return _sorted(np.concatenate(anchors), np.concatenate(depths))


def every_element(supervised: np.ndarray, num_depths: int) -> Elements:
    """Return the elements of depths ≥ 1 of every chain all of whose slots count, nothing left out.

    Args:
        supervised: bool ``[N]``, slots whose prediction counts; a document's last slot never does.
        num_depths: ``D``.
    """
    padded = np.concatenate([supervised, np.zeros(num_depths, bool)])
    whole, anchors, depths = supervised.copy(), [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for depth in range(1, num_depths):
        whole &= padded[depth : depth + len(supervised)]
        anchors.append(np.flatnonzero(whole))
        depths.append(np.full(len(anchors[-1]), depth))
    return _sorted(np.concatenate(anchors), np.concatenate(depths))


def _sorted(anchors: np.ndarray, depths: np.ndarray) -> Elements:
    order = np.lexsort((depths, anchors))
    return Elements(anchors[order], depths[order])


def plan_parallel(
    lengths: Sequence[int] | np.ndarray,
    supervised: np.ndarray,
    known: np.ndarray,
    target_rows: np.ndarray,
    elements: Elements,
    num_depths: int,
    longest_chunk: int,
    num_segments: int = 1,
    ragged: bool = False,
) -> ParallelPlan:
    """Plan a parallel forward over documents that stand end to end.

    Args:
        lengths: tokens of each document.
        supervised: bool ``[N]``, slots whose prediction counts; a document's last slot never does.
        known: bool ``[N]``, slots where the target's choice is in the draft vocabulary.
        target_rows: int64 ``[N]``, the row of target supervision of each slot, -1 without.
        elements: of depths ≥ 1; the slots that they predict for are supervised.
        num_depths: ``D``.
        longest_chunk: rows of the loss that are computed at once.
        num_segments: into how many parts the chains are cut; fewer where there are fewer anchors.
        ragged: attention in runs without padding and by `ElementAttention`, for a GPU, instead of padded calls, for a
            CPU.
    """
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    documents = np.repeat(np.arange(len(lengths)), lengths)
    columns = np.arange(len(documents)) - starts[documents]
    first = np.flatnonzero(supervised)
    key_counts = np.zeros(len(lengths), np.int64)
    for slots in (first, elements.anchors):
        np.maximum.at(key_counts, documents[slots], columns[slots] + 1)
    key_slots = np.flatnonzero(columns < key_counts[documents])
    key_starts = np.cumsum(key_counts) - key_counts
    row_of = np.full(len(documents), -1, np.int64)
    row_of[key_slots] = np.arange(len(key_slots))
    plan_calls = plan_ragged if ragged else plan_padded
    segments, counts = [], np.zeros(num_depths, np.int64)
    for low, high in _bounds(first, elements.anchors, num_segments):
        rows = np.arange(*np.searchsorted(first, [low, high]))
        chosen = slice(*np.searchsorted(elements.anchors, [low, high]))
        anchors, depths = elements.anchors[chosen], elements.depths[chosen]
        all_anchors = np.concatenate([first[rows], anchors])
        all_depths = np.concatenate([np.zeros(len(rows), np.int64), depths])
        predicted = all_anchors + all_depths
        step_counts = np.bincount(all_depths, minlength=num_depths)
        counts += step_counts
        chain_starts = np.unique(anchors, return_index=True)[1]
        chains = documents[anchors], columns[anchors], key_starts, chain_starts, len(key_slots)
        segments.append(
            ChainSegment(
                first_rows=torch.from_numpy(rows),
                anchors=torch.from_numpy(anchors),
                depths=torch.from_numpy(depths),
                calls=() if ragged else plan_padded_chains(*chains),
                loss_rows=_loss_rows(all_depths, target_rows[predicted], longest_chunk),
                loss_slots=torch.from_numpy(all_depths * len(documents) + all_anchors),
                known=torch.from_numpy(known[predicted]),
                step_counts=torch.from_numpy(step_counts),
            )
        )
    return ParallelPlan(
        key_slots=torch.from_numpy(key_slots),
        key_calls=plan_calls(documents[key_slots], columns[key_slots], key_starts),
        first=StepPlan(
            slots=torch.from_numpy(first),
            rows=torch.from_numpy(row_of[first]),
            supervised=torch.arange(len(first)),
            calls=plan_calls(documents[first], columns[first], key_starts),
        ),
        segments=tuple(segments),
        step_counts=torch.from_numpy(counts),
        lengths=torch.from_numpy(lengths),
        num_slots=len(documents),
    )


def _bounds(first: np.ndarray, anchors: np.ndarray, num_segments: int) -> list[tuple[int, int]]:
    """Return the anchors, from one to before another, of segments of about as many rows each."""
    rows = np.sort(np.concatenate([first, anchors]))
    if not len(rows):
        return []
    cuts = rows[np.arange(1, num_segments) * len(rows) // num_segments]
    edges = np.unique(np.concatenate([[rows[0]], cuts, [rows[-1] + 1]]))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _loss_rows(steps: np.ndarray, targets: np.ndarray, longest_chunk: int) -> LossRows:
    order = np.argsort(targets, kind="stable")
    return LossRows(
        order=torch.from_numpy(order),
        steps=torch.from_numpy(steps[order]),
        targets=torch.from_numpy(targets[order]),
        chunks=chunk_rows(targets[order].tolist(), longest_chunk),
    )

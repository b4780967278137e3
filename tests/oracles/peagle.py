"""The P-EAGLE loss as it is defined: elements drawn, read and charged one by one in plain loops, float64.

The draft's own arithmetic is that of `tests.oracles.ttt`; nothing here calls the code it judges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.oracles import ttt
from tests.oracles.distribution import first_argmax

Element = tuple[int, int]  # anchor, depth


def permutations_of(generator: torch.Generator) -> Callable[[int], list[int]]:
    """The draws that a generator yields: a permutation of so many candidates a call."""
    return lambda size: torch.randperm(size, generator=generator).tolist()


def cod_elements(
    mask: list[bool], num_depths: int, ratio: float, ratio_min: float, permutation: Callable[[int], list[int]]
) -> list[Element]:
    """The elements of one document of `len(mask)` slots, in order of depth and, inside it, of anchor."""
    num_slots = len(mask)
    supervised = [slot for slot in range(num_slots) if mask[slot]]
    elements = [(slot, 0) for slot in range(num_slots)]
    pool = [slot for slot in supervised if slot != 0]
    for depth in range(1, num_depths):
        size = int(max(0, len(supervised) - depth) * max(ratio**depth, ratio_min))
        if size == 0:
            break
        taken = pool if len(pool) < size else sorted(pool[place] for place in permutation(len(pool))[:size])
        elements += [(slot - depth, depth) for slot in taken]
        following = [(slot + 1) % num_slots for slot in taken]
        pool = [slot for slot in following if slot != 0 and slot in supervised]
    return elements


def segment_of(element: Element, num_slots: int, num_segments: int) -> int:
    """Which segment owns an element."""
    anchor, depth = element
    place = anchor if depth == 0 else anchor + 1
    return min(place * num_segments // num_slots, num_segments - 1)


def reads(one: Element, other: Element, documents: list[int]) -> bool:
    """Whether element `one` sees `other`; `documents` says of each slot whose it is, -1 padding.

    An element of padding sees itself and nobody else does, which is not part of the definition but keeps NaN out.
    """
    if one == other:
        return True
    (anchor, depth), (other_anchor, other_depth) = one, other
    outside = [slot >= len(documents) or documents[slot] < 0 for slot in (anchor, other_anchor)]
    if any(outside) or documents[anchor] != documents[other_anchor]:
        return False
    return (other_depth == 0 and anchor >= other_anchor) or (anchor == other_anchor and depth >= other_depth)


@dataclass(frozen=True)
class Drawn:
    """One row: whose each slot is (-1 padding), the slots that supervise, and the elements drawn."""

    documents: list[int]
    supervised: list[bool]
    elements: list[Element]


def draw_row(
    lengths: list[int],
    loss_mask: list[bool],
    num_depths: int,
    ratio: float,
    ratio_min: float,
    permutation: Callable[[int], list[int]],
) -> Drawn:
    """A row whose documents have these lengths; the last slot of each supervises nothing."""
    documents = ttt.row_documents(lengths, len(loss_mask))
    supervised = [
        loss_mask[slot] and documents[slot] >= 0 and documents[slot : slot + 2] == [documents[slot]] * 2
        for slot in range(len(loss_mask))
    ]
    elements, start = [], 0
    for length in lengths:
        mask = supervised[start : start + length]
        drawn = cod_elements(mask, num_depths, ratio, ratio_min, permutation)
        elements += [(anchor + start, depth) for anchor, depth in drawn]
        start += length
    return Drawn(documents, supervised, elements)


@dataclass(frozen=True)
class Parallel:
    """Everything a batch yields."""

    loss: torch.Tensor
    accuracy: float
    count: int
    prefix_hits: list[int]
    valid: list[int]


def row_logits(
    draft: ttt.Draft, row: Drawn, input_ids: torch.Tensor, aux: torch.Tensor, mask_token_id: int
) -> list[torch.Tensor]:
    """Draft logits of every element of a row, from token ids [T] and aux states [T, A * Ht]."""
    known, unknown = draft.project(aux.double()), draft.project(draft.parameters["mask_hidden"][0])[0]
    states = [known[anchor] if depth == 0 else unknown for anchor, depth in row.elements]
    ids = [int(input_ids[anchor]) if depth == 0 else mask_token_id for anchor, depth in row.elements]
    starts = {document: row.documents.index(document) for document in row.documents}
    positions = [anchor + depth - starts[row.documents[anchor]] for anchor, depth in row.elements]

    def visible(_step: int, place: int, _documents: list[int], _padding: list[bool]) -> list[tuple[int, int]]:
        one = row.elements[place]
        return [(0, j) for j, other in enumerate(row.elements) if reads(one, other, row.documents)]

    flat = ttt.Row([0] * len(states), [False] * len(states), positions, visible)
    return list(draft.logits(ttt.draft_step(draft, flat, 0, torch.tensor(ids), torch.stack(states))))


def parallel_loss(
    draft: ttt.Draft,
    rows: list[Drawn],
    *,
    input_ids: torch.Tensor,
    aux_hidden_states: torch.Tensor,
    target_probs: torch.Tensor,
    inside: torch.Tensor,
    num_depths: int,
    mask_token_id: int,
) -> Parallel:
    """The loss and the counts of a slot-frame batch; `inside` [B, T]: the target's best token is in the vocabulary."""
    total = sum((parameter.sum() * 0 for parameter in draft.parameters.values()), torch.zeros((), dtype=torch.float64))
    count = correct = 0
    prefix_hits, valid = [0] * num_depths, [0] * num_depths
    for b, row in enumerate(rows):
        if not row.elements:
            continue
        logits = row_logits(draft, row, input_ids[b], aux_hidden_states[b], mask_token_id)
        right = {}
        for (anchor, depth), q in zip(row.elements, logits, strict=True):
            slot = anchor + depth
            if not row.supervised[slot]:
                continue
            p = target_probs[b, slot].double()
            some = p > 0
            total = total + (p[some] * (torch.log(p[some]) - (q - torch.logsumexp(q, dim=0))[some])).sum()
            count += 1
            agrees = first_argmax(q.detach()) == first_argmax(p)
            correct += agrees
            right[anchor, depth] = agrees and bool(inside[b, slot])
        for anchor, depth in row.elements:
            if all(row.supervised[anchor : anchor + depth + 1]):
                valid[depth] += 1
                prefix_hits[depth] += all(right[anchor, shallower] for shallower in range(depth + 1))
    return Parallel(
        loss=total / count if count else total,
        accuracy=correct / count if count else 0.0,
        count=count,
        prefix_hits=prefix_hits,
        valid=valid,
    )

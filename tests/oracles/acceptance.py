"""How many tokens a chain of drafts yields, counted slot by slot with plain Python loops."""

from __future__ import annotations

import math
from collections.abc import Sequence


def simulated_accept_length(step_prefix_hits: Sequence[float], step_valid: Sequence[float]) -> float:
    """One plus the share of valid slots that are right up to each step; a step without valid slots adds nothing."""
    length = 1.0
    for hits, valid in zip(step_prefix_hits, step_valid, strict=True):
        if valid > 0:
            length += hits / valid
    return length


def prefix_counts(right: Sequence[Sequence[bool]], valid: Sequence[Sequence[bool]]) -> tuple[list[int], list[int]]:
    """Of `right[k][slot]` and `valid[k][slot]`, how many slots are so at every step up to k."""
    num_slots = len(right[0])
    hits = [sum(all(right[j][t] for j in range(k + 1)) for t in range(num_slots)) for k in range(len(right))]
    counts = [sum(all(valid[j][t] for j in range(k + 1)) for t in range(num_slots)) for k in range(len(valid))]
    return hits, counts


def walked_accept_length(
    step_hits: Sequence[Sequence[bool]], slot_valid: Sequence[bool], document_ids: Sequence[int]
) -> tuple[int, int]:
    """Tokens and rounds of greedy decoding with a chain of K drafts, each document walked from its first slot."""
    num_steps = len(step_hits)
    tokens = rounds = 0
    for document in sorted({d for d in document_ids if d >= 0}):
        slots = [t for t, d in enumerate(document_ids) if d == document]
        place = 0
        while place < len(slots):
            slot = slots[place]
            if not slot_valid[slot]:
                place += 1
                continue
            accepted = 0
            while accepted < num_steps and step_hits[accepted][slot]:
                accepted += 1
            tokens += accepted + 1
            rounds += 1
            place += accepted + 1
    return tokens, rounds


def expected_accept_length(step_overlaps: Sequence[Sequence[float]], step_valid: Sequence[Sequence[bool]]) -> float:
    """One plus, for each step, the mean probability that a chain survives to it, over slots valid all the way.

    `step_overlaps[k][slot]` is the probability of accepting the token drafted at step k, 0 where nothing supervises.
    """
    length = 1.0
    for k in range(len(step_valid)):
        survivals = [
            math.prod(step_overlaps[j][t] for j in range(k + 1))
            for t in range(len(step_valid[0]))
            if all(step_valid[j][t] for j in range(k + 1))
        ]
        if survivals:
            length += sum(survivals) / len(survivals)
    return length


def decoded_length(overlaps: Sequence[float]) -> float:
    """The mean yield of one round by its outcomes: a tokens accepted, then a refusal or the chain's end, one more."""
    mean, survival = 0.0, 1.0
    for accepted, overlap in enumerate(overlaps):
        mean += survival * (1 - overlap) * (accepted + 1)
        survival *= overlap
    return mean + survival * (len(overlaps) + 1)

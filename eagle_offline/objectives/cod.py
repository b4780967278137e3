"""Conditional-on-distribution (COD) sampling: which (anchor, depth) pairs of a document a P-EAGLE step trains.

An element ``(anchor, depth)`` predicts what slot ``anchor + depth``, its reference slot, predicts, from what is known
at the anchor. Elements of one anchor are a chain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_offline.errors import UsageError


def generate_cod_sample_indices(
    seq_length: int,
    loss_mask: Tensor,
    num_depths: int = 8,
    down_sample_ratio: float = 0.7,
    down_sample_ratio_min: float = 0.2,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the elements of one document: every slot at depth 0, ever fewer chains at each further depth.

    Depth ``d`` takes ``int(max(0, supervised − d) · max(r^d, r_min))`` reference slots, uniformly and without
    replacement, among those whose chain reached ``d − 1``; all of them where there are fewer. A chain only passes
    over supervised slots, so a deeper element's reference slot is one, and its anchor has every shallower element.

    Args:
        seq_length: ``n``, slots of the document.
        loss_mask: bool or integer ``[n]`` or ``[1, n]``, slot frame.
        num_depths: ``D``.
        down_sample_ratio, down_sample_ratio_min: ``r`` and ``r_min``.
        generator: what the draw is a pure function of: one permutation of its candidates for each depth that has
            enough of them; None draws from torch's own.

    Returns:
        ``(anchor_pos, depth)``, int64 ``[M]`` on the loss mask's device: depth 0 first, anchors ascending in a depth.

    Raises:
        UsageError: for a loss mask of another length.

    Example:
        Slots 0 to 2 supervised, ``r = 1``: two chains fit at depth 1, and slot 3 ends the one from anchor 1.

        >>> anchor_pos, depth = generate_cod_sample_indices(5, torch.tensor([1, 1, 1, 0, 0]), 3, 1.0)
        >>> list(zip(anchor_pos.tolist(), depth.tolist()))[5:]
        [(0, 1), (1, 1), (0, 2)]

    Source: P-EAGLE, arXiv 2602.01469; sizes and pools as in the reference implementations.
    """
    supervised = loss_mask.reshape(-1).bool().cpu()
    if len(supervised) != seq_length:
        raise UsageError(f"loss_mask: expected {seq_length} slots, found {len(supervised)}; pass one document's slots")
    num_supervised = int(supervised.sum())
    drawn_on = torch.device("cpu") if generator is None else generator.device
    pool = supervised.nonzero().squeeze(-1)
    pool = pool[pool > 0]
    anchors, counts = [torch.arange(seq_length)], [seq_length]
    for depth in range(1, num_depths):
        size = int(max(0, num_supervised - depth) * max(down_sample_ratio**depth, down_sample_ratio_min))
        if size == 0:
            break
        slots = pool
        if len(pool) >= size:
            order = torch.randperm(len(pool), generator=generator, device=drawn_on).cpu()
            slots = pool[order[:size]].sort().values
        anchors.append(slots - depth)
        counts.append(len(slots))
        pool = slots[slots < seq_length - 1] + 1
        pool = pool[supervised[pool]]
    depths = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.cat(anchors).to(loss_mask.device), depths.to(loss_mask.device)


def assign_cod_segments(anchor_pos: Tensor, depth: Tensor, seq_length: int, num_segments: int) -> Tensor:
    """Return int64 ``[M]``: which of ``P`` segments owns each element, chains beyond depth 0 kept whole.

    Depth 0 falls in ``⌊anchor · P / n⌋``; a deeper element where its depth-1 ancestor's reference slot,
    ``anchor + 1``, falls. What an element reads beside its own segment are depth-0 elements to the left of it.

    Args:
        anchor_pos, depth: int64 ``[M]``.
        seq_length: ``n``, slots of the row that is partitioned.
        num_segments: ``P``.

    Example:
        >>> assign_cod_segments(torch.tensor([0, 1, 2, 3, 1]), torch.tensor([0, 0, 0, 0, 1]), 4, 2).tolist()
        [0, 0, 1, 1, 1]

    Source: P-EAGLE, arXiv 2602.01469, Algorithm 1.
    """
    slots = anchor_pos + depth.clamp_max(1)
    return (slots * num_segments // max(seq_length, 1)).clamp_max(num_segments - 1)

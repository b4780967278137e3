"""Which forwards make up the P-EAGLE loss of a batch: elements drawn, rows cut into segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from eagle_offline.errors import UsageError
from eagle_offline.objectives.cod import assign_cod_segments, generate_cod_sample_indices


@dataclass(frozen=True)
class PEagleUnit:
    """The ``M`` elements of one forward: those that a segment of a row owns, and the depth-0 ones left of them.

    Attributes:
        row: which row of the batch.
        lengths: int64 ``[D]``, slots of the row's documents, padding left out.
        anchor_pos, depth: int64 ``[M]``.
        position_ids: int64 ``[M]``, rotary positions: those of the reference slots.
        owned: bool ``[M]``, false for what is read as keys and values only.
        supervised: bool ``[M]``, the reference slot is supervised.
        anchored: bool ``[M]``, the anchor is supervised too, and with it every slot up to the reference slot.
    """

    row: int
    lengths: Tensor
    anchor_pos: Tensor
    depth: Tensor
    position_ids: Tensor
    owned: Tensor
    supervised: Tensor
    anchored: Tensor

    @property
    def loss_positions(self) -> Tensor:
        """Bool ``[M]``: the elements that are charged."""
        return self.owned & self.supervised

    @property
    def scored(self) -> Tensor:
        """Bool ``[M]``: the elements whose logits are asked for.

        Those that are charged, and the depth-0 element of a chain whose other elements the segment owns: without it
        nothing is known of how far the chain survives.
        """
        return self.supervised & torch.isin(self.anchor_pos, self.anchor_pos[self.owned])

    def selected(self, elements: Tensor, owned: Tensor) -> PEagleUnit:
        """Return the unit of some of the elements, in any order; ``owned`` bool ``[M]`` says so of all of them.

        Args:
            elements: bool ``[M]``, or int64 indices.
            owned: bool ``[M]``.
        """
        return PEagleUnit(
            self.row,
            self.lengths,
            *(
                values[elements]
                for values in (self.anchor_pos, self.depth, self.position_ids, owned, self.supervised, self.anchored)
            ),
        )


class PEaglePlan:
    """Which forwards make up a batch's loss: a unit for each segment of each row that owns elements.

    Not a container on purpose: `DistributedDataParallel` slices tensors inside the tuples, lists and dictionaries
    that it is given, and leaves other objects alone.

    Attributes:
        units: one forward each.
        total_den: int64 scalar, ``N``, the charged elements of all units. Whoever spreads one mean over several
            batches or ranks sets the sum here.
    """

    def __init__(self, units: list[PEagleUnit], total_den: Tensor):
        self.units = units
        self.total_den = total_den

    def padded(self, num_units: int) -> PEaglePlan:
        """Return a plan of at least ``num_units`` units; those added have loss 0 and touch every parameter.

        They read nothing of the batch, only what stands for the unknown.
        """
        one = torch.ones(1, dtype=torch.int64, device=self.total_den.device)
        none = one < 1
        idle = PEagleUnit(0, one, one - 1, one, one - 1, none, none, none)
        return PEaglePlan(self.units + [idle] * (num_units - len(self.units)), self.total_den)


@dataclass(frozen=True)
class CodSampling:
    """How many depths are drawn, and how fast chains thin out: ``D``, ``r`` and ``r_min``.

    Raises:
        UsageError: for a number out of range.
    """

    num_depths: int
    down_sample_ratio: float
    down_sample_ratio_min: float

    def __post_init__(self) -> None:
        if self.num_depths < 1:
            raise UsageError(f"num_depths: expected at least 1, found {self.num_depths}")
        for name in ("down_sample_ratio", "down_sample_ratio_min"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: expected a number from 0 to 1, found {getattr(self, name)}")

    def draw(
        self,
        row: int,
        loss_mask: Tensor,
        lengths: Tensor,
        position_ids: Tensor | None,
        generator: torch.Generator | None,
    ) -> PEagleUnit:
        """Return all elements of a row, its documents drawn one by one; tensors as in `plan_batch`, of the row."""
        ends = lengths.cumsum(0)
        supervised = loss_mask.bool()
        # What a document's last slot predicts lies beyond it; its mask, shifted, is the next document's.
        supervised = supervised.index_fill(0, ends[lengths > 0] - 1, False)
        anchors, depths, positions = [], [], []
        for start, end in pairwise([0, *ends.tolist()]):
            anchor_pos, depth = generate_cod_sample_indices(
                end - start,
                supervised[start:end],
                self.num_depths,
                self.down_sample_ratio,
                self.down_sample_ratio_min,
                generator=generator,
            )
            anchors.append(anchor_pos + start)
            depths.append(depth)
            positions.append(anchor_pos + depth)
        anchor_pos, depth = torch.cat(anchors), torch.cat(depths)
        slots = anchor_pos + depth
        return PEagleUnit(
            row=row,
            lengths=lengths,
            anchor_pos=anchor_pos,
            depth=depth,
            position_ids=torch.cat(positions) if position_ids is None else position_ids[slots],
            owned=torch.ones_like(depth, dtype=torch.bool),
            supervised=supervised[slots],
            anchored=supervised[anchor_pos],
        )


@torch.no_grad()
def plan_batch(
    sampling: CodSampling,
    loss_mask: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_lens: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_segments: int = 1,
) -> PEaglePlan:
    """Draw a batch's elements, row by row and document by document, and cut each row into ``P`` segments.

    Args:
        sampling: how they are drawn.
        loss_mask: ``[B, T]``, slot frame.
        attention_mask: ``[B, T]``, 1 on real slots, which stand on the left; None when all are.
        position_ids: int64 ``[B, T]``; None counts slots inside a document.
        seq_lens: int64 ``[B, max_docs]``; None when a row is one document.
        generator: what the draw is a function of.
        num_segments: ``P``.
    """
    units: list[PEagleUnit] = []
    for row, lengths in enumerate(_document_lengths(loss_mask, attention_mask, seq_lens)):
        positions = None if position_ids is None else position_ids[row]
        units += _segments(sampling.draw(row, loss_mask[row], lengths, positions, generator), num_segments)
    total_den = loss_mask.new_zeros((), dtype=torch.int64)
    return PEaglePlan(units, sum((unit.loss_positions.sum() for unit in units), total_den))


def _document_lengths(loss_mask: Tensor, attention_mask: Tensor | None, seq_lens: Tensor | None) -> Iterator[Tensor]:
    """Yield int64 ``[D]`` for each row: slots of its documents, padding folded into the last one left out."""
    num_rows, num_slots = loss_mask.shape
    for row in range(num_rows):
        real = loss_mask.new_tensor(num_slots, dtype=torch.int64)
        if attention_mask is not None:
            real = attention_mask[row].bool().sum()
        lengths = real.reshape(1) if seq_lens is None else seq_lens[row]
        ends = lengths.cumsum(0).minimum(real)
        yield ends.diff(prepend=torch.zeros_like(ends[:1]))


def _segments(drawn: PEagleUnit, num_segments: int) -> Iterator[PEagleUnit]:
    """Yield the units of a row, from all its elements: one for each segment that owns any."""
    segments = assign_cod_segments(drawn.anchor_pos, drawn.depth, int(drawn.lengths.sum()), num_segments)
    for segment in segments.unique().tolist():
        owned = segments == segment
        yield drawn.selected(owned | ((drawn.depth == 0) & (segments < segment)), owned)

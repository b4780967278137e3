"""Rows of states as they are stored: what travels to the training device, where their values are put together.

This module knows codecs and tensors, neither files nor samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from eagle_offline.cache import codec
from eagle_offline.cache.layout import FieldLayout

if TYPE_CHECKING:
    import torch

# Where a plane may begin: a multiple of every value's size, and of a cache line.
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredStates:
    """``n`` rows of fields that stand side by side, unpacked but not merged.

    Attributes:
        fields: how each is stored; their values stand in a row in this order.
        num_rows: ``n``.
        content: uint8, one after the other the planes ``[n, plane width]`` of every field, see `num_bytes`.
    """

    fields: tuple[FieldLayout, ...]
    num_rows: int
    content: torch.Tensor

    def planes(self) -> Iterator[tuple[FieldLayout, list[torch.Tensor]]]:
        """Yield each field with views of its uint8 planes ``[n, plane width]``."""
        bounds, next_plane = _bounds(self.fields, self.num_rows), 0
        for field in self.fields:
            widths = codec.plane_widths(field)
            starts = bounds[next_plane : next_plane + len(widths)]
            yield (
                field,
                [
                    self.content[start : start + self.num_rows * width].view(self.num_rows, width)
                    for start, width in zip(starts, widths, strict=True)
                ],
            )
            next_plane += len(widths)

    def places(self, start: int, stop: int, number: int) -> list[np.ndarray]:
        """Return the room, on the CPU, for rows ``start`` to ``stop`` of the field at place ``number``, by plane."""
        _, own = list(self.planes())[number]
        return [plane.numpy()[start:stop] for plane in own]

    def rows(self, index: torch.Tensor) -> StoredStates:
        """Return the rows ``index`` (int64 ``[m]``), still not merged."""
        content = self.content.new_empty(num_bytes(self.fields, len(index)))
        chosen = replace(self, num_rows=len(index), content=content)
        for (_, planes), (_, places) in zip(self.planes(), chosen.planes(), strict=True):
            for plane, place in zip(planes, places, strict=True):
                place.copy_(plane[index])
        return chosen

    def between(self, start: int, stop: int) -> torch.Tensor:
        """Return the values ``[m, Σ width]`` of rows ``start`` to ``stop``, put together now."""
        import torch

        values = [codec.merge(field, [plane[start:stop] for plane in planes]) for field, planes in self.planes()]
        return values[0] if len(values) == 1 else torch.cat(values, dim=-1)

    def merge(self) -> torch.Tensor:
        """Return the values ``[n, Σ width]`` on the content's device; of one raw field, a view."""
        return self.between(0, self.num_rows)


def num_bytes(fields: Sequence[FieldLayout], num_rows: int) -> int:
    """Return the size of the content of so many rows: each plane begins at a multiple of 64."""
    return _bounds(fields, num_rows)[-1]


def merges_ahead(fields: Sequence[FieldLayout]) -> bool:
    """Say whether values may be merged long before they are used: not if they are far larger than what is stored."""
    return all(field.encoding != "topk" for field in fields)


def merged_layout(fields: Sequence[FieldLayout]) -> FieldLayout:
    """Return the one raw field that holds the values of fields side by side.

    Raises:
        ValueError: the fields are not of one dtype.
    """
    if len({field.dtype for field in fields}) != 1:
        raise ValueError(f"fields of {sorted({field.dtype for field in fields})} do not merge into one")
    width = sum(field.width for field in fields)
    return FieldLayout(name="merged", width=width, dtype=fields[0].dtype, encoding="raw", rows=fields[0].rows)


def merge_rows(
    states: StoredStates, start: int, fields: Sequence[FieldLayout], number: int, planes: Sequence[np.ndarray]
) -> None:
    """Merge rows of the field at place ``number`` into its columns of states that hold all fields merged.

    Args:
        states: on the CPU, of the one field that ``fields`` merge into; see `merged_layout`.
        start: first row.
        fields: those that stand side by side.
        number: place of the field at hand among them.
        planes: its own, as `codec.unpack` returns them.
    """
    _, (plane,) = next(states.planes())
    column = sum(field.row_bytes for field in fields[:number])
    rows = plane.numpy()[start : start + len(planes[0])]
    codec.merge_into(fields[number], planes, rows[:, column : column + fields[number].row_bytes])


def _bounds(fields: Sequence[FieldLayout], num_rows: int) -> list[int]:
    """Return where each plane begins, and where the last one ends."""
    sizes = [num_rows * width for field in fields for width in codec.plane_widths(field)]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return bounds

"""Codes of one to eight bits, packed: groups of 8, 4, 2 and 1 bits side by side in a row.

A code of ``b`` bits is cut into groups by the binary digits of ``b``, high bits first: 5 = 4 + 1, 6 = 4 + 2. Within
a group of ``g`` bits a byte holds ``8 / g`` codes that stand far apart: with ``W`` the width rounded up to a multiple
of 8 (for ``b`` below 8), byte ``j`` has code ``j + i · W·g/8`` in its bits ``i·g`` and up. So a row is packed and
unpacked by whole slices, with no step from value to value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_GROUPS = (8, 4, 2, 1)


def groups(num_bits: int) -> list[int]:
    """Return the groups of a code, high bits first.

    Example:
        >>> groups(6)
        [4, 2]
    """
    return [group for group in _GROUPS if num_bits & group]


def packed_width(width: int, num_bits: int) -> int:
    """Return the bytes that a row of ``width`` codes takes."""
    return width if num_bits == 8 else -(-width // 8) * num_bits


def pack(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """Return uint8 ``[n, packed_width]`` for codes, uint8 ``[n, width]`` below ``2**num_bits``."""
    if num_bits == 8:
        return codes
    num_rows, width = codes.shape
    padded = np.zeros((num_rows, -(-width // 8) * 8), np.uint8)
    padded[:, :width] = codes
    packed = np.zeros((num_rows, packed_width(width, num_bits)), np.uint8)
    left, start = num_bits, 0
    for group in groups(num_bits):
        left -= group
        group_width = padded.shape[1] * group // 8
        place = packed[:, start : start + group_width]
        for number in range(8 // group):
            part = padded[:, number * group_width : (number + 1) * group_width]
            place |= ((part >> left) & ((1 << group) - 1)) << (number * group)
        start += group_width
    return packed


def unpack_into(packed: Any, num_bits: int, codes: Any) -> None:
    """Write the codes of packed rows; NumPy arrays and tensors of any device alike.

    Args:
        packed: uint8 ``[n, packed_width]``.
        codes: uint8 ``[n, width]``, to be written.
    """
    width = codes.shape[1]
    if num_bits == 8:
        codes[...] = packed
        return
    left, start, padded_width = num_bits, 0, -(-width // 8) * 8
    for place, group in enumerate(groups(num_bits)):
        left -= group
        group_width, mask = padded_width * group // 8, (1 << group) - 1
        source = packed[:, start : start + group_width]
        for number in range(8 // group):
            first = number * group_width
            last = min(first + group_width, width)
            if first >= last:
                break
            part = ((source[:, : last - first] >> (number * group)) & mask) << left
            if place:
                codes[:, first:last] |= part
            else:
                codes[:, first:last] = part
        start += group_width

"""How a matrix of values becomes stored columns, one class an encoding. All columns are bytes, one row a row of values.

``raw`` keeps the little-endian values, readable at memory-map speed.

``planes`` cuts bf16 in two: the exponent (8 bits), which compresses to about a third, and mantissa with sign, which is
noise and stays as it is. With fewer than 7 mantissa bits the value is rounded first, to the nearest, ties to even; the
largest finite value takes what would overflow. A low code is the mantissa's kept bits, then the sign, packed by
`eagle_offline.cache.bit_groups`::

    bf16        s eeeeeeee mmmmmmm
    exponent    eeeeeeee               one byte a value, as a zstd frame where the format compresses
    low code    mmmmmmm s              8 bits; with 4 mantissa bits mmmm s, 5 bits

``fp8`` is e4m3 (no infinities), one byte a value, and a float32 scale a row: the row's largest magnitude over 448, or
1 where that is too small to divide by.

``topk`` keeps the ``k`` largest of a row of probabilities with their places, ascending, and the mass of all others;
they come back with that mass spread evenly over the places that were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from eagle_offline.cache import bit_groups
from eagle_offline.cache.layout import EXACT_MANTISSA_BITS, STORED_DTYPES, FieldLayout

if TYPE_CHECKING:
    import torch

# Values merged at a time on a CPU: what is read and written of them stays in a core's own cache, which made merging
# ten times as fast as over whole matrices (0.4 ns a value instead of 4).
MERGED_VALUES = 1 << 17

# Largest finite value of e4m3 without infinities.
_FP8_MAX = 448.0

# Float32's exponent has a bias of 127, e4m3's of 7.
_FP8_BIAS_FACTOR = np.float32(2.0**120)

_BF16_INFINITY = 0x7F80


@dataclass(frozen=True)
class Column:
    """A stored column of a field: the end of its name, bytes a row, and whether compression pays."""

    suffix: str
    row_bytes: int
    compressible: bool = False


class Encoding(Protocol):
    """One way to store a field."""

    def columns(self, field: FieldLayout) -> list[Column]:
        """Return what the field is stored in."""

    def encode(self, field: FieldLayout, values: torch.Tensor) -> list[np.ndarray]:
        """Return the columns, uint8 ``[n, row_bytes]``, of values ``[n, width]`` on the CPU."""

    def merge(self, field: FieldLayout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the values ``[n, width]`` from the columns, on their device."""

    def merge_into(self, field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Write the values, on the CPU, as their bytes: ``out`` uint8 ``[n, row_bytes]``, its rows may stand apart."""


def encoding_of(field: FieldLayout) -> Encoding:
    """Return how a field is stored."""
    return _ENCODINGS[field.encoding]


def torch_dtype(name: str) -> torch.dtype:
    """Return a stored dtype."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def bytes_of(values: torch.Tensor) -> np.ndarray:
    """Return uint8 ``[n, row_bytes]`` of values ``[n, width]`` on the CPU."""
    import torch

    # A view of nothing has no stride to reinterpret.
    if not len(values):
        return np.empty((0, values.shape[1] * values.element_size()), np.uint8)
    return values.contiguous().view(torch.uint8).numpy()


def values_of(plane: torch.Tensor, dtype: torch.dtype, width: int) -> torch.Tensor:
    """Return uint8 ``[n, row_bytes]`` read as ``[n, width]``; a view."""
    return plane.contiguous().view(dtype) if len(plane) else plane.new_empty(0, width, dtype=dtype)


class _Raw:
    def columns(self, field: FieldLayout) -> list[Column]:
        return [Column("", field.row_bytes)]

    def encode(self, field: FieldLayout, values: torch.Tensor) -> list[np.ndarray]:
        return [bytes_of(values.to(torch_dtype(field.dtype)))]

    def merge(self, field: FieldLayout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        return values_of(planes[0], torch_dtype(field.dtype), field.width)

    def merge_into(self, field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
        out[...] = planes[0]


class _Planes:
    def columns(self, field: FieldLayout) -> list[Column]:
        low = bit_groups.packed_width(field.width, field.mantissa_bits + 1)
        return [Column("exponent", field.width, compressible=True), Column("mantissa", low)]

    def encode(self, field: FieldLayout, values: torch.Tensor) -> list[np.ndarray]:
        words = bytes_of(values.to(torch_dtype(field.dtype))).view("<u2")
        exponent = np.empty(words.shape, np.uint8)
        code = np.empty(words.shape, np.uint8)
        block = max(1, MERGED_VALUES // field.width)
        for start in range(0, len(words), block):
            some = _rounded(words[start : start + block], field.mantissa_bits)
            moved = some >> np.uint16(7)
            exponent[start : start + block] = moved
            np.bitwise_and(some, np.uint16(0x7F), out=moved)
            np.right_shift(moved, np.uint16(EXACT_MANTISSA_BITS - field.mantissa_bits), out=moved)
            np.left_shift(moved, np.uint16(1), out=moved)
            np.bitwise_or(moved, some >> np.uint16(15), out=moved)
            code[start : start + block] = moved
        return [exponent, bit_groups.pack(code, field.mantissa_bits + 1)]

    def merge(self, field: FieldLayout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        exponent, low = planes[0], self._codes(field, planes[1])
        dropped = EXACT_MANTISSA_BITS - field.mantissa_bits
        low = low.to(torch.int16)
        words = exponent.to(torch.int16) << 7 | (low >> 1) << dropped | low << 15
        return words.view(torch.bfloat16)

    def _codes(self, field: FieldLayout, packed: torch.Tensor) -> torch.Tensor:
        if field.mantissa_bits == EXACT_MANTISSA_BITS:
            return packed
        codes = packed.new_empty(len(packed), field.width)
        bit_groups.unpack_into(packed, field.mantissa_bits + 1, codes)
        return codes

    def merge_into(self, field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
        if not len(out):
            return
        words, num_bits = out.view("<u2"), field.mantissa_bits + 1
        num_rows, width = words.shape
        block = max(1, MERGED_VALUES // width)
        first = np.empty((min(block, num_rows), width), np.uint16)
        second = np.empty_like(first)
        unpacked = np.empty(first.shape, np.uint8)
        for start in range(0, num_rows, block):
            high = words[start : start + block]
            low, moved, codes = first[: len(high)], second[: len(high)], unpacked[: len(high)]
            if num_bits == 8:
                codes = planes[1][start : start + block]
            else:
                bit_groups.unpack_into(planes[1][start : start + block], num_bits, codes)
            high[...] = planes[0][start : start + block]
            np.left_shift(high, 7, out=high)
            low[...] = codes
            np.right_shift(low, 1, out=moved)
            if num_bits != 8:
                np.left_shift(moved, 8 - num_bits, out=moved)
            np.bitwise_or(high, moved, out=high)
            np.left_shift(low, 15, out=moved)
            np.bitwise_or(high, moved, out=high)


def _rounded(words: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """Return bf16 words rounded to so many mantissa bits, to nearest, ties to even, finite ones to finite ones."""
    dropped = EXACT_MANTISSA_BITS - mantissa_bits
    if not dropped:
        return words
    magnitude = words & np.uint16(0x7FFF)
    kept_odd = magnitude >> np.uint16(dropped) & np.uint16(1)
    rounded = magnitude + np.uint16((1 << (dropped - 1)) - 1) + kept_odd
    rounded &= np.uint16(0x8000 - (1 << dropped))
    largest = np.uint16(_BF16_INFINITY - (1 << dropped))
    return np.minimum(rounded, largest) | words & np.uint16(0x8000)


class _Fp8:
    def columns(self, field: FieldLayout) -> list[Column]:
        return [Column("fp8", field.width), Column("scale", 4)]

    def encode(self, field: FieldLayout, values: torch.Tensor) -> list[np.ndarray]:
        import torch

        wide = values.float()
        scale = wide.abs().amax(dim=1, keepdim=True) / _FP8_MAX
        # A row of zeros, or of values too small for a scale, has any scale.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        codes = (wide / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        return [codes.view(torch.uint8).numpy(), bytes_of(scale)]

    def merge(self, field: FieldLayout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        codes, scale = planes[0].view(torch.float8_e4m3fn), values_of(planes[1], torch.float32, 1)
        return (codes.float() * scale).to(torch_dtype(field.dtype))

    def merge_into(self, field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
        import torch

        # Sign, exponent and mantissa are moved to where float32 has them, and a product makes up for the exponent's
        # bias: the values that a cast gives, four times as fast on a CPU.
        block = max(1, MERGED_VALUES // field.width)
        words = np.empty((min(block, len(out)), field.width), np.uint32)
        signs = np.empty_like(words)
        scales = planes[1].copy().view("<f4") if len(out) else planes[1]
        for start in range(0, len(out), block):
            codes = planes[0][start : start + block]
            word, sign = words[: len(codes)], signs[: len(codes)]
            word[...] = codes
            np.left_shift(word, 24, out=sign)
            np.bitwise_and(sign, 0x80000000, out=sign)
            np.bitwise_and(word, 0x7F, out=word)
            np.left_shift(word, 20, out=word)
            np.bitwise_or(word, sign, out=word)
            values = word.view(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # a stranger's bytes may say anything
                np.multiply(values, _FP8_BIAS_FACTOR, out=values)
                np.multiply(values, scales[start : start + block], out=values)
            # No encoder writes them; whoever did means what the cast gives.
            np.copyto(values, np.nan, where=(codes & 0x7F) == 0x7F)
            out[start : start + block] = bytes_of(torch.from_numpy(values).to(torch_dtype(field.dtype)))


class _TopK:
    def columns(self, field: FieldLayout) -> list[Column]:
        count = _top_k(field)
        return [
            Column("probs", count * STORED_DTYPES[field.dtype]),
            Column("ids", count * _place_dtype(field).itemsize),
            Column("tail", 4),
        ]

    def encode(self, field: FieldLayout, values: torch.Tensor) -> list[np.ndarray]:

        wide = values.float()
        places = _largest(wide, _top_k(field))
        probs = wide.gather(1, places)
        # Summed by itself, and wide: a difference of two sums near 1 would leave no digit of a small tail.
        tail = wide.double().scatter_(1, places, 0.0).sum(dim=1, keepdim=True).float()
        stored_places = np.ascontiguousarray(places.numpy().astype(_place_dtype(field)))
        return [bytes_of(probs.to(torch_dtype(field.dtype))), _row_bytes(stored_places), bytes_of(tail)]

    def merge(self, field: FieldLayout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        count = _top_k(field)
        probs = values_of(planes[0], torch_dtype(field.dtype), count).float()
        # Read as signed, because few kernels know uint16.
        small = _place_dtype(field).itemsize == 2
        places = values_of(planes[1], torch.int16 if small else torch.int32, count).long()
        places = places & 0xFFFF if small else places
        # What the bytes of a stranger's cache name must stay inside the row.
        places = places.clamp(0, field.width - 1)
        share = values_of(planes[2], torch.float32, 1) / max(field.width - count, 1)
        rows = share.expand(len(probs), field.width).clone()
        return rows.scatter_(1, places, probs).to(torch_dtype(field.dtype))

    def merge_into(self, field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
        _merge_blocks(self, field, planes, out)


def _top_k(field: FieldLayout) -> int:
    assert field.top_k is not None
    return field.top_k


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 ``[n, count]``: the places of each row's largest values, ascending; of equals the lower ones."""
    # What is no number compares with nothing; it is refused elsewhere.
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"))
    smallest = values.topk(count, dim=1).values[:, -1:]
    above, equal = values > smallest, values == smallest
    wanted = count - above.sum(dim=1, keepdim=True)
    chosen = above | equal & (equal.cumsum(dim=1) <= wanted)
    return chosen.nonzero()[:, 1].view(len(values), count)


def _place_dtype(field: FieldLayout) -> np.dtype:
    return np.dtype("<u2") if field.width <= 1 << 16 else np.dtype("<i4")


def _row_bytes(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8) if len(values) else np.empty((0, values.shape[1] * values.itemsize), np.uint8)


def _merge_blocks(encoding: Encoding, field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
    import torch

    block = max(1, MERGED_VALUES // field.width)
    for start in range(0, len(out), block):
        stored = [torch.from_numpy(plane[start : start + block]) for plane in planes]
        out[start : start + block] = bytes_of(encoding.merge(field, stored))


_ENCODINGS: dict[str, Encoding] = {"raw": _Raw(), "planes": _Planes(), "fp8": _Fp8(), "topk": _TopK()}

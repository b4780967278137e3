"""Stored columns written out value by value from the format's definitions, in integers and float64."""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

BF16_INFINITY = 0x7F80
BF16_LARGEST = 0x7F7F
E4M3_LARGEST = 448.0


def group_sizes(num_bits: int) -> list[int]:
    """The binary digits of a number of bits, large ones first."""
    return [size for size in (8, 4, 2, 1) if num_bits & size]


def round_up(width: int) -> int:
    """The next multiple of 8."""
    return (width + 7) // 8 * 8


def packed_row(codes: Sequence[int], num_bits: int) -> bytes:
    """Codes of one row, group after group; byte `j` has code `j + i·W·g/8` in its bits `i·g` and up.

    Codes of eight bits are bytes, with nothing to pack and nothing after them.
    """
    if num_bits == 8:
        return bytes(codes)
    wide = round_up(len(codes))
    padded = [*codes, *[0] * (wide - len(codes))]
    content = bytearray()
    below = num_bits
    for size in group_sizes(num_bits):
        below -= size
        num_bytes = wide * size // 8
        for j in range(num_bytes):
            byte = 0
            for i in range(8 // size):
                byte |= (padded[j + i * num_bytes] >> below & (1 << size) - 1) << i * size
            content.append(byte)
    return bytes(content)


def unpacked_row(content: bytes, width: int, num_bits: int) -> list[int]:
    """The codes of a packed row."""
    if num_bits == 8:
        return list(content)
    wide = round_up(width)
    codes, start, below = [0] * wide, 0, num_bits
    for size in group_sizes(num_bits):
        below -= size
        num_bytes = wide * size // 8
        for place in range(wide):
            byte = content[start + place % num_bytes]
            codes[place] |= (byte >> place // num_bytes * size & (1 << size) - 1) << below
        start += num_bytes
    return codes[:width]


def scaled(word: int) -> int:
    """The magnitude of a finite bf16 word in units of the smallest subnormal, 2^-133: exact."""
    exponent, mantissa = word >> 7 & 0xFF, word & 0x7F
    return mantissa if exponent == 0 else (128 | mantissa) << exponent - 1


@cache
def _coarse_grid(mantissa_bits: int) -> tuple[list[int], list[int]]:
    """The non-negative finite bf16 words with so many mantissa bits, and their magnitudes."""
    words = [word for word in range(BF16_INFINITY) if word % (1 << 7 - mantissa_bits) == 0]
    return words, [scaled(word) for word in words]


def rounded_word(word: int, mantissa_bits: int) -> int:
    """The bf16 word nearest to a finite one that has so many mantissa bits; ties to the even mantissa."""
    words, magnitudes = _coarse_grid(mantissa_bits)
    magnitude, sign = scaled(word), word & 0x8000
    above = bisect_left(magnitudes, magnitude)
    if above == len(words):
        return sign | words[-1]
    if magnitudes[above] == magnitude:
        return sign | words[above]
    to_lower, to_upper = magnitude - magnitudes[above - 1], magnitudes[above] - magnitude
    is_lower_even = (words[above - 1] >> 7 - mantissa_bits) % 2 == 0
    takes_lower = to_lower < to_upper or (to_lower == to_upper and is_lower_even)
    return sign | words[above - 1 if takes_lower else above]


@cache
def rounded_words(mantissa_bits: int) -> np.ndarray:
    """`rounded_word` of every finite word, uint16 [65536]; 0 for those that are not."""
    table = np.zeros(65536, np.uint16)
    for word in range(BF16_INFINITY):
        table[word] = rounded_word(word, mantissa_bits)
        table[word | 0x8000] = rounded_word(word | 0x8000, mantissa_bits)
    return table


def planes_row(words: Sequence[int], mantissa_bits: int) -> tuple[bytes, bytes]:
    """Exponents and packed low codes, mantissa then sign, of words that have so many mantissa bits already."""
    exponents = bytes(word >> 7 & 0xFF for word in words)
    codes = [(word & 0x7F) >> 7 - mantissa_bits << 1 | word >> 15 for word in words]
    return exponents, packed_row(codes, mantissa_bits + 1)


def words_of_planes(exponents: bytes, low_codes: bytes, mantissa_bits: int) -> list[int]:
    """The bf16 words of one row of planes."""
    codes = unpacked_row(low_codes, len(exponents), mantissa_bits + 1)
    return [
        (code & 1) << 15 | exponent << 7 | code >> 1 << 7 - mantissa_bits
        for exponent, code in zip(exponents, codes, strict=True)
    ]


def e4m3_value(code: int) -> float:
    """What an e4m3 byte is: four bits of exponent with bias 7, three of mantissa, no infinities."""
    sign, exponent, mantissa = (-1.0 if code & 0x80 else 1.0), code >> 3 & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3_VALUES = [e4m3_value(code) for code in range(256)]
E4M3_GRID = E4M3_VALUES[:127]


def e4m3_code(value: float) -> int:
    """The byte nearest to a value, ties to the even byte, too large ones to the largest."""
    sign, magnitude = (0x80 if np.signbit(value) else 0), abs(value)
    if magnitude >= E4M3_LARGEST:
        return sign | 126
    above = bisect_left(E4M3_GRID, magnitude)
    if E4M3_GRID[above] == magnitude:
        return sign | above
    to_lower, to_upper = magnitude - E4M3_GRID[above - 1], E4M3_GRID[above] - magnitude
    takes_lower = to_lower < to_upper or (to_lower == to_upper and (above - 1) % 2 == 0)
    return sign | (above - 1 if takes_lower else above)


def is_near_an_e4m3_tie(quotient: float) -> bool:
    """Whether arithmetic in float32 may see a tie where there is none, or none where there is one."""
    magnitude = abs(quotient)
    above = min(bisect_right(E4M3_GRID, magnitude), len(E4M3_GRID) - 1)
    return abs(magnitude - (E4M3_GRID[above - 1] + E4M3_GRID[above]) / 2) <= 2.0**-23 * magnitude


def fp8_scale(row: Sequence[float]) -> float:
    """A row's largest magnitude over 448, as a float32; 1 where that is no normal number, and all become zeros."""
    scale = float(np.float32(max(abs(value) for value in row) / E4M3_LARGEST))
    return scale if scale > 2.0**-126 else 1.0


def fp8_row(row: Sequence[float]) -> tuple[list[int], float]:
    """The bytes and the scale of one row."""
    scale = fp8_scale(row)
    return [e4m3_code(value / scale) for value in row], scale


def fp8_values(codes: bytes, scale: bytes, dtype: torch.dtype) -> torch.Tensor:
    """What one row of bytes under a stored scale is: the product in float32, then in the field's dtype."""
    (factor,) = struct.unpack("<f", scale)
    exact = np.array([E4M3_VALUES[code] for code in codes]) * factor  # 4 by 24 bits: no rounding in float64
    return torch.from_numpy(exact.astype(np.float32)).to(dtype)


def top_k_row(row: Sequence[float], k: int) -> tuple[list[int], float]:
    """The places of the k largest, ascending, lower places first among equals, and the sum of the others."""
    places = sorted(sorted(range(len(row)), key=lambda place: (-row[place], place))[:k])
    return places, float(sum(row[place] for place in range(len(row)) if place not in set(places)))


def spread_row(kept: Sequence[float], places: Sequence[int], tail: float, width: int) -> list[float]:
    """A row with what was kept at its places and the mass of all others spread evenly over the rest."""
    rest = tail / (width - len(places)) if width > len(places) else 0.0
    values = [rest] * width
    for value, place in zip(kept, places, strict=True):
        values[place] = value
    return values


def decoded(
    encoding: str, columns: Sequence[bytes], num_rows: int, width: int, dtype: torch.dtype, mantissa_bits: int, k: int
) -> torch.Tensor:
    """The values of a field from its plain columns, row by row; `dtype` is the field's."""
    sizes = [len(content) // num_rows if num_rows else 0 for content in columns]
    rows = []
    for row in range(num_rows):
        part = [content[row * size :][:size] for content, size in zip(columns, sizes, strict=True)]
        if encoding == "raw":
            rows.append(torch.frombuffer(bytearray(part[0]), dtype=dtype))
        elif encoding == "planes":
            words = np.array(words_of_planes(part[0], part[1], mantissa_bits), np.uint16)
            rows.append(torch.from_numpy(words.view(np.int16)).view(torch.bfloat16))
        elif encoding == "fp8":
            rows.append(fp8_values(part[0], part[1], dtype))
        else:
            kept = torch.frombuffer(bytearray(part[0]), dtype=dtype).double().tolist()
            places = struct.unpack(f"<{k}{'H' if width <= 65536 else 'i'}", part[1])
            (tail,) = struct.unpack("<f", part[2])
            rows.append(torch.tensor(spread_row(kept, places, tail, width), dtype=torch.float64).float().to(dtype))
    return torch.stack(rows) if rows else torch.empty(0, width, dtype=dtype)

"""Packed codes stand where the definition puts them and come back, from NumPy and from tensors, into any rows."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.cache import bit_groups
from tests.oracles.encodings import group_sizes, packed_row, unpacked_row

WIDTHS = range(1, 71)
BITS = range(1, 9)


def draw(num_rows: int, width: int, num_bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << num_bits, (num_rows, width), dtype=np.uint8)


def literally(codes: np.ndarray, num_bits: int) -> np.ndarray:
    rows = [packed_row(row.tolist(), num_bits) for row in codes]
    size = codes.shape[1] if num_bits == 8 else -(-codes.shape[1] // 8) * num_bits
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(codes), size)


def test_the_literal_packing_is_what_the_format_says():
    """By hand: ten codes of five bits, padded to sixteen; eight bytes of high halves, then two of lowest bits."""
    codes = [1, 31, 0, 16, 2, 3, 30, 17, 5, 9]
    high = [0 | 2 << 4, 15 | 4 << 4, 0, 8, 1, 1, 15, 8]  # byte j: code j without its last bit, then code j + 8
    last = [0b10001, 0b11101]  # bit i: last bit of code j + 2 i
    assert packed_row(codes, 5) == bytes(high + last)
    assert group_sizes(7) == [4, 2, 1]
    for num_bits in BITS:
        assert sum(group_sizes(num_bits)) == num_bits
        assert unpacked_row(packed_row([(1 << num_bits) - 1] * 3, num_bits), 3, num_bits) == [(1 << num_bits) - 1] * 3


@pytest.mark.parametrize("num_bits", BITS)
def test_groups_and_sizes_are_as_promised(num_bits):
    assert bit_groups.groups(num_bits) == group_sizes(num_bits)
    for width in WIDTHS:
        assert bit_groups.packed_width(width, num_bits) == len(packed_row([0] * width, num_bits))
        assert bit_groups.packed_width(8 * width, num_bits) == width * num_bits  # no bit is spent on anything else


@pytest.mark.parametrize("num_bits", BITS)
def test_every_width_is_packed_and_unpacked_as_written_out(num_bits):
    for width in WIDTHS:
        codes = draw(3, width, num_bits, width)
        expected = literally(codes, num_bits)
        packed = bit_groups.pack(codes, num_bits)
        assert packed.dtype == np.uint8
        np.testing.assert_array_equal(packed, expected)
        back = np.full((3, width), 77, np.uint8)
        bit_groups.unpack_into(packed, num_bits, back)
        np.testing.assert_array_equal(back, codes)
        tensor = torch.full((3, width), 77, dtype=torch.uint8)
        bit_groups.unpack_into(torch.from_numpy(expected.copy()), num_bits, tensor)
        np.testing.assert_array_equal(tensor.numpy(), codes)


@given(st.integers(0, 5), st.sampled_from(WIDTHS), st.sampled_from(BITS), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_any_rows_come_back(num_rows, width, num_bits, seed):
    codes = draw(num_rows, width, num_bits, seed)
    packed = bit_groups.pack(codes, num_bits)
    np.testing.assert_array_equal(packed, literally(codes, num_bits))
    assert [unpacked_row(row.tobytes(), width, num_bits) for row in packed] == codes.tolist()
    back = np.full_like(codes, 255)
    bit_groups.unpack_into(packed, num_bits, back)
    np.testing.assert_array_equal(back, codes)


@given(st.integers(0, 4), st.sampled_from(WIDTHS), st.sampled_from(BITS), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_unpack_as_written_out_whatever_their_padding_holds(num_rows, width, num_bits, seed):
    size = bit_groups.packed_width(width, num_bits)
    packed = np.frombuffer(random.Random(seed).randbytes(num_rows * size), np.uint8).reshape(num_rows, size)
    for found in (np.zeros((num_rows, width), np.uint8), torch.zeros(num_rows, width, dtype=torch.uint8)):
        given_ = packed if isinstance(found, np.ndarray) else torch.from_numpy(packed.copy())
        bit_groups.unpack_into(given_, num_bits, found)
        assert found.tolist() == [unpacked_row(row.tobytes(), width, num_bits) for row in packed]


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("width", [1, 5, 8, 13, 24, 70])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_codes_that_stand_apart_are_written_and_nothing_between_them(num_bits, width, kind):
    codes = draw(4, width, num_bits, 1)
    packed = literally(codes, num_bits)
    for rows, columns in ((slice(1, 9, 2), slice(3, 3 + 2 * width, 2)), (slice(0, 4), slice(5, 5 + width))):
        whole = np.full((9, 2 * width + 9), 99, np.uint8)
        expected = whole.copy()
        expected[rows, columns] = codes
        if kind == "numpy":
            bit_groups.unpack_into(packed, num_bits, whole[rows, columns])
        else:
            # Packed rows that stand apart as well.
            wide = torch.zeros(8, packed.shape[1] + 3, dtype=torch.uint8)
            wide[::2, 2:-1] = torch.from_numpy(packed.copy())
            bit_groups.unpack_into(wide[::2, 2:-1], num_bits, torch.from_numpy(whole)[rows, columns])
        np.testing.assert_array_equal(whole, expected)


def test_packing_leaves_its_codes_alone_and_takes_strided_ones():
    wide = draw(6, 40, 5, 3)
    copy = wide.copy()
    for codes in (wide[:, ::3], wide[::2], wide.T):
        np.testing.assert_array_equal(bit_groups.pack(codes, 5), literally(codes, 5))
    np.testing.assert_array_equal(wide, copy)

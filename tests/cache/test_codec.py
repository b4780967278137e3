"""States to stored bytes and back, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.cache import codec
from eagle_offline.cache.choices import EncodingChoice
from eagle_offline.cache.layout import FieldLayout
from eagle_offline.errors import DataError, UsageError

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {"bf16": torch.int16, "fp16": torch.int16, "fp32": torch.int32}


def layout(width: int, dtype: str = "bf16", encoding: str = "planes") -> FieldLayout:
    return FieldLayout(name="aux_1", width=width, dtype=dtype, encoding=encoding, rows="tokens")  # type: ignore[arg-type]


def there_and_back(field: FieldLayout, values: torch.Tensor) -> torch.Tensor:
    stored = [memoryview(column) for column in codec.encode(field, values)]
    planes = codec.unpack(field, stored, len(values))
    return codec.merge(field, [torch.from_numpy(plane.copy()) for plane in planes])


def same_bits(one: torch.Tensor, other: torch.Tensor, dtype: str) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(INTEGERS[dtype]), other.view(INTEGERS[dtype]))


@pytest.mark.parametrize("encoding", ["planes", "raw"])
@pytest.mark.parametrize("width", [1, 256, 65536])
def test_every_bf16_bit_pattern_comes_back(encoding: str, width: int) -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(-1, width)
    assert len(patterns.view(torch.int16).unique()) == 65536
    back = there_and_back(layout(width, encoding=encoding), patterns)
    assert back.shape == patterns.shape
    assert same_bits(back, patterns, "bf16")


def test_every_fp16_bit_pattern_comes_back_raw() -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(-1, 64)
    assert same_bits(there_and_back(layout(64, "fp16", "raw"), patterns), patterns, "fp16")


@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 70),
    kind=st.sampled_from([("bf16", "planes"), ("bf16", "raw"), ("fp16", "raw"), ("fp32", "raw")]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_and_any_bits_come_back(rows: int, width: int, kind: tuple[str, str], seed: int) -> None:
    dtype, encoding = kind
    content = np.random.default_rng(seed).bytes(rows * width * (4 if dtype == "fp32" else 2))
    values = torch.frombuffer(bytearray(content) or bytearray(4), dtype=TORCH[dtype])[: rows * width]
    values = values.reshape(rows, width)
    back = there_and_back(layout(width, dtype, encoding), values)
    assert back.shape == (rows, width)
    assert same_bits(back, values, dtype)


@pytest.mark.parametrize("encoding", ["planes", "raw"])
def test_strided_values_are_stored_as_they_read(encoding: str) -> None:
    wide = torch.randn(6, 20).bfloat16()
    for values in (wide[:, ::2], wide.T, wide[2:5, 3:9]):
        back = there_and_back(layout(values.shape[1], encoding=encoding), values)
        assert same_bits(back, values.contiguous(), "bf16")


def test_planes_are_exponents_and_signed_mantissas_as_the_format_says() -> None:
    values = torch.tensor([[1.0, -1.5, 0.0, -0.0, float("inf"), 3.140625]]).bfloat16()
    exponent, mantissa = codec.encode(layout(6), values)
    decoded = pa.decompress(exponent, 6, codec="zstd", asbytes=True)
    assert list(decoded) == [127, 127, 0, 0, 255, 128]
    words = [0x3F80, 0xBFC0, 0x0000, 0x8000, 0x7F80, 0x4049]
    assert list(bytes(mantissa)) == [(word & 0x7F) << 1 | word >> 15 for word in words]


def test_planes_are_smaller_than_raw_on_states_of_one_scale() -> None:
    values = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    planes = sum(len(column) for column in codec.encode(layout(64), values))
    assert planes < 0.75 * values.nbytes


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_planes_of_other_than_bf16_are_refused_naming_raw(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"{dtype}.*--state-encoding raw"):
        EncodingChoice(dtype=dtype)
    assert {field.encoding for field in EncodingChoice(dtype=dtype, state_encoding="raw").fields([1], 4, 8)} == {"raw"}


@pytest.mark.parametrize("claimed", [0, 1, 4, 6, 10**6])
@pytest.mark.parametrize("encoding", ["planes", "raw"])
def test_bytes_of_other_than_the_claimed_rows_are_refused(encoding: str, claimed: int) -> None:
    field = layout(8, encoding=encoding)
    stored = [memoryview(column) for column in codec.encode(field, torch.randn(5, 8).bfloat16())]
    with pytest.raises(DataError, match="aux_1"):
        codec.unpack(field, stored, claimed)


@given(st.binary(max_size=64), st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_in_place_of_a_plane_are_refused(content: bytes, rows: int) -> None:
    field = layout(8)
    whole: list[Any] = codec.encode(field, torch.randn(rows, 8).bfloat16())
    if content == bytes(whole[0]):
        return
    with pytest.raises(DataError):
        codec.unpack(field, [memoryview(content), memoryview(whole[1])], rows)


def test_a_frame_that_claims_gigabytes_is_refused_before_anything_is_made() -> None:
    bomb = pa.compress(bytes(1 << 26), codec="zstd", asbytes=True)
    with pytest.raises(DataError, match="one zstd frame of 40 bytes"):
        codec.unpack(layout(8), [memoryview(bomb), memoryview(bytes(40))], 5)


def test_two_frames_or_bytes_after_a_frame_are_refused() -> None:
    field = layout(8)
    exponent, mantissa = codec.encode(field, torch.randn(5, 8).bfloat16())
    half = pa.compress(bytes(20), codec="zstd", asbytes=True)
    for wrong in (half + half, bytes(exponent) + b"\0", bytes(exponent)[:-1]):
        with pytest.raises(DataError):
            codec.unpack(field, [memoryview(wrong), memoryview(mantissa)], 5)

"""Fields of a sample to stored bytes and back; the encodings themselves are in `eagle_offline.cache.encodings`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from eagle_offline.cache import frames
from eagle_offline.cache.encodings import Column, encoding_of
from eagle_offline.cache.encodings import torch_dtype as dtype_named
from eagle_offline.cache.layout import EXACT_MANTISSA_BITS, STORED_DTYPES, FieldLayout
from eagle_offline.errors import DataError

if TYPE_CHECKING:
    import torch

# What zstd leaves of exponents, measured on real and on synthetic states.
TYPICAL_COMPRESSED_SHARE = 0.44


def column_names(field: FieldLayout) -> list[str]:
    """Return the columns that a field is stored in."""
    return [_column_name(field, column) for column in encoding_of(field).columns(field)]


def _column_name(field: FieldLayout, column: Column) -> str:
    return f"{field.name}.{column.suffix}" if column.suffix else field.name


def plane_widths(field: FieldLayout) -> tuple[int, ...]:
    """Return the bytes a row of each of a field's columns, decompressed."""
    return tuple(column.row_bytes for column in encoding_of(field).columns(field))


def torch_dtype(field: FieldLayout) -> torch.dtype:
    """Return what a field's values are."""
    return dtype_named(field.dtype)


def estimated_row_bytes(field: FieldLayout, compressed_share: float = TYPICAL_COMPRESSED_SHARE) -> float:
    """Return about how many bytes a row takes, given what compression leaves of the columns that compress."""
    columns = encoding_of(field).columns(field)
    return sum(column.row_bytes * (compressed_share if column.compressible else 1.0) for column in columns)


def losses_of(field: FieldLayout) -> tuple[str, ...]:
    """Return what a field's values have lost beyond their dtype, in order; nothing for exact ones."""
    bits = field.mantissa_bits
    own = {
        "planes": f"{bits} mantissa bit{'s' if bits != 1 else ''}" if _rounds(field) else None,
        "fp8": "fp8",
        "topk": f"top {field.top_k}",
    }.get(field.encoding)
    return field.losses if own is None or own in field.losses[-1:] else (*field.losses, own)


def _rounds(field: FieldLayout) -> bool:
    """Whether a field of planes keeps fewer mantissa bits than its values come with.

    Another dtype in between leaves them as few as they were; ``fp8`` does not, whose scale multiplies values.
    """
    fewest = EXACT_MANTISSA_BITS
    for loss in field.losses:
        if match := re.fullmatch(r"(\d+) mantissa bits?", loss):
            fewest = min(fewest, int(match[1]))
        elif loss not in STORED_DTYPES:
            fewest = EXACT_MANTISSA_BITS
    return field.mantissa_bits < fewest


def encode(field: FieldLayout, values: torch.Tensor, *, framed: bool = True) -> list[bytes | memoryview]:
    """Return the stored bytes of ``values`` ``[n, width]``, one object a column.

    Args:
        field: how to store it; what is wider than its dtype is rounded, by ``fp8`` and ``topk`` after they have chosen
            their scale and their places.
        values: on the CPU.
        framed: columns that compress become zstd frames; a format that compresses by itself wants them plain.
    """
    encoding = encoding_of(field)
    stored: list[bytes | memoryview] = []
    for column, plane in zip(encoding.columns(field), encoding.encode(field, values), strict=True):
        content = plane.tobytes()
        stored.append(frames.compress(content) if framed and column.compressible else content)
    return stored


def unpack(field: FieldLayout, stored: Sequence[memoryview], num_rows: int, *, framed: bool = True) -> list[np.ndarray]:
    """Return a field's columns decompressed, each uint8 ``[num_rows, …]``; what was not compressed as a view.

    Args:
        framed: as they were encoded.

    Raises:
        DataError: the stored bytes do not hold ``num_rows`` rows; nothing beyond the expected size is made.
    """
    unpacked = []
    for column, content in zip(encoding_of(field).columns(field), stored, strict=True):
        if framed and column.compressible:
            # Of Arrow's pool, which gives the same memory again: pages of fresh memory cost as much as filling them.
            memory = pa.allocate_buffer(num_rows * column.row_bytes)
            plane = np.frombuffer(memory, np.uint8).reshape(num_rows, column.row_bytes)
            _fill(field, column, content, plane, framed=True)
        else:
            _check_size(field, column, content, num_rows)
            plane = np.frombuffer(content, np.uint8).reshape(num_rows, column.row_bytes)
        unpacked.append(plane)
    return unpacked


def unpack_into(
    field: FieldLayout, stored: Sequence[memoryview], places: Sequence[np.ndarray], *, framed: bool = True
) -> None:
    """Fill ``places``, uint8 ``[num_rows, …]`` each, with a field's columns decompressed.

    Args:
        framed: as they were encoded.

    Raises:
        DataError: the stored bytes do not hold so many rows.
    """
    for column, content, place in zip(encoding_of(field).columns(field), stored, places, strict=True):
        _fill(field, column, content, place, framed=framed)


def _fill(field: FieldLayout, column: Column, content: memoryview, place: np.ndarray, *, framed: bool) -> None:
    if framed and column.compressible:
        try:
            frames.decompress_into(content, place.reshape(-1))
        except DataError as error:
            raise DataError(f"{_column_name(field, column)}: {error}") from error
    else:
        _check_size(field, column, content, len(place))
        place[...] = np.frombuffer(content, np.uint8).reshape(place.shape)


def _check_size(field: FieldLayout, column: Column, content: memoryview, num_rows: int) -> None:
    if len(content) != num_rows * column.row_bytes:
        name = _column_name(field, column)
        raise DataError(f"{name}: {len(content)} bytes stored, expected {num_rows} rows of {column.row_bytes}")


def merge(field: FieldLayout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the values ``[n, width]`` in the field's dtype from its unpacked uint8 columns, on their device.

    A raw field's are a view of its bytes.
    """
    import torch

    encoding = encoding_of(field)
    if field.encoding == "raw" or planes[0].device.type != "cpu":
        return encoding.merge(field, planes)
    values = torch.empty(len(planes[0]), field.width, dtype=torch_dtype(field))
    merge_into(field, [plane.numpy() for plane in planes], values.view(torch.uint8).numpy())
    return values


def merge_into(field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write a field's values, from its unpacked columns, as their bytes.

    Args:
        field, planes: as `unpack` returned them.
        out: uint8 ``[n, row_bytes]``; rows may stand apart.
    """
    encoding_of(field).merge_into(field, planes, out)

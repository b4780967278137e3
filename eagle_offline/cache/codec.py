"""Fields of a sample to stored bytes and back; the encodings themselves are in `eagle_offline.cache.encodings`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numcodecs import zstd

from eagle_offline.cache.encodings import encoding_of
from eagle_offline.cache.encodings import torch_dtype as dtype_named
from eagle_offline.cache.layout import EXACT_MANTISSA_BITS, FieldLayout
from eagle_offline.errors import DataError

if TYPE_CHECKING:
    import torch

# Level 1 is within 3% of the exponent plane's entropy; higher levels cost time and save nothing.
ZSTD_LEVEL = 1

# What zstd leaves of exponents, measured on real and on synthetic states.
TYPICAL_COMPRESSED_SHARE = 0.44

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def column_names(field: FieldLayout) -> list[str]:
    """Return the columns that a field is stored in."""
    return [
        f"{field.name}.{column.suffix}" if column.suffix else field.name for column in encoding_of(field).columns(field)
    ]


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
    own = {
        "planes": f"{field.mantissa_bits} mantissa bits" if field.mantissa_bits < EXACT_MANTISSA_BITS else None,
        "fp8": "fp8",
        "topk": f"top {field.top_k}",
    }.get(field.encoding)
    return field.losses if own is None or own in field.losses[-1:] else (*field.losses, own)


def encode(field: FieldLayout, values: torch.Tensor, *, framed: bool = True) -> list[bytes | memoryview]:
    """Return the stored bytes of ``values`` ``[n, width]``, one object a column.

    Args:
        field: how to store it; wider values are rounded to its dtype.
        values: on the CPU.
        framed: columns that compress become zstd frames; a format that compresses by itself wants them plain.
    """
    encoding = encoding_of(field)
    stored: list[bytes | memoryview] = []
    for column, plane in zip(encoding.columns(field), encoding.encode(field, values), strict=True):
        content = plane.tobytes()
        stored.append(zstd.compress(content, ZSTD_LEVEL) if framed and column.compressible else content)
    return stored


def unpack(field: FieldLayout, stored: Sequence[memoryview], num_rows: int, *, framed: bool = True) -> list[np.ndarray]:
    """Return a field's columns decompressed, each uint8 ``[num_rows, …]``; nothing beyond the expected size is made.

    Args:
        framed: as they were encoded.

    Raises:
        DataError: the stored bytes do not hold ``num_rows`` rows.
    """
    unpacked = []
    for column, name, content in zip(encoding_of(field).columns(field), column_names(field), stored, strict=True):
        size = num_rows * column.row_bytes
        plane = _decompressed(name, content, size) if framed and column.compressible else content
        if len(plane) != size:
            raise DataError(f"{name}: {len(plane)} bytes stored, expected {num_rows} rows of {column.row_bytes}")
        unpacked.append(np.frombuffer(plane, np.uint8).reshape(num_rows, column.row_bytes))
    return unpacked


def _decompressed(name: str, frame: memoryview, size: int) -> memoryview:
    if frame_content_size(frame) != size:
        raise DataError(f"{name}: not one zstd frame of {size} bytes")
    try:
        # Arrow's decoder, because it works without Python's lock: readers run beside one another and beside a step.
        return memoryview(pa.decompress(frame, size, codec="zstd"))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: does not decompress to {size} bytes") from error


def frame_content_size(frame: memoryview) -> int | None:
    """Return the size a zstd frame declares in its header, None where it declares none (RFC 8878, 3.1.1)."""
    if len(frame) < 6 or bytes(frame[:4]) != _ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    single_segment, dictionary_flag = descriptor >> 5 & 1, descriptor & 3
    size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    if not size_bytes:
        return None
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[dictionary_flag]
    size = int.from_bytes(frame[start : start + size_bytes], "little")
    return size + 256 if size_bytes == 2 else size


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

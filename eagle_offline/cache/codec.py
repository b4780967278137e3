"""State matrices to stored columns and back: exact, and compressed where compression pays.

``raw`` keeps the little-endian values, readable at memory-map speed. ``planes`` splits bf16 into two bytes a value:
the exponent (8 bits), which compresses to about a third, as one zstd frame a sample; and mantissa with sign (8
bits), which is noise and stays raw. Rotating the 16 bits left by one puts the exponent into the high byte::

    bf16      s eeeeeeee mmmmmmm
    rotated   eeeeeeee mmmmmmm s
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numcodecs import zstd

from eagle_offline.cache.layout import FieldLayout
from eagle_offline.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

# Level 1 is within 3% of the exponent plane's entropy; higher levels cost time and save nothing.
ZSTD_LEVEL = 1

EXPONENT = "exponent"
MANTISSA = "mantissa"

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

# Values merged at a time on a CPU: what is read and written of them stays in a core's own cache, which made merging
# ten times as fast as over whole matrices (0.4 ns a value instead of 4).
_MERGED_VALUES = 1 << 17


def check_encoding(encoding: str, dtype: str) -> None:
    """Refuse an encoding that cannot hold a dtype.

    Raises:
        UsageError: names the encoding that can.
    """
    if encoding == "planes" and dtype != "bf16":
        raise UsageError(f"--state-encoding planes stores bf16 only, not {dtype}: use --state-encoding raw")


def column_names(field: FieldLayout) -> list[str]:
    """Return the Arrow columns that a field is stored in."""
    if field.encoding == "raw":
        return [field.name]
    return [f"{field.name}.{EXPONENT}", f"{field.name}.{MANTISSA}"]


def plane_widths(field: FieldLayout) -> tuple[int, ...]:
    """Return the bytes a row of each of a field's unpacked columns."""
    return (field.row_bytes,) if field.encoding == "raw" else (field.width, field.width)


def torch_dtype(field: FieldLayout) -> torch.dtype:
    """Return what a field's values are."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[field.dtype]


def encode(field: FieldLayout, values: torch.Tensor) -> list[bytes | memoryview]:
    """Return the stored bytes of ``values`` ``[n, width]``, one object a column.

    Args:
        field: how to store it; ``values`` must already have its dtype.
        values: contiguous, on the CPU.
    """
    import torch

    bits = values.contiguous().view(torch.uint8).numpy()
    if field.encoding == "raw":
        return [bits.tobytes()]
    words = bits.view("<u2")
    rotated = (words << np.uint16(1)) | (words >> np.uint16(15))
    exponent = (rotated >> np.uint16(8)).astype(np.uint8)
    mantissa = rotated.astype(np.uint8)
    return [zstd.compress(exponent.tobytes(), ZSTD_LEVEL), mantissa.tobytes()]


def unpack(field: FieldLayout, stored: list[memoryview], num_rows: int) -> list[np.ndarray]:
    """Return a field's columns decompressed, each uint8 ``[num_rows, …]``; nothing beyond the expected size is made.

    Raises:
        DataError: the stored bytes do not hold ``num_rows`` rows.
    """
    if field.encoding == "raw":
        return [_checked(field, np.frombuffer(stored[0], np.uint8), num_rows, field.row_bytes)]
    frame, mantissa = stored
    size = num_rows * field.width
    if _frame_content_size(frame) != size:
        raise DataError(f"{field.name}: exponent plane is not one zstd frame of {size} bytes")
    try:
        # Arrow's decoder, because it works without Python's lock: readers run beside one another and beside a step.
        exponent = pa.decompress(frame, size, codec="zstd")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{field.name}: exponent plane does not decompress to {size} bytes") from error
    return [
        _checked(field, np.frombuffer(exponent, np.uint8), num_rows, field.width),
        _checked(field, np.frombuffer(mantissa, np.uint8), num_rows, field.width),
    ]


def _frame_content_size(frame: memoryview) -> int | None:
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


def _checked(field: FieldLayout, plane: np.ndarray, num_rows: int, row_bytes: int) -> np.ndarray:
    if plane.size != num_rows * row_bytes:
        raise DataError(f"{field.name}: {plane.size} bytes stored, expected {num_rows} rows of {row_bytes}")
    return plane.reshape(num_rows, row_bytes)


def merge(field: FieldLayout, planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the values ``[n, width]`` in the field's dtype from its unpacked uint8 columns, on their device.

    A raw field's are a view of its bytes.
    """
    import torch

    dtype = torch_dtype(field)
    if field.encoding == "raw":
        # A view of nothing has no stride to reinterpret.
        empty = planes[0].new_empty(0, field.width, dtype=dtype)
        return planes[0].contiguous().view(dtype) if len(planes[0]) else empty
    exponent, mantissa = planes
    if _runs_on_host(exponent):
        values = torch.empty(exponent.shape, dtype=torch.int16)
        _merge_planes(exponent.numpy(), mantissa.numpy(), values.numpy().view(np.uint16))
        return values.view(dtype)
    rotated = (exponent.to(torch.int16) << 8) | mantissa.to(torch.int16)
    # int16 shifts are arithmetic: the mask drops the copies of the top bit.
    words = ((rotated >> 1) & 0x7FFF) | (rotated << 15)
    return words.view(dtype)


def _runs_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def merge_into(field: FieldLayout, planes: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write a field's values, from its unpacked columns, as their bytes.

    Args:
        field, planes: as `unpack` returned them.
        out: uint8 ``[n, row_bytes]``; rows may stand apart.
    """
    if field.encoding == "raw":
        out[...] = planes[0]
    elif len(out):
        _merge_planes(planes[0], planes[1], out.view("<u2"))


def _merge_planes(exponent: np.ndarray, mantissa: np.ndarray, words: np.ndarray) -> None:
    """Write the uint16 words ``[n, width]`` of two planes, a block of rows at a time."""
    num_rows, width = words.shape
    block = max(1, _MERGED_VALUES // width)
    signed = np.empty((min(block, num_rows), width), np.uint16)
    shifted = np.empty_like(signed)
    for start in range(0, num_rows, block):
        high, low = words[start : start + block], signed[: num_rows - start]
        moved = shifted[: len(high)]
        high[...] = exponent[start : start + block]
        np.left_shift(high, 7, out=high)
        low[...] = mantissa[start : start + block]
        np.right_shift(low, 1, out=moved)
        np.bitwise_or(high, moved, out=high)
        np.left_shift(low, 15, out=moved)
        np.bitwise_or(high, moved, out=high)

"""Byte planes as zstd frames: compressed for what they are, and decompressed only into the room that is meant for them.

Exponents are noise around a few values. A compressor that looks for repetitions finds accidents, and each costs more
bits and more time to undo than it saves; almost nothing but the entropy coding pays. Measured on exponents of synthetic
states, against zstd's own level 1: 2.90 bits a value instead of 3.06 (entropy 2.86), decoded 1.6 times as fast.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from eagle_offline.errors import DataError, one_line

_MAGIC = b"\x28\xb5\x2f\xfd"

# The shortest hash table and the longest shortest match that there are, so that few accidents are found.
_HASH_LOG = 7
_MIN_MATCH = 7
_WINDOW_LOG = 19

_CHECKSUM_BYTES = 4

_own = threading.local()


def compress(content: bytes) -> bytes:
    """Return one zstd frame that says in its header how large its content is."""
    if not hasattr(_own, "compressor"):
        parameters = zstandard.ZstdCompressionParameters(
            window_log=_WINDOW_LOG,
            hash_log=_HASH_LOG,
            min_match=_MIN_MATCH,
            chain_log=zstandard.CHAINLOG_MIN,
            search_log=zstandard.SEARCHLOG_MIN,
            target_length=0,
            strategy=zstandard.STRATEGY_FAST,
            write_content_size=True,
        )
        _own.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return _own.compressor.compress(content)


def decompress_into(frame: memoryview, out: np.ndarray) -> None:
    """Fill ``out`` with the content of a frame, without Python's lock, so that readers run beside one another.

    Args:
        frame: one zstd frame and nothing else.
        out: uint8 and contiguous; nothing beyond its size is ever made.

    Raises:
        DataError: not one frame, or of another size.
    """
    if content_size(frame) != out.size or _length(frame) != len(frame):
        raise DataError(f"not one zstd frame of {out.size} bytes")
    if not hasattr(_own, "decompressor"):
        _own.decompressor = zstandard.ZstdDecompressor()
    try:
        with _own.decompressor.stream_reader(frame) as content:
            filled = content.readinto(out) if out.size else 0
    except zstandard.ZstdError as error:
        raise DataError(f"does not decompress: {one_line(error)}") from error
    if filled != out.size:
        raise DataError(f"decompresses to {filled} bytes, expected {out.size}")


def _header(frame: memoryview) -> tuple[int, int | None] | None:
    """Return where a frame's blocks begin and the size it declares, if it declares one (RFC 8878, 3.1.1)."""
    if len(frame) < 6 or bytes(frame[:4]) != _MAGIC:
        return None
    descriptor = frame[4]
    single_segment, dictionary_flag = descriptor >> 5 & 1, descriptor & 3
    size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[dictionary_flag]
    size = int.from_bytes(frame[start : start + size_bytes], "little") if size_bytes else None
    return start + size_bytes, size + 256 if size is not None and size_bytes == 2 else size


def content_size(frame: memoryview) -> int | None:
    """Return the size a frame declares, None for what is no frame or declares none."""
    header = _header(frame)
    return None if header is None else header[1]


def _length(frame: memoryview) -> int | None:
    """Return where a frame ends, by the headers of its blocks; None when they lead beyond it."""
    header = _header(frame)
    if header is None:
        return None
    place, is_last = header[0], False
    while not is_last:
        if place + 3 > len(frame):
            return None
        block = int.from_bytes(frame[place : place + 3], "little")
        is_last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        # A block of one repeated byte stores that byte alone.
        place += 3 + (1 if kind == 1 else size)
    return place + (_CHECKSUM_BYTES if frame[4] >> 2 & 1 else 0)

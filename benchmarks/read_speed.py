"""How fast are shuffled samples read, beside a bare memory map over the same bytes?

Decoded on the CPU, as `open_cache(path)[i]` does and training on a CPU; and unpacked but not merged, laid where a GPU
copies from, as training on a GPU does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.caches import IDENTITY_DIGEST, write_synthetic_shard
from benchmarks.harness import Figures, alternating_seconds
from benchmarks.states import chat_lengths
from eagle_offline.cache.arrow import ArrowShardReader
from eagle_offline.cache.samples import StoredSample, decode_fields, unpack_fields
from eagle_offline.cache.stored_states import StoredStates, num_bytes

NAME = "read_speed"
QUESTION = __doc__


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case an encoding; all of it is the CPU's work."""
    if device != "cpu":
        return {}
    return {encoding: lambda encoding=encoding: measure(encoding) for encoding in ("raw", "planes")}


def measure(encoding: str, num_samples: int = 12, hidden_size: int = 4096, repeats: int = 5) -> Figures:
    """Return tokens a second and the share of the memory map's, page cache warm, one thread, values touched.

    Every way writes to memory that it has written to before: fresh pages cost more than the reading.
    """
    lengths = chat_lengths(num_samples, seed=1, longest=1024)
    tokens = int(lengths.sum())
    order = np.random.Generator(np.random.PCG64(0)).permutation(num_samples)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shard"
            table, shard_bytes, fields = write_synthetic_shard(path, lengths, encoding, hidden_size)
            reader = ArrowShardReader(path, fields, 0, IDENTITY_DIGEST)
            raw = np.memmap(path, np.uint8, mode="r")
            bounds = np.linspace(0, shard_bytes, num_samples + 1).astype(np.int64)
            longest = int(lengths.max())
            memory = torch.ones(num_bytes(fields, longest) + longest, dtype=torch.uint8)

            def read_ours(take: Callable[[StoredSample], None], verify: bool) -> None:
                for index in order:
                    stored = reader.read(table.record_batch[index], table.row[index])
                    if verify and stored.digest() != table.digest[index]:
                        raise AssertionError("digest differs")
                    take(stored)

            def decode(stored: StoredSample) -> None:
                for values in decode_fields(fields, stored).values():
                    memory[: values.nbytes].copy_(values.view(-1).view(torch.uint8))

            def unpack(stored: StoredSample) -> None:
                for field in fields:
                    planes = unpack_fields(fields, stored, [field.name])[field.name]
                    StoredStates((field,), len(planes[0]), memory).put(0, 0, planes)

            def read_map() -> None:
                place = memory.numpy()
                for index in order:
                    content = raw[bounds[index] : bounds[index + 1]]
                    place[: len(content)] = content

            seconds = alternating_seconds(
                {
                    "decoded": lambda: read_ours(decode, False),
                    "decoded_verified": lambda: read_ours(decode, True),
                    "unpacked": lambda: read_ours(unpack, False),
                    "unpacked_verified": lambda: read_ours(unpack, True),
                    "memmap": read_map,
                },
                repeats=repeats,
            )
    finally:
        torch.set_num_threads(threads)
    ours = [way for way in seconds if way != "memmap"]
    return {
        **{f"share_of_memmap_{way}": seconds["memmap"] / seconds[way] for way in ours},
        **{f"tokens_per_second_{way}": tokens / seconds[way] for way in ours},
        "gigabytes_per_second_unpacked": shard_bytes / seconds["unpacked"] / 1e9,
        "memmap_gigabytes_per_second": shard_bytes / seconds["memmap"] / 1e9,
    }

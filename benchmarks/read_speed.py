"""How fast are shuffled samples read, beside a bare memory map over the same bytes?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.caches import IDENTITY_DIGEST, write_synthetic_shard
from benchmarks.harness import Figures, alternating_seconds
from benchmarks.states import chat_lengths
from eagle_offline.cache.arrow import ArrowShardReader, decode_fields

NAME = "read_speed"
QUESTION = __doc__


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case an encoding; decoding happens on the CPU."""
    if device != "cpu":
        return {}
    return {encoding: lambda encoding=encoding: measure(encoding) for encoding in ("raw", "planes")}


def measure(encoding: str, num_samples: int = 12, hidden_size: int = 4096, repeats: int = 5) -> Figures:
    """Return tokens a second and the share of the memory map's, page cache warm, one thread, values touched."""
    lengths = chat_lengths(num_samples, seed=1, longest=1024)
    tokens = int(lengths.sum())
    order = np.random.Generator(np.random.PCG64(0)).permutation(num_samples)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shard"
            table, num_bytes, fields = write_synthetic_shard(path, lengths, encoding, hidden_size)
            reader = ArrowShardReader(path, fields, 0, IDENTITY_DIGEST)
            raw = np.memmap(path, np.uint8, mode="r")
            bounds = np.linspace(0, num_bytes, num_samples + 1).astype(np.int64)

            def read_ours(verify: bool) -> None:
                for index in order:
                    stored = reader.read(table.record_batch[index], table.row[index])
                    if verify and stored.digest() != table.digest[index]:
                        raise AssertionError("digest differs")
                    for values in decode_fields(fields, stored).values():
                        values.clone()

            def read_map() -> None:
                for index in order:
                    np.array(raw[bounds[index] : bounds[index + 1]])

            seconds = alternating_seconds(
                {"ours": lambda: read_ours(False), "verified": lambda: read_ours(True), "memmap": read_map},
                repeats=repeats,
            )
    finally:
        torch.set_num_threads(threads)
    return {
        "share_of_memmap": seconds["memmap"] / seconds["ours"],
        "share_of_memmap_verified": seconds["memmap"] / seconds["verified"],
        "tokens_per_second": tokens / seconds["ours"],
        "gigabytes_per_second": num_bytes / seconds["ours"] / 1e9,
        "memmap_gigabytes_per_second": num_bytes / seconds["memmap"] / 1e9,
    }

"""A cache on disk whose stored states are damaged in place, whatever reads them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eagle_offline import open_cache


def spoil(source: Path, destination: Path, sample_ids: Sequence[int], value: float) -> Path:
    """Copy a cache of raw float32 states, once, and overwrite the first token's states of some samples' lowest layer.

    Digests do not fit any more: read it with `verify=False`.
    """
    if destination.exists():
        return destination
    shutil.copytree(source, destination)
    cache = open_cache(source)
    size = cache.manifest.identity.target.hidden_size
    for sample_id in sample_ids:
        index = cache.sample_ids.tolist().index(sample_id)
        states = cache[index].aux_hidden_states[:, :size].contiguous().numpy()
        found = 0
        for shard in sorted(destination.glob("shard-*")):
            content = bytearray(shard.read_bytes())
            place = content.find(states.tobytes())
            if place >= 0:
                content[place : place + 4 * size] = np.full(size, value, np.float32).tobytes()
                shard.write_bytes(content)
                found += 1
        assert found == 1, f"sample {sample_id} was found in {found} shards"
    return destination

"""How many tokens go through the target at once: found out before a cache is begun, by one of its processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from eagle_offline.cache.layout import MANIFEST_FILE
from eagle_offline.cache.manifest import BatchPlan, read_manifest
from eagle_offline.errors import EagleOfflineError, StoppedEarly
from eagle_offline.interrupts import StopRequest
from eagle_offline.target.capture import Capture, TokenSample
from eagle_offline.text.build_lock import acquire_lock, held_lock
from eagle_offline.text.token_table import TokenTable

LOCK_FILE = "manifest.lock"

# On a CPU nothing is gained by more tokens at once, and there is nothing to find out.
CPU_BATCH_TOKENS = 2048

# Where processes begin a cache at once that do not see what the others find out.
STORE_BATCH_TOKENS = 8192

_POLL_SECONDS = 0.2

# What is tried, in order; more is not taken for less than this gain in speed.
_BUDGETS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
_WORTH = 1.03

_REPEATS = 2


@contextmanager
def begun_by_one(directory: Path, stop: StopRequest) -> Iterator[BatchPlan | None]:
    """Let one process begin a cache: in the block nobody else does. Yield the batch plan if another has meanwhile.

    Raises:
        StoppedEarly: asked to stop while another process began.
    """
    lock = directory / LOCK_FILE
    while not (content := acquire_lock(lock)):
        if (directory / MANIFEST_FILE).is_file():
            break
        if stop.requested:
            raise StoppedEarly("stopped by a signal while another process began the cache; go on with --resume")
        time.sleep(_POLL_SECONDS)
    if content is None:
        yield read_manifest(directory).identity.batch_plan
        return
    with held_lock(lock, content):
        begun = (directory / MANIFEST_FILE).is_file()
        yield read_manifest(directory).identity.batch_plan if begun else None


def find_batch_tokens(capture: Capture, table: TokenTable, device: str) -> int:
    """Return the fewest tokens at once with which the target is about as fast as with more.

    Rows of a typical length, all supervised, so that no batch of the corpus takes more memory.

    Raises:
        EagleOfflineError: memory does not suffice for one such row.
    """
    length = typical_length(table.lengths)
    best, best_rate = None, 0.0
    for budget in _BUDGETS:
        count = max(1, budget // length)
        try:
            seconds = min(_seconds(capture, table, length, count) for _ in range(_REPEATS + 1))
        except torch.OutOfMemoryError:
            break
        rate = count * length / seconds
        if best is not None and rate < best_rate * _WORTH:
            break
        best, best_rate = max(budget, length), rate
    if best is None:
        raise EagleOfflineError(
            f"{device}: out of memory with one sample of {length} tokens: choose a smaller --seq-length, another "
            "--compute-dtype, or spread the target over several GPUs"
        )
    return best


def typical_length(lengths: np.ndarray) -> int:
    """Return the length of the sample that the corpus's middle token is in.

    Example:
        >>> typical_length(np.array([1, 1, 1, 10, 4]))
        10
    """
    ascending = np.sort(lengths)
    tokens = np.cumsum(ascending, dtype=np.int64)
    return int(ascending[np.searchsorted(tokens, tokens[-1] / 2)])


def _seconds(capture: Capture, table: TokenTable, length: int, count: int) -> float:
    """Return how long a batch of rows takes, until its states are on the host."""
    generator = np.random.Generator(np.random.PCG64(count))
    supervised = np.ones(length, np.uint8)
    rows = generator.integers(0, table.meta.max_token_id + 1, (count, length), np.int32)
    started = time.perf_counter()
    for batch in capture.run([TokenSample(0, row, supervised) for row in rows]):
        if batch.halved:
            raise torch.OutOfMemoryError
        batch.arrived()
    return time.perf_counter() - started

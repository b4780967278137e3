"""Several caches of one target as one list of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.errors import MismatchError


class CacheMixture:
    """The samples of caches, one cache after the other; shards are numbered through.

    Args:
        caches: at least one.

    Attributes:
        caches: as given.
        lengths, shards, sample_ids: int64 ``[N]`` of every sample.
        starts: int64 ``[C + 1]``, the first sample of each cache, and ``N``.

    Raises:
        MismatchError: the caches are not of one target, or store it in unlike ways.
    """

    def __init__(self, caches: Sequence[Cache]):
        self.caches = tuple(caches)
        for other in self.caches[1:]:
            check_alike(self.caches[0], other)
        self.starts = np.cumsum([0, *(len(cache) for cache in self.caches)])
        self.lengths = np.concatenate([cache.lengths for cache in self.caches])
        self.sample_ids = np.concatenate([cache.sample_ids for cache in self.caches])
        shard_counts = [cache.manifest.identity.num_shards for cache in self.caches]
        firsts = np.cumsum([0, *shard_counts[:-1]])
        self.shards = np.concatenate([cache.shards + first for cache, first in zip(self.caches, firsts, strict=True)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """Return a sample decoded on the CPU.

        Raises:
            IndexError: no such sample. DataError: its bytes are not what the record says.
        """
        cache, local = self.locate(index)
        return cache[local]

    def locate(self, index: int) -> tuple[Cache, int]:
        """Return the cache that holds a sample, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.caches[number], int(index - self.starts[number])

    def read_ahead(self, samples: np.ndarray) -> None:
        """Prepare for samples, int64 indices, to be read in about this order."""
        for number, cache in enumerate(self.caches):
            places = np.flatnonzero((samples >= self.starts[number]) & (samples < self.starts[number + 1]))
            cache.read_ahead(samples[places] - self.starts[number], places)

    def close(self) -> None:
        """End what was begun for reading ahead."""
        for cache in self.caches:
            cache.close()

    def indices_of(self, number: int) -> np.ndarray:
        """Return int64 ``[n]``: the samples of a cache."""
        return np.arange(self.starts[number], self.starts[number + 1])


def check_alike(cache: Cache, other: Cache) -> None:
    """Refuse caches that cannot stand for one another.

    Raises:
        MismatchError: names the first field that differs.
    """
    ours, theirs = cache.manifest.identity, other.manifest.identity
    check_same_states(cache, other)
    pairs = {
        "target encoding": (ours.capture.target_encoding, theirs.capture.target_encoding),
        "dense vocabulary": (ours.capture.draft_vocab_digest, theirs.capture.draft_vocab_digest),
        "stored dtype": (ours.capture.fields[0].dtype, theirs.capture.fields[0].dtype),
    }
    _refuse_unlike(cache, other, pairs)


def check_same_states(cache: Cache, other: Cache) -> None:
    """Refuse caches whose states are not those of one target at the same layers.

    Raises:
        MismatchError: names the first field that differs.
    """
    ours, theirs = cache.manifest.identity, other.manifest.identity
    pairs = {
        "target": (ours.target.checkpoint_digest, theirs.target.checkpoint_digest),
        "aux layers": (ours.capture.aux_layer_ids, theirs.capture.aux_layer_ids),
    }
    _refuse_unlike(cache, other, pairs)


def _refuse_unlike(cache: Cache, other: Cache, pairs: dict[str, tuple[Any, Any]]) -> None:
    for name, (one, two) in pairs.items():
        if one != two:
            raise MismatchError(f"{other.name}: its {name} is {two}, that of {cache.name} is {one}")

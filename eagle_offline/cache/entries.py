"""All that a cache accounts for, one by one: what it stores, and what is recorded in the stead of lost samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from eagle_offline.cache.layout import LostSample
from eagle_offline.cache.reader import Cache
from eagle_offline.cache.writer import read_record
from eagle_offline.errors import DataError


class CacheEntries:
    """All that a complete cache accounts for, in order: in each shard its samples as they stand, then those it lost.

    Raises:
        DataError: shards are missing, or hold more than the manifest calls for.
    """

    def __init__(self, cache: Cache):
        identity, held = cache.manifest.identity, [entry.num_samples for entry in cache.index.entries]
        if cache.missing_shards:
            raise DataError(
                f"{cache.path}: {len(cache.missing_shards)} of {identity.num_shards} shards are missing "
                f"(first: {cache.missing_shards[0]}); finish it with --resume, then convert it"
            )
        shards = range(len(held))
        if len(held) != identity.num_shards or any(held[shard] > identity.shard_samples(shard) for shard in shards):
            raise DataError(
                f"{cache.path}: holds other shards than its manifest calls for; see eagle-offline inspect-manifest "
                f"{cache.path} --verify"
            )
        self._cache, self._identity, self._held = cache, identity, held
        self._starts = np.concatenate([[0], np.cumsum(held, dtype=np.int64)])
        self._shard_size = identity.capture.shard_size

    def __len__(self) -> int:
        return self._identity.dataset.num_samples

    def stored(self, entries: range) -> range:
        """Return the numbers of the stored samples among consecutive entries."""
        return range(self._stored_before(entries.start), self._stored_before(entries.stop))

    def _stored_before(self, entry: int) -> int:
        shard, place = divmod(entry, self._shard_size)
        return int(self._starts[shard]) + (min(place, self._held[shard]) if shard < len(self._held) else 0)

    def walk(self, entries: range) -> Iterator[int | LostSample]:
        """Yield consecutive entries: the number of a stored sample, or what is recorded in a sample's stead."""
        size = self._shard_size
        for shard in range(entries.start // size, -(-entries.stop // size)):
            begin, end = max(entries.start, shard * size), min(entries.stop, (shard + 1) * size)
            yield from self.stored(range(begin, end))
            lost_from = shard * size + self._held[shard]
            if end > lost_from:
                yield from self._lost(shard)[max(begin - lost_from, 0) : end - lost_from]

    def _lost(self, shard: int) -> list[LostSample]:
        record = read_record(self._cache.path, shard)
        expected = self._identity.shard_samples(shard) - self._held[shard]
        if len(record.lost) != expected or record.identity_digest != self._identity.digest:
            raise DataError(
                f"{self._cache.path}: the record of shard {shard} names {len(record.lost)} lost samples, expected "
                f"{expected}; see eagle-offline inspect-manifest {self._cache.path} --verify"
            )
        return record.lost

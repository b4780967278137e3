"""Several caches of one target as one list of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.errors import MismatchError

# From which target encoding `convert` makes which other.
_CONVERSIONS = {("factored", "dense"), ("factored", "topk"), ("dense", "topk")}


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
        MismatchError: names the first field that differs, and the conversion after which none does.
    """
    ours, theirs = cache.manifest.identity.capture, other.manifest.identity.capture
    pairs = {
        **_states(cache, other),
        "target encoding": (ours.target_encoding, theirs.target_encoding),
        "dense vocabulary": (ours.draft_vocab_digest, theirs.draft_vocab_digest),
        "stored dtype": (ours.fields[0].dtype, theirs.fields[0].dtype),
    }
    _refuse_unlike(cache, other, pairs)


def check_same_states(cache: Cache, other: Cache) -> None:
    """Refuse caches whose states are not those of one target at the same layers.

    Raises:
        MismatchError: names the first field that differs, and the conversion after which none does.
    """
    _refuse_unlike(cache, other, _states(cache, other))


def _states(cache: Cache, other: Cache) -> dict[str, tuple[Any, Any]]:
    ours, theirs = cache.manifest.identity, other.manifest.identity
    return {
        "target": (ours.target.digest, theirs.target.digest),
        "aux layers": (ours.capture.aux_layer_ids, theirs.capture.aux_layer_ids),
    }


def _refuse_unlike(cache: Cache, other: Cache, pairs: dict[str, tuple[Any, Any]]) -> None:
    unlike = [name for name, (one, two) in pairs.items() if one != two]
    if not unlike:
        return
    one, two = pairs[unlike[0]]
    found = (
        f"its aux layers are {_spaced(two)}, those of {cache.name} are {_spaced(one)}"
        if unlike[0] == "aux layers"
        else f"its {unlike[0]} is {two}, that of {cache.name} is {one}"
    )
    raise MismatchError(f"{other.name}: {found}; {_way_out(cache, other, unlike)}")


def _way_out(cache: Cache, other: Cache, unlike: list[str]) -> str:
    """Return what makes two caches alike in the named fields."""
    if "target" in unlike:
        return "no conversion changes that: precompute it anew with the same target, or leave it out"
    for source, wanted in ((other, cache), (cache, other)):
        if flags := _flags(source, wanted, unlike):
            return f"make them alike: eagle-offline convert {source.name} --output-dir DIR {' '.join(flags)}"
    shared = sorted(set.intersection(*(set(each.manifest.identity.capture.aux_layer_ids) for each in (cache, other))))
    if unlike == ["aux layers"] and shared:
        return f"make them alike: eagle-offline convert each of them with --aux-layer-ids {_spaced(shared)}"
    both = ", or both with --target-encoding factored" if {"target encoding", "dense vocabulary"} & set(unlike) else ""
    return f"no conversion makes them alike: precompute one of them anew as the other was{both}"


def _flags(source: Cache, wanted: Cache, unlike: list[str]) -> list[str]:
    """Return the flags of the conversion that makes a cache like another; none where there is no such conversion."""
    has, asked = source.manifest.identity.capture, wanted.manifest.identity.capture
    flags: list[str] = []
    if "aux layers" in unlike:
        if not set(asked.aux_layer_ids) <= set(has.aux_layer_ids):
            return []
        flags.append(f"--aux-layer-ids {_spaced(asked.aux_layer_ids)}")
    if "target encoding" in unlike or "dense vocabulary" in unlike:
        known = (has.target_encoding, asked.target_encoding) in _CONVERSIONS
        if not known or _vocab_digest(source) != _vocab_digest(wanted):
            return []
        flags.append(f"--target-encoding {asked.target_encoding}")
    if "stored dtype" in unlike:
        flags.append(f"--dtype {asked.dtype}")
        if has.state_encoding == "planes" and asked.dtype != "bf16":
            flags.append("--state-encoding raw")
    return flags


def _vocab_digest(cache: Cache) -> str:
    """Return the draft vocabulary that a cache's probabilities are over, or would be."""
    manifest = cache.manifest
    return manifest.identity.capture.draft_vocab_digest or manifest.defaults.draft_vocabulary.digest


def _spaced(layer_ids: Sequence[int]) -> str:
    return " ".join(map(str, layer_ids))

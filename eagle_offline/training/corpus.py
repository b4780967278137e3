"""What a run trains on and what it validates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eagle_offline.cache.reader import Cache, open_cache
from eagle_offline.cache.remote import is_url
from eagle_offline.data.mixture import CacheMixture, check_alike, check_same_states
from eagle_offline.data.sampler import (
    SHUFFLE_WINDOW_SHARDS,
    heldout_mask,
    plan_epoch,
    plan_packs,
    weighted_samples,
)
from eagle_offline.errors import DataError, UsageError
from eagle_offline.train_settings import TrainSettings

# More passes over a cache than this in one epoch are rather a mistake.
_LARGEST_WEIGHT = 100


@dataclass(frozen=True)
class Corpus:
    """What is trained and validated on.

    Attributes:
        samples, heldout: open caches, the same ones when documents are held out by share.
        train_samples: int64 indices into ``samples``, one array a cache.
        heldout_samples: int64 indices into ``heldout``.
        weights: how often an epoch goes through each cache's ``train_samples``.
    """

    samples: CacheMixture
    heldout: CacheMixture
    train_samples: tuple[np.ndarray, ...]
    heldout_samples: np.ndarray
    weights: tuple[float, ...]

    @property
    def cache(self) -> Cache:
        """The first cache, which speaks for all in what they share."""
        return self.samples.caches[0]

    def close(self) -> None:
        """End what was begun for reading ahead."""
        self.samples.close()
        self.heldout.close()

    def epoch_packs(self, settings: TrainSettings, epoch: int) -> list[np.ndarray]:
        """Return an epoch's packs in order, sample indices each: a function of seed, epoch and caches alone."""
        chosen = [
            weighted_samples(samples, weight, settings.seed, number, epoch)
            for number, (samples, weight) in enumerate(zip(self.train_samples, self.weights, strict=True))
        ]
        shards, lengths = self.samples.shards, self.samples.lengths
        return plan_epoch(np.concatenate(chosen), shards, lengths, settings.seed, epoch, settings.tokens_per_batch)

    def heldout_packs(self, settings: TrainSettings) -> Iterator[np.ndarray]:
        """Yield the held-out samples in cache order, a pack at a time."""
        yield from plan_packs(self.heldout_samples, self.heldout.lengths, settings.tokens_per_batch)


def small_local_cache(settings: TrainSettings, corpus: Corpus) -> list[str]:
    """Return what is to be said of a ``--local-cache-size`` that costs time, with the size that would not."""
    caches = {id(cache): cache for cache in (*corpus.samples.caches, *corpus.heldout.caches) if is_url(cache.name)}
    trained = [cache for cache in corpus.samples.caches if id(cache) in caches]
    sizes = sorted((entry.file_bytes for cache in trained for entry in cache.index.entries), reverse=True)
    everything = sum(entry.file_bytes for cache in caches.values() for entry in cache.index.entries)
    size, said = int(settings.local_cache_size), []
    mixed, ahead = sum(sizes[:SHUFFLE_WINDOW_SHARDS]), sum(sizes[: 2 * SHUFFLE_WINDOW_SHARDS])
    if size < min(ahead, everything):
        again = "fetched again for almost every sample" if size < min(mixed, everything) else "waited for"
        said.append(
            f"--local-cache-size {_in_words(size)} holds fewer shards than are mixed at a time "
            f"({SHUFFLE_WINDOW_SHARDS}) and read ahead (as many): they will be {again}; "
            f"{_in_words(min(ahead, everything))} would do"
        )
    if size < everything and corpus.heldout is corpus.samples and trained and len(corpus.heldout_samples):
        said.append(
            f"held-out documents lie in all shards: with less than --local-cache-size {_in_words(everything)} each "
            "validation fetches them all; --heldout-cache avoids that"
        )
    return said


def _in_words(num_bytes: int) -> str:
    """Return a size as ``--local-cache-size`` takes it, rounded up."""
    unit, name = next((unit for unit in ((10**9, "GB"), (10**6, "MB")) if num_bytes >= 10 * unit[0]), (1000, "kB"))
    return f"{-(-num_bytes // unit)}{name}"


def open_corpus(settings: TrainSettings) -> Corpus:
    """Open the caches and set the held-out documents apart.

    Raises:
        DataError: nothing to train or to validate on. MismatchError: caches that are not of one target.
        UsageError: weights that fit no caches, or samples that stand in two of the caches.
    """
    weights = _weights(settings)
    opened = [_open(settings, path, allow_partial=settings.allow_partial) for path in settings.cache]
    for number, cache in enumerate(opened):
        _refuse_repeated(
            opened[:number],
            cache,
            "--cache {path} holds {count} of the samples of {other}: give one of the two, or slices that share none "
            "(eagle-offline convert --samples); to see samples more often, use --cache-weights",
        )
    samples = CacheMixture(opened)
    everything = [samples.indices_of(number) for number in range(len(opened))]
    names = ", ".join(str(path) for path in settings.cache)
    if settings.heldout_cache is None:
        held = heldout_mask(samples.sample_ids, settings.heldout_share, settings.seed)
        kept = tuple(indices[~held[indices]] for indices in everything)
        corpus = Corpus(samples, samples, kept, np.flatnonzero(held), weights)
    else:
        other = _open(settings, settings.heldout_cache)
        _refuse_repeated(
            opened,
            other,
            "--heldout-cache {path} holds {count} of the samples of {other}, which are trained on: give another, or "
            "slices that share none (eagle-offline convert --samples)",
        )
        # Final states give the distribution over any vocabulary, also over that of probabilities that are trained on.
        factored = other.manifest.identity.capture.target_encoding == "factored"
        (check_same_states if factored else check_alike)(samples.caches[0], other)
        corpus = Corpus(samples, CacheMixture([other]), tuple(everything), np.arange(len(other)), weights)
    if not sum(len(indices) for indices in corpus.train_samples):
        raise DataError(f"{names}: no samples to train on")
    if not len(corpus.heldout_samples) and settings.heldout_share > 0:
        raise DataError(
            f"{names}: {len(samples)} samples are too few to hold {settings.heldout_share:.0%} out; "
            "raise --heldout-share, set it to 0, or give --heldout-cache"
        )
    return corpus


def _open(settings: TrainSettings, path: Path | str, *, allow_partial: bool = False) -> Cache:
    cache = open_cache(
        path,
        allow_partial=allow_partial,
        verify=settings.verify,
        local_cache=settings.local_cache,
        local_cache_bytes=settings.local_cache_size,
    )
    # Of the first token of an answer such a cache has no choice of the target, and the other gates do not ask for one.
    if settings.supervision_gate == "predicted" and cache.manifest.identity.capture.target_statistics != "full":
        raise UsageError(
            f"--supervision-gate predicted: {path} was imported without the target's choice at the first token of "
            "answers; train with input or both, or precompute a cache"
        )
    return cache


def _weights(settings: TrainSettings) -> tuple[float, ...]:
    if settings.cache_weights is None:
        return (1.0,) * len(settings.cache)
    if len(settings.cache_weights) != len(settings.cache):
        raise UsageError(
            f"--cache-weights has {len(settings.cache_weights)} values for {len(settings.cache)} caches; give one each"
        )
    if not all(0 < weight <= _LARGEST_WEIGHT for weight in settings.cache_weights):
        given = " ".join(f"{weight:g}" for weight in settings.cache_weights)
        raise UsageError(f"--cache-weights {given}: expected numbers above 0, at most {_LARGEST_WEIGHT}")
    return settings.cache_weights


def _refuse_repeated(caches: Sequence[Cache], again: Cache, said: str) -> None:
    """Refuse a cache of samples that others hold, however each of them is stored."""
    for cache in caches:
        one, two = (held.manifest.identity.dataset.rows_digest for held in (cache, again))
        # Sample ids are rows of the token table: of equal tables they say which samples are the same.
        count = len(np.intersect1d(cache.sample_ids, again.sample_ids)) if one == two else 0
        if count:
            raise UsageError(said.format(path=again.name, other=cache.name, count=count))

"""What a run trains on and what it validates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eagle_offline.cache.reader import Cache, open_cache
from eagle_offline.data.mixture import CacheMixture, check_alike
from eagle_offline.data.sampler import heldout_mask, plan_epoch, plan_packs, weighted_samples
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


def open_corpus(settings: TrainSettings) -> Corpus:
    """Open the caches and set the held-out documents apart.

    Raises:
        DataError: nothing to train or to validate on. MismatchError: caches that are not of one target.
        UsageError: weights that fit no caches.
    """
    weights = _weights(settings)
    opened = [_open(settings, path, allow_partial=settings.allow_partial) for path in settings.cache]
    _refuse_repeated(
        opened, "--cache {path} holds what {other} does; to see its samples more often, use --cache-weights"
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
        check_alike(samples.caches[0], other)
        _refuse_repeated([*opened, other], "--heldout-cache {path} holds what is trained on; give another")
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
    return open_cache(
        path,
        allow_partial=allow_partial,
        verify=settings.verify,
        local_cache=settings.local_cache,
        local_cache_bytes=settings.local_cache_size,
    )


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


def _refuse_repeated(caches: Sequence[Cache], said: str) -> None:
    seen: dict[str, Cache] = {}
    for cache in caches:
        other = seen.setdefault(cache.manifest.identity.digest, cache)
        if other is not cache:
            raise UsageError(said.format(path=cache.name, other=other.name))

"""The order of training: an epoch is one list of packs, a pure function of seed, epoch and cache."""

from __future__ import annotations

import numpy as np
import xxhash

# Samples are shuffled over this many shards at a time, so that a disk sees long reads.
SHUFFLE_WINDOW_SHARDS = 16


def heldout_mask(sample_ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return bool ``[N]``: the samples kept out of training.

    A sample's fate depends on its id and the seed alone, not on what else is in the cache.

    Args:
        sample_ids: int64 ``[N]``.
        share: expected share, in ``[0, 1)``.
    """
    limit = int(share * 2**64)
    keys = (int(sample_id).to_bytes(8, "little") for sample_id in sample_ids)
    return np.array([xxhash.xxh3_64_intdigest(key, seed=seed) < limit for key in keys], bool)


def weighted_samples(samples: np.ndarray, weight: float, seed: int, number: int, epoch: int) -> np.ndarray:
    """Return the samples of one cache that an epoch visits: whole passes, and a share that moves on epoch by epoch.

    With a weight of 0.5 two epochs see every sample once, whatever epoch they begin at.

    Args:
        samples: int64 ``[n]`` cache indices.
        weight: passes an epoch, positive.
        number: the cache's place among those that are mixed.
    """
    whole, share = int(weight), weight - int(weight)
    passes = [samples] * whole
    if share and len(samples):
        begin, end = round(epoch * share * len(samples)), round((epoch + 1) * share * len(samples))
        order = np.random.Generator(np.random.PCG64([seed, number])).permutation(samples)
        passes.append(order[np.arange(begin, end) % len(samples)])
    return np.concatenate(passes) if passes else samples[:0]


def shuffled_samples(samples: np.ndarray, shards: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return ``samples`` in an epoch's order: shards shuffled, then samples inside windows of shards.

    Args:
        samples: int64 ``[n]`` cache indices to visit.
        shards: int64 ``[N]``, the shard of every cache index.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = np.unique(shards[samples])
    generator.shuffle(order)
    rank = np.empty(int(order.max()) + 1 if len(order) else 0, np.int64)
    rank[order] = np.arange(len(order))
    windows = rank[shards[samples]] // SHUFFLE_WINDOW_SHARDS
    keys = generator.permutation(len(samples))
    return samples[np.lexsort((keys, windows))]


def plan_packs(samples: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Cut an order of samples into packs of at most ``tokens_per_batch`` tokens; a longer sample is a pack of its own.

    Args:
        samples: int64 ``[n]`` cache indices, in order.
        lengths: int64 ``[N]``, token count of every cache index.
    """
    ends = np.cumsum(lengths[samples])
    packs, start, before = [], 0, 0
    while start < len(samples):
        end = max(int(np.searchsorted(ends, before + tokens_per_batch, side="right")), start + 1)
        packs.append(samples[start:end])
        start, before = end, int(ends[end - 1])
    return packs


def plan_epoch(
    samples: np.ndarray, shards: np.ndarray, lengths: np.ndarray, seed: int, epoch: int, tokens_per_batch: int
) -> list[np.ndarray]:
    """Return an epoch's packs, in order, each the cache indices of its samples."""
    return plan_packs(shuffled_samples(samples, shards, seed, epoch), lengths, tokens_per_batch)

"""What a run trains on and what it validates on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eagle_offline.cache.reader import Cache, open_cache
from eagle_offline.config import TrainSettings
from eagle_offline.data.sampler import heldout_mask
from eagle_offline.errors import DataError, MismatchError


@dataclass(frozen=True)
class Corpus:
    """What is trained and validated on.

    Attributes:
        cache, heldout_cache: open caches, the same one when documents are held out by share.
        train_samples, heldout_samples: int64 cache indices.
    """

    cache: Cache
    heldout_cache: Cache
    train_samples: np.ndarray
    heldout_samples: np.ndarray


def open_corpus(settings: TrainSettings) -> Corpus:
    """Open the caches and set the held-out documents apart.

    Raises:
        DataError: nothing to train or to validate on. MismatchError: the held-out cache is of another target.
    """
    cache = open_cache(settings.cache, allow_partial=settings.allow_partial, verify=settings.verify)
    everything = np.arange(len(cache))
    if settings.heldout_cache is None:
        held = heldout_mask(cache.sample_ids, settings.heldout_share, settings.seed)
        corpus = Corpus(cache, cache, everything[~held], everything[held])
    else:
        other = open_cache(settings.heldout_cache, verify=settings.verify)
        ours, theirs = cache.manifest.identity, other.manifest.identity
        pairs = {
            "target": (ours.target.checkpoint_digest, theirs.target.checkpoint_digest),
            "aux layers": (ours.capture.aux_layer_ids, theirs.capture.aux_layer_ids),
            "target encoding": (ours.capture.target_encoding, theirs.capture.target_encoding),
            "dense vocabulary": (ours.capture.draft_vocab_digest, theirs.capture.draft_vocab_digest),
        }
        for name, (one, two) in pairs.items():
            if one != two:
                raise MismatchError(f"--heldout-cache {settings.heldout_cache}: its {name} is {two}, the cache's {one}")
        corpus = Corpus(cache, other, everything, np.arange(len(other)))
    if not len(corpus.train_samples):
        raise DataError(f"{settings.cache}: no samples to train on")
    if not len(corpus.heldout_samples) and settings.heldout_share > 0:
        raise DataError(
            f"{settings.cache}: {len(cache)} samples are too few to hold {settings.heldout_share:.0%} out; "
            "raise --heldout-share, set it to 0, or give --heldout-cache"
        )
    return corpus

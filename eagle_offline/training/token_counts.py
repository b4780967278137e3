"""How often the data of caches holds each token: read without decoding a state or checking a sample's digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from eagle_offline.cache.layout import TOKENS_DIRECTORY, repair_way_out
from eagle_offline.cache.reader import Cache
from eagle_offline.errors import DataError, unreadable

# The tokenised corpus that comes with a cache: a row a sample, by sample id, and rows that were not captured.
TOKEN_TABLE = f"{TOKENS_DIRECTORY}/tokens.arrow"

# Counting at once pays for a vector as long as the vocabulary.
_COUNTED_TOKENS = 1 << 18


class Tokens(NamedTuple):
    """Token ids of several samples, one after the other.

    Attributes:
        ids: int32 ``[T]``. bounds: ``[N + 1]``, where each sample begins, and ``T``. sample_ids: ``[N]``.
    """

    ids: np.ndarray
    bounds: np.ndarray
    sample_ids: range | np.ndarray


def supervised_counts(caches: Sequence[Cache]) -> np.ndarray:
    """Return int64 ``[V]``: how often each id is a supervised token.

    Only token ids and masks are read; their samples' digests are checked later, when they are trained on.

    Raises:
        DataError: ids outside the target's vocabulary.
    """
    return _counted(caches, (tokens for cache in caches for tokens in _stored(cache, supervised=True)))


def token_counts(caches: Sequence[Cache]) -> np.ndarray:
    """Return int64 ``[V]``: how often each id is a token of the data, supervised or not.

    Read from the caches' token tables, which may hold more samples than a cache does; a table that several caches
    share counts once. Of a cache without one, its samples are read.

    Raises:
        DataError: ids outside the target's vocabulary, or a table that is not as it was written.
    """
    return _counted(caches, (tokens for cache in distinct(caches) for tokens in _all_tokens(cache)))


def first_sample(cache: Cache, token_id: int) -> int | None:
    """Return the id of the first sample that `token_counts` finds a token in; None when there is none."""
    for tokens in _all_tokens(cache):
        found = np.flatnonzero(tokens.ids == token_id)
        if len(found):
            return int(tokens.sample_ids[int(np.searchsorted(tokens.bounds, found[0], side="right")) - 1])
    return None


def distinct(caches: Sequence[Cache]) -> list[Cache]:
    """Return caches of unlike tokens: of several with one token table, such as slices of a cache, the first."""
    tables = [cache.manifest.files.get(TOKEN_TABLE) for cache in caches]
    keys = [id(cache) if table is None else table.digest for cache, table in zip(caches, tables, strict=True)]
    return [cache for number, cache in enumerate(caches) if keys.index(keys[number]) == number]


def _counted(caches: Sequence[Cache], parts: Iterator[Tokens]) -> np.ndarray:
    counts = np.zeros(caches[0].manifest.identity.target.vocab_size, np.int64)
    for tokens in parts:
        counts += np.bincount(tokens.ids, minlength=len(counts))
    return counts


def _all_tokens(cache: Cache) -> Iterator[Tokens]:
    path = cache.companion(TOKEN_TABLE)
    yield from _stored(cache) if path is None else _of_table(cache, path)


def _of_table(cache: Cache, path: Path) -> Iterator[Tokens]:
    """Yield the rows of a token table, one record batch at a time."""
    row = 0
    try:
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_file(mapped)
            for number in range(table.num_record_batches):
                batch = table.get_batch(number)
                batch.validate(full=True)
                column = batch.column("input_ids")
                bounds, ids = column.offsets.to_numpy(), column.values.to_numpy()
                _check(cache, ids, f"its {TOKEN_TABLE}")
                yield Tokens(ids, bounds, range(row, row + len(batch)))
                row += len(batch)
    except (pa.ArrowException, OSError, LookupError, ValueError, AttributeError) as error:
        raise unreadable(path, f"not a readable token table ({repair_way_out(cache.name)})", error) from error


def _stored(cache: Cache, *, supervised: bool = False) -> Iterator[Tokens]:
    """Yield the samples of a cache, many at a time; of ``supervised`` tokens, these alone."""
    # Digests cover the states: checking them here would read the whole cache.
    unchecked = cache.unchecked()
    ids: list[np.ndarray] = []
    first, num_tokens = 0, 0
    for index in range(len(unchecked)):
        stored = unchecked.read_stored(index)
        chosen = stored.input_ids[stored.loss_mask.astype(bool)] if supervised else stored.input_ids
        _check(cache, chosen, f"sample {stored.sample_id}")
        ids.append(chosen)
        num_tokens += len(chosen)
        if num_tokens >= _COUNTED_TOKENS or index + 1 == len(unchecked):
            bounds = np.cumsum([0, *(len(part) for part in ids)])
            yield Tokens(np.concatenate(ids), bounds, unchecked.sample_ids[first : index + 1])
            ids, first, num_tokens = [], index + 1, 0


def _check(cache: Cache, ids: np.ndarray, what: str) -> None:
    vocab_size = cache.manifest.identity.target.vocab_size
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise DataError(
            f"{cache.name}: {what} has token ids outside a vocabulary of {vocab_size}: check it with "
            "inspect-manifest --verify"
        )

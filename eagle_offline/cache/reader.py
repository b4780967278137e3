"""A cache opened for reading: samples by number, decoded from memory-mapped shards, checked when first touched."""

from __future__ import annotations

import resource
import threading
import weakref
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eagle_offline.cache.formats import ShardReader, shard_reader
from eagle_offline.cache.index import SampleIndex, index_of, read_index
from eagle_offline.cache.layout import (
    EMBEDDINGS_FILE,
    HEAD_FILE,
    LAST_HIDDEN_STATE,
    TARGET_PROBS,
    aux_field,
    repair_way_out,
    shard_of_record,
)
from eagle_offline.cache.manifest import Manifest, read_manifest
from eagle_offline.cache.remote import is_url
from eagle_offline.cache.samples import StoredSample, decode_fields, names_tokens
from eagle_offline.cache.saved_settings import maker
from eagle_offline.cache.shard_check import check_record
from eagle_offline.cache.source import CacheSource, LocalSource, RemoteSource
from eagle_offline.cache.writer import read_record
from eagle_offline.errors import DataError
from eagle_offline.provenance import digest_file, user_cache_directory

if TYPE_CHECKING:
    import torch

    from eagle_offline.supervision import Head

DEFAULT_LOCAL_CACHE_BYTES = 100 * 10**9

# Memory maps held at once: far below the usual limit on open files.
_MAX_OPEN_SHARDS = 128


@dataclass(frozen=True)
class TargetSupervision:
    """What a sample's target said, at positions with ``m_t ∨ m_{t+1}`` only.

    Attributes:
        positions: int64 ``[P]``, ascending.
        last_hidden_state: ``[P, H]`` as stored, under ``factored``; else None.
        target_probs: ``[P, Vd]`` as stored, under ``dense`` and ``topk``; else None.
        target_argmax: int64 ``[P]``, over the full vocabulary; -1 where an imported cache does not have it.
        target_log_normalizer: float32 ``[P]``, over the full vocabulary; 0 where an imported cache does not have it.
    """

    positions: torch.Tensor
    last_hidden_state: torch.Tensor | None
    target_probs: torch.Tensor | None
    target_argmax: torch.Tensor
    target_log_normalizer: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """One cached sample, nothing shifted.

    Attributes:
        sample_id: row of the token table.
        input_ids: int64 ``[T]``; loss_mask: bool ``[T]``.
        aux_hidden_states: ``[T, A·H]`` in the stored dtype, low layer first.
        supervision: see `TargetSupervision`.
    """

    sample_id: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux_hidden_states: torch.Tensor
    supervision: TargetSupervision


class Cache:
    """A cache of one target's states; `open_cache` makes one.

    Samples are numbered in the order of shards and of rows inside them.

    Args:
        source: where its files are.
        verify: check each sample's digest when it is first read.

    Attributes:
        name: what the user calls it.
        path: its directory; of a cache in an object store, the local one that mirrors it.
        manifest: what it is.
        index: where every sample is, and what is known of it without reading it.
        missing_shards: shards that the manifest calls for and that are not committed.
        shards, lengths, sample_ids, num_target_positions: int64 ``[N]``, of each sample.
    """

    def __init__(self, source: CacheSource, *, verify: bool = True):
        self._source = source
        self.name, self.path = source.name, source.directory
        self.manifest: Manifest = read_manifest(self.path)
        source.bring_companions(self.manifest)
        self.index = self._read_index()
        self._entries = {entry.shard: entry for entry in self.index.entries}
        num_shards = self.manifest.identity.num_shards
        self.missing_shards = [shard for shard in range(num_shards) if shard not in self._entries]
        self.shards = self.index.shards
        self.lengths = self.index.num_tokens.astype(np.int64)
        self.sample_ids = self.index.sample_id.astype(np.int64)
        self.num_target_positions = self.index.num_target_positions.astype(np.int64)
        self._verify = verify
        self._touched = np.zeros(len(self), bool)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        self._places: np.ndarray | None = None

    def _read_index(self) -> SampleIndex:
        names = self._source.names()
        committed = sorted(shard for name in names if (shard := shard_of_record(name)) is not None)
        identity_digest = self.manifest.identity.digest
        index = read_index(self.path, names, committed, identity_digest)
        if index is not None:
            return index
        self._source.bring_records()
        records = [read_record(self.path, shard) for shard in committed]
        for record in records:
            try:
                check_record(record, self.manifest.identity)
            except DataError as error:
                raise DataError(f"{self.name}: shard {record.shard} {error}; {self._way_out()}") from error
        return index_of(records)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample decoded on the CPU.

        Raises:
            IndexError: no such sample. DataError: its bytes are not what the record says.
        """
        import torch

        from eagle_offline.supervision import supervised_positions

        stored = self.read_stored(index)
        fields = decode_fields(self.manifest.identity.capture.fields, stored)
        loss_mask = torch.from_numpy(stored.loss_mask).bool()
        return Sample(
            sample_id=stored.sample_id,
            input_ids=torch.from_numpy(stored.input_ids).long(),
            loss_mask=loss_mask,
            aux_hidden_states=torch.cat([fields[aux_field(i)] for i in self.aux_layer_ids], dim=-1),
            supervision=TargetSupervision(
                positions=supervised_positions(loss_mask).nonzero().squeeze(-1),
                last_hidden_state=fields.get(LAST_HIDDEN_STATE),
                target_probs=fields.get(TARGET_PROBS),
                target_argmax=torch.from_numpy(stored.target_argmax).long(),
                target_log_normalizer=torch.from_numpy(stored.target_log_normalizer).clone(),
            ),
        )

    def read_stored(self, index: int) -> StoredSample:
        """Return a sample as stored, its digest checked on first touch.

        Raises:
            IndexError: no such sample. DataError: its bytes are not what the record says.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(self.shards[index])
        if self._places is not None:
            self._source.reached(int(self._places[index]))
        reader = self._shard(shard)
        try:
            stored = reader.read(int(self.index.record_batch[index]), int(self.index.row[index]))
        except DataError as error:
            raise self._damage(index, f"cannot be read ({error})") from error
        sizes = (stored.sample_id, len(stored.input_ids), len(stored.loss_mask), len(stored.target_argmax))
        length = self.lengths[index]
        if sizes != (self.sample_ids[index], length, length, self.num_target_positions[index]):
            raise self._damage(index, "is not the sample that its record names")
        if self._verify and not self._touched[index]:
            if int(stored.loss_mask.sum()) != self.index.num_supervised[index]:
                raise self._damage(index, "has another number of supervised tokens than its record says")
            if not names_tokens(stored, self.manifest.identity):
                raise self._damage(index, "names tokens that the target does not have")
            if int(stored.digest(), 16) != self.index.digest[index]:
                raise self._damage(index, "does not match its digest: the file was damaged after it was written")
            self._touched[index] = True
        if _count_positions(stored.loss_mask) != self.num_target_positions[index]:
            raise self._damage(index, "has supervision at other positions than its loss mask calls for")
        return stored

    def _damage(self, index: int, what: str) -> DataError:
        file = self.shard_file(int(self.shards[index]))
        return DataError(f"{self.name}/{file}: sample {self.sample_ids[index]} {what}; {self._way_out()}")

    def shard_file(self, shard: int) -> str:
        """Return the name of a shard."""
        return self._entries[shard].file

    def _way_out(self) -> str:
        return repair_way_out(self.name)

    def _check_companion(self, name: str) -> None:
        """Refuse a file beside the shards that is not what the manifest records; checked once, when first used."""
        recorded = self.manifest.files.get(name)
        path = self._source.companion(name, None if recorded is None else recorded.num_bytes)
        if not self._verify or recorded is None or not path.is_file():
            return
        if path.stat().st_size != recorded.num_bytes or digest_file(path) != recorded.digest:
            self._source.forget(name)
            raise DataError(f"{self.name}/{name}: differs from what the manifest records; {self._way_out()}")

    def companion(self, name: str) -> Path | None:
        """Return where a file stands that comes with the cache, a store's brought here first; None where it is missing.

        Raises:
            DataError: it is not what the manifest records.
        """
        recorded = self.manifest.files.get(name)
        if recorded is None:
            return None
        try:
            path = self._source.companion(name, recorded.num_bytes)
        except DataError:  # the store does not have it either
            return None
        self._check_companion(name)
        return path if path.is_file() else None

    def _check_floats(self, name: str, values: torch.Tensor, *shape: int) -> None:
        if tuple(values.shape) != shape or not values.is_floating_point():
            found = f"{values.dtype} {tuple(values.shape)}"
            raise DataError(f"{self.path / name}: holds {found}, expected floats {shape}")

    def _shard(self, shard: int) -> ShardReader:
        # Training and validation read from threads of their own; one that waits for a store holds up no other.
        with self._lock:
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:
            with self._lock:
                if shard in self._open:
                    self._open.move_to_end(shard)
                    return self._open[shard]
                self._make_room(self._entries[shard].file_bytes)
            reader = self._open_shard(shard)
            with self._lock:
                limit = self._source.max_open_bytes
                if limit is None or self._entries[shard].file_bytes <= limit:
                    self._make_room(self._entries[shard].file_bytes)
                    self._open[shard] = reader
            return reader

    def _open_shard(self, shard: int) -> ShardReader:
        with ExitStack() as stack:
            path = stack.enter_context(self._source.shard(self._entries[shard]))
            try:
                reader = shard_reader(path, self.manifest.identity, shard)
            except DataError as error:
                raise DataError(f"{error}; {self._way_out()}") from error
            # The file stays where it is for as long as anybody has the reader.
            weakref.finalize(reader, stack.pop_all().close).atexit = False
            return reader

    def _make_room(self, num_bytes: int) -> None:
        """Let go of the shards not asked for the longest, so that another one may be open."""
        limit = self._source.max_open_bytes
        taken = sum(self._entries[shard].file_bytes for shard in self._open)
        most = min(_MAX_OPEN_SHARDS, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        while self._open and (len(self._open) >= most or (limit is not None and taken + num_bytes > limit)):
            shard, _ = self._open.popitem(last=False)
            taken -= self._entries[shard].file_bytes

    def read_ahead(self, samples: np.ndarray, places: np.ndarray | None = None) -> None:
        """Prepare for samples to be read in about this order: a store's shards come before they are asked for.

        Args:
            samples: int64 indices.
            places: int64, ascending: where each stands in an order that is of several caches; default as given.
        """
        if not self._source.reads_ahead:
            return
        places = np.arange(len(samples)) if places is None else places
        shards = self.shards[samples]
        _, firsts = np.unique(shards, return_index=True)
        numbers, lasts = np.unique(shards[::-1], return_index=True)
        last_place = dict(zip(numbers.tolist(), places[::-1][lasts].tolist(), strict=True))
        order = np.sort(firsts)
        ahead = np.full(len(self), -1, np.int64)
        ahead[samples[::-1]] = places[::-1]  # of a sample that is read twice, the first
        self._source.read_ahead(
            [self._entries[int(shard)] for shard in shards[order]],
            [(int(places[first]), last_place[int(shards[first])]) for first in order],
        )
        self._places = ahead

    def unchecked(self) -> Cache:
        """Return the same cache once more, its samples read without looking at digests."""
        return Cache(self._source, verify=False)

    def close(self) -> None:
        """End what was begun for reading ahead; samples that were read stay."""
        self._source.close()

    @property
    def aux_layer_ids(self) -> list[int]:
        return self.manifest.identity.capture.aux_layer_ids

    @cached_property
    def head(self) -> Head:
        """The target's head as stored."""
        from eagle_offline.cache.companions import read_head

        self._check_companion(HEAD_FILE)
        self._check_companion(EMBEDDINGS_FILE)
        head, target = read_head(self.path), self.manifest.identity.target
        self._check_floats(HEAD_FILE, head.weight, target.vocab_size, target.hidden_size)
        if head.bias is not None:
            self._check_floats(HEAD_FILE, head.bias, target.vocab_size)
        return head

    @cached_property
    def embeddings(self) -> torch.Tensor:
        """The target's raw token embeddings ``[V, H]``."""
        from eagle_offline.cache.companions import read_embeddings

        self._check_companion(EMBEDDINGS_FILE)
        weight, target = read_embeddings(self.path), self.manifest.identity.target
        self._check_floats(EMBEDDINGS_FILE, weight, target.vocab_size, target.hidden_size)
        return weight

    @cached_property
    def selected_token_ids(self) -> torch.Tensor:
        """The default draft vocabulary, int64 ``[Vd]``."""
        from eagle_offline.cache.companions import read_vocab

        vocabulary = self.manifest.defaults.draft_vocabulary
        ids = read_vocab(self.path, vocabulary.digest, self.manifest.identity.target.vocab_size)
        if len(ids) != vocabulary.size:
            raise DataError(f"{self.name}: its draft vocabulary has {len(ids)} tokens, expected {vocabulary.size}")
        return ids

    @cached_property
    def selected_token_mask(self) -> torch.Tensor:
        """Bool ``[V]``, true on the default draft vocabulary."""
        import torch

        mask = torch.zeros(self.manifest.identity.target.vocab_size, dtype=torch.bool)
        mask[self.selected_token_ids] = True
        return mask

    @cached_property
    def _selected_head(self) -> Head:
        return self.head.select(self.selected_token_ids)

    def target_probs(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the projected target distribution of a sample, nothing shifted.

        Returns:
            float32 ``[T, Vd]``, zero where ``m_t = 0``; bool ``[T, 1]``, the position mask ``c``.
        """
        import torch

        from eagle_offline.supervision import chosen_inside

        supervision = sample.supervision
        if supervision.last_hidden_state is not None:
            stored = self._selected_head.logits(supervision.last_hidden_state).softmax(dim=-1)
        elif supervision.target_probs is not None:
            stored = supervision.target_probs.float()
        else:
            raise DataError(f"{self.name}: the sample carries no target supervision")
        supervised = sample.loss_mask[supervision.positions]
        num_tokens = len(sample.input_ids)
        probs = torch.zeros(num_tokens, stored.shape[-1])
        probs[supervision.positions] = stored * supervised.unsqueeze(-1)
        mask = torch.zeros(num_tokens, 1, dtype=torch.bool)
        mask[supervision.positions, 0] = supervised & chosen_inside(supervision.target_argmax, self.selected_token_mask)
        return probs, mask


def _count_positions(loss_mask: np.ndarray) -> int:
    """Return how many positions have supervision; see `eagle_offline.supervision.supervised_positions`."""
    mask = loss_mask != 0
    return int(np.count_nonzero(mask)) + int(np.count_nonzero(mask[1:] & ~mask[:-1]))


def open_cache(
    path: str | Path,
    *,
    allow_partial: bool = False,
    verify: bool = True,
    local_cache: Path | None = None,
    local_cache_bytes: int = DEFAULT_LOCAL_CACHE_BYTES,
) -> Cache:
    """Open a cache for reading.

    Args:
        path: its directory, or the URL of one in an object store.
        allow_partial: accept missing shards; their samples are then absent.
        verify: check each sample's digest when it is first read.
        local_cache: where shards of a store are kept on this machine; default in the user's cache directory.
        local_cache_bytes: how much of them.

    Raises:
        DataError: no cache there, shards missing, or records damaged.
        MismatchError: of another format or version.
    """
    source: CacheSource
    if is_url(path):
        source = RemoteSource(str(path), local_cache or user_cache_directory() / "shards", local_cache_bytes)
    else:
        source = LocalSource(Path(path))
    cache = Cache(source, verify=verify)
    if cache.missing_shards and not allow_partial:
        total = cache.manifest.identity.num_shards
        raise DataError(
            f"{path}: {len(cache.missing_shards)} of {total} shards are missing (first: {cache.missing_shards[0]}); "
            f"finish it with {maker(cache.manifest)} --resume, or train on what is there with --allow-partial"
        )
    return cache

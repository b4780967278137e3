"""Samples of caches read end to end into one pack, nothing shifted, their states as the training device wants them.

A GPU gets the stored bytes and merges them itself: fewer bytes travel, and the host does nothing that the device does
a hundred times faster. For a CPU the thread that reads merges, beside the step and not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from eagle_offline.cache import codec
from eagle_offline.cache.layout import LAST_HIDDEN_STATE, TARGET_PROBS, FieldLayout, aux_field
from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.cache.samples import StoredSample, stored_columns
from eagle_offline.cache.stored_states import StoredStates, merge_rows, merged_layout, merges_ahead, num_bytes
from eagle_offline.data.buffers import HostBuffers
from eagle_offline.data.collate import collate

_Fields = tuple[FieldLayout, ...]


@dataclass(frozen=True)
class StoredPack:
    """Samples end to end, ``N`` slots of ``D`` documents, nothing shifted.

    Attributes:
        sample_ids: in the order of their documents.
        lengths: int64 ``[D]``, on the host.
        input_ids: int64 ``[N]``; loss_mask: bool ``[N]``.
        aux_states: rows of ``A·H`` values, ``N`` in all; several only where neighbours are stored in unlike ways.
        target_states: rows of ``H`` or ``Vd`` values, ``P`` in all.
        target_slots: int64 ``[P]``, the slot of each of them; target_argmax: int64 ``[P]``.
    """

    sample_ids: tuple[int, ...]
    lengths: np.ndarray
    input_ids: Tensor
    loss_mask: Tensor
    aux_states: tuple[StoredStates, ...]
    target_states: tuple[StoredStates, ...]
    target_slots: Tensor
    target_argmax: Tensor


class PackReader:
    """Reads packs, for any number of threads.

    Args:
        aux_layers: places, among the captured layers, of those to read; None for all.
        merged: states are merged while they are read.
        pinned: the memory that they are read into is page-locked.
    """

    def __init__(self, aux_layers: Sequence[int] | None = None, *, merged: bool = True, pinned: bool = False):
        self._aux_layers = None if aux_layers is None else tuple(aux_layers)
        self._merged = merged
        self._buffers = HostBuffers(pinned=pinned)

    @classmethod
    def for_device(cls, device: torch.device, aux_layers: Sequence[int] | None = None) -> PackReader:
        """Return the reader for packs that a device will run."""
        return cls(aux_layers, merged=device.type == "cpu", pinned=device.type == "cuda")

    def read(self, samples: Sequence[tuple[Cache, int]]) -> StoredPack:
        """Return samples, each a cache and an index in it, end to end in the order given.

        Raises:
            DataError: bytes of a sample are not what its record says.
        """
        lengths = np.array([cache.lengths[index] for cache, index in samples], np.int64)
        counts = np.array([cache.num_target_positions[index] for cache, index in samples], np.int64)
        starts, firsts = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
        input_ids, loss_mask = np.empty(lengths.sum(), np.int64), np.empty(lengths.sum(), bool)
        argmax = np.empty(counts.sum(), np.int64)
        aux_states, target_states, place = [], [], 0
        for (aux_held, target_held), run in groupby(samples, lambda sample: self._held(sample[0])):
            members = list(run)
            docs = slice(place, place + len(members))
            aux = _Rows(aux_held, lengths[docs], self._buffers)
            target = _Rows(target_held, counts[docs], self._buffers)
            for cache, index in members:
                stored = cache.read_stored(index)
                slots = slice(starts[place], starts[place] + lengths[place])
                input_ids[slots], loss_mask[slots] = stored.input_ids, stored.loss_mask
                argmax[firsts[place] : firsts[place] + counts[place]] = stored.target_argmax
                aux_fields, target_fields = self._fields(cache)
                aux.append(cache, stored, aux_fields)
                target.append(cache, stored, target_fields)
                place += 1
            aux_states.append(aux.states)
            target_states.append(target.states)
        return StoredPack(
            sample_ids=tuple(int(cache.sample_ids[index]) for cache, index in samples),
            lengths=lengths,
            input_ids=torch.from_numpy(input_ids),
            loss_mask=torch.from_numpy(loss_mask),
            aux_states=tuple(aux_states),
            target_states=tuple(target_states),
            target_slots=torch.from_numpy(_supervised_slots(loss_mask, starts)),
            target_argmax=torch.from_numpy(argmax),
        )

    def _fields(self, cache: Cache) -> tuple[_Fields, _Fields]:
        """Return the aux fields of a cache that are read, and the target's."""
        fields = {field.name: field for field in cache.manifest.identity.capture.fields}
        layer_ids = cache.aux_layer_ids
        places = range(len(layer_ids)) if self._aux_layers is None else self._aux_layers
        target = fields.get(LAST_HIDDEN_STATE) or fields[TARGET_PROBS]
        return tuple(fields[aux_field(layer_ids[place])] for place in places), (target,)

    def _held(self, cache: Cache) -> tuple[_Fields, _Fields]:
        """Return how a pack holds the aux states of a cache, and the target's."""
        aux, target = self._fields(cache)
        if not self._merged:
            return aux, target
        return (merged_layout(aux),), (merged_layout(target),) if merges_ahead(target) else target


class _Rows:
    """States of a run of samples that are held alike, filled one by one."""

    def __init__(self, held: _Fields, counts: np.ndarray, buffers: HostBuffers):
        num_rows = int(counts.sum())
        self.states = StoredStates(held, num_rows, buffers.take(num_bytes(held, num_rows)))
        self._start = 0

    def append(self, cache: Cache, stored: StoredSample, fields: _Fields) -> None:
        stop = self._start + stored.num_rows(fields[0])
        columns = {field.name: own for field, own in stored_columns(cache.manifest.identity.capture.fields, stored)}
        # One field at a time: what was just decompressed is still in the core's own cache when it is merged.
        for number, field in enumerate(fields):
            if self.states.fields == fields:
                places = self.states.places(self._start, stop, number)
                codec.unpack_into(field, columns[field.name], places, framed=stored.framed)
            else:
                planes = codec.unpack(field, columns[field.name], stop - self._start, framed=stored.framed)
                merge_rows(self.states, self._start, fields, number, planes)
        self._start = stop


def pack_of_samples(samples: Sequence[Sample]) -> StoredPack:
    """Return decoded samples end to end, in the order that `collate` lays them in.

    Raises:
        DataError: a sample carries no target supervision.
    """
    pack = collate(samples, row_slots=sum(len(sample.input_ids) for sample in samples))
    return StoredPack(
        sample_ids=tuple(pack.sample_ids),
        lengths=pack.seq_lens[0].numpy(),
        input_ids=pack.input_ids[0],
        loss_mask=pack.loss_mask[0],
        aux_states=(_raw_states(pack.aux_hidden_states[0]),),
        target_states=(_raw_states(pack.target_rows),),
        target_slots=pack.target_slots,
        target_argmax=pack.target_argmax,
    )


def _raw_states(values: Tensor) -> StoredStates:
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[values.dtype]
    layout = FieldLayout(name="merged", width=values.shape[1], dtype=dtype, encoding="raw", rows="tokens")
    return StoredStates((layout,), len(values), values.contiguous().view(-1).view(torch.uint8))


def _supervised_slots(loss_mask: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return int64 ``[P]``: the slots with ``m_t ∨ m_{t+1}``, documents apart."""
    following = np.zeros_like(loss_mask)
    following[:-1] = loss_mask[1:]
    following[starts[1:] - 1] = False
    return np.flatnonzero(loss_mask | following)

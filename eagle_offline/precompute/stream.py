"""Samples of shard after shard, captured and encoded ahead of whoever writes them.

The target's next batch is under way while the states of the last one come down, are encoded and are written. What is
held at a time is a few batches, however large a shard is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch

from eagle_offline.cache.filling import ShardLog
from eagle_offline.cache.formats import frames_columns
from eagle_offline.cache.layout import LostSample
from eagle_offline.cache.samples import EncodingErrors, StoredSample, encode_fields
from eagle_offline.errors import EagleOfflineError
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute.plan import Plan
from eagle_offline.prefetch import prefetch
from eagle_offline.target.capture import CapturedBatch, CapturedSample, TokenSample
from eagle_offline.text.token_table import TokenTable

# Batches captured or under way beyond the one that is being encoded.
_BATCHES_AHEAD = 2

# Threads that encode. One keeps up with a CPU's target and leaves it its cores.
_MAX_ENCODERS = 4


class SampleSource(Protocol):
    """What gives samples their states."""

    def run(self, samples: Sequence[TokenSample]) -> list[CapturedBatch]:
        """Return samples with their states, in any order."""


@dataclass(frozen=True)
class _Batch:
    """Samples of a shard that go through the target together."""

    shard: int
    samples: list[TokenSample]


@dataclass(frozen=True)
class _Made:
    """A sample of a shard as it is stored, or lost; what encoding it cost, and whether memory was short."""

    shard: int
    sample: StoredSample | LostSample
    errors: EncodingErrors
    halved: bool


class SampleStream:
    """The samples of some shards in order, made on threads. A failure in any of them is raised where samples are taken.

    Args:
        plan: what the cache is, with its batches settled.
        capture: of its target, or of what another tool has captured.
        shards: in the order in which they are to be taken.
        stop: once it is asked to stop, no further shard is begun.
    """

    def __init__(self, plan: Plan, capture: SampleSource, shards: Sequence[int], stop: StopRequest):
        self._plan, self._capture, self._shards, self._stop = plan, capture, shards, stop
        self._began = self._idle_since = time.monotonic()
        self._waited = 0.0
        self._made = self._make()
        self._next: _Made | None = None

    def of_shard(self, shard: int, log: ShardLog) -> Iterator[StoredSample | LostSample]:
        """Yield a shard's samples; it must be the next one. Not all may come once a stop is asked for."""
        num_halved = 0
        while (made := self._peek()) is not None and made.shard == shard:
            self._next = None
            log.errors.merge(made.errors)
            if made.halved:
                num_halved += 1
                log.environment["samples_of_halved_batches"] = num_halved
            yield made.sample

    def waited_share(self) -> float:
        """Return which share of its time the target has waited for what was captured to be encoded and written."""
        return self._waited / max(time.monotonic() - self._began, 1e-9)

    def close(self) -> None:
        """End all threads."""
        self._made.close()

    def _peek(self) -> _Made | None:
        if self._next is None:
            self._next = next(self._made, None)
        return self._next

    def _make(self) -> Generator[_Made, None, None]:
        on_cpu = torch.device(self._plan.device).type == "cpu"
        encoders = 1 if on_cpu else min(_MAX_ENCODERS, os.cpu_count() or 1)
        # The target's tensor work has the process's threads; encoding is done beside it, each sample on one thread.
        captured = prefetch(self._run, self._batches(), _BATCHES_AHEAD, computes_alone=False)
        with closing(captured):
            samples = (
                (shard, batch.halved, sample) for shard, batches in captured for batch in batches for sample in batch
            )
            with closing(prefetch(self._encode, samples, num_workers=encoders)) as made:
                yield from made

    def _batches(self) -> Iterator[_Batch]:
        batching, table = self._plan.batching, self._plan.table
        assert batching is not None
        for shard in self._shards:
            if self._stop.requested:
                return
            rows = self._plan.rows(shard)
            for positions in batching.batches(table.lengths[rows].tolist()):
                yield _Batch(shard, [token_sample(table, int(rows[position])) for position in positions])

    def _run(self, batch: _Batch) -> tuple[int, list[CapturedBatch]]:
        self._waited += time.monotonic() - self._idle_since
        device = torch.device(self._plan.device)
        if device.type == "cuda" and device.index is not None:
            # Which device is the current one is each thread's own matter; kernels of others go by it.
            torch.cuda.set_device(device)
        try:
            return batch.shard, self._capture.run(batch.samples)
        except torch.OutOfMemoryError as error:
            sample = batch.samples[0]
            raise EagleOfflineError(
                f"{self._plan.device}: out of memory with one sample of {len(sample.input_ids)} tokens "
                f"({self._place(sample)}): choose a smaller --seq-length, another --compute-dtype, or spread the "
                "target over several GPUs"
            ) from error
        finally:
            self._idle_since = time.monotonic()

    def _encode(self, item: tuple[int, bool, CapturedSample]) -> _Made:
        shard, halved, captured = item
        errors = EncodingErrors()
        return _Made(shard, self._stored(captured, errors), errors, halved)

    def _stored(self, captured: CapturedSample, errors: EncodingErrors) -> StoredSample | LostSample:
        """Return a captured sample encoded, or what is recorded in its stead.

        Raises:
            EagleOfflineError: values are not finite, and the settings say to stop.
        """
        tokens, settings = captured.tokens, self._plan.settings
        if not captured.finite:
            if settings.on_nonfinite == "stop":
                wider = "" if settings.dtype == "bf16" else "--dtype bf16 or "
                raise EagleOfflineError(
                    f"sample {tokens.sample_id} ({self._place(tokens)}): the target's states have NaN or infinite "
                    f"values as {settings.dtype}; try {wider}another --compute-dtype, or leave such samples out with "
                    "--on-nonfinite drop"
                )
            return LostSample(sample_id=tokens.sample_id, reason="non-finite states")
        target = captured.last_hidden_state if captured.target_probs is None else captured.target_probs
        capture = self._plan.identity.capture
        framed = frames_columns(capture.format)
        return StoredSample(
            sample_id=tokens.sample_id,
            input_ids=tokens.input_ids,
            loss_mask=tokens.loss_mask,
            target_argmax=captured.target_argmax,
            target_log_normalizer=captured.target_log_normalizer,
            columns=encode_fields(capture.fields, [*captured.aux_hidden_states, target], errors, framed=framed),
            framed=framed,
            num_in_vocab=captured.num_in_vocab,
            vocab_mass=captured.vocab_mass,
        )

    def _place(self, sample: TokenSample) -> str:
        row = self._plan.table[sample.sample_id]
        return f"{self._plan.table.meta.sources[row.source].name}, row {row.row}"


def token_sample(table: TokenTable, row: int) -> TokenSample:
    """Return a row of the token table as what goes through the target."""
    tokens = table[row]
    return TokenSample(row, tokens.input_ids, tokens.loss_mask)

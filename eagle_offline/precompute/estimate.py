"""What every choice of encodings would cost, told before any of the work: bytes, hours, and what is lost.

Rows are counted in the tokenised corpus. What a row takes is measured: the target runs over a few batches of typical
length, and their states are really encoded in every way. Without that probe, typical compression is assumed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from eagle_offline.cache import codec
from eagle_offline.cache.arrow import shard_schema
from eagle_offline.cache.choices import EncodingChoice, StateEncoding, TargetEncoding
from eagle_offline.cache.layout import (
    EXACT_MANTISSA_BITS,
    MERGED_BATCH_BYTES,
    STORED_DTYPES,
    TARGET_PROBS,
    FieldLayout,
)
from eagle_offline.capture_settings import EstimateSettings, PrecomputeSettings
from eagle_offline.devices import resolve_device
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute.advice import advise, command_as_asked
from eagle_offline.precompute.estimate_record import Corpus, Cost, Estimate
from eagle_offline.precompute.fill import target_files
from eagle_offline.precompute.plan import aux_layer_ids, draft_vocab, encoding_choice, resolve_config
from eagle_offline.precompute.probe import Measurements, probe_target
from eagle_offline.progress import Progress
from eagle_offline.target.load import DTYPES, TargetSource
from eagle_offline.text.token_table import META_FILE, QUARANTINE_FILE, TOKENS_FILE, TokenTable
from eagle_offline.vocab import DraftVocab

_STATES: tuple[tuple[StateEncoding, int | None], ...] = (
    ("planes", None),
    ("raw", None),
    ("planes", 5),
    ("planes", 4),
    ("planes", 3),
    ("planes", 2),
    ("fp8", None),
)
# From what loses nothing to what loses most.
_TARGETS: tuple[TargetEncoding, ...] = ("factored", "dense", "topk")

# Beside the float columns: id, ids and mask a token, argmax and normaliser a position, and offsets.
_SAMPLE_BYTES, _TOKEN_BYTES, _POSITION_BYTES = 8 + 4 * 4, 4 + 1, 4 + 4

# Manifest, index and status; a shard's and a sample's entries in records and index.
_PAPER_BYTES, _SHARD_PAPER_BYTES, _SAMPLE_PAPER_BYTES = 9000, 1200, 60 + 44

# Of Zarr: an array's document and its index, and what a sample of an array adds to them.
_ARRAY_BYTES, _CHUNK_BYTES = 900, 32


def estimate_cache(
    settings: EstimateSettings, table: TokenTable, tokenizer: Any, directory: Path, stop: StopRequest
) -> Estimate:
    """Return what every choice would cost; nothing is written, and the target is let go of.

    Args:
        settings: as for precompute, which it is.
        table, tokenizer: the corpus.
        directory: where the cache would go, if not to an object store; the disk below it is looked at.
        stop: is watched between batches.

    Raises:
        StoppedEarly: asked to stop. EagleOfflineError: see `eagle_offline.errors`.
    """
    source, config = resolve_config(settings, weights=settings.probe)
    text_config = config.get_text_config()
    vocab = draft_vocab(settings, table, tokenizer)
    ids = aux_layer_ids(settings, text_config.num_hidden_layers)
    layouts = {choice: choice.fields(ids, text_config.hidden_size, vocab.size) for choice in choices(settings)}
    corpus = _count(table)
    if settings.store_url is not None:
        # Shards are made there before they go up.
        assert settings.output_dir is not None
        directory = settings.output_dir.absolute()
    disk = next(place for place in (directory, *directory.parents) if place.is_dir())
    room = shutil.disk_usage(disk).free
    # What stands there already, tokens and shards that were begun, is part of what is needed.
    if settings.output_dir is not None:
        room += sum(path.stat().st_size for path in settings.output_dir.rglob("*") if path.is_file())
    device = resolve_device(settings.device)
    found = None
    if settings.probe:
        every = {layout for fields in layouts.values() for layout in fields}
        found = probe_target(settings, table, vocab, source, ids, every, disk, device, stop)
    fixed = _fixed_bytes(settings, table, source, config, vocab)
    costs = [_cost(settings, choice, fields, corpus, fixed, room, found) for choice, fields in layouts.items()]
    asked = command_as_asked(settings, costs)
    command, advice = advise(settings, costs, fixed, room, directory)
    return Estimate(
        target=settings.target_model,
        device=device,
        aux_layer_ids=ids,
        hidden_size=text_config.hidden_size,
        draft_vocab_size=vocab.size,
        corpus=corpus,
        probe=None if found is None else found.probe,
        directory=str(directory),
        free_bytes=room,
        fixed_bytes=fixed,
        choices=costs,
        asked=asked,
        command=command,
        advice=advice,
    )


def choices(settings: PrecomputeSettings) -> list[EncodingChoice]:
    """Return the choices that are compared, the settings' own among them, without those that their dtype excludes."""
    own = encoding_choice(settings)
    states = {*_STATES, (own.state_encoding, own.mantissa_bits)}
    return [
        replace(
            own,
            state_encoding=encoding,
            mantissa_bits=bits,
            target_encoding=target,
            top_k=own.top_k if target == "topk" else None,
        )
        for target in _TARGETS
        for encoding, bits in sorted(states, key=_loss_of_states)
        if encoding != "planes" or own.dtype == "bf16"
    ]


def _loss_of_states(states: tuple[StateEncoding, int | None]) -> tuple[float, str]:
    """Return what sorts states from what loses nothing on; fp8 has three mantissa bits and fewer exponents."""
    encoding, bits = states
    return -2.5 if encoding == "fp8" else -(bits or EXACT_MANTISSA_BITS), encoding


def _count(table: TokenTable) -> Corpus:
    """Return what stands in a token table."""
    meta, firsts = table.meta, 0
    with Progress("count", len(table), unit="rows") as progress:
        for row in range(len(table)):
            mask = table[row].loss_mask
            # Beside supervised tokens, the position before each answer is stored: see `supervised_positions`.
            firsts += int(np.count_nonzero(mask[1:] > mask[:-1]))
            progress.advance()
    return Corpus(
        num_samples=meta.num_rows,
        num_tokens=meta.num_tokens,
        num_supervised=meta.num_supervised,
        num_target_positions=meta.num_supervised + firsts,
        num_left_out=meta.num_quarantined,
    )


def _fixed_bytes(
    settings: PrecomputeSettings, table: TokenTable, source: TargetSource, config: Any, vocab: DraftVocab
) -> int:
    """Return what a cache takes whatever is chosen: its companions, its tokens and its papers."""
    embeddings = config.dtype if isinstance(config.dtype, torch.dtype) else DTYPES[settings.compute_dtype or "fp32"]
    num_values = vocab.vocab_size * config.get_text_config().hidden_size
    head_bytes = num_values * STORED_DTYPES[settings.dtype]
    if getattr(config, "tie_word_embeddings", False) and embeddings == DTYPES[settings.dtype]:
        head_bytes = 0
    files = set(target_files(source))
    files |= {table.directory / name for name in (TOKENS_FILE, QUARANTINE_FILE, META_FILE)}
    num_shards = -(-len(table) // settings.shard_size)
    papers = _PAPER_BYTES + num_shards * _SHARD_PAPER_BYTES + len(table) * _SAMPLE_PAPER_BYTES
    companions = head_bytes + num_values * embeddings.itemsize + vocab.size * 8
    return companions + sum(path.stat().st_size for path in files) + papers


def _cost(
    settings: PrecomputeSettings,
    choice: EncodingChoice,
    fields: Sequence[FieldLayout],
    corpus: Corpus,
    fixed: int,
    room: int,
    found: Measurements | None,
) -> Cost:
    rows = {"tokens": corpus.num_tokens, "supervised_positions": corpus.num_target_positions}
    row_bytes = found.row_bytes if found is not None else codec.estimated_row_bytes
    shard_bytes = sum(rows[layout.rows] * row_bytes(layout) for layout in fields)
    shard_bytes += corpus.num_tokens * _TOKEN_BYTES + corpus.num_target_positions * _POSITION_BYTES
    shard_bytes = int(shard_bytes + _wrapping_bytes(settings, fields, corpus, shard_bytes))
    # What goes up to a store is dropped here, shard after shard.
    at_once = 1.0 if settings.store_url is None else min(1.0, settings.shard_size / max(corpus.num_samples, 1))
    held = math.ceil(shard_bytes * at_once)
    states = [layout for layout in fields if layout.name != TARGET_PROBS]
    targets = [layout for layout in fields if layout.name == TARGET_PROBS]
    hours = None
    if found is not None:
        seconds = found.token_seconds * corpus.num_tokens
        seconds += sum(found.row_seconds(layout) * rows[layout.rows] for layout in fields)
        seconds += shard_bytes / (found.probe.disk_bytes_per_second or math.inf)
        hours = seconds / 3600
    return Cost(
        state_encoding=choice.state_encoding,
        mantissa_bits=choice.mantissa_bits,
        target_encoding=choice.target_encoding,
        top_k=fields[-1].top_k,
        chosen=choice == encoding_choice(settings),
        num_bytes=shard_bytes + fixed,
        epoch_bytes=shard_bytes,
        disk_bytes=held + fixed,
        bytes_per_token=shard_bytes / max(corpus.num_tokens, 1),
        losses=list(dict.fromkeys(loss for layout in fields for loss in codec.losses_of(layout))),
        state_error=None if found is None else found.error(states),
        target_error=None if found is None else found.error(targets),
        compressed_share=_compressed_share(fields, rows, row_bytes),
        hours=hours,
        fits=held + fixed <= room,
    )


def _compressed_share(fields: Sequence[FieldLayout], rows: dict[str, int], row_bytes: Any) -> float | None:
    stored = plain = 0.0
    for layout in fields:
        compressible = codec.estimated_row_bytes(layout, 1.0) - codec.estimated_row_bytes(layout, 0.0)
        plain += rows[layout.rows] * compressible
        if compressible:
            stored += rows[layout.rows] * (row_bytes(layout) - codec.estimated_row_bytes(layout, 0.0))
    return stored / plain if plain else None


def _wrapping_bytes(
    settings: PrecomputeSettings, fields: Sequence[FieldLayout], corpus: Corpus, content_bytes: float
) -> float:
    """Return what a format puts around the content of all shards."""
    num_shards, num_columns = -(-corpus.num_samples // settings.shard_size), sum(map(_num_columns, fields))
    if settings.format == "zarr":
        return num_columns * (num_shards * _ARRAY_BYTES + corpus.num_samples * _CHUNK_BYTES)
    schema = shard_schema(fields, 0, "0" * 32)
    empty = _arrow_bytes(schema, 0)
    num_batches = num_shards + min(corpus.num_samples, content_bytes // MERGED_BATCH_BYTES)
    samples = corpus.num_samples * (_SAMPLE_BYTES + 8 * num_columns)
    return num_shards * empty + num_batches * (_arrow_bytes(schema, 1) - empty) + samples


def _num_columns(layout: FieldLayout) -> int:
    return len(codec.column_names(layout))


def _arrow_bytes(schema: pa.Schema, num_batches: int) -> int:
    """Return the size of an Arrow file with so many empty record batches."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for _ in range(num_batches):
            writer.write_batch(pa.RecordBatch.from_pylist([], schema))
    return sink.getvalue().size

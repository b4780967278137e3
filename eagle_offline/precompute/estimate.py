"""What every choice of encodings would cost, told before any of the work: bytes, hours, and what is lost.

Rows are counted in the tokenised corpus. What a row takes is measured: the target runs over a few batches of typical
length, and their states are really encoded in every way. Without that probe, typical compression is assumed.
"""

from __future__ import annotations

import gc
import math
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numcodecs import blosc, zstd
from pydantic import Field

from eagle_offline.cache import codec
from eagle_offline.cache.arrow import shard_schema
from eagle_offline.cache.choices import EncodingChoice, StateEncoding, TargetEncoding
from eagle_offline.cache.encodings import encoding_of
from eagle_offline.cache.formats import frames_columns
from eagle_offline.cache.layout import (
    EXACT_MANTISSA_BITS,
    LAST_HIDDEN_STATE,
    MERGED_BATCH_BYTES,
    STORED_DTYPES,
    TARGET_PROBS,
    FieldLayout,
    Frozen,
)
from eagle_offline.cache.samples import EncodingErrors, encode_fields
from eagle_offline.config import EstimateSettings, PrecomputeSettings
from eagle_offline.devices import resolve_device
from eagle_offline.errors import EagleOfflineError, StoppedEarly
from eagle_offline.interrupts import StopRequest
from eagle_offline.pages import text_facts, text_table
from eagle_offline.precompute.fill import _TARGET_FILES
from eagle_offline.precompute.plan import aux_layer_ids, draft_vocab, encoding_choice, resolve_config
from eagle_offline.progress import Progress
from eagle_offline.supervision import Head
from eagle_offline.target.capture import Capture, CapturedSample, TokenSample, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import read_head
from eagle_offline.target.load import DTYPES, TargetSource, load_model
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

PROBE_SECONDS = 20.0

# Where the probed batches lie among all tokens when samples are in order of length: the typical one first.
_PROBE_SHARES = (1 / 2, 1 / 6, 5 / 6)

# Rows of a batch that are encoded in every way, spread over its samples.
_ENCODED_ROWS = 1024

_DISK_PIECE, _DISK_PIECES, _DISK_SECONDS = 8 << 20, 8, 2.0

# Beside the float columns: id, ids and mask a token, argmax and normaliser a position, and offsets.
_SAMPLE_BYTES, _TOKEN_BYTES, _POSITION_BYTES = 8 + 4 * 4, 4 + 1, 4 + 4

# Manifest, index and status; a shard's and a sample's entries in records and index.
_PAPER_BYTES, _SHARD_PAPER_BYTES, _SAMPLE_PAPER_BYTES = 9000, 1200, 60 + 44

# Of Zarr: an array's document and its index, and what a sample of an array adds to them.
_ARRAY_BYTES, _CHUNK_BYTES = 900, 32


class Corpus(Frozen):
    """What is counted: samples, tokens, supervised tokens, positions with a stored target, and rows left out."""

    num_samples: int
    num_tokens: int
    num_supervised: int
    num_target_positions: int
    num_left_out: int


class Probe(Frozen):
    """What was measured on how much.

    Attributes:
        num_batches, num_tokens: timed; seconds: what the target took for them.
        num_nonfinite: samples among them with NaN or infinite states, which precompute would not store.
        tokens_per_second: of the target alone.
        disk_bytes_per_second: written durably; None where nothing could be written.
    """

    num_batches: int
    num_tokens: int
    seconds: float
    num_nonfinite: int
    tokens_per_second: float
    disk_bytes_per_second: float | None


class Cost(Frozen):
    """What one choice would cost.

    Attributes:
        state_encoding, mantissa_bits, target_encoding, top_k: the choice, as settings of precompute.
        chosen: it is the settings' own.
        num_bytes: of the whole cache; epoch_bytes: of it, what an epoch of training reads: the shards.
        bytes_per_token: of the shards.
        losses: of any column beyond its dtype; empty for an exact choice.
        state_error: root of ``Σ (x̂ − x)² / Σ x²`` over states, None without a probe; target_error: of probabilities.
        compressed_share: what compression left of the columns that compress, None where none does.
        hours: of one process on this device, None without a probe.
        fits: into what is free.
    """

    state_encoding: StateEncoding
    mantissa_bits: int | None
    target_encoding: TargetEncoding
    top_k: int | None
    chosen: bool
    num_bytes: int
    epoch_bytes: int
    bytes_per_token: float
    losses: list[str]
    state_error: float | None
    target_error: float | None
    compressed_share: float | None
    hours: float | None
    fits: bool

    @property
    def name(self) -> str:
        """Return the choice in words."""
        bits = "" if self.mantissa_bits is None else f" {self.mantissa_bits} bits"
        top = "" if self.top_k is None else f" {self.top_k}"
        return f"{self.state_encoding}{bits} + {self.target_encoding}{top}"


class Estimate(Frozen):
    """What a precompute would cost, by every choice.

    Attributes:
        target: as given; device: where it would run.
        aux_layer_ids, hidden_size, draft_vocab_size: of what is stored.
        corpus, probe: what the figures come from; no probe was made when None.
        directory, free_bytes: where the cache would go, and what it may take there.
        fixed_bytes: of every choice: head, embeddings, tokens and the like.
        choices: from what loses nothing to what loses most.
        command: how to go on with the smallest exact choice that fits, else the best one that does; None for none.
        advice: why that one, or the way out.
    """

    target: str
    device: str
    aux_layer_ids: list[int]
    hidden_size: int
    draft_vocab_size: int
    corpus: Corpus
    probe: Probe | None
    directory: str
    free_bytes: int
    fixed_bytes: int
    choices: list[Cost] = Field(min_length=1)
    command: str | None
    advice: str


@dataclass
class _Measured:
    """What encoding rows of one field cost: rows, stored bytes, seconds, and what was lost."""

    num_rows: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    errors: EncodingErrors = field(default_factory=EncodingErrors)


@dataclass
class _Measurements:
    """What the probe found: ``fields`` for every layout, and seconds a token of the target and of probabilities."""

    probe: Probe
    fields: dict[FieldLayout, _Measured]
    token_seconds: float
    probs_seconds: float

    def row_bytes(self, layout: FieldLayout) -> float:
        measured = self.fields[layout]
        return measured.num_bytes / max(measured.num_rows, 1)

    def row_seconds(self, layout: FieldLayout) -> float:
        measured = self.fields[layout]
        made = self.probs_seconds if layout.name == TARGET_PROBS else 0.0
        return measured.seconds / max(measured.num_rows, 1) + made

    def error(self, layouts: Sequence[FieldLayout]) -> float | None:
        """Return the relative error of some fields together, None for no fields."""
        sums = [entry for layout in layouts for entry in self.fields[layout].errors.record().values()]
        size = sum(entry.squared_values for entry in sums)
        lost = math.sqrt(sum(entry.squared_error for entry in sums) / size) if size else 0.0
        return lost if layouts else None


def estimate_cache(
    settings: EstimateSettings, table: TokenTable, tokenizer: Any, directory: Path, stop: StopRequest
) -> Estimate:
    """Return what every choice would cost; nothing is written, and the target is let go of.

    Args:
        settings: as for precompute, which it is.
        table, tokenizer: the corpus.
        directory: where the cache would go; the disk below it is looked at.
        stop: is watched between batches.

    Raises:
        StoppedEarly: asked to stop. EagleOfflineError: see `eagle_offline.errors`.
    """
    source, config = resolve_config(settings)
    text_config = config.get_text_config()
    vocab = draft_vocab(settings, table, tokenizer)
    ids = aux_layer_ids(settings, text_config.num_hidden_layers)
    layouts = {choice: choice.fields(ids, text_config.hidden_size, vocab.size) for choice in choices(settings)}
    corpus = _count(table)
    room = shutil.disk_usage(directory).free
    # What stands there already, tokens and shards that were begun, is part of what is needed.
    if settings.output_dir is not None:
        room += sum(path.stat().st_size for path in settings.output_dir.rglob("*") if path.is_file())
    device = resolve_device(settings.device)
    found = None
    if settings.probe:
        every = {layout for fields in layouts.values() for layout in fields}
        with _let_go(settings, device):
            found = _probe(settings, table, vocab, source, ids, every, device, stop)
        disk = _disk_bytes_per_second(directory)
        found.probe = found.probe.model_copy(update={"disk_bytes_per_second": disk})
    fixed = _fixed_bytes(settings, table, source, config, vocab)
    costs = [_cost(settings, choice, fields, corpus, fixed, room, found) for choice, fields in layouts.items()]
    command, advice = _advise(settings, costs, corpus, fixed, room, directory)
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
    files = {path for pattern in _TARGET_FILES for path in source.directory.glob(pattern)}
    files = {path for path in files if not path.name.endswith(".index.json")}
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
    found: _Measurements | None,
) -> Cost:
    rows = {"tokens": corpus.num_tokens, "supervised_positions": corpus.num_target_positions}
    row_bytes = found.row_bytes if found is not None else codec.estimated_row_bytes
    shard_bytes = sum(rows[layout.rows] * row_bytes(layout) for layout in fields)
    shard_bytes += corpus.num_tokens * _TOKEN_BYTES + corpus.num_target_positions * _POSITION_BYTES
    shard_bytes = int(shard_bytes + _wrapping_bytes(settings, fields, corpus, shard_bytes))
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
        bytes_per_token=shard_bytes / max(corpus.num_tokens, 1),
        losses=list(dict.fromkeys(loss for layout in fields for loss in codec.losses_of(layout))),
        state_error=None if found is None else found.error(states),
        target_error=None if found is None else found.error(targets),
        compressed_share=_compressed_share(fields, rows, row_bytes),
        hours=hours,
        fits=shard_bytes + fixed <= room,
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


def _probe(
    settings: PrecomputeSettings,
    table: TokenTable,
    vocab: DraftVocab,
    source: TargetSource,
    layer_ids: list[int],
    layouts: set[FieldLayout],
    device: str,
    stop: StopRequest,
) -> _Measurements:
    """Run the target over a few batches and encode their states in every way.

    Raises:
        StoppedEarly: asked to stop. EagleOfflineError: out of memory, or no state is finite.
    """
    model = load_model(source, device, settings.compute_dtype)
    target = HFEagle3TargetModel(model, layer_ids)
    check_capture(target, read_head(model), _sample(table, 0))
    head = read_head(model).to(device, DTYPES[settings.dtype])
    selected = torch.from_numpy(vocab.selected_token_ids)
    capture = Capture(target, head, DTYPES[settings.dtype], selected)
    return _measure(settings, table, capture, head.select(selected), layouts, stop)


@contextmanager
def _let_go(settings: PrecomputeSettings, device: str) -> Iterator[None]:
    """Say in one line that memory did not suffice, and free what the target took."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EagleOfflineError(
            f"{device}: out of memory with --batch-size {settings.batch_size} and --seq-length {settings.seq_length}: "
            "choose smaller ones, another --compute-dtype or --device, or --no-probe"
        ) from error
    finally:
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    settings: PrecomputeSettings,
    table: TokenTable,
    capture: Capture,
    selected_head: Head,
    layouts: set[FieldLayout],
    stop: StopRequest,
) -> _Measurements:
    fields = {layout: _Measured() for layout in layouts}
    num_batches = num_tokens = num_nonfinite = num_probs = 0
    target_seconds = probs_seconds = 0.0
    first, *others = probe_batches(table.lengths, settings.batch_size)
    begun = time.monotonic()
    with Progress("probe", 0, unit="tok") as progress:
        # The first batch comes twice: once to warm up, unless that alone takes all the time there is.
        for number, rows in enumerate((first, first, *others)):
            samples = [_sample(table, int(row)) for row in rows]
            started = time.monotonic()
            captured = list(capture.run(samples, settings.batch_size))
            seconds = time.monotonic() - started
            if stop.requested:
                raise StoppedEarly("stopped by a signal while the target was probed; nothing was kept but tokens")
            is_late = time.monotonic() - begun > PROBE_SECONDS
            if number == 0 and not is_late:
                continue
            num_batches, target_seconds = num_batches + 1, target_seconds + seconds
            num_tokens += sum(len(sample.input_ids) for sample in samples)
            progress.reach(num_tokens)
            finite = [sample for sample in captured if sample.finite]
            num_nonfinite += len(captured) - len(finite)
            for sample in finite:
                probs, seconds = _encode_in_every_way(settings, sample, selected_head, fields)
                num_probs, probs_seconds = num_probs + probs, probs_seconds + seconds
            if is_late or time.monotonic() - begun > PROBE_SECONDS:
                break
    if not any(measured.num_rows for measured in fields.values()):
        raise EagleOfflineError(
            f"the target's states have NaN or infinite values as {settings.dtype} in every probed sample; "
            "try --dtype bf16 or another --compute-dtype, or --no-probe"
        )
    probe = Probe(
        num_batches=num_batches,
        num_tokens=num_tokens,
        seconds=target_seconds,
        num_nonfinite=num_nonfinite,
        tokens_per_second=num_tokens / max(target_seconds, 1e-9),
        disk_bytes_per_second=None,
    )
    return _Measurements(probe, fields, target_seconds / num_tokens, probs_seconds / max(num_probs, 1))


def probe_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return rows of the batches to probe: samples of like length, from the middle and the outer thirds of all tokens.

    Example:
        >>> [rows.tolist() for rows in probe_batches(np.array([9, 2, 5, 7, 5]), 2)]
        [[3, 0], [2, 4], [3, 0]]
    """
    order = np.argsort(lengths, kind="stable")
    tokens = np.cumsum(lengths[order], dtype=np.int64)
    places = np.searchsorted(tokens, [share * tokens[-1] for share in _PROBE_SHARES])
    starts = np.clip(places - (batch_size - 1) // 2, 0, max(len(order) - batch_size, 0))
    return [order[start : start + batch_size] for start in starts]


def _encode_in_every_way(
    settings: PrecomputeSettings,
    sample: CapturedSample,
    selected_head: Head,
    fields: dict[FieldLayout, _Measured],
) -> tuple[int, float]:
    """Add what some rows of a sample cost in every layout; return rows and seconds of making probabilities."""
    share = max(1, _ENCODED_ROWS // settings.batch_size)
    final = _some(sample.last_hidden_state, share)
    started = time.monotonic()
    with torch.inference_mode():
        probs = selected_head.logits(final.to(selected_head.weight.device)).softmax(dim=-1).cpu()
    seconds = time.monotonic() - started
    values = {LAST_HIDDEN_STATE: final, TARGET_PROBS: probs}
    names = sorted({layout.name for layout in fields if layout.rows == "tokens"}, key=_layer_of)
    values |= {name: _some(states, share) for name, states in zip(names, sample.aux_hidden_states, strict=True)}
    for layout, measured in fields.items():
        exact = values[layout.name]
        started = time.monotonic()
        framed = frames_columns(settings.format)
        stored = encode_fields([layout], [exact], measured.errors, framed=framed)
        sizes = [len(column) for column in stored] if framed else _compressed_sizes(settings, layout, stored)
        measured.seconds += time.monotonic() - started
        measured.num_rows += len(exact)
        measured.num_bytes += sum(sizes)
    return len(final), seconds


def _layer_of(name: str) -> int:
    return int(name.rpartition("_")[2])


def _some(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return at most so many rows, spread evenly."""
    return values[:: max(1, -(-len(values) // count))].contiguous()


def _compressed_sizes(
    settings: PrecomputeSettings, layout: FieldLayout, columns: Sequence[bytes | memoryview]
) -> list[int]:
    """Return what Zarr's compressor leaves of columns."""
    sizes = []
    for column, content in zip(encoding_of(layout).columns(layout), columns, strict=True):
        if settings.compressor == "blosc":
            wide = STORED_DTYPES[layout.dtype] if column.suffix in ("", "probs") else 1
            values = np.frombuffer(content, f"u{wide}")
            shuffle = blosc.SHUFFLE if wide > 1 else blosc.NOSHUFFLE
            sizes.append(len(blosc.compress(values, b"zstd", codec.ZSTD_LEVEL, shuffle, 0)))
        else:
            sizes.append(len(zstd.compress(content, codec.ZSTD_LEVEL)))
    return sizes


def _sample(table: TokenTable, row: int) -> TokenSample:
    tokens = table[row]
    return TokenSample(row, tokens.input_ids, tokens.loss_mask)


def _disk_bytes_per_second(directory: Path) -> float | None:
    """Return how fast a file grows durably, None where none can be written; nothing of it stays."""
    piece, written = os.urandom(_DISK_PIECE), 0
    started = time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            while written < _DISK_PIECES * _DISK_PIECE and time.monotonic() - started < _DISK_SECONDS:
                written += file.write(piece) or 0
            os.fsync(file.fileno())
    except OSError:
        return None
    return written / max(time.monotonic() - started, 1e-9)


def _advise(
    settings: EstimateSettings, costs: Sequence[Cost], corpus: Corpus, fixed: int, room: int, directory: Path
) -> tuple[str | None, str]:
    """Return how to go on, and why so."""
    fitting = [cost for cost in costs if cost.fits]
    exact = [cost for cost in fitting if not cost.losses]
    if exact:
        best = min(exact, key=lambda cost: cost.num_bytes)
        return _command(settings, best), f"go on with {best.name}, the smallest that loses nothing and fits:"
    if fitting:
        best = fitting[0]
        exact_bytes = min(cost.num_bytes for cost in costs if not cost.losses)
        return _command(settings, best), (
            f"nothing exact fits: {size(exact_bytes)} needed, {size(room)} free at {directory}; free some space, "
            f"choose another --output-dir, or accept a loss ({', '.join(best.losses)}):"
        )
    smallest = min(costs, key=lambda cost: cost.num_bytes)
    share = max(0, int(100 * (room - fixed) / max(smallest.epoch_bytes, 1)))
    fewer = f"take fewer conversations (--split: about {share}% of them fit), " if share else ""
    return None, (
        f"nothing fits: the smallest, {smallest.name}, needs {size(smallest.num_bytes)}, {size(room)} free at "
        f"{directory}; free some space, choose another --output-dir, {fewer}or store fewer --aux-layer-ids"
    )


def _command(settings: EstimateSettings, cost: Cost) -> str:
    """Return the command line that goes on with a choice."""
    chosen = {
        "state_encoding": cost.state_encoding,
        "mantissa_bits": cost.mantissa_bits,
        "target_encoding": cost.target_encoding,
        "top_k": settings.top_k if cost.target_encoding == "topk" else None,
        "output_dir": settings.output_dir or "C",
        "resume": True,
        "dry_run": False,
    }
    words = ["eagle-offline", "precompute"]
    for name, info in PrecomputeSettings.model_fields.items():
        value = chosen.get(name, getattr(settings, name))
        if value == info.default:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


def size(num_bytes: float) -> str:
    """Return bytes in words.

    Example:
        >>> size(123_456_789)
        '123.5 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def duration(hours: float) -> str:
    """Return a time in words.

    Example:
        >>> duration(0.25)
        '15 min'
    """
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 30 else f"{hours * 3600:.0f} s"


def render_text(estimate: Estimate) -> str:
    """Return what `estimate` prints."""
    corpus, probe = estimate.corpus, estimate.probe
    left_out = f", {corpus.num_left_out:,} rows left out" if corpus.num_left_out else ""
    facts = [
        (
            "target",
            f"{estimate.target}, layers {' '.join(map(str, estimate.aux_layer_ids))}, width {estimate.hidden_size}",
        ),
        ("draft vocabulary", f"{estimate.draft_vocab_size:,} tokens"),
        (
            "corpus",
            f"{corpus.num_samples:,} samples, {corpus.num_tokens:,} tokens, "
            f"{corpus.num_supervised:,} supervised{left_out}",
        ),
        ("free", f"{size(estimate.free_bytes)} at {estimate.directory}"),
        ("probe", _probe_in_words(estimate.device, probe)),
    ]
    head = ("", "whole", "an epoch", "KiB a token", "time", "state error", "", "  lost")
    rows = [_row(cost) for cost in estimate.choices]
    notes = ["→ what the flags say. Lost is beyond the stored dtype. An epoch is what training reads."]
    if probe is not None:
        notes.append(f"Time is of one process on {estimate.device}; N processes (--process-count N) divide them.")
    going_on = [estimate.advice] if estimate.command is None else [estimate.advice, f"  {estimate.command}"]
    lines = [*text_facts(facts), "", *text_table([head, *rows]), "", *notes, "", *going_on]
    return "\n".join(line.rstrip() for line in lines)


def _probe_in_words(device: str, probe: Probe | None) -> str:
    if probe is None:
        return f"none: typical compression ({codec.TYPICAL_COMPRESSED_SHARE:.0%}) is assumed; no times, no errors"
    bad = f"; {probe.num_nonfinite} samples have states that are not finite" if probe.num_nonfinite else ""
    disk = probe.disk_bytes_per_second
    written = "" if disk is None else f", {size(disk)}/s written"
    return f"{probe.num_tokens:,} tokens on {device}, {probe.tokens_per_second:,.0f}/s{written}{bad}"


def _row(cost: Cost) -> list[str]:
    error = "–" if cost.state_error is None else f"{cost.state_error:.2%}" if cost.state_error else "0"
    return [
        f"{'→' if cost.chosen else ' '} {cost.name}",
        size(cost.num_bytes),
        size(cost.epoch_bytes),
        f"{cost.bytes_per_token / 1024:.2f}",
        "–" if cost.hours is None else duration(cost.hours),
        error,
        "fits" if cost.fits else "does not fit",
        f"  {', '.join(cost.losses) or 'nothing'}",
    ]

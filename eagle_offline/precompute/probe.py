"""Measures what a row takes: the target over a few batches of typical length, every way to encode, and the disk."""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numcodecs import blosc, zstd

from eagle_offline.cache.encodings import encoding_of
from eagle_offline.cache.formats import frames_columns
from eagle_offline.cache.layout import LAST_HIDDEN_STATE, STORED_DTYPES, TARGET_PROBS, FieldLayout
from eagle_offline.cache.samples import EncodingErrors, encode_fields
from eagle_offline.cache.zarr_shards import ZSTD_LEVEL
from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.errors import EagleOfflineError, StoppedEarly, UsageError
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute.batch_probe import CPU_BATCH_TOKENS, find_batch_tokens
from eagle_offline.precompute.estimate_record import Probe
from eagle_offline.progress import Progress
from eagle_offline.supervision import Head
from eagle_offline.target.batching import Batching
from eagle_offline.target.capture import Capture, CapturedSample, TokenSample, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import read_head
from eagle_offline.target.load import DTYPES, TargetSource, load_model
from eagle_offline.target.spread import load_spread
from eagle_offline.text.token_table import TokenTable
from eagle_offline.vocab import DraftVocab

PROBE_SECONDS = 20.0

# Where the probed batches lie among all tokens when samples are in order of length: the typical one first.
_PROBE_SHARES = (1 / 2, 1 / 6, 5 / 6)

# Rows of a batch that are encoded in every way, spread over its samples.
_ENCODED_ROWS = 1024

_DISK_PIECE, _DISK_PIECES, _DISK_SECONDS = 8 << 20, 8, 2.0


@dataclass
class Measured:
    """What encoding rows of one field cost: rows, stored bytes, seconds, and what was lost."""

    num_rows: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    errors: EncodingErrors = field(default_factory=EncodingErrors)


@dataclass
class Measurements:
    """What the probe found: ``fields`` for every layout, and seconds a token of the target and of probabilities."""

    probe: Probe
    fields: dict[FieldLayout, Measured]
    token_seconds: float
    probs_seconds: float

    def row_bytes(self, layout: FieldLayout) -> float:
        """Return what a row of a field takes."""
        measured = self.fields[layout]
        return measured.num_bytes / max(measured.num_rows, 1)

    def row_seconds(self, layout: FieldLayout) -> float:
        """Return how long a row of a field takes to make and to encode."""
        measured = self.fields[layout]
        made = self.probs_seconds if layout.name == TARGET_PROBS else 0.0
        return measured.seconds / max(measured.num_rows, 1) + made

    def error(self, layouts: Sequence[FieldLayout]) -> float | None:
        """Return the relative error of some fields together, None for no fields."""
        sums = [entry for layout in layouts for entry in self.fields[layout].errors.record().values()]
        size = sum(entry.squared_values for entry in sums)
        lost = math.sqrt(sum(entry.squared_error for entry in sums) / size) if size else 0.0
        return lost if layouts else None


def probe_target(
    settings: PrecomputeSettings,
    table: TokenTable,
    vocab: DraftVocab,
    source: TargetSource,
    layer_ids: list[int],
    layouts: set[FieldLayout],
    directory: Path,
    device: str,
    stop: StopRequest,
) -> Measurements:
    """Run the target over a few batches, encode their states in every way, and write a little to the directory's disk.

    Nothing of the target or of what was written stays.

    Raises:
        StoppedEarly: asked to stop. EagleOfflineError: out of memory, or no state is finite.
    """
    with _let_go(settings, device):
        found = _run_target(settings, table, vocab, source, layer_ids, layouts, device, stop)
    disk = _disk_bytes_per_second(directory)
    found.probe = found.probe.model_copy(update={"disk_bytes_per_second": disk})
    return found


def _run_target(
    settings: PrecomputeSettings,
    table: TokenTable,
    vocab: DraftVocab,
    source: TargetSource,
    layer_ids: list[int],
    layouts: set[FieldLayout],
    device: str,
    stop: StopRequest,
) -> Measurements:
    if settings.tensor_parallel_size > 1:
        raise UsageError(
            f"--tensor-parallel-size {settings.tensor_parallel_size}: one process probes; spread the target with "
            "--device-map auto in its stead, or add --no-probe"
        )
    load = load_model if settings.device_map is None else partial(load_spread, device_map=settings.device_map)
    model = load(source, device, settings.compute_dtype)
    target = HFEagle3TargetModel(model, layer_ids)
    target.position_limits.check(int(table.lengths.max()))
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
            f"{device}: out of memory with --seq-length {settings.seq_length}: choose a smaller one, another "
            "--compute-dtype or --device, or --no-probe"
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
) -> Measurements:
    fields = {layout: Measured() for layout in layouts}
    num_batches = num_tokens = num_nonfinite = num_probs = 0
    target_seconds = probs_seconds = 0.0
    first, *others = probe_batches(table.lengths, _batching(settings, table, capture, selected_head.weight.device))
    begun = time.monotonic()
    with Progress("probe", 0, unit="tok") as progress:
        # The first batch comes twice: once to warm up, unless that alone takes all the time there is.
        for number, rows in enumerate((first, first, *others)):
            samples = [_sample(table, int(row)) for row in rows]
            started = time.monotonic()
            captured = [sample for batch in capture.run(samples) for sample in batch]
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
                share = max(1, _ENCODED_ROWS // len(samples))
                probs, seconds = _encode_in_every_way(settings, sample, share, selected_head, fields)
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
    return Measurements(probe, fields, target_seconds / num_tokens, probs_seconds / max(num_probs, 1))


def _batching(settings: PrecomputeSettings, table: TokenTable, capture: Capture, device: torch.device) -> Batching:
    """Return how much a precompute with these settings would put through the target at once."""
    if settings.batch_size is not None or settings.max_batch_tokens is not None:
        return Batching(settings.batch_size, settings.max_batch_tokens)
    found = CPU_BATCH_TOKENS if device.type == "cpu" else find_batch_tokens(capture, table, str(device))
    return Batching(max_batch_tokens=found)


def probe_batches(lengths: np.ndarray, batching: Batching) -> list[np.ndarray]:
    """Return rows of the batches to probe: samples of like length, from the middle and the outer thirds of all tokens.

    Example:
        >>> [rows.tolist() for rows in probe_batches(np.array([9, 2, 5, 7, 5]), Batching(batch_size=2))]
        [[0, 3], [2, 4], [0, 3]]
    """
    order = np.argsort(lengths, kind="stable")
    tokens = np.cumsum(lengths[order], dtype=np.int64)
    places = np.searchsorted(tokens, [share * tokens[-1] for share in _PROBE_SHARES])
    return [_batch_around(order, place, lengths, batching) for place in places]


def _batch_around(order: np.ndarray, place: int, lengths: np.ndarray, batching: Batching) -> np.ndarray:
    """Return rows of a batch of samples about as long as the one at a place of the order of lengths."""
    # As many as the place's own length lets in, it among them; where there are fewer, what there is.
    size = batching.batch_size or max(1, (batching.max_batch_tokens or 1) // int(lengths[order[place]]))
    start = int(np.clip(place - (size - 1) // 2, 0, max(len(order) - size, 0)))
    rows = order[start : start + size]
    return rows[batching.batches(lengths[rows].tolist())[0]]


def _encode_in_every_way(
    settings: PrecomputeSettings,
    sample: CapturedSample,
    share: int,
    selected_head: Head,
    fields: dict[FieldLayout, Measured],
) -> tuple[int, float]:
    """Add what some rows of a sample cost in every layout; return rows and seconds of making probabilities."""
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
            sizes.append(len(blosc.compress(values, b"zstd", ZSTD_LEVEL, shuffle, 0)))
        else:
            sizes.append(len(zstd.compress(content, ZSTD_LEVEL)))
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

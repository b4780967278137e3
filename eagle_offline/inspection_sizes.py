"""What a cache takes on disk, what for, and what encoding saves and costs."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from eagle_offline.cache.codec import column_names, losses_of
from eagle_offline.cache.index import SampleIndex
from eagle_offline.cache.layout import (
    EMBEDDINGS_FILE,
    HEAD_FILE,
    TARGET_DIRECTORY,
    TOKENS_DIRECTORY,
    VOCAB_DIRECTORY,
    FieldLayout,
)
from eagle_offline.cache.manifest import Manifest
from eagle_offline.inspection_record import FieldFacts, SizePart

_PLAIN_COLUMNS = {
    "ids and loss mask": ("sample_id", "input_ids", "loss_mask"),
    "target's choices": ("target_argmax", "target_log_normalizer"),
}

# Beyond what a disk can hold: a stranger's cache may record any size.
_MAX_BYTES = 1 << 62


def total(counts: np.ndarray) -> int:
    """Return the sum of a column of the index."""
    return int(counts.sum(dtype=np.int64))


def known(value: float) -> float | None:
    """Return a number if it is one."""
    return value if math.isfinite(value) else None


def size_facts(path: Path, manifest: Manifest, index: SampleIndex, sizes: dict[str, int | None]) -> dict[str, Any]:
    """Return the facts of bytes: how many, what for, and what the values were before they were encoded."""
    target, fields = manifest.identity.target, manifest.identity.capture.fields
    columns = _column_bytes(fields, index)
    tokens, shard_bytes = total(index.num_tokens), sum(_size(entry.file_bytes) for entry in index.entries)
    rows = {"tokens": tokens, "supervised_positions": total(index.num_target_positions)}
    raw_states = _size(2 * tokens * target.num_layers * target.hidden_size)
    counted = {*manifest.files, *(entry.file for entry in index.entries)}
    rest = {"records and the rest": sum(size or 0 for name, size in sizes.items() if name not in counted)}
    parts = {**_shard_parts(fields, columns, shard_bytes), **_companion_parts(manifest), **rest}
    return {
        "shard_bytes": shard_bytes,
        "companion_bytes": sum(_size(file.num_bytes) for file in manifest.files.values()),
        "bytes_per_token": shard_bytes / tokens if tokens > 0 else None,
        "column_bytes": columns,
        "raw_field_bytes": {field.name: field.row_bytes * rows[field.rows] for field in fields},
        "raw_states_bytes": raw_states,
        "share_of_raw_states": shard_bytes / raw_states if raw_states else None,
        "parts": _shares(parts),
        "free_bytes": shutil.disk_usage(path).free,
        "fields": [_field(field, rows[field.rows], columns, index) for field in fields],
    }


def _size(num_bytes: int) -> int:
    """Return a recorded size, none beyond what a disk can hold."""
    return max(0, min(num_bytes, _MAX_BYTES))


def _column_bytes(fields: list[FieldLayout], index: SampleIndex) -> dict[str, int]:
    names = [name for columns in _PLAIN_COLUMNS.values() for name in columns]
    names += [name for field in fields for name in column_names(field)]
    return {name: sum(_size(entry.column_bytes.get(name, 0)) for entry in index.entries) for name in names}


def _shard_parts(fields: list[FieldLayout], columns: dict[str, int], shard_bytes: int) -> dict[str, int]:
    parts = {field.name: sum(columns[name] for name in column_names(field)) for field in fields}
    parts |= {part: sum(columns[name] for name in names) for part, names in _PLAIN_COLUMNS.items()}
    return {**parts, "around them, in shards": max(0, shard_bytes - sum(columns.values()))}


def _companion_parts(manifest: Manifest) -> dict[str, int]:
    folders = {VOCAB_DIRECTORY: "draft vocabulary", TARGET_DIRECTORY: "tokenizer and configs"}
    names = {HEAD_FILE: "head", EMBEDDINGS_FILE: "embeddings", **folders, TOKENS_DIRECTORY: "tokenised corpus"}
    parts: Counter[str] = Counter()
    for name, file in manifest.files.items():
        parts[names.get(name.split("/")[0], "other files")] += _size(file.num_bytes)
    return dict(parts)


def _shares(parts: dict[str, int]) -> list[SizePart]:
    total = max(1, sum(parts.values()))
    return [SizePart(name=name, num_bytes=size, share=size / total) for name, size in parts.items()]


def _field(field: FieldLayout, num_rows: int, columns: dict[str, int], index: SampleIndex) -> FieldFacts:
    stored, values = sum(columns[name] for name in column_names(field)), num_rows * field.width
    losses = losses_of(field)
    errors = [entry.encoding_errors[field.name] for entry in index.entries if field.name in entry.encoding_errors]
    squared = sum(error.squared_error for error in errors), sum(error.squared_values for error in errors)
    return FieldFacts(
        **field.model_dump(include={"name", "rows", "width", "dtype", "encoding"}),
        values=values,
        stored_bytes=stored,
        bits_per_value=8 * stored / values if values > 0 else None,
        exact=not losses,
        losses=list(losses),
        relative_rms_error=known(math.sqrt(squared[0] / squared[1])) if squared[1] > 0 else None,
    )

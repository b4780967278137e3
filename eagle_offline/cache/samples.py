"""A sample as it is stored, whatever the format of the shard that holds it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from eagle_offline.cache import codec
from eagle_offline.cache.layout import EncodingError, FieldLayout, SampleTable

if TYPE_CHECKING:
    import torch

    from eagle_offline.cache.manifest import Identity

# Samples are read-only views of a memory map, and nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


@dataclass(frozen=True)
class StoredSample:
    """One sample as a shard holds it: tokens and supervision in the clear, float fields encoded.

    Attributes:
        sample_id: row of the token table.
        input_ids: int32 ``[T]``; loss_mask: uint8 ``[T]``.
        target_argmax: int32 ``[P]``; target_log_normalizer: float32 ``[P]``, at supervised positions.
        columns: stored bytes of every float field's columns, in layout order.
        framed: columns that compress are zstd frames (Arrow); else all are plain (Zarr compresses around them).
        num_in_vocab, vocab_mass: see `SampleTable`; known on the way into a shard, not read back from it.
    """

    sample_id: int
    input_ids: np.ndarray
    loss_mask: np.ndarray
    target_argmax: np.ndarray
    target_log_normalizer: np.ndarray
    columns: Sequence[bytes | memoryview]
    framed: bool = True
    num_in_vocab: int = 0
    vocab_mass: float = 0.0

    def digest(self) -> str:
        """Return xxh3_64 over the values in column order, each after its size in bytes (uint64, little-endian)."""
        digest = xxhash.xxh3_64()
        plain = (self.input_ids, self.loss_mask, self.target_argmax, self.target_log_normalizer)
        for part in (self.sample_id.to_bytes(8, "little"), *(array.tobytes() for array in plain), *self.columns):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        return self.input_ids.nbytes + self.loss_mask.nbytes + sum(len(column) for column in self.columns)

    def num_rows(self, field: FieldLayout) -> int:
        """Return how many rows a field has."""
        return len(self.input_ids) if field.rows == "tokens" else len(self.target_argmax)


class TableBuilder:
    """A shard's sample table in the making."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in SampleTable.model_fields}

    def __len__(self) -> int:
        return len(self._columns["row"])

    def add(self, sample: StoredSample, record_batch: int, row: int) -> None:
        """Add a sample that stands at a place."""
        entry = {
            "sample_id": sample.sample_id,
            "num_tokens": len(sample.input_ids),
            "num_supervised": int(sample.loss_mask.sum()),
            "num_target_positions": len(sample.target_argmax),
            "num_in_vocab": sample.num_in_vocab,
            "vocab_mass": float(f"{sample.vocab_mass:.6g}"),
            "record_batch": record_batch,
            "row": row,
            "digest": sample.digest(),
        }
        for name, value in entry.items():
            self._columns[name].append(value)

    def build(self) -> SampleTable:
        """Return the table."""
        return SampleTable(**self._columns)


class EncodingErrors:
    """What encoding costs the fields of a shard, added up as its samples are encoded."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, field: FieldLayout, encoded: Sequence[np.ndarray], values: torch.Tensor) -> None:
        """Add a field of a sample: as it was encoded, and as it was."""
        import torch

        decoded = codec.merge(field, [torch.from_numpy(plane) for plane in encoded]).float()
        exact, sums = values.float(), self._sums.setdefault(field.name, [0.0, 0.0])
        # Rows by themselves, which float32 sums well enough; then wide.
        lost = decoded.sub_(exact)
        sums[0] += float(torch.linalg.vecdot(lost, lost).double().sum())
        sums[1] += float(torch.linalg.vecdot(exact, exact).double().sum())

    def merge(self, other: EncodingErrors) -> None:
        """Add what was added to another."""
        for name, added in other._sums.items():
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] += added[0]
            sums[1] += added[1]

    def record(self) -> dict[str, EncodingError]:
        """Return the sums by field, to six digits."""
        return {
            name: EncodingError(squared_error=float(f"{error:.6g}"), squared_values=float(f"{size:.6g}"))
            for name, (error, size) in self._sums.items()
        }


def encode_fields(
    fields: Sequence[FieldLayout], values: Sequence[torch.Tensor], errors: EncodingErrors, *, framed: bool
) -> list[bytes | memoryview]:
    """Return a sample's stored columns.

    Args:
        fields: in layout order; values: of each, ``[rows, width]`` on the CPU.
        errors: is told what lossy fields lose.
        framed: see `codec.encode`.
    """
    columns: list[bytes | memoryview] = []
    for field, exact in zip(fields, values, strict=True):
        stored = codec.encode(field, exact, framed=framed)
        if len(codec.losses_of(field)) > len(field.losses):
            views = [memoryview(column) for column in stored]
            errors.add(field, codec.unpack(field, views, len(exact), framed=framed), exact)
        columns.extend(stored)
    return columns


def names_tokens(sample: StoredSample, identity: Identity) -> bool:
    """Say whether all token ids of a sample are the target's; -1 is its choice where a cache may not know it."""
    lowest_choice = 0 if identity.capture.target_statistics == "full" else -1
    columns = ((sample.input_ids, 0), (sample.target_argmax, lowest_choice))
    return all(not len(ids) or lowest <= ids.min() <= ids.max() < identity.target.vocab_size for ids, lowest in columns)


def unpack_fields(
    fields: Sequence[FieldLayout], sample: StoredSample, names: Iterable[str] | None = None
) -> dict[str, list[np.ndarray]]:
    """Return the unpacked columns of float fields, each uint8 ``[rows, …]``.

    Args:
        fields: the sample's, in layout order.
        sample: as read.
        names: of the fields to unpack; nothing is done for the others. All when None.

    Raises:
        DataError: a column does not hold the rows that the sample's tokens call for.
    """
    chosen = {field.name for field in fields} if names is None else set(names)
    return {
        field.name: codec.unpack(field, stored, sample.num_rows(field), framed=sample.framed)
        for field, stored in stored_columns(fields, sample)
        if field.name in chosen
    }


def stored_columns(
    fields: Sequence[FieldLayout], sample: StoredSample
) -> Iterator[tuple[FieldLayout, list[memoryview]]]:
    """Yield each float field of a sample with its stored columns."""
    next_column = 0
    for field in fields:
        count = len(codec.plane_widths(field))
        yield field, [memoryview(column) for column in sample.columns[next_column : next_column + count]]
        next_column += count


def decode_fields(fields: Sequence[FieldLayout], sample: StoredSample) -> dict[str, torch.Tensor]:
    """Return every float field's values ``[rows, width]`` on the CPU.

    Raises:
        DataError: a column does not hold the rows that the sample's tokens call for.
    """
    import torch

    unpacked = unpack_fields(fields, sample)
    return {
        field.name: codec.merge(field, [torch.from_numpy(plane) for plane in unpacked[field.name]]) for field in fields
    }

"""What a shard is written as: the one place that knows which formats there are."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from eagle_offline.cache.layout import SampleTable
from eagle_offline.cache.manifest import Identity
from eagle_offline.cache.samples import StoredSample
from eagle_offline.provenance import digest_file, plain_size


class ShardWriter(Protocol):
    """Writes one shard, sample by sample.

    Attributes:
        column_bytes: stored bytes a column so far, about.
    """

    column_bytes: dict[str, int]

    def append(self, sample: StoredSample) -> None:
        """Add a sample."""

    def close(self) -> tuple[SampleTable, str, int]:
        """Finish the shard durably; return its sample table, digest and size."""

    def abort(self) -> None:
        """Give up: nothing is finished; what was written may stay for the caller to remove."""


class ShardReader(Protocol):
    """A shard opened for any number of threads."""

    def read(self, record_batch: int, row: int) -> StoredSample:
        """Return a sample.

        Raises:
            DataError: no such row, or it cannot be read.
        """


def frames_columns(format_: str) -> bool:
    """Say whether a format wants columns that compress as frames; else it compresses around them."""
    return format_ == "arrow"


def digest_shard(path: Path, num_bytes: int | None = None) -> tuple[str, int]:
    """Return the digest of a shard, a file or a directory, and its size.

    Args:
        num_bytes: what it should have; one of another size is not read, and its digest is none.

    Raises:
        DataError, OSError: it cannot be read.
    """
    if path.is_dir():
        from eagle_offline.cache.zarr_shards import digest_tree

        return digest_tree(path, num_bytes)
    found = plain_size(path)
    return (digest_file(path) if num_bytes in (None, found) else ""), found


def shard_writer(path: Path, identity: Identity, shard: int) -> ShardWriter:
    """Return a writer of a shard at ``path``, a name that is not taken."""
    capture = identity.capture
    if capture.format == "arrow":
        from eagle_offline.cache.arrow import ArrowShardWriter

        return ArrowShardWriter(path, capture.fields, shard, identity.digest)
    from eagle_offline.cache.zarr_shards import ZarrShardWriter, zarr_layout

    return ZarrShardWriter(path, zarr_layout(identity, shard), shard, identity.digest)


def shard_reader(path: Path, identity: Identity, shard: int) -> ShardReader:
    """Return a committed shard opened for reading.

    Raises:
        DataError: not such a shard, torn, or of another cache or place.
    """
    capture = identity.capture
    if capture.format == "arrow":
        from eagle_offline.cache.arrow import ArrowShardReader

        return ArrowShardReader(path, capture.fields, shard, identity.digest)
    from eagle_offline.cache.zarr_shards import ZarrShardReader, zarr_layout

    return ZarrShardReader(path, zarr_layout(identity, shard), shard, identity.digest)

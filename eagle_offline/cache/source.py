"""Where the files of an open cache are: the directory that it stands in, or an object store behind a local one."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from eagle_offline.cache.index import ShardEntry
from eagle_offline.cache.layout import MANIFEST_FILE, TARGET_DIRECTORY, VOCAB_DIRECTORY
from eagle_offline.cache.manifest import Manifest
from eagle_offline.errors import DataError


class CacheSource(Protocol):
    """Gives the files of one cache.

    Attributes:
        name: what the user calls the cache.
        directory: holds the manifest, and what else was asked for.
        max_open_bytes: shards that a reader may keep open together; None for any.
        reads_ahead: whether `read_ahead` does anything.
    """

    name: str
    directory: Path
    reads_ahead: bool

    @property
    def max_open_bytes(self) -> int | None: ...

    def names(self) -> Collection[str]:
        """Return what stands in the cache."""

    def bring_records(self) -> None:
        """See that the commit records are in the directory."""

    def bring_companions(self, manifest: Manifest) -> None:
        """See that the small files which come with the cache are in the directory."""

    def companion(self, name: str, num_bytes: int | None) -> Path:
        """Return where a file that comes with the cache is; the caller verifies it."""

    def forget(self, name: str) -> None:
        """Take it that a file which comes with the cache is damaged; a copy of a store's is fetched anew next time."""

    def shard(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        """Yield where a shard is; nobody takes it away meanwhile."""

    def read_ahead(self, entries: Sequence[ShardEntry], uses: Sequence[tuple[int, int]]) -> None:
        """Prepare for shards, in the order of first use, to be used between two places of some order each."""

    def reached(self, place: int) -> None:
        """Take it that reading has come to a place of that order."""

    def close(self) -> None:
        """End what was begun for reading ahead."""


class LocalSource:
    """A cache in a directory."""

    max_open_bytes: int | None = None
    reads_ahead = False

    def __init__(self, directory: Path):
        self.name, self.directory = str(directory), directory

    def names(self) -> Collection[str]:
        return {entry.name for entry in os.scandir(self.directory)}

    def bring_records(self) -> None:
        pass

    def bring_companions(self, manifest: Manifest) -> None:
        pass

    def companion(self, name: str, num_bytes: int | None) -> Path:
        return self.directory / name

    def forget(self, name: str) -> None:
        pass

    def shard(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        return nullcontext(self.directory / entry.file)

    def read_ahead(self, entries: Sequence[ShardEntry], uses: Sequence[tuple[int, int]]) -> None:
        pass

    def reached(self, place: int) -> None:
        pass

    def close(self) -> None:
        pass


class RemoteSource:
    """A cache in an object store; whole shards come to local disk, verified, and go when others need the room.

    Args:
        url: of the cache.
        local_cache: directory on this machine, shared by its processes and by several caches.
        max_bytes: of all shards there.

    Raises:
        UsageError: the protocol's package is missing, or the directory is another cache's.
        EagleOfflineError: the store cannot be reached.
    """

    def __init__(self, url: str, local_cache: Path, max_bytes: int):
        from eagle_offline.cache.local_cache import ShardCache
        from eagle_offline.cache.remote import Mirror, RemoteCache, mirror_directory

        self._remote = RemoteCache(url)
        self._mirror = Mirror(self._remote, mirror_directory(local_cache, url))
        self._shards = ShardCache(self._remote, local_cache, max_bytes)
        self.name, self.directory, self.reads_ahead = url, self._mirror.directory, True
        self._listed = self._mirror.pull(records=False)
        if MANIFEST_FILE not in self._listed:
            raise DataError(f"{url}: no cache there: {MANIFEST_FILE} is missing")

    @property
    def max_open_bytes(self) -> int | None:
        return self._shards.max_held_bytes

    def names(self) -> Collection[str]:
        return self._listed

    def bring_records(self) -> None:
        self._listed = self._mirror.pull()

    def bring_companions(self, manifest: Manifest) -> None:
        for name, file in manifest.files.items():
            if name.split("/")[0] in (TARGET_DIRECTORY, VOCAB_DIRECTORY):
                self._mirror.ensure(name, file.num_bytes)

    def companion(self, name: str, num_bytes: int | None) -> Path:
        return self._mirror.ensure(name, num_bytes)

    def forget(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def shard(self, entry: ShardEntry) -> AbstractContextManager[Path]:
        return self._shards.held(entry.file, entry.file_bytes, entry.digest)

    def read_ahead(self, entries: Sequence[ShardEntry], uses: Sequence[tuple[int, int]]) -> None:
        from eagle_offline.cache.local_cache import Shard

        self._shards.prefetch([Shard(entry.file, entry.file_bytes, entry.digest) for entry in entries], uses)

    def reached(self, place: int) -> None:
        self._shards.reached(place)

    def close(self) -> None:
        self._shards.close()

"""A cache that is made in a directory and brought up to an object store as it grows: objects first, records last."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eagle_offline.cache.filling import ensure_manifest
from eagle_offline.cache.index import index_names
from eagle_offline.cache.layout import (
    CONFIG_FILE,
    MANIFEST_FILE,
    STATUS_FILE,
    TOKENS_DIRECTORY,
    CommitRecord,
    record_file,
)
from eagle_offline.cache.manifest import Identity, Manifest, read_manifest
from eagle_offline.cache.remote import Mirror, RemoteCache
from eagle_offline.cache.saved_settings import config_bytes, saved_settings
from eagle_offline.cache.writer import committed_shards, ensure_index, read_record
from eagle_offline.errors import DataError, EagleOfflineError, MismatchError, UsageError


class Publisher:
    """Keeps a store in step with the directory that a cache is made in. Shards are dropped here once they are there.

    Nothing in the store changes before `begin`.

    Args:
        url: of the cache.
        directory: where it is made, by one process.

    Raises:
        UsageError: the directory belongs to another cache. EagleOfflineError: the store cannot be reached.
    """

    def __init__(self, url: str, directory: Path):
        self._remote = RemoteCache(url)
        self._mirror = Mirror(self._remote, directory)
        self._directory = directory

    def take_up(self, own_entries: Collection[str]) -> None:
        """Bring down what stands in the store: manifest, records, tokens. What is here and not there yet stays.

        Raises:
            MismatchError: something else stands there.
        """
        listed = self._mirror.take_up()
        if MANIFEST_FILE not in listed:
            foreign = sorted(name for name in listed if name not in own_entries and not _is_status(name))
            if foreign:
                some = ", ".join(foreign[:3]) + (", …" if foreign[3:] else "")
                raise MismatchError(
                    f"{self._remote.url} holds something else ({some}): choose an empty or new --output-dir"
                )
            return
        with self.in_its_name():
            manifest = read_manifest(self._directory)
            records = [read_record(self._directory, shard) for shard in committed_shards(self._directory)]
        for record in records:
            if record.file not in listed and not (self._directory / record.file).exists():
                raise DataError(
                    f"{self._remote.url}: {record.file} is missing; delete {record_file(record.shard)} there "
                    "and run again with --resume to make the shard again"
                )
        for name, file in manifest.files.items():
            if name.startswith(f"{TOKENS_DIRECTORY}/") and self._remote.entry(name) is not None:
                self._mirror.ensure(name, file.num_bytes)

    def push_left(self) -> None:
        """Bring up the shard that an interruption left here."""
        self._mirror.push_left()

    def is_whole(self, manifest: Manifest) -> bool:
        """Say whether all that comes with the cache is in the store."""
        standing = ((self._remote.entry(name), file.num_bytes) for name, file in manifest.files.items())
        return all(entry is not None and entry.num_bytes == num_bytes for entry, num_bytes in standing)

    def begin(self, manifest: Manifest) -> None:
        """Bring up the manifest and what comes with it.

        Raises:
            MismatchError: another process began another cache there. DataError: a file came out other than recorded.
        """
        if not self._mirror.push_manifest():
            manifest = ensure_manifest(self._directory, manifest)
        self._mirror.push_companions(manifest.files)
        self._push_config(manifest)

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Bring up a shard, then its record; return the record that stands there, this one or another writer's."""
        return self._mirror.push_shard(record)

    def finish(self, identity: Identity) -> None:
        """Bring up the index, if all shards are there, and take older ones away."""
        self._mirror.pull()
        self._push_config(read_manifest(self._directory))
        if len(committed_shards(self._directory)) != identity.num_shards:
            return
        ensure_index(self._directory, identity, shards_here=False)
        current = index_names(path.name for path in self._directory.iterdir())
        standing = index_names(self._remote.names())
        for name in current:
            if name not in standing:
                self._remote.put(self._directory / name, name)
        for name in standing:
            if name not in current:
                self._remote.remove(name)

    @contextmanager
    def in_its_name(self) -> Iterator[None]:
        """Let errors about what the directory holds name the store's copy of it, which is the user's."""
        try:
            yield
        except (UsageError, MismatchError, DataError) as error:
            said = str(error).replace(str(self._directory), self._remote.url)
            raise type(error)(said) from error

    @contextmanager
    def reported_status(self) -> Iterator[None]:
        """Bring up how the block ended, for whoever looks at the store; a refusal leaves what stands there."""
        try:
            yield
        except (UsageError, MismatchError):
            raise
        except BaseException:
            # What went wrong is said, not that the store does not take it either.
            with suppress(EagleOfflineError):
                self._push_status()
            raise
        self._push_status()

    def _push_config(self, manifest: Manifest) -> None:
        settings = saved_settings(self._directory, manifest)
        if settings is not None:
            self._remote.create(CONFIG_FILE, config_bytes({**settings, "output_dir": self._remote.url}))

    def _push_status(self) -> None:
        for path in self._directory.glob("status*.json"):
            self._remote.put(path, path.name)


def _is_status(name: str) -> bool:
    return name == STATUS_FILE or (name.startswith("status-") and name.endswith(".json"))

"""A cache in an object store, named by an fsspec URL, and the local directory that mirrors it.

Everything else works on directories. What is small is brought down into one, what is made there is brought up: objects
first, their record last, and the record only if none is there. So whatever is killed, a shard without its record does
not exist, here or there.

Where the store is and who asks are the business of its filesystem. S3 (``pip install s3fs``) takes what botocore
takes: ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY`` or ``AWS_PROFILE``, ``AWS_ENDPOINT_URL`` for stores that
are not Amazon's. Every fsspec filesystem also takes its arguments from ``FSSPEC_<PROTOCOL>_<ARGUMENT>``, such as
``FSSPEC_S3_ENDPOINT_URL``, and from files in ``~/.config/fsspec``.
"""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eagle_offline.cache.formats import digest_shard
from eagle_offline.cache.layout import MANIFEST_FILE, TOKENS_DIRECTORY, CommitRecord, record_file, shard_of_record
from eagle_offline.cache.writer import committed_shards, read_record
from eagle_offline.durable import (
    create_exclusively,
    explained_os_errors,
    fsync_directory,
    fsync_file,
    make_directory,
    put_in_place,
    remove,
    replacing,
    temporary_sibling,
    write_bytes,
)
from eagle_offline.errors import DataError, EagleOfflineError, MismatchError, SpaceError, UsageError, one_line
from eagle_offline.provenance import digest_bytes

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}

# Where fsspec's own ways to write a file are, which look first and write then.
_GENERIC = ("fsspec.spec", "fsspec.asyn")

# Filesystems try again themselves; what still fails is tried twice more, after these pauses.
_RETRY_SECONDS = (0.5, 3.0)
_TRANSIENT_NUMBERS = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT}
# botocore's, aiohttp's and requests' kinds of failed transfers, by name: none of them need be installed.
_TRANSIENT_KINDS = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "TimeoutError",
}

# What stores answer when a name is taken; one that is just being taken is a conflict in S3, and is tried again.
_TAKEN = ("PreconditionFailed", "412", 412)

# Objects in one go: they are on their way together, and are tried again together. A large one is itself fetched in
# up to ten parts of 50 MB at once.
_OBJECTS_AT_ONCE = 32

# What a store may call the state of an object; any of them changes when the object does.
_TOKENS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified", "updated", "created")

_SIDECAR = ".mirror.json"
_LOCK = ".mirror.lock"
# What a mirror has of its own in its directory.
MIRROR_ENTRIES = {_SIDECAR, _LOCK}
_INDEX_NAME = re.compile(r"index-[0-9a-f]{32}\.arrow")
_SHARD_NAME = re.compile(r"shard-(\d{6,})-[0-9a-f]{32}\.(arrow|zarr)")
# Of a commit record, which is the largest of what is read at once.
_MAX_READ_BYTES = 256 << 20


def is_url(text: str | Path) -> bool:
    """Say whether a cache is named by a URL and not by a directory; ask before making a `Path` of it."""
    return "://" in str(text)


def mirror_directory(root: Path, url: str) -> Path:
    """Return the directory below ``root`` that belongs to the cache at ``url``."""
    return root / digest_bytes(url.rstrip("/").encode())


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[int]:
    """Hold the lock of the file ``path``, made if missing; yield its descriptor.

    The kernel lets go however the process ends. Threads exclude each other as processes do.

    Raises:
        BlockingIOError: it is held, and ``wait`` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def vanish(path: Path) -> None:
    """Remove a file or directory so that nobody ever finds half of it; whoever has a file open keeps it."""
    former = temporary_sibling(path)
    try:
        os.rename(path, former)
    except FileNotFoundError:
        return
    remove(former)


@dataclass(frozen=True)
class Entry:
    """One name in a cache's directory.

    Attributes:
        num_bytes: of a file; 0 for a directory.
        is_directory: it has objects below it.
        token: changes whenever the object does.
    """

    num_bytes: int
    is_directory: bool
    token: str


class _Truncated(ConnectionError):
    """Fewer or more bytes came than the store says there are."""


class RemoteCache:
    """The directory of a cache in a store.

    Args:
        url: an fsspec URL; nothing is asked of the store yet.

    Attributes:
        url: as given, without a slash at its end.

    Raises:
        UsageError: no such protocol, or its package is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._process = 0
        self._connected()

    def _connected(self) -> AbstractFileSystem:
        """Return the filesystem of this process: after a fork it is made anew."""
        if self._process != os.getpid():
            self._filesystem, self._root = _open(self.url)
            self._process = os.getpid()
        return self._filesystem

    @property
    def creates_exclusively(self) -> bool:
        """Whether of several that create a name at once, one succeeds; else the last of them does.

        True for S3 (conditional requests; some stores that imitate it ignore the condition), Google's store, files
        and memory.
        """
        filesystem = self._connected()
        if getattr(filesystem, "local_file", False):
            return True
        method = type(filesystem)._pipe_file if filesystem.async_impl else type(filesystem).pipe_file
        return method.__module__ not in _GENERIC and "mode" in inspect.signature(method).parameters

    def names(self) -> dict[str, Entry]:
        """Return what stands in the cache's directory, by name, from one listing; nothing for a new cache.

        Raises:
            DataError: no such bucket. EagleOfflineError: the store cannot be asked.
        """

        def listing() -> list[dict[str, Any]]:
            try:
                return self._connected().ls(self._root, detail=True)
            except FileNotFoundError as error:
                if "bucket does not exist" in str(error).lower():
                    raise
                return []

        entries = {}
        for found in self._call("", listing):
            path = found["name"].rstrip("/")
            name = path.rpartition("/")[2]
            if path != self._root and _is_confined(name):
                entries[name] = _entry(found)
        return entries

    def entry(self, name: str) -> Entry | None:
        """Return what stands under a name, None if nothing does."""
        place = self._place(name)

        def info() -> dict[str, Any] | None:
            try:
                return self._connected().info(place)
            except FileNotFoundError:
                return None

        found = self._call(name, info)
        return None if found is None else _entry(found)

    def modified(self, name: str) -> datetime:
        """Return when a file was written, as the store says.

        Raises:
            DataError: missing.
        """
        place = self._place(name)
        return self._call(name, lambda: self._connected().modified(place))

    def read(self, name: str, max_bytes: int = _MAX_READ_BYTES) -> bytes:
        """Return the content of a file of bounded size.

        Raises:
            DataError: missing, or larger.
        """
        place = self._place(name)
        size = self._call(name, lambda: self._connected().info(place))["size"]
        if size > max_bytes:
            raise DataError(f"{self._address(name)}: {size} bytes, expected at most {max_bytes}")
        return self._call(name, lambda: self._connected().cat_file(place))

    def fetch(self, name: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
        """Put a copy of a file or tree durably in place at ``path``, once it is there in full.

        Args:
            check: looks at the copy before it is put in place, and raises if it is not what it should be.

        Raises:
            DataError: missing, or it has a name that leaves its directory. SpaceError: the local disk is full.
        """
        sizes = self._objects(name)
        with _replacing(path) as sibling:
            wanted = {
                self._below(name, part): (sibling / part if part else sibling, size) for part, size in sizes.items()
            }
            self._download(name, wanted)
            if check is not None:
                check(sibling)

    def fetch_files(self, sizes: Mapping[str, int], directory: Path) -> None:
        """Put copies of several files of known sizes durably in place in ``directory``, fetched at the same time."""
        with ExitStack() as stack:
            wanted = {
                self._place(name): (stack.enter_context(replacing(directory / name)), size)
                for name, size in sizes.items()
            }
            self._download("", wanted)

    def put(self, path: Path, name: str) -> None:
        """Bring a file or a tree up; a tree's objects become visible one by one.

        Raises:
            DataError: nothing is at ``path``. EagleOfflineError: it did not arrive.
        """
        files = {"": path} if path.is_file() else {str(file.relative_to(path)): file for file in _files_below(path)}
        if not files:
            raise DataError(f"{path}: missing or empty, cannot be brought to {self._address(name)}")
        for batch in self._batches(files.items()):
            here = [str(file) for _, file in batch]
            there = [self._below(name, part) for part, _ in batch]
            self._call(name, partial(self._connected().put, here, there))
        found = self._objects(name)
        if any(found.get(part) != file.stat().st_size for part, file in files.items()):
            raise EagleOfflineError(f"{self._address(name)}: did not arrive in full; run it again with --resume")

    def create(self, name: str, content: bytes) -> bool:
        """Create a file unless the name is taken; return whether this call did.

        The content appears at once and in full. See `creates_exclusively`. False may also mean that this call did and
        the store's answer was lost: whoever must know compares what stands there.
        """
        place, filesystem = self._place(name), self._connected()

        def attempt() -> bool:
            try:
                if getattr(filesystem, "local_file", False):
                    make_directory(Path(place).parent)
                    return create_exclusively(Path(place), content)
                if not self.creates_exclusively and filesystem.exists(place):
                    return False
                more = {"mode": "create"} if self.creates_exclusively else {}
                filesystem.pipe_file(place, content, **more)
                return True
            except Exception as error:
                if _says_taken(error):
                    return False
                raise

        return self._call(name, attempt)

    def remove(self, name: str) -> None:
        """Remove a file or tree, if it is there."""
        place = self._place(name)

        def attempt() -> None:
            with suppress(FileNotFoundError):
                self._connected().rm(place, recursive=True)

        self._call(name, attempt)

    def _address(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _place(self, name: str) -> str:
        """Return the filesystem's path of a name.

        Raises:
            DataError: the name leaves the cache, or could.
        """
        if not _is_confined(name):
            raise DataError(f"{self.url}: {name!r} is no name inside a cache")
        return f"{self._root}/{name}"

    def _below(self, name: str, part: str) -> str:
        return self._place(f"{name}/{part}" if part else name)

    def _objects(self, name: str) -> dict[str, int]:
        """Return the size of every object below a name, by path below it; of a file its own under ``""``."""
        place, filesystem = self._place(name), self._connected()
        info = self._call(name, lambda: filesystem.info(place))
        if info["type"] != "directory":
            return {"": info["size"]}
        found = self._call(name, lambda: filesystem.find(place, detail=True))
        sizes = {}
        for path, entry in found.items():
            part = path.removeprefix(f"{place}/")
            if path.endswith("/") or path == place:  # what some programs put where a directory would be
                continue
            if not _is_confined(part):
                raise DataError(f"{self._address(name)}: {part!r} is no name inside it")
            sizes[part] = entry["size"]
        return sizes

    def _download(self, name: str, wanted: Mapping[str, tuple[Path, int]]) -> None:
        """Fetch objects to where nothing stands yet, and see that each has its size."""
        for parent in {path.parent for path, _ in wanted.values()}:
            make_directory(parent)

        def attempt(batch: Sequence[tuple[str, tuple[Path, int]]]) -> None:
            self._connected().get([place for place, _ in batch], [str(path) for _, (path, _) in batch])
            for place, (path, size) in batch:
                if path.stat().st_size != size:
                    raise _Truncated(f"{path.stat().st_size} bytes of {place} came, expected {size}")

        for batch in self._batches(wanted.items()):
            self._call(name, partial(attempt, batch))

    def _batches(self, items: Iterable[T]) -> Iterator[list[T]]:
        """Yield items in lists of what the filesystem transfers at the same time."""
        at_once = _OBJECTS_AT_ONCE if self._connected().async_impl else 1
        left = iter(items)
        while batch := list(islice(left, at_once)):
            yield batch

    def _call(self, name: str, action: Callable[[], T]) -> T:
        """Return what ``action`` does, tried again when the connection fails; errors are those of this package."""
        try:
            for pause in _RETRY_SECONDS:
                try:
                    return action()
                except Exception as error:
                    if not _is_transient(error):
                        raise
                time.sleep(pause)
            return action()
        except EagleOfflineError:
            raise
        except Exception as error:
            raise _in_words(self._address(name), error) from error


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    """Return a URL's filesystem and the path in it.

    Raises:
        UsageError: no such protocol, its package is not installed, or it is set up wrongly.
    """
    protocol = url.partition("://")[0]
    # Listings are never remembered: others write to the same cache.
    settings: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("file", "local"):
        settings["auto_mkdir"] = True
    try:
        from fsspec.core import url_to_fs

        filesystem, root = url_to_fs(url, **settings)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "the fsspec filesystem of this protocol")
        raise UsageError(f"{url}: {protocol}:// needs another package: pip install {package}") from error
    except Exception as error:
        raise UsageError(f"{url}: cannot be meant ({one_line(error)}); give a URL such as s3://bucket/cache") from error
    root = root.rstrip("/")
    if not root or not is_url(url):
        raise UsageError(f"{url}: names no place in the store; give a URL such as s3://bucket/cache")
    return filesystem, root


def _is_confined(name: str) -> bool:
    """Say whether a name is of this directory: relative, forward slashes, no part empty or beginning with a dot."""
    return not any(char in name for char in "\\\0") and all(
        part and not part.startswith(".") for part in name.split("/")
    )


def _entry(found: Mapping[str, Any]) -> Entry:
    directory = found["type"] == "directory"
    token = next((str(found[key]) for key in _TOKENS if found.get(key)), "")
    return Entry(0 if directory else int(found["size"]), directory, token)


def _is_transient(error: BaseException) -> bool:
    """Say whether the same request may succeed a moment later."""
    if isinstance(error, OSError) and error.errno in _TRANSIENT_NUMBERS:
        return True
    return any(kind.__name__ in _TRANSIENT_KINDS for kind in type(error).__mro__)


def _says_taken(error: BaseException) -> bool:
    """Say whether an exclusive creation failed because the name is there."""
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__ or error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(error, "code", None)
    return code in _TAKEN


def _in_words(address: str, error: Exception) -> EagleOfflineError:
    """Return what a store or its filesystem said as one line with the way out."""
    said = one_line(error)
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(f"{address}: {error.strerror}; nothing committed is lost: free some space and run again")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{address}: not found ({said}); check the bucket and the path")
    if isinstance(error, PermissionError) or any(part in kind for kind in kinds for part in ("Credential", "Auth")):
        return UsageError(
            f"{address}: no access ({said}); check the credentials that the store's client finds "
            "(S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) and what they permit"
        )
    if _is_transient(error):
        return EagleOfflineError(
            f"{address}: the store cannot be reached or did not finish ({said}); check the network and the endpoint "
            "(S3: AWS_ENDPOINT_URL) and run again: nothing committed is lost"
        )
    return EagleOfflineError(f"{address}: {said}")


def _files_below(directory: Path) -> list[Path]:
    return sorted(
        Path(parent, name) for parent, _, names in os.walk(directory) for name in names if not name.startswith(".")
    )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a sibling name for a file or a tree that durably replaces ``path``; on failure it is removed."""
    make_directory(path.parent)
    sibling = temporary_sibling(path)
    try:
        with explained_os_errors(path):
            yield sibling
            if sibling.is_dir():
                _fsync_tree(sibling)
            else:
                fsync_file(sibling)
            put_in_place(sibling, path)
            fsync_directory(path.parent)
    finally:
        # An interrupted transfer may still be writing there; what is left is removed by a later run.
        with suppress(OSError):
            remove(sibling)


def _fsync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for name in names:
            fsync_file(Path(parent, name))
        fsync_directory(Path(parent))


class Mirror:
    """A local directory that is a cache directory, kept in step with a remote one.

    A reader pulls what is small and asks for the rest by name. A writer works in the directory, and pushes the
    manifest, then the companions, then shard after shard. Processes may share the directory.

    Args:
        remote: the cache in its store.
        directory: made if missing.

    Raises:
        UsageError: the directory mirrors another cache.
    """

    def __init__(self, remote: RemoteCache, directory: Path):
        self.remote = remote
        self.directory = directory
        make_directory(directory)
        mirrored = self._read_sidecar().get("url", remote.url)
        if mirrored != remote.url:
            raise UsageError(f"{directory}: mirrors {mirrored}, not {remote.url}; choose another directory")

    def pull(self, *, records: bool = True, keep: Collection[str] = ()) -> dict[str, Entry]:
        """Make manifest and records here those of the remote cache, and return its listing.

        What is here already is kept if the store's size and token of it are unchanged. Records that the remote cache
        does not have go.

        Args:
            records: False: not the records if there is an index, which says what they say.
            keep: names that stay although they are not there.
        """
        with locked(self.directory / _LOCK):
            listed = self.remote.names()
            indexes = {name for name in listed if _INDEX_NAME.fullmatch(name)}
            wanted = {name for name in (MANIFEST_FILE,) if name in listed} | indexes
            if records or not indexes:
                wanted |= {name for name in listed if shard_of_record(name) is not None}
            known = self._read_sidecar().get("files", {})
            self._drop_absent({*listed, *keep}, known)
            stale = {name: listed[name].num_bytes for name in wanted if not self._is_current(name, listed[name], known)}
            # What is forgotten first is fetched again if this is interrupted.
            kept = {name: token for name, token in known.items() if name in listed and name not in stale}
            self._write_sidecar(kept)
            self.remote.fetch_files(stale, self.directory)
            self._write_sidecar(kept | {name: listed[name].token for name in stale})
            return listed

    def ensure(self, name: str, num_bytes: int | None = None, *, again: bool = False) -> Path:
        """Return where a file of the cache stands here, fetched if it does not; the caller verifies it.

        Args:
            num_bytes: what the manifest records; a file here of another size is fetched again.
            again: fetch it whatever is here, because it did not verify.

        Raises:
            DataError: missing in the store, too.
        """
        if not _is_confined(name):
            raise DataError(f"{self.remote.url}: {name!r} is no name inside a cache")
        path = self.directory / name
        right = path.is_file() and num_bytes in (None, path.stat().st_size)
        if again or not right:
            self.remote.fetch(name, path)
        return path

    def take_up(self) -> dict[str, Entry]:
        """Make a writer's directory go on from what stands in the store, where nothing changes; return its listing.

        Manifest and records come here. A shard that is whole here, its record not there yet, waits for `push_left`;
        any other record that is not there goes, so that its shard is made again. What was begun here under a manifest
        that is not there goes, but for its tokens.

        Raises:
            MismatchError: a shard here waits and was made under another manifest than stands there.
        """
        listed = self.remote.names()
        path = self.directory / MANIFEST_FILE
        there = self.remote.read(MANIFEST_FILE) if MANIFEST_FILE in listed else None
        here = path.read_bytes() if path.exists() else None
        alone = [shard for shard in committed_shards(self.directory) if record_file(shard) not in listed]
        if there is not None and here is not None and here != there and alone:
            raise MismatchError(
                f"{self.directory}: shard {alone[0]} was made under another manifest than that of "
                f"{self.remote.url}; remove this directory, or choose another --output-dir"
            )
        if here != there:
            self._start_over()
        self._drop_shards(listed)
        return self.pull(keep=[record_file(shard) for shard in alone if self._is_whole(shard)])

    def push_left(self, *, drop: bool = True) -> list[int]:
        """Push the shards that are committed here and not there; return them."""
        listed = self.remote.names()
        alone = [shard for shard in committed_shards(self.directory) if record_file(shard) not in listed]
        for shard in alone:
            self.push_shard(read_record(self.directory, shard), drop=drop)
        return alone

    def push_manifest(self) -> bool:
        """Create the remote manifest from the one here; return whether the one here is what stands there now.

        If another one stands there, that is here now, too: the caller must agree with it or leave.
        """
        content = (self.directory / MANIFEST_FILE).read_bytes()
        if self.remote.create(MANIFEST_FILE, content):
            return True
        standing = self.remote.read(MANIFEST_FILE)
        if standing == content:
            return True
        write_bytes(self.directory / MANIFEST_FILE, standing)
        return False

    def push_companions(self, names: Iterable[str]) -> None:
        """Bring up the files that come with the cache, those of the same size that stand there left out."""
        for name in names:
            path = self.directory / name
            standing = self.remote.entry(name)
            if standing is None or not path.is_file() or standing.num_bytes != path.stat().st_size:
                self.remote.put(path, name)

    def push_shard(self, record: CommitRecord, *, drop: bool = True) -> CommitRecord:
        """Bring up a shard that is committed here, then create its record; return the record that stands there.

        When another writer's stands there, it stands here now, too, and this one's shard goes, there and here.

        Args:
            drop: remove the shard here once it is committed there.
        """
        name = record_file(record.shard)
        self.remote.put(self.directory / record.file, record.file)
        standing = record
        if not self.remote.create(name, (self.directory / name).read_bytes()):
            write_bytes(self.directory / name, self.remote.read(name))
            standing = read_record(self.directory, record.shard)
        if standing.file != record.file:
            self.remote.remove(record.file)
        if drop or standing.file != record.file:
            vanish(self.directory / record.file)
        return standing

    def _start_over(self) -> None:
        """Remove what belongs to the manifest here."""
        for name in os.listdir(self.directory):
            if not name.startswith((".", "status")) and name != TOKENS_DIRECTORY:
                vanish(self.directory / name)

    def _is_whole(self, shard: int) -> bool:
        """Say whether a shard that is committed here is here as its record says."""
        try:
            record = read_record(self.directory, shard)
            path = self.directory / record.file
            return path.exists() and digest_shard(path)[0] == record.digest
        except DataError:
            return False

    def _drop_shards(self, listed: Mapping[str, Entry]) -> None:
        """Remove shards here whose record stands there."""
        for name in os.listdir(self.directory):
            match = _SHARD_NAME.fullmatch(name)
            if match and record_file(int(match[1])) in listed:
                vanish(self.directory / name)

    def _drop_absent(self, listed: Collection[str], known: Mapping[str, str]) -> None:
        """Remove what the remote cache no longer has; a manifest that never came from there stays."""
        for name in os.listdir(self.directory):
            derived = shard_of_record(name) is not None or _INDEX_NAME.fullmatch(name)
            if name not in listed and (derived or (name == MANIFEST_FILE and name in known)):
                (self.directory / name).unlink(missing_ok=True)

    def _is_current(self, name: str, entry: Entry, known: Mapping[str, str]) -> bool:
        path = self.directory / name
        return known.get(name) == entry.token and path.is_file() and path.stat().st_size == entry.num_bytes

    def _read_sidecar(self) -> dict[str, Any]:
        try:
            content = json.loads((self.directory / _SIDECAR).read_bytes())
        except (OSError, ValueError):  # none, or a torn one: everything is fetched again
            return {}
        return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else {}

    def _write_sidecar(self, files: Mapping[str, str]) -> None:
        content = {"url": self.remote.url, "files": dict(files)}
        write_bytes(self.directory / _SIDECAR, json.dumps(content, separators=(",", ":")).encode())

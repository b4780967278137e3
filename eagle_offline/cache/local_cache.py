"""Shards of a remote cache on the disk of a training machine: fetched ahead, shared by its processes, bounded in size.

Below the directory given, every cache has one of its own (`eagle_offline.cache.remote.mirror_directory`), where a
shard has the name it has in the store, so that a cache mirrored there reads as any other. Beside a shard stands its
*stamp*, ``<shard>.lock``, an empty-looking file that is never removed. Its lock is held exclusively by who fetches or
evicts the shard, shared by who opens it; the kernel lets go of it however a process ends. Its content says how many
bytes are taken or reserved and which process fetched the shard ahead without having asked for it yet; its modification
time is when the shard was last asked for. The bound is on everything below the directory together.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from eagle_offline.cache.formats import digest_shard
from eagle_offline.cache.remote import RemoteCache, locked, mirror_directory, vanish
from eagle_offline.durable import explained_os_errors, is_alive, make_directory, remove_abandoned
from eagle_offline.errors import DataError, EagleOfflineError, SpaceError, UsageError

# Of what is fetched, this much more must be free on the disk.
FREE_SHARE = 0.05

# How long a shard waits for others to let go of theirs before the bound is said to be too small.
ROOM_SECONDS = 120.0

_POLL_SECONDS = 0.05
_AHEAD_POLL_SECONDS = 0.25
_SPACE_LOCK = ".space.lock"
_STAMP_SUFFIX = ".lock"
_STAMP_BYTES = 32


# All of this process, by the directory that they share: none takes from another what that needs sooner.
_SHARING: dict[Path, weakref.WeakSet[ShardCache]] = {}


class Shard(NamedTuple):
    """A shard as its commit record names it: file name, size and xxh3_128."""

    file: str
    file_bytes: int
    digest: str


class _Damaged(DataError):
    """A copy that is not what the commit record says."""


@dataclass(frozen=True)
class _Stamp:
    """What is known of a shard here without opening it.

    Attributes:
        path: of the shard.
        num_bytes: taken, or reserved by who fetches it; 0: neither.
        ahead_of: the process that fetched it ahead and has not asked for it yet; 0: none.
        asked: when it was last asked for or put in place, ns.
    """

    path: Path
    num_bytes: int
    ahead_of: int
    asked: int


class ShardCache:
    """Whole shards of one remote cache, on local disk.

    Any number of threads and processes may ask for the same shard at the same time: it is fetched once. A shard is
    verified against its digest before it gets its name.

    Eviction takes the shards not asked for the longest. It unlinks: a file that is memory-mapped stays readable, but
    its space is free only when it is unmapped, so readers should hold few shards open. A directory must be held
    (`held`) while it is read.

    Args:
        remote: where the shards are.
        directory: shared by the processes of a machine, not by machines.
        max_bytes: of all shards below ``directory``.

    Attributes:
        directory: where this cache's shards are.

    Raises:
        EagleOfflineError: the directory cannot be made.
    """

    def __init__(self, remote: RemoteCache, directory: Path, max_bytes: int):
        self._remote = remote
        self._place = directory
        self._max_bytes = max_bytes
        self.directory = mirror_directory(directory, remote.url)
        make_directory(self.directory)
        remove_abandoned(self.directory)
        # What the thread works through. A shard is needed at places from its first use to its last; those before
        # `_asked` are done. Of the plan the first `_fetched` shards were fetched.
        self._plan: list[Shard] = []
        self._uses: dict[Path, tuple[int, int]] = {}
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        self._asked = self._fetched = 0
        self._asks_are_uses = True
        self._failed: set[str] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        _SHARING.setdefault(directory.resolve(), weakref.WeakSet()).add(self)

    def __enter__(self) -> ShardCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def max_held_bytes(self) -> int:
        """Shards that one reader may hold when it is not reading, so that whoever asks for another finds room.

        Half of the bound, shared by the caches that this process reads and the processes that ``torchrun`` started on
        this machine.
        """
        processes = os.environ.get("LOCAL_WORLD_SIZE", "")
        return self._max_bytes // (2 * len(self._sharing()) * (int(processes) if processes.isdigit() else 1) or 1)

    def _sharing(self) -> list[ShardCache]:
        return [cache for cache in list(_SHARING[self._place.resolve()]) if not cache._closed]

    def path(self, file: str, file_bytes: int, digest: str) -> Path:
        """Return where a shard is, fetched if it is not here.

        Open it at once: when many are asked for it may be evicted, and then this is to be called again; `held` keeps
        it.

        Raises:
            DataError: not in the store, or damaged there. SpaceError: the disk is nearly full.
            UsageError: larger than all shards together may be. EagleOfflineError: the store cannot be reached.
        """
        with self.held(file, file_bytes, digest) as path:
            return path

    @contextmanager
    def held(self, file: str, file_bytes: int, digest: str) -> Iterator[Path]:
        """Yield where a shard is, fetched if it is not here; nobody evicts it meanwhile. Raises as `path` does."""
        shard = Shard(file, file_bytes, digest)
        path = self._path_of(shard)
        if self._asks_are_uses and path in self._uses:
            self.reached(self._uses[path][0])
        # What went wrong when nobody asked for it may be right by now; if not, it goes wrong again.
        self._failed.discard(file)
        while True:
            with locked(_stamp_of(path), shared=True) as stamp:
                if path.exists():
                    _touch(stamp, path)
                    yield path
                    return
            self._fetch(shard)

    def prefetch(self, shards: Iterable[Shard], uses: Iterable[tuple[int, int]] | None = None) -> None:
        """Fetch shards in the background, in the order in which they will be asked for, as far ahead as they fit.

        The order replaces the one given before; a shard counts at its first place in it. What is needed sooner is
        never evicted for what is needed later, nor what another process has fetched ahead for itself. What goes wrong
        is tried again, and raised, when the shard is asked for.

        Args:
            shards: in the order of first use.
            uses: at which place each is used first and last; then `reached` says how far its user is, and places of
                all caches that share a directory in this process are of one order. Without, a shard is used once, when
                it is asked for.

        Raises:
            UsageError: a shard is larger than all together may be.
        """
        plan = list({shard.file: shard for shard in (Shard(*shard) for shard in shards)}.values())
        places = [(place, place) for place in range(len(plan))] if uses is None else list(uses)
        by_path = dict(zip(map(self._path_of, plan), places, strict=True))
        with self._changed:
            self._plan, self._uses, self._asks_are_uses = plan, by_path, uses is None
            self._firsts, self._lasts = [first for first, _ in places], sorted(last for _, last in places)
            self._asked = self._fetched = 0
            self._failed.clear()
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_ahead, name="shard-prefetch", daemon=True)
            self._thread.start()

    def close(self, wait_seconds: float = 5.0) -> None:
        """Stop fetching ahead; a shard under way is waited for, but not long: what is left of it is removed later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(wait_seconds)

    def _path_of(self, shard: Shard) -> Path:
        if "/" in shard.file or shard.file.startswith(".") or shard.file.endswith(_STAMP_SUFFIX):
            raise DataError(f"{self._remote.url}: {shard.file!r} is no name of a shard")
        if shard.file_bytes > self._max_bytes:
            raise UsageError(
                f"{self._remote.url}/{shard.file}: {shard.file_bytes} bytes, more than all shards together may take "
                f"({self._max_bytes}): raise --local-cache-size"
            )
        return self.directory / shard.file

    def reached(self, place: int) -> None:
        """Note that whoever the order was given for has come to a place in it."""
        if place <= self._asked:
            return
        with self._changed:
            done = bisect_left(self._lasts, self._asked)
            self._asked = max(self._asked, place)
            self._fetched = max(self._fetched, bisect_left(self._firsts, place))
            if bisect_left(self._lasts, self._asked) > done:  # one is not needed any more
                self._changed.notify_all()

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._fetched < len(self._plan))
                if self._closed:
                    return
                plan, position = self._plan, self._fetched
            done = self._try_ahead(plan[position])
            with self._changed:
                if done and plan is self._plan:
                    self._fetched = max(self._fetched, position + 1)
                elif not done:
                    # Until something is not needed any more here, or another process has made room.
                    self._changed.wait(_AHEAD_POLL_SECONDS)

    def _try_ahead(self, shard: Shard) -> bool:
        """Fetch a shard ahead; return False if there is no room yet. What goes wrong is left to who asks for it."""
        try:
            return self._fetch(shard, ahead=True)
        except Exception:
            self._failed.add(shard.file)
            return True

    def _fetch(self, shard: Shard, *, ahead: bool = False) -> bool:
        """Bring a shard here unless it is here; return whether it is.

        Args:
            ahead: nobody waits for it: give up where there is no room.
        """
        path = self._path_of(shard)
        with ExitStack() as stack:
            try:
                stamp = stack.enter_context(locked(_stamp_of(path), wait=not ahead))
            except BlockingIOError:  # somebody reads it, or fetches it already
                return True
            if not path.exists():
                if not self._reserve(shard, stamp, ahead=ahead):
                    return False
                try:
                    self._download(shard, path)
                except BaseException:
                    _write_stamp(stamp, 0, 0)
                    raise
            elif not ahead:
                return True
            _write_stamp(stamp, shard.file_bytes, os.getpid() if ahead else 0)
            return True

    def _download(self, shard: Shard, path: Path) -> None:
        check = partial(_verify, shard, f"{self._remote.url}/{shard.file}")
        with suppress(_Damaged):
            self._remote.fetch(shard.file, path, check)
            return
        self._remote.fetch(shard.file, path, check)

    def _reserve(self, shard: Shard, stamp: int, *, ahead: bool) -> bool:
        """Make room for a shard and reserve it; return False, where nobody waits for it, if there is none.

        Raises:
            SpaceError: the disk is too full. UsageError: others hold all the room there may be.
        """
        give_up = time.monotonic() + ROOM_SECONDS
        while True:
            with locked(self._place / _SPACE_LOCK):
                room, disk_has_room = self._make_room(shard, ahead=ahead)
                if room and disk_has_room:
                    _write_stamp(stamp, shard.file_bytes, os.getpid() if ahead else 0)
                    return True
            if ahead:
                return False
            if room:
                free = shutil.disk_usage(self.directory).free
                raise SpaceError(
                    f"{self.directory}: {free / 1e9:.1f} GB free on the disk, too little for {shard.file} "
                    f"({shard.file_bytes / 1e9:.1f} GB); free some space, or lower --local-cache-size"
                )
            if time.monotonic() > give_up:
                raise UsageError(
                    f"{self._place}: what is being read and fetched at once takes all of {self._max_bytes} bytes: "
                    "raise --local-cache-size"
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, shard: Shard, *, ahead: bool) -> tuple[bool, bool]:
        """Evict until a shard fits the bound and the disk, if it can be; return whether it fits each."""
        own = self._path_of(shard)
        stamps = [stamp for stamp in _stamps(self._place) if stamp.path != own]
        taken = sum(stamp.num_bytes for stamp in stamps)
        coming = sum(stamp.num_bytes for stamp in stamps if not stamp.path.exists())

        def fits() -> tuple[bool, bool]:
            needed = (shard.file_bytes + coming) * (1 + FREE_SHARE)
            return taken + shard.file_bytes <= self._max_bytes, shutil.disk_usage(self.directory).free >= needed

        for stamp in self._evictable(stamps, own, ahead=ahead):
            if all(fits()):
                break
            reserved_only = not stamp.path.exists()
            if _evict(stamp):
                taken -= stamp.num_bytes
                coming -= stamp.num_bytes if reserved_only else 0
        return fits()

    def _needed(self) -> dict[Path, int]:
        """Return where each shard that is still needed is needed next."""
        with self._changed:
            return {path: max(first, self._asked) for path, (first, last) in self._uses.items() if last >= self._asked}

    def _evictable(self, stamps: list[_Stamp], own: Path, *, ahead: bool) -> list[_Stamp]:
        """Return what may go for the shard ``own``, in the order in which it should.

        First what nobody is known to need, the one not asked for the longest first; then what is needed here, the last
        first; then what others fetched ahead for themselves, the latest first. A shard that nobody waits for yet takes
        nothing from others, and nothing that is needed here before it.
        """
        needed = {path: place for cache in self._sharing() for path, place in cache._needed().items()}
        coming = self._uses.get(own, (0, 0))[0]

        def order(stamp: _Stamp) -> tuple[int, int]:
            if stamp.path in needed:
                return 1, -needed[stamp.path]
            if stamp.ahead_of not in (0, os.getpid()) and is_alive(stamp.ahead_of):
                return 2, -stamp.asked
            return 0, stamp.asked

        ordered = sorted((stamp for stamp in stamps if stamp.num_bytes), key=order)
        return [stamp for stamp in ordered if not ahead or order(stamp) < (1, -coming)]


def _verify(shard: Shard, address: str, path: Path) -> None:
    """Refuse a copy that is not what the commit record says.

    Raises:
        DataError: says so.
    """
    if digest_shard(path)[0] != shard.digest:
        raise _Damaged(
            f"{address}: does not match the digest in its name; it was damaged in the store: "
            "delete its commit record there and run precompute --resume to make the shard again"
        )


def _stamp_of(path: Path) -> Path:
    return path.with_name(path.name + _STAMP_SUFFIX)


def _stamps(place: Path) -> list[_Stamp]:
    """Return the stamp of every shard that is or was below a directory."""
    found = []
    for directory in os.scandir(place):
        for entry in os.scandir(directory) if directory.is_dir() else ():
            # Most are empty: there are as many as shards were ever here.
            is_stamp = entry.name.startswith("shard-") and entry.name.endswith(_STAMP_SUFFIX)
            if not is_stamp or not entry.stat().st_size:
                continue
            with open(entry.path, "rb") as file:
                num_bytes, ahead_of = _parsed(file.read(_STAMP_BYTES))
                asked = os.fstat(file.fileno()).st_mtime_ns
            found.append(_Stamp(Path(entry.path.removesuffix(_STAMP_SUFFIX)), num_bytes, ahead_of, asked))
    return found


def _parsed(content: bytes) -> tuple[int, int]:
    """Return size and process of a stamp; of one that is new or torn, zeros."""
    numbers = content.split()
    return (int(numbers[0]), int(numbers[1])) if len(content) == _STAMP_BYTES and len(numbers) == 2 else (0, 0)


def _write_stamp(stamp: int, num_bytes: int, ahead_of: int) -> None:
    """Write a stamp in one piece, so that it is never found torn, and note the time finer than the kernel does."""
    with explained_os_errors("the stamp of a shard"):
        if not num_bytes:
            os.ftruncate(stamp, 0)
            return
        os.pwrite(stamp, f"{num_bytes:020d} {ahead_of:010d}\n".encode(), 0)
        os.utime(stamp, ns=(time.time_ns(), time.time_ns()))


def _touch(stamp: int, path: Path) -> None:
    """Note that a shard is asked for; what another process fetched ahead for itself remains marked so."""
    num_bytes, ahead_of = _parsed(os.pread(stamp, _STAMP_BYTES, 0))
    if not num_bytes:  # the stamp was lost, the shard was not
        num_bytes = _size_of(path)
    keep = ahead_of not in (0, os.getpid()) and is_alive(ahead_of)
    _write_stamp(stamp, num_bytes, ahead_of if keep else 0)


def _size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _evict(stamp: _Stamp) -> bool:
    """Remove a shard, or a reservation whose process is gone, unless it is held."""
    try:
        with locked(_stamp_of(stamp.path), wait=False) as descriptor:
            vanish(stamp.path)
            _write_stamp(descriptor, 0, 0)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EagleOfflineError(f"{stamp.path}: cannot be removed: {error.strerror}") from error
    return True

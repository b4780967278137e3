"""Shards on local disk: fetched once whoever asks, verified, never above the bound, never gone from under a reader."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from eagle_offline.cache import local_cache
from eagle_offline.cache import remote as remote_module
from eagle_offline.cache.formats import digest_shard
from eagle_offline.cache.layout import CommitRecord
from eagle_offline.cache.local_cache import Shard, ShardCache
from eagle_offline.cache.remote import RemoteCache
from eagle_offline.errors import DataError, EagleOfflineError, SpaceError, UsageError
from tests.object_store import Answer, ObjectStore, running_store, write_shard_by_hand

ROOT = Path(__file__).resolve().parents[2]
SIZE = 1000


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with running_store() as running:
        yield running


class Shelf:
    """Six shards of one size in a store, and how often each was fetched."""

    def __init__(self, url: str, directory: Path, format_: str = "arrow"):
        self.remote = RemoteCache(url)
        self.fetched: list[str] = []
        self.shards: list[Shard] = []
        for number in range(6):
            record = write_shard_by_hand(directory, number, format_, bytes([number]) * SIZE)
            self.remote.put(directory / record.file, record.file)
            self.shards.append(shard_of(record))
        self.size = self.shards[0].file_bytes
        fetch = self.remote.fetch

        def counted(name: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
            self.fetched.append(name)
            fetch(name, path, check)

        self.remote.fetch = counted  # type: ignore[method-assign]

    def numbers(self, names: list[str]) -> list[int]:
        return [[shard.file for shard in self.shards].index(name) for name in names]

    def here(self, cache: ShardCache) -> list[int]:
        """Numbers of the shards that are on the disk."""
        return sorted(self.numbers([path.name for path in cache.directory.glob("shard-*") if path.suffix != ".lock"]))


def shard_of(record: CommitRecord) -> Shard:
    return Shard(record.file, record.file_bytes, record.digest)


@pytest.fixture(params=["arrow", "zarr"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    return Shelf(f"memory://{uuid.uuid4().hex}/cache", tmp_path / "made", request.param)


@pytest.fixture
def files(tmp_path: Path) -> Shelf:
    return Shelf(f"memory://{uuid.uuid4().hex}/cache", tmp_path / "made")


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def stays(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        assert true()
        time.sleep(0.01)


# Bounds and order.


def test_a_shard_is_fetched_once_and_is_what_it_was(shelf, tmp_path):
    with ShardCache(shelf.remote, tmp_path / "local", 10 * shelf.size) as cache:
        for _ in range(3):
            path = cache.path(*shelf.shards[2])
            assert digest_shard(path)[0] == shelf.shards[2].digest
        assert path == cache.directory / shelf.shards[2].file
    with ShardCache(shelf.remote, tmp_path / "local", 10 * shelf.size) as again:
        assert again.path(*shelf.shards[2]) == path
    assert shelf.numbers(shelf.fetched) == [2]


def test_the_one_not_asked_for_the_longest_goes_first(shelf, tmp_path):
    with ShardCache(shelf.remote, tmp_path / "local", 3 * shelf.size) as cache:
        for number in (0, 1, 2, 0, 3):
            cache.path(*shelf.shards[number])
        assert shelf.here(cache) == [0, 2, 3]
        cache.path(*shelf.shards[4])
        assert shelf.here(cache) == [0, 3, 4]


def test_never_more_than_the_bound_lies_there(shelf, tmp_path):
    with ShardCache(shelf.remote, tmp_path / "local", 2 * shelf.size + SIZE // 2) as cache:
        for number in (0, 1, 2, 3, 4, 5, 0, 3, 1):
            cache.path(*shelf.shards[number])
            assert len(shelf.here(cache)) <= 2
            assert number in shelf.here(cache)
    assert not list((tmp_path / "local").rglob(".*partial*"))


def test_caches_of_several_stores_share_one_bound(tmp_path):
    one, other = (Shelf(f"memory://{uuid.uuid4().hex}/cache", tmp_path / name) for name in ("one", "other"))
    with (
        ShardCache(one.remote, tmp_path / "local", 2 * one.size) as first,
        ShardCache(other.remote, tmp_path / "local", 2 * one.size) as second,
    ):
        first.path(*one.shards[0])
        first.path(*one.shards[1])
        second.path(*other.shards[0])
        assert (one.here(first), other.here(second)) == ([1], [0])


def test_a_shard_larger_than_the_bound_is_refused_in_one_line(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", files.size - 1) as cache:
        with pytest.raises(UsageError, match=r"1000 bytes, more than .* \(999\): raise --local-cache-size"):
            cache.path(*files.shards[0])
        with pytest.raises(UsageError, match="--local-cache-size"):
            cache.prefetch(files.shards)


def test_a_mapped_shard_outlives_its_eviction(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", files.size) as cache:
        with cache.path(*files.shards[1]).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cache.path(*files.shards[2])
        assert files.here(cache) == [2]
        assert mapped[:] == b"\1" * SIZE


def test_what_is_held_is_not_evicted(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(local_cache, "ROOM_SECONDS", 0.2)
    with ShardCache(shelf.remote, tmp_path / "local", 2 * shelf.size) as cache:
        with cache.held(*shelf.shards[0]) as path:
            for number in (1, 2, 3):
                cache.path(*shelf.shards[number])
            assert shelf.here(cache) == [0, 3]
            assert digest_shard(path)[0] == shelf.shards[0].digest
            with cache.held(*shelf.shards[3]), pytest.raises(UsageError, match="raise --local-cache-size"):
                cache.path(*shelf.shards[4])
        assert digest_shard(cache.path(*shelf.shards[4]))[0] == shelf.shards[4].digest


def test_a_disk_that_is_nearly_full_is_not_filled(files, tmp_path, monkeypatch):
    free = [10 * files.size]
    monkeypatch.setattr(local_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    with ShardCache(files.remote, tmp_path / "local", 10 * files.size) as cache:
        cache.path(*files.shards[0])
        free[0] = int(1.04 * files.size)
        with pytest.raises(SpaceError, match="free on the disk, too little for shard-000001"):
            cache.path(*files.shards[1])
        free[0] = int(1.06 * files.size)
        cache.path(*files.shards[1])


# Damage.


def corrupt(name: str, times: int) -> Callable[[str, str, Answer], Answer]:
    left = [times]

    def meddle(method: str, path: str, said: Answer) -> Answer:
        if method != "GET" or not path.endswith(name) or not left[0]:
            return said
        left[0] -= 1
        whole = bytearray(b"".join(said[2]))
        whole[len(whole) // 2] ^= 1
        return said[0], [item for item in said[1] if not item[0].lower().startswith("x-amz-checksum")], [bytes(whole)]

    return meddle


@pytest.mark.parametrize(("format_", "part"), [("arrow", ".arrow"), ("zarr", "c.1.0.0")])
def test_what_comes_damaged_is_fetched_again_once_and_never_put_in_place(store, tmp_path, format_, part):
    shelf = Shelf(f"s3://{store.new_bucket()}/cache", tmp_path / "made", format_)
    try:
        with ShardCache(shelf.remote, tmp_path / "local", 10 * shelf.size) as cache:
            store.meddle = corrupt(part, times=1)
            assert digest_shard(cache.path(*shelf.shards[0]))[0] == shelf.shards[0].digest
            assert shelf.numbers(shelf.fetched) == [0, 0]
            store.meddle = corrupt(part, times=9)
            with pytest.raises(DataError, match=r"shard-000001-.*damaged in the store.*precompute --resume"):
                cache.path(*shelf.shards[1])
            assert shelf.numbers(shelf.fetched) == [0, 0, 1, 1]
            assert shelf.here(cache) == [0]
            store.meddle = None
            cache.path(*shelf.shards[1])
    finally:
        store.meddle = None
    assert not list((tmp_path / "local").rglob(".*partial*"))


def test_a_shard_that_is_not_in_the_store_is_one_line(files, tmp_path):
    files.remote.remove(files.shards[3].file)
    with ShardCache(files.remote, tmp_path / "local", 2 * files.size) as cache:
        with pytest.raises(DataError, match="not found"):
            cache.path(*files.shards[3])
        for number in (0, 1, 2):  # what was reserved for it is free again
            cache.path(*files.shards[number])
        assert files.here(cache) == [1, 2]


@pytest.mark.parametrize("name", ["../shard-000000.arrow", "a/b", ".hidden", "..", "shard-000000.arrow.lock"])
def test_no_name_leaves_the_directory(files, tmp_path, name):
    cache = ShardCache(files.remote, tmp_path / "local", 2 * files.size)
    with pytest.raises(DataError, match="no name"):
        cache.path(name, 10, "0" * 32)
    assert not list((tmp_path / "local").rglob("*.lock"))


# Fetching ahead.


def test_shards_come_ahead_in_order_and_only_as_far_as_they_fit(shelf, tmp_path):
    with ShardCache(shelf.remote, tmp_path / "local", 3 * shelf.size) as cache:
        order = [shelf.shards[number] for number in (4, 2, 0, 1, 5, 3)]
        cache.prefetch(order)
        wait_until(lambda: len(shelf.here(cache)) == 3)
        stays(lambda: shelf.numbers(shelf.fetched) == [4, 2, 0])
        cache.path(*order[0])
        stays(lambda: shelf.numbers(shelf.fetched) == [4, 2, 0])  # the one in hand stays, too
        cache.path(*order[1])
        wait_until(lambda: shelf.here(cache) == [0, 1, 2])
        for shard in order[2:]:
            cache.path(*shard)
        assert shelf.numbers(shelf.fetched) == [4, 2, 0, 1, 5, 3]


def test_nothing_needed_sooner_goes_for_what_is_needed_later(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", 3 * files.size) as cache:
        for number in (0, 1, 2):
            cache.path(*files.shards[number])
        cache.prefetch([files.shards[number] for number in (2, 3, 0, 1)])
        wait_until(lambda: 3 in files.here(cache))
        stays(lambda: files.here(cache) == [0, 2, 3])  # 1 is needed last of all


def test_asking_for_what_was_not_planned_takes_the_room_of_what_is_needed_last(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", 3 * files.size) as cache:
        cache.prefetch(files.shards[:4])
        wait_until(lambda: cache._fetched == 3)
        cache.path(*files.shards[5])
        assert files.here(cache) == [0, 1, 5]


def test_a_new_order_replaces_the_old_one(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", 2 * files.size) as cache:
        cache.prefetch(files.shards[:3])
        wait_until(lambda: files.here(cache) == [0, 1])
        cache.prefetch(files.shards[4:])
        wait_until(lambda: files.here(cache) == [4, 5])


def test_a_reader_that_overtakes_is_caught_up_with(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", 2 * files.size) as cache:
        cache.prefetch(files.shards)
        wait_until(lambda: files.here(cache) == [0, 1])
        cache.path(*files.shards[4])
        wait_until(lambda: files.here(cache) == [4, 5])
        assert 3 not in files.numbers(files.fetched)


def test_what_goes_wrong_ahead_is_said_when_the_shard_is_asked_for(files, tmp_path):
    files.remote.remove(files.shards[1].file)
    with ShardCache(files.remote, tmp_path / "local", 4 * files.size) as cache:
        cache.prefetch(files.shards)
        cache.path(*files.shards[0])
        wait_until(lambda: 2 in files.here(cache))
        with pytest.raises(DataError, match=files.shards[1].file):
            cache.path(*files.shards[1])


def test_what_went_wrong_ahead_and_is_right_by_now_is_not_said(files, tmp_path):
    files.remote.remove(files.shards[1].file)
    with ShardCache(files.remote, tmp_path / "local", 4 * files.size) as cache:
        cache.prefetch(files.shards)
        wait_until(lambda: 2 in files.here(cache))
        files.remote.put(tmp_path / "made" / files.shards[1].file, files.shards[1].file)
        cache.path(*files.shards[1])


def test_a_shard_stays_until_its_last_use(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", 3 * files.size) as cache:
        cache.prefetch(files.shards, [(0, 9), (1, 3), (2, 8), (10, 10), (11, 11), (12, 12)])
        wait_until(lambda: files.here(cache) == [0, 1, 2])
        for number, place in ((0, 0), (1, 1), (2, 2), (0, 3)):
            cache.reached(place)
            cache.path(*files.shards[number])
        stays(lambda: files.here(cache) == [0, 1, 2])
        cache.reached(4)
        wait_until(lambda: files.here(cache) == [0, 2, 3])
        cache.path(*files.shards[5])  # asked for by somebody else: what is needed last makes room, nothing is skipped
        assert files.here(cache) == [0, 2, 5]
        cache.reached(10)
        wait_until(lambda: 4 in files.here(cache))


def test_what_is_open_does_not_hold_up_what_comes_after_it(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", 4 * files.size) as cache, cache.held(*files.shards[0]):
        cache.prefetch(files.shards[:3])
        wait_until(lambda: files.here(cache) == [0, 1, 2])


def test_caches_of_one_process_take_nothing_from_each_other_that_is_needed_sooner(tmp_path):
    one, other = (Shelf(f"memory://{uuid.uuid4().hex}/cache", tmp_path / name) for name in ("one", "other"))
    with (
        ShardCache(one.remote, tmp_path / "local", 4 * one.size) as first,
        ShardCache(other.remote, tmp_path / "local", 4 * one.size) as second,
    ):
        first.prefetch(one.shards, [(place, place) for place in (0, 2, 4, 6, 8, 10)])
        second.prefetch(other.shards, [(place, place) for place in (1, 3, 5, 7, 9, 11)])
        wait_until(lambda: (one.here(first), other.here(second)) == ([0, 1], [0, 1]))
        stays(lambda: (one.here(first), other.here(second)) == ([0, 1], [0, 1]))


def test_readers_leave_room_for_one_another(files, tmp_path, monkeypatch):
    with ShardCache(files.remote, tmp_path / "local", 12_000) as cache:
        assert cache.max_held_bytes == 6_000
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        assert cache.max_held_bytes == 2_000
        with ShardCache(files.remote, tmp_path / "local", 12_000):
            assert cache.max_held_bytes == 1_000
        assert cache.max_held_bytes == 2_000


def test_closing_stops_it(files, tmp_path):
    gate = threading.Event()
    fetch = files.remote.fetch

    def slow(name: str, path: Path, check: Callable[[Path], None] | None = None) -> None:
        gate.wait(10)
        fetch(name, path, check)

    files.remote.fetch = slow  # type: ignore[method-assign]
    cache = ShardCache(files.remote, tmp_path / "local", 6 * files.size)
    cache.prefetch(files.shards)
    time.sleep(0.05)
    cache.close(wait_seconds=0.05)
    gate.set()
    wait_until(lambda: files.fetched == [files.shards[0].file])
    stays(lambda: len(files.fetched) == 1)
    cache.path(*files.shards[3])  # who still asks is still answered


# Several at once.


def test_threads_that_ask_at_the_same_time_share_one_download(shelf, tmp_path):
    with ShardCache(shelf.remote, tmp_path / "local", 3 * shelf.size) as cache:
        cache.prefetch(shelf.shards[:1])
        got: list[Path] = []
        threads = [threading.Thread(target=lambda: got.append(cache.path(*shelf.shards[0]))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [cache.directory / shelf.shards[0].file] * 8
        assert len(shelf.fetched) == 1


def test_many_threads_in_little_room_all_get_what_they_ask_for(files, tmp_path):
    with ShardCache(files.remote, tmp_path / "local", 2 * files.size) as cache:
        cache.prefetch(files.shards)
        wrong: list[object] = []

        def ask(first: int) -> None:
            try:
                for turn in range(12):
                    number = (first * 5 + turn) % 6
                    with cache.held(*files.shards[number]) as path:
                        if path.read_bytes() != bytes([number]) * SIZE:
                            wrong.append(number)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(files.here(cache)) <= 2


ASK = """
import json, sys, threading
from pathlib import Path
from eagle_offline.cache.local_cache import ShardCache
from eagle_offline.cache.formats import digest_shard
from eagle_offline.cache.remote import RemoteCache
url, directory, max_bytes, shards = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
cache = ShardCache(RemoteCache(url), directory, max_bytes)
print("ready", flush=True)
sys.stdin.readline()
wrong = []
def ask(first):
    for turn in range(len(shards)):
        shard = shards[(first + turn) % len(shards)]
        with cache.held(*shard) as path:
            if digest_shard(path)[0] != shard[2]:
                wrong.append(shard)
threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("wrong" if wrong else "right", flush=True)
"""


def start_asking(shelf: Shelf, directory: Path, max_bytes: int, shards: list[Shard]) -> subprocess.Popen:
    import json

    return subprocess.Popen(
        [sys.executable, "-c", ASK, shelf.remote.url, str(directory), str(max_bytes), json.dumps(shards)],
        cwd=ROOT,
        env=dict(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask_together(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60)[0] == "right\n"
        assert process.returncode == 0


def test_processes_with_several_threads_share_one_download(store, tmp_path):
    shelf = Shelf(f"s3://{store.new_bucket()}/cache", tmp_path / "made")
    wanted = shelf.shards[:3]
    store.requests.clear()
    ask_together([start_asking(shelf, tmp_path / "local", 10 * shelf.size, wanted) for _ in range(2)])
    assert [store.downloads(shard.file) for shard in wanted] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["arrow", "zarr"])
def test_processes_in_little_room_all_get_what_they_ask_for(store, tmp_path, format_):
    shelf = Shelf(f"s3://{store.new_bucket()}/cache", tmp_path / "made", format_)
    ask_together([start_asking(shelf, tmp_path / "local", 2 * shelf.size, shelf.shards) for _ in range(3)])
    with ShardCache(shelf.remote, tmp_path / "local", 2 * shelf.size) as cache:
        assert len(shelf.here(cache)) <= 2
    assert not list((tmp_path / "local").rglob(".*partial*"))


KILLED = """
import json, os, signal, sys
from pathlib import Path
from eagle_offline.cache import local_cache
from eagle_offline.cache.remote import RemoteCache
local_cache._verify = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
shard = json.loads(sys.argv[4])[0]
local_cache.ShardCache(RemoteCache(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).path(*shard)
"""


def test_a_process_killed_while_fetching_leaves_nothing_behind(tmp_path, monkeypatch):
    shelf = Shelf(f"file://{tmp_path}/bucket", tmp_path / "made", "zarr")
    monkeypatch.setitem(globals(), "ASK", KILLED)
    process = start_asking(shelf, tmp_path / "local", 2 * shelf.size, shelf.shards[:1])
    assert process.wait(60) == -signal.SIGKILL
    assert list((tmp_path / "local").rglob(".*partial*"))
    with ShardCache(shelf.remote, tmp_path / "local", 2 * shelf.size) as cache:
        assert not list((tmp_path / "local").rglob(".*partial*"))
        for number in (1, 2, 0):  # its lock and its reservation are gone
            assert digest_shard(cache.path(*shelf.shards[number]))[0] == shelf.shards[number].digest
        assert shelf.here(cache) == [0, 2]


def test_what_another_process_fetched_ahead_is_left_to_it(files, tmp_path, monkeypatch):
    mine = ShardCache(files.remote, tmp_path / "local", 3 * files.size)
    alive = [True]
    alone = pytest.MonkeyPatch()
    alone.setattr(ShardCache, "_sharing", lambda cache: [cache])  # as in a process of its own
    monkeypatch.setattr(local_cache, "is_alive", lambda process: alive[0])
    with ShardCache(files.remote, tmp_path / "local", 3 * files.size) as other, mine:
        monkeypatch.setattr(local_cache.os, "getpid", lambda: 77)
        other.prefetch(files.shards[:2])
        wait_until(lambda: files.here(other) == [0, 1])
        stays(lambda: files.here(other) == [0, 1])
        monkeypatch.undo()
        monkeypatch.setattr(local_cache, "is_alive", lambda process: alive[0])
        mine.prefetch(files.shards[3:])
        wait_until(lambda: files.here(mine) == [0, 1, 3])
        stays(lambda: files.here(mine) == [0, 1, 3])
        alive[0] = False
        wait_until(lambda: files.here(mine) == [3, 4, 5])
    alone.undo()


def test_an_error_of_the_store_is_one_line_and_the_next_attempt_may_succeed(files, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_RETRY_SECONDS", ())
    filesystem = files.remote._connected()
    with ShardCache(files.remote, tmp_path / "local", 3 * files.size) as cache:
        with monkeypatch.context() as broken:
            broken.setattr(filesystem, "get", lambda *_: (_ for _ in ()).throw(ConnectionError("reset")))
            with pytest.raises(EagleOfflineError, match="cannot be reached"):
                cache.path(*files.shards[0])
        cache.path(*files.shards[0])
    shutil.rmtree(tmp_path / "local")

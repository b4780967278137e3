"""A cache in a store: the same one as here, whoever is killed, whoever else writes, whatever the network does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from eagle_offline import open_cache
from eagle_offline.cache import remote as remote_module
from eagle_offline.cache.formats import digest_shard
from eagle_offline.cache.layout import record_file
from eagle_offline.cache.remote import Mirror, RemoteCache, is_url
from eagle_offline.cache.writer import committed_shards
from eagle_offline.errors import DataError, EagleOfflineError, MismatchError, SpaceError, UsageError
from tests import builders
from tests.object_store import (
    COMPANIONS,
    ENVIRONMENT,
    Answer,
    ObjectStore,
    running_store,
    write_cache_by_hand,
    write_shard_by_hand,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with running_store() as running:
        yield running


@pytest.fixture
def s3_url(store: ObjectStore) -> Iterator[str]:
    yield f"s3://{store.new_bucket()}/caches/one"
    store.meddle = None


@pytest.fixture
def memory_url() -> str:
    return f"memory://{uuid.uuid4().hex}/one"


@pytest.fixture(params=["memory", "s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a new cache in each kind of store."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket/one"
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_RETRY_SECONDS", (0.0, 0.0))


def files_of(directory: Path) -> dict[str, bytes]:
    """Content of every file of a cache directory, by path; what begins with a dot is not of the cache."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def push_all(url: str, directory: Path, *, drop: bool = False) -> Mirror:
    """Bring up a whole cache directory."""
    mirror = Mirror(RemoteCache(url), directory)
    assert mirror.push_manifest()
    mirror.push_companions(COMPANIONS)
    mirror.push_left(drop=drop)
    return mirror


def pull_all(url: str, directory: Path) -> Mirror:
    """Bring down a whole cache."""
    mirror = Mirror(RemoteCache(url), directory)
    listed = mirror.pull()
    for name in (*COMPANIONS, *(name for name in listed if name.startswith("shard-"))):
        mirror.ensure(name)
    return mirror


def test_a_url_is_told_from_a_directory():
    assert is_url("s3://bucket/cache")
    assert is_url("file:///cache")
    assert not is_url("/data/cache")
    assert not is_url(Path("data/s3"))


@pytest.mark.parametrize("format_", ["arrow", "zarr"])
def test_what_comes_down_is_what_went_up(url, tmp_path, format_):
    write_cache_by_hand(tmp_path / "here", 3, format_)
    push_all(url, tmp_path / "here")
    pull_all(url, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    assert not list((tmp_path / "there").rglob(".*partial*"))


def test_a_cache_that_was_made_reads_the_same_from_a_store(memory_url, tmp_path):
    cache = builders.make_cache(tmp_path / "cache")
    remote = RemoteCache(memory_url)
    for path in cache.iterdir():
        if path.is_file():
            remote.put(path, path.name)
        else:
            for file in path.iterdir():
                remote.put(file, f"{path.name}/{file.name}")
    mirror = Mirror(remote, tmp_path / "mirror")
    listed = mirror.pull()
    mirrored, made = open_cache(tmp_path / "mirror"), open_cache(cache)
    for name in listed:
        if name.startswith("shard-"):
            mirror.ensure(name)
    assert len(mirrored) == len(made)
    assert all(mirrored.read_stored(i).digest() == made.read_stored(i).digest() for i in range(len(made)))


def test_a_new_place_holds_nothing(url, tmp_path):
    assert RemoteCache(url).names() == {}
    assert Mirror(RemoteCache(url), tmp_path / "here").pull() == {}


def test_one_listing_names_everything_at_the_top(store, s3_url, tmp_path):
    records = write_cache_by_hand(tmp_path / "here", 2, "zarr")
    push_all(s3_url, tmp_path / "here")
    store.requests.clear()
    names = RemoteCache(s3_url).names()
    assert len(store.requests) == 1
    assert names[records[0].file].is_directory
    assert names["head.safetensors"].num_bytes == len(b"head")
    assert {name for name in names if not name.startswith(("shard", "commit"))} == {
        "manifest.json",
        "head.safetensors",
        "vocab",
    }


def test_a_listing_is_never_an_old_one(store, s3_url):
    import boto3

    remote = RemoteCache(s3_url)
    remote.create("one", b"")
    assert remote.names().keys() == {"one"}
    bucket, _, key = s3_url.removeprefix("s3://").partition("/")
    boto3.client("s3", endpoint_url=store.endpoint).put_object(Bucket=bucket, Key=f"{key}/two", Body=b"")
    assert remote.names().keys() == {"one", "two"}


# Exclusive creation.


def test_of_several_that_create_a_name_one_does(url):
    remote = RemoteCache(url)
    remote.create("other", b"so that the place is there")
    assert remote.creates_exclusively
    barrier, won = threading.Barrier(6), []

    def create(content: bytes) -> None:
        barrier.wait()
        if remote.create("name", content):
            won.append(content)

    threads = [threading.Thread(target=create, args=(bytes([number]) * 100,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not url.startswith("memory"):  # it looks first and writes then, but not for several processes
        assert len(won) == 1
    assert remote.read("name") in won
    assert not remote.create("name", b"late")


def test_a_store_without_exclusive_creation_is_known_and_still_never_overwrites(memory_url):
    class Weak(MemoryFileSystem):
        def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
            assert not kwargs
            super().pipe_file(path, value)

    remote = RemoteCache(memory_url)
    remote._filesystem = Weak()
    assert not remote.creates_exclusively
    assert remote.create("name", b"first")
    assert not remote.create("name", b"second")
    assert remote.read("name") == b"first"


def test_the_writer_that_comes_second_takes_the_record_that_stands_and_its_shard_goes(url, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        write_cache_by_hand(directory, 0)
    push_all(url, ours)
    format_ = "zarr"
    first, second = (write_shard_by_hand(d, 0, format_, d.name.encode()) for d in (ours, theirs))
    assert Mirror(RemoteCache(url), ours).push_shard(first) == first
    mirror = Mirror(RemoteCache(url), theirs)
    assert mirror.push_shard(second, drop=False) == first
    assert (theirs / record_file(0)).read_bytes() == (ours / record_file(0)).read_bytes()
    names = mirror.remote.names()
    assert first.file in names
    assert second.file not in names
    assert not (theirs / second.file).exists()


def test_two_writers_of_the_same_bytes_do_not_take_them_from_each_other(url, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    records = write_cache_by_hand(ours, 1)
    shutil.copytree(ours, theirs)
    push_all(url, ours)
    mirror = Mirror(RemoteCache(url), theirs)
    assert mirror.push_shard(records[0]) == records[0]
    assert records[0].file in mirror.remote.names()


def test_the_manifest_that_stands_is_never_replaced(url, tmp_path):
    write_cache_by_hand(tmp_path / "ours", 0)
    write_cache_by_hand(tmp_path / "theirs", 0)
    (tmp_path / "theirs" / "manifest.json").write_text("another")
    push_all(url, tmp_path / "ours")
    mirror = Mirror(RemoteCache(url), tmp_path / "theirs")
    assert not mirror.push_manifest()
    assert files_of(tmp_path / "theirs") == files_of(tmp_path / "ours")
    assert mirror.push_manifest()


# Pulling again.


def test_what_is_unchanged_is_not_fetched_again_and_what_is_changed_is(store, s3_url, tmp_path):
    write_cache_by_hand(tmp_path / "here", 3)
    up = push_all(s3_url, tmp_path / "here")
    mirror = Mirror(RemoteCache(s3_url), tmp_path / "there")
    mirror.pull()
    store.requests.clear()
    mirror.pull()
    assert store.downloads(".json") == 0
    up.remote.remove(record_file(1))
    up.remote.remove(record_file(2))
    same_size = (tmp_path / "here" / record_file(2)).read_bytes().replace(b"made", b"MADE")
    assert up.remote.create(record_file(2), same_size)
    mirror.pull()
    assert committed_shards(mirror.directory) == [0, 2]
    assert (mirror.directory / record_file(2)).read_bytes() == same_size
    assert store.downloads(".json") == 1


def test_an_index_stands_for_the_records(memory_url, tmp_path):
    write_cache_by_hand(tmp_path / "here", 2)
    push_all(memory_url, tmp_path / "here")
    mirror = Mirror(RemoteCache(memory_url), tmp_path / "there")
    mirror.pull(records=False)
    assert committed_shards(mirror.directory) == [0, 1]  # there is none yet
    index = f"index-{'a' * 32}.arrow"
    mirror.remote.create(index, b"index")
    fresh = Mirror(RemoteCache(memory_url), tmp_path / "fresh")
    fresh.pull(records=False)
    assert files_of(fresh.directory).keys() == {"manifest.json", index}
    fresh.pull()
    assert committed_shards(fresh.directory) == [0, 1]
    mirror.remote.remove(index)
    fresh.pull()
    assert not (fresh.directory / index).exists()


def test_a_directory_mirrors_one_cache(memory_url, tmp_path):
    Mirror(RemoteCache(memory_url), tmp_path).pull()
    with pytest.raises(UsageError, match="mirrors memory://"):
        Mirror(RemoteCache(f"{memory_url}-other"), tmp_path)


def test_a_companion_of_another_size_is_fetched_again(memory_url, tmp_path):
    write_cache_by_hand(tmp_path / "here", 0)
    push_all(memory_url, tmp_path / "here")
    mirror = Mirror(RemoteCache(memory_url), tmp_path / "there")
    path = mirror.ensure("vocab/ids.safetensors")
    path.write_bytes(b"short")
    assert mirror.ensure("vocab/ids.safetensors").read_bytes() == b"short"
    assert mirror.ensure("vocab/ids.safetensors", 10).read_bytes() == b"vocabulary"
    path.write_bytes(b"damaged!!!")
    assert mirror.ensure("vocab/ids.safetensors", 10, again=True).read_bytes() == b"vocabulary"


# Interruptions.

KILLED = """
import os, signal, sys
from pathlib import Path
from eagle_offline.cache import remote
from eagle_offline.cache.writer import read_record

url, directory, moment = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "between objects":
    def half(self, path, name):
        put(self, path / "zarr.json", f"{name}/zarr.json")
        die()
    put, remote.RemoteCache.put = remote.RemoteCache.put, half
if moment == "before the record":
    remote.RemoteCache.create = die
if moment == "before the shard is dropped":
    remote.vanish = die
remote.Mirror(remote.RemoteCache(url), directory).push_shard(read_record(directory, 1))
"""
MOMENTS = ["between objects", "before the record", "before the shard is dropped"]


def run_python(code: str, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def kill_and_take_up(url: str, tmp_path: Path, moment: str, *, shard_lost: bool) -> None:
    here = tmp_path / "here"
    records = write_cache_by_hand(here, 2, "zarr")
    whole = files_of(here)
    mirror = Mirror(RemoteCache(url), here)
    mirror.push_manifest()
    mirror.push_companions(COMPANIONS)
    mirror.push_shard(records[0])
    killed = run_python(KILLED, url, here, moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    committed = moment == "before the shard is dropped"
    assert (record_file(1) in mirror.remote.names()) == committed
    if shard_lost:
        shutil.rmtree(here / records[1].file)
    there = mirror.remote.names()
    again = Mirror(RemoteCache(url), here)
    again.take_up()
    assert again.remote.names() == there  # nothing goes up yet
    assert again.push_left() == ([] if committed or shard_lost else [1])
    if shard_lost and not committed:
        assert committed_shards(here) == [0]
        write_shard_by_hand(here, 1, "zarr", b"\1" * 1001)  # made again: the same bytes
        assert Mirror(RemoteCache(url), here).push_left() == [1]
    mirror.pull()
    assert not list(here.glob("shard-*"))
    pull_all(url, tmp_path / "there")
    assert files_of(tmp_path / "there") == whole


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_pushing_and_resumed_the_cache_is_whole(s3_url, tmp_path, moment):
    kill_and_take_up(s3_url, tmp_path, moment, shard_lost=False)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_pushing_and_the_shard_lost_it_is_made_again(s3_url, tmp_path, moment):
    kill_and_take_up(s3_url, tmp_path, moment, shard_lost=True)


def test_a_record_whose_shard_is_gone_or_damaged_goes_so_that_it_is_made_again(memory_url, tmp_path):
    records = write_cache_by_hand(tmp_path, 3)
    (tmp_path / records[0].file).unlink()
    (tmp_path / records[1].file).write_bytes(b"torn")
    mirror = Mirror(RemoteCache(memory_url), tmp_path)
    mirror.push_manifest()
    mirror.take_up()
    assert committed_shards(tmp_path) == [2]
    assert mirror.push_left() == [2]
    names = mirror.remote.names()
    assert {name for name in names if name.startswith("commit")} == {record_file(2)}


def test_what_was_begun_here_and_is_not_in_the_store_is_begun_again(memory_url, tmp_path):
    write_cache_by_hand(tmp_path, 2)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokens.arrow").write_bytes(b"tokens")
    mirror = Mirror(RemoteCache(memory_url), tmp_path)
    assert mirror.take_up() == {}
    assert files_of(tmp_path) == {"tokens/tokens.arrow": b"tokens"}
    assert mirror.remote.names() == {}


def test_work_of_another_manifest_is_never_pushed_nor_lost(memory_url, tmp_path):
    write_cache_by_hand(tmp_path / "ours", 1)
    write_cache_by_hand(tmp_path / "theirs", 0)
    (tmp_path / "theirs" / "manifest.json").write_text("another")
    push_all(memory_url, tmp_path / "theirs")
    before = files_of(tmp_path / "ours")
    with pytest.raises(MismatchError, match="another manifest"):
        Mirror(RemoteCache(memory_url), tmp_path / "ours").take_up()
    assert files_of(tmp_path / "ours") == before


# A network that fails.


class Flaky(MemoryFileSystem):
    """Fails the given calls, counted over all methods that ask the store."""

    calls = 0
    failing: frozenset[int] = frozenset()
    error: Exception = ConnectionError("reset by peer")

    def count(self) -> None:
        type(self).calls += 1
        if self.calls in self.failing:
            raise self.error

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        self.count()
        return super().ls(*args, **kwargs)

    def get_file(self, *args: Any, **kwargs: Any) -> Any:
        self.count()
        return super().get_file(*args, **kwargs)

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self.count()
        return super().put_file(*args, **kwargs)

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        self.count()
        return super().cat_file(*args, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.count()
        super().pipe_file(path, value, mode=mode, **kwargs)


def flaky(url: str, monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> RemoteCache:
    monkeypatch.setattr(Flaky, "calls", 0)
    monkeypatch.setattr(Flaky, "failing", frozenset(failing))
    remote = RemoteCache(url)
    remote._filesystem = Flaky()
    return remote


@pytest.mark.parametrize("every", [2, 3])
def test_a_store_that_fails_now_and_then_costs_nothing(memory_url, tmp_path, monkeypatch, no_pauses, every):
    write_cache_by_hand(tmp_path / "here", 2)
    before = files_of(tmp_path / "here")
    failing = set(range(1, 200, every))
    up = Mirror(flaky(memory_url, monkeypatch, failing), tmp_path / "here")
    up.push_manifest()
    up.push_companions(COMPANIONS)
    assert up.push_left(drop=False) == [0, 1]
    down = Mirror(flaky(memory_url, monkeypatch, failing), tmp_path / "there")
    for name in (*COMPANIONS, *(name for name in down.pull() if name.startswith("shard-"))):
        down.ensure(name)
    assert files_of(tmp_path / "there") == before


@pytest.mark.parametrize("call", range(1, 8))
def test_a_store_that_stays_away_is_one_line_and_a_later_run_goes_on(
    memory_url, tmp_path, monkeypatch, no_pauses, call
):
    write_cache_by_hand(tmp_path / "here", 2)
    mirror = Mirror(flaky(memory_url, monkeypatch, set(range(call, 200))), tmp_path / "here")
    with pytest.raises(EagleOfflineError, match=r"cannot be reached.*reset by peer") as raised:
        push_with(mirror)
    assert memory_url in str(raised.value)
    assert "\n" not in str(raised.value)
    push_with(Mirror(RemoteCache(memory_url), tmp_path / "here"))
    pull_all(memory_url, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def push_with(mirror: Mirror) -> None:
    mirror.push_manifest()
    mirror.push_companions(COMPANIONS)
    mirror.push_left(drop=False)


def test_what_is_not_the_networks_fault_is_not_tried_again(memory_url, monkeypatch, no_pauses):
    remote = flaky(memory_url, monkeypatch, {1})
    monkeypatch.setattr(Flaky, "error", PermissionError("Forbidden"))
    with pytest.raises(UsageError, match=r"no access \(Forbidden\); check the credentials"):
        remote.names()
    assert Flaky.calls == 1


def test_a_lost_answer_to_the_creation_of_a_record_is_no_lost_race(memory_url, tmp_path, monkeypatch, no_pauses):
    records = write_cache_by_hand(tmp_path, 1)
    remote = RemoteCache(memory_url)

    class Forgetful(MemoryFileSystem):
        lost = False

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            super().pipe_file(path, value, mode=mode, **kwargs)
            if not self.lost:
                self.lost = True
                raise ConnectionResetError("reset by peer")

    remote._filesystem = Forgetful()
    assert Mirror(remote, tmp_path).push_shard(records[0]) == records[0]
    assert {record_file(0), records[0].file} <= remote.names().keys()


def cut_in_half(name: str, times: int) -> Any:
    left = [times]

    def meddle(method: str, path: str, said: Answer) -> Answer:
        if method != "GET" or not path.endswith(name) or not left[0]:
            return said
        left[0] -= 1
        status, headers, body = said
        whole = b"".join(body)
        kept = [(key, value) for key, value in headers if not key.lower().startswith(("x-amz-checksum", "content-l"))]
        return status, [*kept, ("Content-Length", str(len(whole) // 2))], [whole[: len(whole) // 2]]

    return meddle


def test_a_download_that_was_cut_short_is_not_put_in_place(store, s3_url, tmp_path, no_pauses):
    records = write_cache_by_hand(tmp_path / "here", 1, "zarr")
    mirror = push_all(s3_url, tmp_path / "here")
    store.meddle = cut_in_half("c.1.0.0", times=1)
    mirror.remote.fetch(records[0].file, tmp_path / "again")
    assert digest_shard(tmp_path / "again")[0] == records[0].digest
    store.meddle = cut_in_half("c.1.0.0", times=9)
    with pytest.raises(EagleOfflineError, match=r"did not finish \(500 bytes of .* came, expected 1000\)"):
        mirror.remote.fetch(records[0].file, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_full_local_disk_is_said_as_such(memory_url, tmp_path, monkeypatch):
    write_cache_by_hand(tmp_path / "here", 1)
    remote = push_all(memory_url, tmp_path / "here").remote

    class Full(MemoryFileSystem):
        def get_file(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

    remote._filesystem = Full()
    with pytest.raises(SpaceError, match="No space left"):
        remote.fetch("head.safetensors", tmp_path / "head")
    assert not list(tmp_path.glob(".*"))


# Names and places.


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", ".hidden", "a/.hidden", "a\\b", "a\0b", "", "a//b", "a/", ".", ".."]
)
def test_no_name_leaves_the_cache(memory_url, tmp_path, name):
    mirror = Mirror(RemoteCache(memory_url), tmp_path / "mirror")
    (tmp_path / "file").write_bytes(b"x")
    for attempt in (
        lambda: mirror.remote.fetch(name, tmp_path / "out"),
        lambda: mirror.remote.put(tmp_path / "file", name),
        lambda: mirror.remote.create(name, b"x"),
        lambda: mirror.remote.remove(name),
        lambda: mirror.remote.read(name),
        lambda: mirror.ensure(name),
    ):
        with pytest.raises(DataError, match="no name inside"):
            attempt()


def test_a_tree_with_names_that_leave_it_is_refused(memory_url, tmp_path):
    remote = RemoteCache(memory_url)
    for name in ("c.0", "../../escaped"):
        MemoryFileSystem().pipe_file(f"{remote._root}/tree.zarr/{name}", b"x")
    with pytest.raises(DataError, match=r"'\.\./\.\./escaped' is no name inside it"):
        remote.fetch("tree.zarr", tmp_path / "a" / "b" / "tree.zarr")
    assert not list(tmp_path.rglob("escaped"))


def test_a_file_larger_than_expected_is_not_read(memory_url):
    remote = RemoteCache(memory_url)
    remote.create("large", b"x" * 100)
    with pytest.raises(DataError, match="100 bytes, expected at most 99"):
        remote.read("large", 99)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket/cache", "Protocol not known"),
        ("gs://bucket/cache", "pip install gcsfs"),
        ("s3://", "names no place"),
        ("memory://", "names no place"),
    ],
)
def test_a_url_that_cannot_be_meant_is_one_line(url, said):
    if url.startswith("gs"):
        try:
            import gcsfs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("gcsfs is installed")
    with pytest.raises(UsageError, match=said):
        RemoteCache(url)


def test_a_missing_bucket_is_one_line_and_is_not_made(store):
    remote = RemoteCache("s3://no-such-bucket-at-all/cache")
    for attempt in (remote.names, lambda: remote.create("name", b""), lambda: remote.put(Path(__file__), "name")):
        with pytest.raises(
            DataError, match=r"s3://no-such-bucket-at-all/cache.*bucket does not exist.*check the bucket"
        ):
            attempt()


ASK = """
import sys
from eagle_offline.cache.remote import RemoteCache
from eagle_offline.errors import EagleOfflineError
try:
    print(sorted(RemoteCache(sys.argv[1]).names()))
except EagleOfflineError as error:
    print(type(error).__name__, error)
"""


def test_missing_credentials_are_one_line(tmp_path):
    pytest.importorskip("s3fs")
    nobody = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    code = "import os\nfor name in [n for n in os.environ if n.startswith('AWS_') and n[4:7] != 'EC2']:\n"
    told = run_python(f"{code}    del os.environ[name]\n{ASK}", "s3://bucket/cache", environment=nobody)
    assert told.stdout.startswith("UsageError s3://bucket/cache: no access (Unable to locate credentials)"), told.stderr
    assert "AWS_ACCESS_KEY_ID" in told.stdout


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"])
def test_the_endpoint_is_taken_from_the_environment(store, s3_url, variable):
    RemoteCache(s3_url).create("manifest.json", b"{}")
    code = "import os\nos.environ.pop('AWS_ENDPOINT_URL')\nos.environ[sys.argv[2]] = sys.argv[3]\n"
    told = run_python(f"import sys\n{code}{ASK}", s3_url, variable, store.endpoint, environment=ENVIRONMENT)
    assert told.stdout.strip() == "['manifest.json']", told.stderr

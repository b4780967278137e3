"""A cache in an object store, end to end: made there as in a directory, and trained on as from one."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from eagle_offline import open_cache
from eagle_offline.cache import filling, local_cache
from eagle_offline.cache import remote as remote_module
from eagle_offline.cache.remote import Mirror, RemoteCache
from eagle_offline.cache.writer import committed_shards
from eagle_offline.provenance import digest_bytes
from eagle_offline.text import token_builder
from eagle_offline.training.corpus import small_local_cache
from eagle_offline.training.trainer import Trainer
from tests import builders
from tests.builders import SCRATCH, run_cli, shared_chat
from tests.object_store import Forked, ObjectStore, running_store
from tests.training.caches import (
    assert_same_run,
    flags,
    latest,
    metrics,
    settings,
    shared_cache,
    train,
    train_until,
)
from tests.training.test_ranks import assert_alike, torchrun

# Of a small cache: three shards of two samples, or six of four.
SMALL = {"shard_size": 2, "batch_size": 2}
OF_A_RUN = ("status.json", "config.json")


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with running_store() as running:
        yield running


@pytest.fixture
def s3(store: ObjectStore) -> Iterator[str]:
    yield f"s3://{store.new_bucket()}/caches/one"
    store.meddle = None


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}/one"


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    process = Forked()
    yield process
    process.close()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_RETRY_SECONDS", (0.0, 0.0))


def precompute(url: str, staging: Path, **more: Any) -> builders.Ended:
    return builders.precompute(url, None, shared_chat(6), staging_dir=staging, **{**SMALL, **more})


def in_a_directory(format_: str = "arrow") -> dict[str, str]:
    """The same cache made in a directory, its content."""
    return _in_a_directory(format_)


@cache
def _in_a_directory(format_: str) -> dict[str, str]:
    directory = SCRATCH / f"in-a-directory-{format_}"
    return content(f"file://{builders.make_cache(directory, None, shared_chat(6), format=format_, **SMALL)}")


def content(url: str) -> dict[str, str]:
    """Digests of all objects of a cache, by path, without those that say how and where it was made."""
    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    names = {path: path.removeprefix(root).strip("/") for path in filesystem.find(root)}
    return {
        name: digest_bytes(filesystem.cat_file(path))
        for path, name in names.items()
        if name not in OF_A_RUN and not name.startswith("status-")
    }


def put_up(directory: Path, url: str) -> str:
    """Bring a whole cache up as anybody would."""
    fsspec.core.url_to_fs(url)[0].put(f"{directory}/", fsspec.core.url_to_fs(url)[1] + "/", recursive=True)
    return url


def said(url: str, name: str = "status.json") -> dict[str, Any]:
    return json.loads(RemoteCache(url).read(name))


# Making one.


@pytest.mark.parametrize(
    ("place", "format_"), [("memory", "arrow"), pytest.param("memory", "zarr", marks=pytest.mark.slow), ("s3", "zarr")]
)
def test_a_cache_made_in_a_store_is_the_one_made_in_a_directory(request, tmp_path, place, format_):
    url = request.getfixturevalue(place)
    made = precompute(f"{url}/", tmp_path / "staging", format=format_)
    assert made.code == 0, made.err
    assert content(url) == in_a_directory(format_)
    shown = json.loads(made.out)
    assert (shown["cache"], shown["shards"], shown["shards_committed"]) == (url, 3, 3)
    assert said(url)["state"] == "done"
    assert said(url, "config.json")["output_dir"] == url
    assert not list((tmp_path / "staging").rglob("shard-*"))
    refused = precompute(url, tmp_path / "staging", format=format_)
    assert (refused.code, refused.errors) == (2, [f"error: {url} already holds a cache: add --resume to go on with it"])
    again = precompute(url, tmp_path / "elsewhere", format=format_, resume=True)
    assert again.code == 0, again.err
    assert json.loads(again.out)["shards_committed"] == 3
    assert not list((tmp_path / "elsewhere").rglob("head.safetensors"))
    assert content(url) == in_a_directory(format_)


def test_several_processes_make_it_together_from_tokens_made_once(memory, tmp_path, monkeypatch):
    first = precompute(memory, tmp_path, process_index=0, process_count=2)
    assert json.loads(first.out)["shards_committed"] == 2, first.err
    assert said(memory, "status-0000.json")["state"] == "done"
    assert not [name for name in RemoteCache(memory).names() if name.startswith("index")]
    monkeypatch.setattr(token_builder, "_build", lambda *_: pytest.fail("tokens were made again"))
    second = precompute(memory, tmp_path, process_index=1, process_count=2, resume=True)
    assert json.loads(second.out)["shards_committed"] == 3, second.err
    assert content(memory) == in_a_directory()


def test_at_most_one_shard_lies_on_this_machine_and_needs_room(memory, tmp_path, monkeypatch):
    push, found = Mirror.push_shard, []

    def watched(mirror: Mirror, *arguments: Any, **named: Any) -> Any:
        found.append(sum(path.stat().st_size for path in tmp_path.rglob("shard-*")))
        return push(mirror, *arguments, **named)

    monkeypatch.setattr(Mirror, "push_shard", watched)
    whole = sum(entry.file_bytes for entry in open_cache(shared_small()).index.entries)
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: SimpleNamespace(free=0.8 * whole))
    assert precompute(memory, tmp_path).code == 0
    assert len(found) == 3
    assert 0 < max(found) < 0.6 * whole
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: SimpleNamespace(free=whole // 10))
    full = precompute(f"{memory}-other", tmp_path / "other")
    assert full.code == 6
    assert RemoteCache(f"{memory}-other").names().keys() == {"status.json"}
    assert said(f"{memory}-other")["state"] == "failed"


def shared_small(format_: str = "arrow") -> Path:
    in_a_directory(format_)
    return SCRATCH / f"in-a-directory-{format_}"


def test_other_settings_are_refused_before_anything_changes_there(memory, tmp_path):
    assert precompute(memory, tmp_path / "one").code == 0
    RemoteCache(memory).remove("commit-000001.json")
    before = {name: entry.token for name, entry in RemoteCache(memory).names().items()}
    for staging in ("one", "two"):
        ended = precompute(memory, tmp_path / staging, resume=True, seq_length=64)
        assert ended.code == 3
        assert ended.errors[-1].startswith(f"error: {memory} was begun with other settings")
    assert {name: entry.token for name, entry in RemoteCache(memory).names().items()} == before


def test_what_was_begun_here_and_never_there_does_not_stand_in_the_way(memory, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Mirror, "push_manifest", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert precompute(memory, tmp_path, seq_length=64).code != 0
    assert (tmp_path / "0-of-1" / "manifest.json").is_file()
    assert precompute(memory, tmp_path).code == 0
    assert content(memory) == in_a_directory()


def test_a_place_that_holds_something_else_is_refused(memory, tmp_path):
    RemoteCache(memory).create("thesis.tex", b"x")
    ended = precompute(memory, tmp_path, resume=True)
    assert (ended.code, ended.errors[-1]) == (
        3,
        f"error: {memory} holds something else (thesis.tex): choose an empty or new --output-dir",
    )
    assert RemoteCache(memory).names().keys() == {"thesis.tex"}


def test_a_dry_run_leaves_no_trace(memory, tmp_path):
    ended = precompute(memory, tmp_path, dry_run=True)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["shards_committed"] == 0
    assert RemoteCache(memory).names() == {}


def test_a_companion_that_is_gone_or_cut_short_is_written_again(memory, tmp_path):
    assert precompute(memory, tmp_path / "one").code == 0
    remote = RemoteCache(memory)
    remote.remove("head.safetensors")
    remote.remove("config.json")
    remote.remove("target/config.json")
    remote.create("target/config.json", b"{")
    assert precompute(memory, tmp_path / "two", resume=True).code == 0
    assert content(memory) == in_a_directory()
    assert said(memory, "config.json")["output_dir"] == memory
    remote.remove("embeddings.safetensors")
    assert precompute(memory, tmp_path / "two", resume=True).code == 0  # there it still lies
    assert content(memory) == in_a_directory()


def test_a_store_that_goes_away_is_one_line_and_the_rest_is_made_later(memory, tmp_path, monkeypatch, no_pauses):
    put = RemoteCache.put

    def failing(remote: RemoteCache, path: Path, name: str) -> None:
        if name.startswith(("shard-000001", "status")):
            raise remote_module._in_words(f"{remote.url}/{name}", ConnectionError("reset"))
        put(remote, path, name)

    with monkeypatch.context() as broken:
        broken.setattr(RemoteCache, "put", failing)
        ended = precompute(memory, tmp_path)
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert "shard-000001" in ended.errors[0]
    made = []
    with monkeypatch.context() as counted:
        counted.setattr(filling, "write_shard", lambda *a: made.append(a[2]) or original(*a))
        assert precompute(memory, tmp_path, resume=True).code == 0
    assert made == [2]  # the one that could not go up was not made again
    assert content(memory) == in_a_directory()


original = filling.write_shard


# Changes in the store: manifest, companions and config, then shard and record thrice, index, status. After one is
# before the next, but for what happens here between them.
KILLS = [(number, "before") for number in range(1, 23)] + [(number, "after") for number in (5, 14, 15)]
FEW = [(5, "before"), (15, "before"), (15, "after"), (21, "before")]


@pytest.mark.parametrize(
    ("number", "when"), [pytest.param(*kill, marks=() if kill in FEW else pytest.mark.slow) for kill in KILLS]
)
def test_killed_at_any_change_and_resumed_anywhere_it_is_the_same_cache(forked, tmp_path, number, when):
    url, format_ = f"file://{tmp_path}/bucket/one", "zarr" if number % 2 else "arrow"

    def arguments(staging: str) -> list[str]:
        chosen = {**SMALL, "format": format_, "resume": True, "staging_dir": tmp_path / staging}
        return builders.precompute_arguments(url, None, shared_chat(6), **chosen)

    code, err = forked.run(arguments("one"), tmp_path, number, when)
    assert code in (-9, 0), err
    assert code == -9
    standing = RemoteCache(url).names()
    for name in standing:
        if name.startswith("commit"):
            assert any(other.startswith(f"shard-{name[7:13]}") for other in standing)
    code, err = forked.run(arguments("one" if number % 3 else "another machine"), tmp_path)
    assert code == 0, err
    assert content(url) == in_a_directory(format_)
    assert said(url)["state"] == "done"


# Training from one.


def total_bytes(cache_directory: Path) -> int:
    return sum(entry.file_bytes for entry in open_cache(cache_directory).index.entries)


def made(format_: str = "arrow", seed: int = 0) -> Path:
    """A cache that training is to read from a store."""
    return shared_cache() if (format_, seed) == ("arrow", 0) else _made(format_, seed)


@cache
def _made(format_: str, seed: int) -> Path:
    return builders.make_cache(
        SCRATCH / f"trained-stores-{format_}-{seed}",
        data=shared_chat(24, seed),
        format=format_,
        draft_vocab_size=200,
    )


def from_directory(format_: str = "arrow") -> Path:
    """A run that trained from the directory."""
    return _from_directory(format_)


@cache
def _from_directory(format_: str) -> Path:
    run = SCRATCH / f"run-{format_}"
    train(settings(run, cache=(made(format_),)))
    return run


class Watched:
    """The most bytes of shards that lay in a directory, and how often shards were fetched."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.directory, self.most, self.fetched = directory, 0, []
        fetch, self._end = RemoteCache.fetch, threading.Event()

        def counted(remote: RemoteCache, name: str, *arguments: Any) -> None:
            if name.startswith("shard-"):
                self.fetched.append(f"{remote.url}/{name}")
            fetch(remote, name, *arguments)
            self.look()

        monkeypatch.setattr(RemoteCache, "fetch", counted)

    def look(self) -> None:
        found = 0
        for path in list(self.directory.glob("*/shard-*")):
            if path.suffix == ".lock":
                continue
            try:
                found += local_cache._size_of(path)
            except FileNotFoundError:  # just evicted
                continue
        self.most = max(self.most, found)


@pytest.mark.parametrize(
    ("shards_here", "format_"),
    [(2, "arrow"), (2, "zarr"), (99, "arrow"), pytest.param(99, "zarr", marks=pytest.mark.slow)],
)
def test_training_from_a_store_is_training_from_the_directory(memory, tmp_path, monkeypatch, format_, shards_here):
    directory = made(format_)
    put_up(directory, memory)
    entries = open_cache(directory).index.entries
    size = shards_here * max(entry.file_bytes for entry in entries) + 100
    watched = Watched(tmp_path / "local", monkeypatch)
    chosen = settings(tmp_path / "run", cache=(memory,), local_cache=tmp_path / "local", local_cache_size=size)
    ended = run_cli("train", *flags(chosen))
    assert ended.code == 0, ended.err
    assert_same_run(tmp_path / "run", from_directory(format_))
    assert watched.most <= size
    if shards_here == 99:
        assert len(watched.fetched) == len(entries) == len(set(watched.fetched))
        assert "--local-cache-size" not in ended.err
    else:
        assert len(watched.fetched) > len(entries)
        assert "holds fewer shards than are mixed at a time (16)" in ended.err
        assert "each validation fetches them all" in ended.err
    assert not [thread for thread in threading.enumerate() if thread.name == "shard-prefetch"]


def test_a_run_goes_on_in_mid_epoch_and_with_another_local_cache(memory, tmp_path, monkeypatch):
    put_up(made(), memory)
    chosen = {"cache": (memory,), "local_cache": tmp_path / "local"}
    train_until(settings(tmp_path / "run", **chosen), 7, monkeypatch)
    chosen |= {"local_cache": tmp_path / "other", "local_cache_size": 200_000, "verify": False, "resume": True}
    train(settings(tmp_path / "run", **chosen))
    assert_same_run(tmp_path / "run", from_directory())


def test_several_caches_and_a_held_out_one_from_stores(memory, tmp_path, monkeypatch):
    two = [made(), made(seed=1)]
    heldout = made(seed=2)
    urls = [put_up(directory, f"{memory}-{number}") for number, directory in enumerate([*two, heldout])]
    size = 3 * max(entry.file_bytes for path in two for entry in open_cache(path).index.entries)
    watched = Watched(tmp_path / "local", monkeypatch)
    common = {"num_epochs": 1, "cache_weights": (1.0, 0.5)}
    train(settings(tmp_path / "expected", cache=tuple(two), heldout_cache=heldout, **common))
    train(
        settings(
            tmp_path / "run",
            cache=tuple(urls[:2]),
            heldout_cache=urls[2],
            local_cache=tmp_path / "local",
            local_cache_size=size,
            **common,
        )
    )
    assert_same_run(tmp_path / "run", tmp_path / "expected")
    assert watched.most <= size


def test_shards_are_fetched_once_an_epoch_where_two_windows_fit(memory, tmp_path, monkeypatch):
    """40 shards, 16 mixed at a time: with room for 32 none is fetched twice, and none is waited for again."""
    directory = builders.make_cache(tmp_path / "cache", data=shared_chat(80), shard_size=2, draft_vocab_size=200)
    put_up(directory, memory)
    sizes = sorted((entry.file_bytes for entry in open_cache(directory).index.entries), reverse=True)
    watched = Watched(tmp_path / "local", monkeypatch)
    size = sum(sizes[:32])
    chosen = settings(
        tmp_path / "run", cache=(memory,), local_cache=tmp_path / "local", local_cache_size=size, heldout_share=0,
        num_epochs=1,
    )  # fmt: skip
    ended = run_cli("train", *flags(chosen))
    assert ended.code == 0, ended.err
    assert "--local-cache-size" not in ended.err
    assert len(sizes) == 40
    assert len(watched.fetched) == len(set(watched.fetched)) == 40
    assert watched.most <= size


def test_what_is_said_of_a_small_local_cache_names_the_size_that_would_do(memory, tmp_path):
    from eagle_offline.training.corpus import open_corpus

    put_up(made(), memory)
    whole = total_bytes(made())
    chosen = settings(tmp_path, cache=(memory,), local_cache=tmp_path / "local", local_cache_size=whole)
    corpus = open_corpus(chosen)
    assert small_local_cache(chosen, corpus) == []
    small = chosen.model_copy(update={"local_cache_size": whole - 1})
    said_of_it = small_local_cache(small, corpus)
    assert len(said_of_it) == 2
    assert f"{-(-whole // 1000)}kB would do" in said_of_it[0]
    assert small_local_cache(small.model_copy(update={"cache": (made(),)}), open_corpus(settings(tmp_path))) == []


def test_a_damaged_shard_in_the_store_is_one_line_that_names_it(memory, tmp_path):
    put_up(made(), memory)
    remote = RemoteCache(memory)
    name = next(name for name in sorted(remote.names()) if name.startswith("shard-000002"))
    damaged = bytearray(remote.read(name))
    damaged[len(damaged) // 2] ^= 1
    remote.remove(name)
    remote.create(name, bytes(damaged))
    chosen = settings(tmp_path / "run", cache=(memory,), local_cache=tmp_path / "local")
    ended = run_cli("train", *flags(chosen))
    assert ended.code == 4
    assert len([line for line in ended.errors if line.startswith("error:")]) == 1
    assert f"{memory}/{name}: does not match the digest in its name" in ended.err


def test_a_store_that_goes_away_in_training_costs_no_checkpoint(memory, tmp_path, monkeypatch, no_pauses):
    put_up(made(), memory)
    size = 2 * max(entry.file_bytes for entry in open_cache(made()).index.entries) + 100
    chosen = settings(
        tmp_path / "run", cache=(memory,), local_cache=tmp_path / "local", local_cache_size=size, checkpoint_every=1
    )
    step = Trainer.step

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("reset")

    with monkeypatch.context() as broken:

        def gone(trainer: Trainer, *arguments: Any) -> Any:
            if trainer.position.step == 4:
                broken.setattr(type(RemoteCache(memory)._connected()), "get_file", refuse)
            return step(trainer, *arguments)

        broken.setattr(Trainer, "step", gone)
        ended = run_cli("train", *flags(chosen))
    assert ended.code == 1, ended.err
    errors = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "the store cannot be reached" in errors[0]
    assert "Traceback" not in ended.err
    assert int(latest(tmp_path / "run").name.rpartition("-")[2]) >= 4
    train(chosen.model_copy(update={"resume": True}))
    ours, theirs = metrics(tmp_path / "run"), metrics(from_directory())
    assert [row for row in ours if row["kind"] == "train"] == [row for row in theirs if row["kind"] == "train"]


@pytest.mark.slow
def test_processes_of_a_run_fetch_each_shard_once_and_train_what_one_would(s3, store, tmp_path):
    put_up(made(), s3)
    common = {"global_batch": 4, "tokens_per_batch": 100}
    train(settings(tmp_path / "alone", cache=(made(),), **common))
    store.requests.clear()
    chosen = settings(tmp_path / "run", cache=(s3,), local_cache=tmp_path / "local", **common)
    ended = torchrun(2, chosen)
    assert ended.returncode == 0, ended.stderr
    assert_alike(tmp_path / "run", tmp_path / "alone")
    assert [store.downloads(entry.file) for entry in open_cache(made()).index.entries] == [1] * 6


@pytest.mark.slow
@pytest.mark.parametrize("shards_here", [2, 3])
def test_processes_in_little_room_never_wait_for_one_another_forever(s3, tmp_path, shards_here):
    put_up(made(), s3)
    common = {"global_batch": 4, "tokens_per_batch": 100}
    train(settings(tmp_path / "alone", cache=(made(),), **common))
    size = shards_here * max(entry.file_bytes for entry in open_cache(made()).index.entries) + 100
    chosen = settings(tmp_path / "run", cache=(s3,), local_cache=tmp_path / "local", local_cache_size=size, **common)
    began = time.monotonic()
    ended = torchrun(2, chosen)
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - began < local_cache.ROOM_SECONDS
    assert_alike(tmp_path / "run", tmp_path / "alone")


# Looking at one.


@pytest.mark.parametrize("format_", ["arrow", "zarr"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_cache_in_a_store_is_looked_at_without_its_shards(memory, tmp_path, monkeypatch, format_, indexed):
    directory = shutil.copytree(shared_small(format_), tmp_path / "cache")
    if not indexed:
        next(directory.glob("index-*")).unlink()
    put_up(directory, memory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    theirs, ours = (json.loads(run_cli("inspect-manifest", place, "--json").out) for place in (directory, memory))
    assert ours["path"] == memory
    for one in (ours, theirs):
        del one["path"], one["begun_at"], one["free_bytes"]
    assert ours == theirs
    assert ours["example"]["tokens"]
    assert not list((tmp_path / "home").rglob("shard-*"))
    assert run_cli("inspect-manifest", memory).code == 0
    RemoteCache(memory).remove("head.safetensors")
    broken = run_cli("inspect-manifest", memory, "--json")
    assert broken.code == 4
    assert json.loads(broken.out)["problems"] == [
        "head.safetensors: missing; run precompute --resume to write it again"
    ]


def test_a_cache_in_a_store_opens_as_one_in_a_directory(memory, tmp_path):
    put_up(shared_small(), memory)
    ours, theirs = open_cache(memory, local_cache=tmp_path / "local"), open_cache(shared_small())
    assert [ours.read_stored(i).digest() for i in range(len(ours))] == [
        theirs.read_stored(i).digest() for i in range(len(theirs))
    ]
    ours.close()
    size = max(entry.file_bytes for entry in theirs.index.entries)
    little = open_cache(memory, local_cache=tmp_path / "little", local_cache_bytes=size)
    assert [little.read_stored(i).digest() for i in range(len(little))][:1] == [theirs.read_stored(0).digest()]
    assert not little._open  # or nobody else who shares the directory would find room
    nowhere = f"{memory}-nowhere"
    ended = run_cli("inspect-manifest", nowhere)
    assert (ended.code, ended.errors) == (4, [f"error: {nowhere}: no cache there: manifest.json is missing"])


URL = "s3://bucket/cache"
# What takes a file or directory of this machine, given a URL instead.
LOCAL_ONLY = [
    ["convert", URL, "--output-dir", "there"],
    ["convert", "here", "--output-dir", URL],
    ["verify", URL],
    ["repair", URL],
    ["inspect-manifest", URL, "--verify"],
    ["tokenize", "--target-model=m", "--input-data=d", "--output-dir", URL],
    ["precompute", "--target-model=m", "--input-data=d", f"--output-dir={URL}", f"--staging-dir={URL}"],
    ["precompute", "--target-model=m", "--input-data=d", "--output-dir=here", f"--chat-template={URL}"],
    ["precompute", "--config", URL],
    ["train", "--cache=here", "--output-dir", URL],
    ["train", "--cache=here", "--output-dir=there", "--local-cache", URL],
    ["train", "--cache=here", "--output-dir=there", "--draft-vocab", URL],
    ["export", URL, "--target=m"],
    ["export", "--check", URL],
    ["evaluate", "--draft=here", "--target=m", "--output-dir", URL],
    ["report", "--run", URL, "--output-dir=there"],
    ["plot", URL],
    ["run", URL],
    ["run", "here", "--work", URL],
    ["quickstart", "--work", URL],
]  # fmt: skip


@pytest.mark.parametrize("argv", LOCAL_ONLY, ids=lambda argv: " ".join(argv[:1] + [a for a in argv if URL in a]))
def test_what_needs_a_directory_refuses_a_url_in_one_line(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    ended = run_cli(*argv)
    assert ended.code == 2, ended.err
    assert len(ended.errors) == 1
    assert f"{URL}: a file or directory of this machine is needed here, not a URL" in ended.errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "--draft", URL, "--target=m"],
        ["train", "--cache=here", "--output-dir=there", "--init-from", URL],
    ],
    ids=lambda argv: argv[0],
)
def test_a_url_is_no_model(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    ended = run_cli(*argv)
    assert ended.code in (2, 4), ended.err
    assert len([line for line in ended.errors if line.startswith("error:")]) == 1
    assert not (tmp_path / "s3:").exists()


def test_an_estimate_for_a_store_looks_at_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = builders.precompute_arguments(URL, None, shared_chat(6), staging_dir=tmp_path / "staging")
    ended = run_cli("estimate", *arguments[1:], "--no-probe", "--json")
    assert ended.code == 0, ended.err
    assert list(tmp_path.iterdir()) == []


def test_committed_shards_of_a_staging_directory_are_those_of_the_store(memory, tmp_path):
    assert precompute(memory, tmp_path / "one").code == 0
    remote = RemoteCache(memory)
    record = json.loads(remote.read("commit-000002.json"))
    remote.remove("commit-000002.json")
    remote.remove(record["file"])
    again = precompute(memory, tmp_path / "one", resume=True)
    assert json.loads(again.out)["shards_committed"] == 3, again.err
    assert committed_shards(tmp_path / "one" / "0-of-1") == [0, 1, 2]
    assert content(memory) == in_a_directory()


def test_a_shard_that_is_gone_from_the_store_is_not_counted_as_made(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'cache'}"
    assert precompute(url, tmp_path / "staging").code == 0
    shard = next((tmp_path / "cache").glob("shard-000001-*"))
    shard.unlink()
    refused = precompute(url, tmp_path / "staging", resume=True)
    assert refused.code == 4, refused.err
    assert shard.name in refused.err
    (tmp_path / "cache" / "commit-000001.json").unlink()
    assert precompute(url, tmp_path / "staging", resume=True).code == 0
    assert shard.is_file()

"""`eagle-offline verify`: everything that is wrong is said, one line each, and nothing hides anything else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from eagle_offline import open_cache
from eagle_offline.cache import formats, shard_check
from eagle_offline.cache import verify as verifying
from eagle_offline.cache.manifest import read_manifest
from eagle_offline.cache.verify import check_cache, verify_cache
from eagle_offline.cache.writer import read_record, write_shard
from eagle_offline.errors import StoppedEarly
from tests import builders
from tests.cache.mutations import resealed

Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten samples in five shards, with its index; never to be changed."""
    return builders.make_cache(tmp_path_factory.mktemp("indexed") / "cache", shard_size=2)


def shard_of(cache: Path, number: int) -> Path:
    return cache / json.loads((cache / f"commit-{number:06d}.json").read_bytes())["file"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(resealed(document)))


def found(cache: Path) -> dict[str, str]:
    """What is wrong, by place."""
    return {problem.where: problem.what for problem in check_cache(cache).problems}


def notes(cache: Path) -> dict[str, str]:
    return {note.where: note.what for note in check_cache(cache).notes}


def test_a_clean_cache_exits_0_and_says_what_was_read(indexed: Path) -> None:
    ended = builders.run_cli("verify", indexed)
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    assert "no problems; 5 shards with 10 samples are sound" in ended.out
    said = json.loads(builders.run_cli("verify", indexed, "--json").out)
    files = [indexed / name for name in read_manifest(indexed).files] + list(indexed.glob("shard-*"))
    assert said.pop("seconds") >= 0
    assert said == {
        "problems": [],
        "notes": [],
        "num_shards": 5,
        "num_samples": 10,
        "num_bytes": sum(path.stat().st_size for path in files),
    }


def test_every_problem_is_one_line_with_place_and_way_out(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    for name in ("head.safetensors", "tokens/tokens.arrow", shard_of(cache, 0).name, shard_of(cache, 3).name):
        flip(cache / name)
    (cache / "commit-000001.json").write_text("{")
    shard_of(cache, 2).unlink()
    (cache / "commit-000004.json").unlink()
    (cache / "embeddings.safetensors").unlink()
    ended = builders.run_cli("verify", cache)
    assert ended.code == 4
    said = [line for line in ended.out.splitlines()[:-1] if not line.startswith("note: ")]
    index = next(cache.glob("index-*")).name
    places = [
        index, "embeddings.safetensors", "head.safetensors", "tokens/tokens.arrow",
        *(f"commit-00000{shard}.json" for shard in range(4)), "shard 4",
    ]  # fmt: skip
    assert sorted(line.split(": ")[0] for line in said) == sorted(places)
    for line in said:
        made = line.startswith(("embeddings", "shard 4"))
        assert (" --resume " if made else f"; eagle-offline repair {cache} ") in line
    as_json = builders.run_cli("verify", cache, "--json")
    assert as_json.code == 4
    problems = json.loads(as_json.out)["problems"]
    assert [f"{p['where']}: {p['what']}; {p['way_out']}" for p in problems] == said
    assert [str(problem) for problem in verify_cache(cache)] == said


def test_samples_of_sound_shards_are_decoded_when_another_shard_is_broken(
    indexed: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = copy_of(indexed)
    flip(shard_of(cache, 0))
    flip(cache / "head.safetensors")
    decoded: list[int] = []

    def decode(fields: Any, stored: Any) -> None:
        decoded.append(stored.sample_id)

    monkeypatch.setattr(shard_check, "decode_fields", decode)
    assert check_cache(cache).num_samples == 8
    assert sorted(decoded) == list(range(2, 10))


def rewritten(cache: Path, shard: int, source: int) -> None:
    """Give a shard the samples of another, in a file that is sound by every other measure."""
    opened = open_cache(cache)
    samples = [opened.read_stored(i) for i in range(len(opened)) if opened.shards[i] == source]
    old = shard_of(cache, shard)
    (cache / f"commit-{shard:06d}.json").unlink()
    write_shard(cache, read_manifest(cache).identity, shard, samples, {})
    old.unlink()


def test_a_sample_that_two_sound_shards_hold_is_said_of_both(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    rewritten(cache, 3, source=1)
    said = found(cache)
    assert said["commit-000001.json"] == "holds sample 2, which shard 3 holds too"
    assert said["commit-000003.json"] == "holds sample 2, which shard 1 holds too"


def test_a_broken_shard_casts_no_doubt_on_the_one_whose_samples_it_claims(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    edit(cache / "commit-000003.json", lambda record: record["samples"]["sample_id"].__setitem__(0, 2))
    said = found(cache)
    assert "commit-000003.json" in said
    assert "commit-000001.json" not in said


def test_damage_to_decoded_values_is_noticed_even_where_every_digest_was_made_to_fit(
    indexed: Path, copy_of: Copy
) -> None:
    cache = copy_of(indexed)
    edit(cache / "commit-000002.json", lambda record: record["samples"]["digest"].reverse())
    assert "is not what the record says of it" in found(cache)["commit-000002.json"]


@pytest.mark.parametrize("sample_id", [-1, 1 << 31, 1 << 70])
def test_samples_by_numbers_that_none_can_have_are_a_problem(indexed: Path, copy_of: Copy, sample_id: int) -> None:
    cache = copy_of(indexed)

    def lose(record: dict[str, Any]) -> None:
        for column in record["samples"].values():
            column.pop()
        record["lost"] = [{"sample_id": sample_id, "reason": "x"}]

    edit(cache / "commit-000002.json", lose)
    assert "number" in found(cache)["commit-000002.json"]


# The index


def test_a_cache_without_an_index_is_clean(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    next(cache.glob("index-*")).unlink()
    assert not found(cache)


def test_a_damaged_index_is_a_problem(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    index = next(cache.glob("index-*"))
    flip(index)
    assert list(found(cache)) == [index.name]


def test_an_index_of_shards_that_are_gone_is_a_problem(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    shard_of(cache, 4).unlink()
    (cache / "commit-000004.json").unlink()
    assert set(found(cache)) == {next(cache.glob("index-*")).name, "shard 4"}


def test_an_index_that_says_something_else_than_the_records_is_a_problem(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    edit(cache / "commit-000002.json", lambda record: record["samples"]["num_in_vocab"].__setitem__(1, 0))
    assert list(found(cache)) == [next(cache.glob("index-*")).name]


# What does no harm


def test_what_does_not_belong_is_noted_and_is_no_problem(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    unclaimed = f"shard-000001-{'0' * 32}.arrow"
    (cache / unclaimed).write_text("x")
    (cache / "notes.txt").write_text("mine")
    (cache / "target" / "more.txt").write_text("mine")
    (cache / ".shard-000001.partial-host-1-00000000").write_text("x")
    (cache / "aside" / "then").mkdir(parents=True)
    (cache / "status-0001.json").write_text("{}")
    said = notes(cache)
    assert set(said) == {
        "config.json", unclaimed, "notes.txt", "target/more.txt", ".shard-000001.partial-host-1-00000000", "aside",
    }  # fmt: skip
    assert "another place" in said["config.json"]  # the copy is not where the cache was made
    assert "no record names" in said[unclaimed]
    ended = builders.run_cli("verify", cache)
    assert ended.code == 0
    assert ended.out.count("\nnote: ") + ended.out.startswith("note: ") == 6


def test_settings_that_are_not_those_of_the_manifest_are_a_problem(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    config = cache / "config.json"
    content = config.read_text()
    for changed in (
        content.replace('"shard_size": 2', '"shard_size": 3'),
        content[:-9],
        content.replace("\n  ", "\n\t"),
        "[]",
    ):
        config.write_text(changed)
        assert list(found(cache)) == ["config.json"], changed
    config.unlink()
    assert list(found(cache)) == ["config.json"]


# How it is done


def test_shards_are_checked_several_at_a_time(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=20)
    check = verifying._Check.shard

    def wait(self: Any, shard: int) -> Any:
        if shard < 3:
            together.wait()
        return check(self, shard)

    monkeypatch.setattr(verifying._Check, "shard", wait)
    done: list[tuple[int, int]] = []
    assert not check_cache(indexed, num_workers=3, report=lambda *counts: done.append(counts)).problems
    assert done == [(number, 5) for number in range(1, 6)]


def test_threads_of_torch_are_as_many_as_before(indexed: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check_cache(indexed)
        with ThreadPoolExecutor(1) as pool:  # one that had not asked for its number yet
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given", ["0", "-1", "many"])
def test_a_number_of_workers_that_cannot_be_meant_exits_2(indexed: Path, given: str) -> None:
    ended = builders.run_cli("verify", indexed, "--num-workers", given)
    assert ended.code == 2
    assert "--num-workers" in ended.errors[-1]


def test_a_disk_that_gives_errors_is_a_problem_of_the_file_that_lies_there(
    indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {shard_of(indexed, 1), indexed / "head.safetensors"}
    digest = verifying.digest_file

    def fail(path: Path) -> str:
        if path in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(verifying, "digest_file", fail)
    monkeypatch.setattr(formats, "digest_file", fail)
    said = found(indexed)
    assert set(said) == {"commit-000001.json", "head.safetensors"}
    assert all("Input/output error" in what for what in said.values())


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A signal comes while the first sample is decoded; counts decoded samples."""
    decoded: list[int] = []
    decode = shard_check.decode_fields

    def signal_first(fields: Any, stored: Any) -> Any:
        decoded.append(stored.sample_id)
        if len(decoded) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(fields, stored)

    monkeypatch.setattr(shard_check, "decode_fields", signal_first)
    return decoded


def test_a_signal_stops_it_in_one_line_with_exit_code_5(indexed: Path, copy_of: Copy, stopping: list[int]) -> None:
    cache = copy_of(indexed)
    before = builders.tree(cache)
    ended = builders.run_cli("verify", cache, "--num-workers", "1")
    assert ended.code == 5
    errors = [line for line in ended.errors if not line.startswith("verify:")]
    assert len(errors) == 1
    assert "stopped by a signal" in errors[0]
    assert len(stopping) < 10
    assert builders.tree(cache) == before


def test_who_asks_it_to_stop_gets_no_answer(indexed: Path) -> None:
    with pytest.raises(StoppedEarly):
        check_cache(indexed, stopped=lambda: True)


def test_what_is_no_cache_is_one_line(indexed: Path, copy_of: Copy, tmp_path: Path) -> None:
    cache = copy_of(indexed)
    (cache / "manifest.json").write_text("{")
    (tmp_path / "file").write_text("x")
    for place in (cache, tmp_path / "nowhere", tmp_path / "file", tmp_path):
        ended = builders.run_cli("verify", place)
        assert ended.code == 4
        assert len(ended.errors) == 1
        assert "manifest.json" in ended.errors[0]


def test_nothing_is_written(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    flip(shard_of(cache, 1))
    before = builders.tree(cache, without=())
    builders.run_cli("verify", cache)
    assert builders.tree(cache, without=()) == before


def test_records_that_repeat_a_shard_of_another_number_are_a_problem(indexed: Path, copy_of: Copy) -> None:
    cache = copy_of(indexed)
    shutil.copy(cache / "commit-000001.json", cache / "commit-000002.json")
    edit(cache / "commit-000002.json", lambda record: record.update(shard=2))
    assert read_record(cache, 2).file == shard_of(cache, 1).name
    assert "expected shard-000002-" in found(cache)["commit-000002.json"]

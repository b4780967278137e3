"""What a cache was made from changes under its path, or what stands in it is of another time: refused or right."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_offline import open_cache
from eagle_offline.errors import DataError
from tests import builders
from tests.faults.driver import Driver
from tests.faults.work import Work, check_same, leftovers

FORMATS = ["arrow", "zarr"]


class Inputs:
    """A target and chat data that a test may change, and a cache that was begun from them."""

    def __init__(self, directory: Path, format_: str = "arrow"):
        self.target = shutil.copytree(builders.shared_target(), directory / "target")
        self.chat = builders.write_jsonl(directory / "chat.jsonl", builders.conversations(4, seed=3))
        self.cache = directory / "cache"
        self.format = format_

    def precompute(self, **flags: object) -> builders.Ended:
        given = {"shard_size": 2, "batch_size": 2, "format": self.format, **flags}
        return builders.precompute(self.cache, self.target, self.chat, **given)

    def begin(self) -> None:
        """Make the cache and take one shard away, so that a resume has something to do."""
        ended = self.precompute()
        assert ended.code == 0, ended.err
        (record,) = [r for r in builders.record_contents(self.cache).values() if r["shard"] == 1]
        (self.cache / "commit-000001.json").unlink()
        shard = self.cache / record["file"]
        shutil.rmtree(shard) if shard.is_dir() else shard.unlink()


@pytest.fixture(params=FORMATS)
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> Inputs:
    made = Inputs(tmp_path, request.param)
    made.begin()
    return made


def other_weights(target: Path) -> None:
    """Another checkpoint of the same shape and size."""
    path = target / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.layers.2.mlp.up_proj.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def same_stat(path: Path, before: os.stat_result) -> None:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def other_tokenizer(inputs: Inputs) -> None:
    path = inputs.target / "tokenizer.json"
    document = json.loads(path.read_text())
    vocab = document["model"]["vocab"]
    first, second = list(vocab)[60:62]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(document))


def other_template(inputs: Inputs) -> None:
    changed = False
    for path in inputs.target.iterdir():
        if path.suffix in (".jinja", ".json") and "<|im_start|>" in path.read_text() and path.name != "tokenizer.json":
            if path.suffix == ".jinja":
                path.write_text(path.read_text() + " ")
                changed = True
            else:
                document = json.loads(path.read_text())
                if "chat_template" in document:
                    document["chat_template"] += " "
                    path.write_text(json.dumps(document))
                    changed = True
    assert changed


def edit_data(inputs: Inputs) -> None:
    """In place: the same size, another word."""
    content = inputs.chat.read_bytes()
    with inputs.chat.open("r+b") as file:
        file.write(content.replace(b"because", b"bEcause", 1).replace(b"value", b"valuE", 1))
    assert inputs.chat.stat().st_size == len(content)
    assert inputs.chat.read_bytes() != content


def edit_data_and_hide_it(inputs: Inputs) -> None:
    before = inputs.chat.stat()
    edit_data(inputs)
    same_stat(inputs.chat, before)


def replace_data(inputs: Inputs) -> None:
    sibling = builders.write_jsonl(inputs.chat.with_name("new.jsonl"), builders.conversations(4, seed=4))
    sibling.replace(inputs.chat)


def append_data(inputs: Inputs) -> None:
    with inputs.chat.open("a") as file:
        file.write(json.dumps(builders.conversations(1, seed=5)[0]) + "\n")


CHANGES: dict[str, tuple[Callable[[Inputs], None], str]] = {
    "weights": (lambda inputs: other_weights(inputs.target), "target.checkpoint_digest"),
    "tokenizer": (other_tokenizer, "text.tokenizer_digest"),
    "template": (other_template, "text.template_digest"),
    "data edited": (edit_data, "dataset.sources"),
    "data edited unseen": (edit_data_and_hide_it, "dataset.sources"),
    "data replaced": (replace_data, "dataset.sources"),
    "data grown": (append_data, "dataset.sources"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_inputs_that_changed_under_the_same_path_are_refused_and_named(inputs: Inputs, what: str) -> None:
    change, field = CHANGES[what]
    change(inputs)
    before = builders.tree(inputs.cache, without=())
    ended = inputs.precompute(resume=True)
    assert ended.code == 3, ended.err
    assert len(ended.errors) == 1
    assert field in ended.errors[0]
    assert builders.tree(inputs.cache, without=()) == before


def test_weights_replaced_behind_the_same_size_and_time_are_found_with_rehash_only(tmp_path: Path) -> None:
    """Remembered digests go by path, size, modification time and inode: that much is compared without `--rehash`."""
    inputs = Inputs(tmp_path)
    inputs.begin()
    path = inputs.target / "model.safetensors"
    before, content = path.stat(), path.read_bytes()
    other_weights(inputs.target)
    other = path.read_bytes()
    with path.open("r+b") as file:  # the same inode
        file.write(content)
    same_stat(path, before)
    assert inputs.precompute(resume=True).code == 0
    inputs.precompute(resume=True)
    (inputs.cache / "commit-000001.json").unlink()
    with path.open("r+b") as file:
        file.write(other)
    same_stat(path, before)
    tree = builders.tree(inputs.cache, without=())
    found = inputs.precompute(resume=True, rehash=True)
    assert found.code == 3, found.err
    assert "target.checkpoint_digest" in found.errors[0]
    assert builders.tree(inputs.cache, without=()) == tree
    # Once read again, the digest is remembered as it is.
    assert inputs.precompute(resume=True).code == 3


@pytest.mark.parametrize("how", ["inode", "time", "size"])
def test_weights_whose_inode_time_or_size_is_another_are_read_again(tmp_path: Path, how: str) -> None:
    inputs = Inputs(tmp_path)
    inputs.begin()
    path = inputs.target / "model.safetensors"
    before, content = path.stat(), path.read_bytes()
    path.with_name("former").hardlink_to(path)  # keeps its inode taken
    other_weights(inputs.target)
    other = path.read_bytes()
    if how == "inode":
        sibling = path.with_name("sibling")
        sibling.write_bytes(other)
        path.write_bytes(content)
        sibling.replace(path)
        same_stat(path, before)
        assert path.stat().st_ino != before.st_ino
    else:  # in the file that it was
        path.with_name("former").replace(path)
        with path.open("r+b") as file:
            file.write(other if how == "time" else other + b"\0")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (how == "time")))
        assert path.stat().st_ino == before.st_ino
    ended = inputs.precompute(resume=True)
    assert ended.code == 3, ended.err
    assert "target.checkpoint_digest" in ended.errors[0]


def test_a_manifest_of_another_cache_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    ours, theirs = Inputs(tmp_path / "a"), Inputs(tmp_path / "b")
    (tmp_path / "b").mkdir(exist_ok=True)
    other_weights(theirs.target)
    for one in (ours, theirs):
        assert one.precompute().code == 0
    shutil.copy(theirs.cache / "manifest.json", ours.cache / "manifest.json")
    with pytest.raises(DataError, match="another manifest"):
        open_cache(ours.cache)
    assert builders.run_cli("verify", ours.cache).code == 4
    before = builders.tree(ours.cache, without=())
    ended = ours.precompute(resume=True)
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "checkpoint_digest" in ended.errors[0]
    assert builders.tree(ours.cache, without=()) == before


# The source of a conversion


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A cache and a conversion of it that was begun: one of its shards is missing."""
    cache = builders.make_cache(tmp_path / "cache", None, builders.shared_chat(4), shard_size=2)
    result = tmp_path / "result"
    assert convert(cache, result).code == 0
    record = builders.record_contents(result)["commit-000001.json"]
    (result / "commit-000001.json").unlink()
    shutil.rmtree(result / record["file"])
    return cache, result


def convert(cache: Path, result: Path, *flags: str) -> builders.Ended:
    return builders.run_cli(
        "convert", cache, "--output-dir", result, "--format", "zarr", "--state-encoding", "fp8", *flags
    )


def test_another_cache_in_the_place_of_a_conversions_source_is_refused(begun: tuple[Path, Path]) -> None:
    cache, result = begun
    shutil.rmtree(cache)
    builders.make_cache(cache, None, builders.shared_chat(4, seed=9), shard_size=2)
    before = builders.tree(result, without=())
    ended = convert(cache, result, "--resume")
    assert (ended.code, len(ended.errors)) == (3, 1), ended.err
    assert "dataset.sources" in ended.errors[0]
    assert builders.tree(result, without=()) == before


def test_a_conversions_source_that_lost_a_shard_or_a_byte_meanwhile_is_refused(begun: tuple[Path, Path]) -> None:
    cache, result = begun
    before = builders.tree(result)
    shard = cache / builders.record_contents(cache)["commit-000001.json"]["file"]
    content = shard.read_bytes()
    middle = content.index(b"\x28\xb5\x2f\xfd", len(content) // 3) + 9  # inside a compressed column
    for damaged in (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], content[:-1], b"", None):
        shard.unlink(missing_ok=True)
        if damaged is not None:
            shard.write_bytes(damaged)
        ended = convert(cache, result, "--resume")
        assert ended.code == 4, ended.err
        assert shard.name in ended.errors[-1]
        assert builders.tree(result) == before
    shard.write_bytes(content)
    ended = convert(cache, result, "--resume")
    assert ended.code == 0, ended.err
    assert builders.run_cli("verify", result).code == 0


# The index


def remake_with_other_bytes(driver: Driver, work: Work, *, keep_shard: bool) -> None:
    """Make shard 1 again in an environment that gives other bytes."""
    record = builders.record_contents(work.place)["commit-000001.json"]
    (work.place / "commit-000001.json").unlink()
    old = work.place / record["file"]
    if not keep_shard:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    run = work.run(driver, other_bytes=True)
    assert run.code == 0, run.err
    assert builders.record_contents(work.place)["commit-000001.json"]["file"] != record["file"]


def check_reading_is_right(directory: Path) -> None:
    """What is read with an index is what the records say, and what is read without."""
    opened = open_cache(directory)
    records = builders.record_contents(directory)
    assert {opened.shard_file(shard) for shard in set(opened.shards.tolist())} == {r["file"] for r in records.values()}
    values = [sample.aux_hidden_states for sample in opened]
    for index in directory.glob("index-*"):
        index.rename(index.with_name("put-aside"))
    plain = open_cache(directory)
    assert [sample.sample_id for sample in plain] == [sample.sample_id for sample in opened]
    assert all(torch.equal(one.aux_hidden_states, other) for one, other in zip(plain, values, strict=True))


@pytest.mark.parametrize("keep_shard", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_index_of_a_shard_that_was_made_again_with_other_bytes_is_not_read(
    driver: Driver, tmp_path: Path, kind: str, keep_shard: bool
) -> None:
    work = Work(kind, tmp_path / "cache", count=4)
    assert work.run(driver).code == 0
    remake_with_other_bytes(driver, work, keep_shard=keep_shard)
    assert builders.run_cli("verify", work.place).code == 0
    check_reading_is_right(work.place)


@pytest.mark.parametrize("kind", FORMATS)
def test_killed_while_the_index_is_written_reading_is_right_and_resume_writes_it(
    driver: Driver, tmp_path: Path, kind: str
) -> None:
    work = Work(kind, tmp_path / "cache", count=4)
    events = work.uninterrupted(driver).events
    steps = [n for n, event in enumerate(events, start=1) if "index-" in event]
    assert len(steps) >= 3
    moments = [(n, when) for n in steps for when in ("before", "half", "after")]
    for event, when in moments:
        if when == "half" and not events[event - 1].startswith("write_bytes"):
            continue
        work.clear()
        run = work.run(driver, {"event": event, "when": when, "kind": "kill"})
        assert run.code == -9
        assert [sample.sample_id for sample in open_cache(work.place)] == [
            sample.sample_id for sample in open_cache(work.reference)
        ]
        assert builders.run_cli("verify", work.place).code == 0
        assert work.run(driver).code == 0
        check_same(work.place, work.reference)


def test_an_index_deleted_or_damaged_at_any_time_changes_nothing_that_is_read(driver: Driver, tmp_path: Path) -> None:
    work = Work("arrow", tmp_path / "cache", count=4)
    work.uninterrupted(driver)
    right = [sample.aux_hidden_states for sample in open_cache(work.reference)]
    shutil.copytree(work.reference, work.place)
    (index,) = work.place.glob("index-*")
    content = index.read_bytes()
    damaged = [b"", content[:-1], content[: len(content) // 2], content + b"\0", b"\0" * len(content)]
    damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(0, len(content), 97)]
    opened = open_cache(work.place)
    for bad in damaged:
        sibling = work.place.with_name("bad")
        sibling.write_bytes(bad)
        sibling.replace(index)
        for cache in (opened, open_cache(work.place)):
            values = [sample.aux_hidden_states for sample in cache]
            assert all(torch.equal(one, other) for one, other in zip(values, right, strict=True))
    index.unlink()
    assert len(open_cache(work.place)) == work.count
    assert work.run(driver).code == 0
    check_same(work.place, work.reference)


def test_an_index_cut_short_in_place_takes_no_reader_down(driver: Driver, tmp_path: Path) -> None:
    work = Work("arrow", tmp_path / "cache", count=4)
    work.uninterrupted(driver)
    shutil.copytree(work.reference, work.place)
    (index,) = work.place.glob("index-*")
    child = os.fork()
    if not child:
        faulthandler.disable()
        try:
            opened = open_cache(work.place)
            os.truncate(index, 0)
            os._exit(0 if [opened[number].sample_id for number in range(4)] else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_resume_writes_a_damaged_index_anew(driver: Driver, tmp_path: Path) -> None:
    work = Work("arrow", tmp_path / "cache", count=4)
    work.uninterrupted(driver)
    shutil.copytree(work.reference, work.place)
    (index,) = work.place.glob("index-*")
    index.write_bytes(index.read_bytes()[:-1])
    assert work.run(driver).code == 0
    check_same(work.place, work.reference)
    assert leftovers(work.place) == []

"""Damage done on purpose: each is noticed, says where, and names the way out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eagle_offline import open_cache
from eagle_offline.errors import DataError, EagleOfflineError, MismatchError
from tests import builders
from tests.cache.mutations import flip_bit, resealed

Copy = Callable[[Path], Path]


def verify(cache: Path) -> builders.Ended:
    return builders.run_cli("inspect-manifest", cache, "--verify")


def check_noticed(cache: Path, *parts: str) -> None:
    ended = verify(cache)
    said = ended.out + ended.err
    assert ended.code == 4, said
    assert "Traceback" not in said
    for part in parts:
        assert part in said


def flip(path: Path, seed: int) -> str:
    content, what = flip_bit(path.read_bytes(), random.Random(f"{path.name}{seed}"))
    path.write_bytes(content)
    return what


def shard(cache: Path, number: int) -> Path:
    return cache / json.loads((cache / f"commit-{number:06d}.json").read_bytes())["file"]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(resealed(document)))


def test_a_whole_cache_verifies(whole: Path) -> None:
    ended = verify(whole)
    assert ended.code == 0
    assert "PROBLEMS" not in ended.out
    assert json.loads(builders.run_cli("inspect-manifest", whole, "--verify", "--json").out)["problems"] == []


@pytest.mark.parametrize(
    "kind",
    [
        "shard-*", "commit-*", "manifest.json", "head.safetensors", "embeddings.safetensors", "vocab/*", "target/*",
        "tokens/tokens.arrow", "tokens/tokens.json",
    ],
)  # fmt: skip
def test_a_flipped_bit_anywhere_is_noticed_by_verify(whole: Path, copy_of: Copy, kind: str) -> None:
    cache = copy_of(whole)
    unnoticed = []
    for path in sorted(cache.glob(kind))[:2]:
        content = path.read_bytes()
        for seed in range(8):
            what = flip(path, seed)
            if verify(cache).code not in (3, 4):
                unnoticed.append(f"{path.name}: {what}")
            path.write_bytes(content)
    assert not unnoticed


def test_a_flipped_bit_of_stored_values_is_noticed_when_the_sample_is_first_touched(whole: Path, copy_of: Copy) -> None:
    content = shard(whole, 0).read_bytes()
    record = json.loads((whole / "commit-000000.json").read_bytes())
    original = [sample for sample in open_cache(whole) if sample.sample_id in record["samples"]["sample_id"]]
    cache, refused = copy_of(whole), 0
    for seed in range(40):
        changed, what = flip_bit(content, random.Random(seed))
        shard(cache, 0).unlink()
        (cache / record["file"]).write_bytes(changed)
        try:
            opened = open_cache(cache)
            touched = [opened[index] for index in range(len(original))]
        except DataError as error:
            refused += 1
            assert record["file"] in str(error)  # noqa: PT017
            continue
        except Exception as error:
            # No traceback: Arrow ends the process when a damaged array among a frame's arguments is shown.
            pytest.fail(f"{what}: {type(error).__name__}: {error}", pytrace=False)
        for ours, theirs in zip(touched, original, strict=True):
            assert ours.input_ids.equal(theirs.input_ids), what
            assert ours.aux_hidden_states.view(dtype=theirs.aux_hidden_states.dtype).equal(theirs.aux_hidden_states)
    assert refused > 30  # the rest are bytes of padding between columns


def test_only_samples_that_are_damaged_are_refused(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    path = shard(cache, 1)
    path.write_bytes(path.read_bytes()[:-2000] + b"\0" * 2000)
    opened = open_cache(cache)
    for index in range(len(opened)):
        if opened.shards[index] == 1:
            with pytest.raises(DataError):
                opened[index]
        else:
            opened[index]


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.5, 0.99, -1])
def test_truncated_shards_are_noticed_and_refused(whole: Path, copy_of: Copy, keep: float) -> None:
    cache = copy_of(whole)
    path = shard(cache, 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    check_noticed(cache, path.name)
    opened = open_cache(cache)
    with pytest.raises(DataError, match=path.name):
        opened[list(opened.shards).index(1)]


def test_bytes_after_the_end_of_a_shard_are_noticed(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    with shard(cache, 0).open("ab") as file:
        file.write(b"more")
    check_noticed(cache, shard(cache, 0).name)


def test_swapped_shards_are_noticed_and_refused(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    one, other = shard(cache, 0), shard(cache, 1)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    check_noticed(cache, one.name, other.name)
    opened = open_cache(cache)
    for index in (0, 5):
        with pytest.raises(DataError):
            opened[index]


def test_swapped_records_are_noticed_and_refused(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    (cache / "commit-000000.json").rename(cache / "kept")
    (cache / "commit-000001.json").rename(cache / "commit-000000.json")
    (cache / "kept").rename(cache / "commit-000001.json")
    check_noticed(cache, "commit-000000.json")
    with pytest.raises(DataError):
        open_cache(cache)


def test_a_shard_and_record_of_another_cache_are_refused(whole: Path, copy_of: Copy, tmp_path: Path) -> None:
    foreign = builders.make_cache(tmp_path / "foreign", data=builders.shared_chat(10, 5))
    cache = copy_of(whole)
    shutil.copy(shard(foreign, 1), cache)
    shutil.copy(foreign / "commit-000001.json", cache)
    check_noticed(cache, "commit-000001.json", "another manifest")
    with pytest.raises(DataError, match="another manifest"):
        open_cache(cache)
    # Even when the record claims to be ours: the shard itself does not.
    ours = json.loads((cache / "commit-000000.json").read_bytes())["identity_digest"]
    edit(cache / "commit-000001.json", lambda record: record.update(identity_digest=ours))
    with pytest.raises(DataError, match="another cache"):
        open_cache(cache)[5]
    check_noticed(cache)


def test_a_record_that_leaves_samples_out_is_noticed(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)

    def shorten(record: dict[str, Any]) -> None:
        for column in record["samples"].values():
            column.pop()

    edit(cache / "commit-000001.json", shorten)
    check_noticed(cache, "commit-000001.json")


def test_a_record_that_names_a_sample_twice_is_noticed(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)

    def repeat(record: dict[str, Any]) -> None:
        for column in record["samples"].values():
            column[-1] = column[0]

    edit(cache / "commit-000001.json", repeat)
    check_noticed(cache, "commit-000001.json")


def test_counts_of_supervised_tokens_that_are_not_true_are_noticed(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    edit(cache / "commit-000000.json", lambda record: record["samples"]["num_supervised"].__setitem__(0, 1))
    check_noticed(cache)


def test_a_cache_without_a_shard_says_which_and_how_to_go_on(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    (cache / "commit-000001.json").unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards are missing \(first: 1\).*--resume.*--allow-partial"):
        open_cache(cache)
    partial = open_cache(cache, allow_partial=True)
    assert set(partial.shards.tolist()) == {0, 2}
    check_noticed(cache, "shard 1", "--resume")
    assert "1 shards missing" in builders.run_cli("inspect-manifest", cache).out


@pytest.mark.parametrize("name", ["head.safetensors", "embeddings.safetensors"])
def test_missing_companions_are_noticed_and_resume_writes_them_again(whole: Path, copy_of: Copy, name: str) -> None:
    cache = copy_of(whole)
    content = (cache / name).read_bytes()
    (cache / name).unlink()
    check_noticed(cache, name, "--resume")
    with pytest.raises(DataError, match="--resume"):
        _ = (open_cache(cache).head, open_cache(cache).embeddings)
    assert builders.precompute(cache, resume=True).code == 0
    assert (cache / name).read_bytes() == content


@pytest.mark.parametrize("name", ["head.safetensors", "embeddings.safetensors"])
def test_a_damaged_head_is_not_trained_on(whole: Path, copy_of: Copy, name: str) -> None:
    cache = copy_of(whole)
    path = cache / name
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40  # in the values, where safetensors has no check of its own
    path.write_bytes(content)
    opened = open_cache(cache)
    with pytest.raises(DataError, match=name):
        _ = (opened.head, opened.embeddings)


def test_a_vocabulary_other_than_its_name_is_refused(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    path = next((cache / "vocab").iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=path.name):
        _ = open_cache(cache).selected_token_ids


def test_damaged_tokens_are_made_again_by_resume_and_are_the_same(whole: Path, copy_of: Copy) -> None:
    cache = copy_of(whole)
    tokens = cache / "tokens" / "tokens.arrow"
    content = tokens.read_bytes()
    flip(tokens, 1)
    check_noticed(cache, "tokens")
    (cache / "commit-000000.json").unlink()
    ended = builders.precompute(cache, resume=True)
    assert ended.code == 0, ended.err
    assert tokens.read_bytes() == content
    assert builders.shard_bytes(cache) == builders.shard_bytes(whole)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: m.update(version=1), MismatchError, "version 1"),
        (lambda m: m.update(version="1"), MismatchError, "version '1'"),
        (lambda m: m.pop("version"), MismatchError, "version None"),
        (lambda m: m.update(format="nemo"), MismatchError, "nemo"),
        (lambda m: m.update(more=1), DataError, "more"),
        (lambda m: m.pop("identity"), DataError, "identity"),
        (lambda m: m["identity"]["capture"].update(shard_size=0), DataError, "shard_size"),
        (lambda m: m["identity"]["capture"]["fields"][0].update(dtype="int3"), DataError, "dtype"),
        (lambda m: m["identity"]["capture"]["fields"][0].update(name="../aux"), DataError, "name"),
        (lambda m: m["identity"]["dataset"].update(num_samples=-1), DataError, "num_samples"),
        (lambda m: m["identity"]["dataset"].update(num_samples=2**62), DataError, ""),
        (lambda m: m["defaults"]["draft_vocabulary"].update(digest="../../x"), DataError, "digest"),
        (lambda m: m["files"].update({"../outside": {"num_bytes": 1, "digest": "0" * 32}}), DataError, "outside"),
        (lambda m: m["files"].update({"/etc/passwd": {"num_bytes": 1, "digest": "0" * 32}}), DataError, "passwd"),
        (lambda m: m["files"]["head.safetensors"].pop("digest"), DataError, "digest"),
        (lambda m: m["files"]["head.safetensors"].update(num_bytes="many"), DataError, "num_bytes"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_follow_its_schema_is_refused(
    whole: Path, copy_of: Copy, change: Callable[[dict[str, Any]], None], error: type[EagleOfflineError], said: str
) -> None:
    cache = copy_of(whole)
    edit(cache / "manifest.json", change)
    with pytest.raises(error, match=said or None) as caught:
        open_cache(cache)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert builders.run_cli("inspect-manifest", cache).code == caught.value.exit_code


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(version=1), "version"),
        (lambda r: r.update(shard=1), "another shard"),
        (lambda r: r.update(file="../shard-000000-" + "0" * 32 + ".arrow"), "file"),
        (lambda r: r.update(finite=False), "finite"),
        (lambda r: r.update(digest="zz"), "digest"),
        (lambda r: r.pop("lost"), "lost"),
        (lambda r: r["samples"]["row"].pop(), "unequal length"),
        (lambda r: r["samples"]["num_tokens"].__setitem__(0, -5), ""),
        (lambda r: r["samples"]["row"].__setitem__(0, -1), ""),
        (lambda r: r["samples"]["record_batch"].__setitem__(0, 2**40), ""),
        (lambda r: r["samples"]["sample_id"].__setitem__(0, 2**70), ""),
        (lambda r: r["samples"]["digest"].__setitem__(0, "x"), ""),
    ],
)
def test_a_record_that_does_not_follow_its_schema_is_refused(
    whole: Path, copy_of: Copy, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    cache = copy_of(whole)
    edit(cache / "commit-000000.json", change)
    with pytest.raises(DataError, match=said or None):
        open_cache(cache)[0]
    check_noticed(cache, "commit-000000.json")


@pytest.mark.parametrize("name", ["manifest.json", "commit-000001.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"a": 1}'])
def test_json_files_of_a_cache_that_are_not_theirs_are_refused(
    whole: Path, copy_of: Copy, name: str, content: bytes
) -> None:
    cache = copy_of(whole)
    (cache / name).write_bytes(content)
    with pytest.raises(EagleOfflineError, match=name):
        open_cache(cache)
    assert verify(cache).code in (3, 4)
    assert builders.run_cli("inspect-manifest", cache).code in (3, 4)


def test_what_is_no_cache_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    for place in ("nowhere", "file", "directory"):
        with pytest.raises(DataError, match=r"manifest\.json"):
            open_cache(tmp_path / place)
        ended = builders.run_cli("inspect-manifest", tmp_path / place)
        assert ended.code == 4
        assert len(ended.errors) == 1
        assert ended.errors[0].startswith("error: ")

"""Which files, splits and slices are read, in which order, and what is said about input that is not there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_offline.errors import DataError, UsageError
from eagle_offline.text.rows import Source, iter_rows
from eagle_offline.text.sources import pinned_inputs, resolve_sources
from tests.text.reading import assert_one_line, numbered, numbers, read
from tests.text.tiny_tokenizers import write_jsonl


def test_directory_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", numbered(3))
    write_jsonl(tmp_path / "a" / "z.jsonl", numbered(1, 2))
    write_jsonl(tmp_path / ".hidden" / "x.jsonl", numbered(9))
    (tmp_path / "readme.md").write_text("not data")
    assert numbers(tmp_path) == [1, 2, 3]
    assert [source.name for source in resolve_sources(str(tmp_path))] == ["a/z.jsonl", "b.jsonl"]


def test_empty_and_missing_inputs_are_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "directory").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    for name in ("empty.jsonl", "list.json", "directory", "bad.parquet", "absent.jsonl", "absent"):
        with pytest.raises(DataError) as error:
            read(tmp_path / name)
        assert_one_line(error, str(tmp_path / name))
    with pytest.raises(UsageError):
        read(" ")
    (tmp_path / "a.csv").write_text("n\n1\n")
    with pytest.raises(UsageError) as usage:
        read(tmp_path / "a.csv")
    assert_one_line(usage, ".jsonl, .json, .parquet")


def test_split_selects_local_files_by_stem_shard_or_directory(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", numbered(1))
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", numbered(2))
    write_jsonl(tmp_path / "train_extra.jsonl", numbered(3))
    write_jsonl(tmp_path / "held" / "test" / "part.jsonl", numbered(4))
    assert numbers(tmp_path, "train") == [1, 2]  # an exact name wins over one that only begins so
    assert numbers(tmp_path, "train_e") == [3]
    assert numbers(tmp_path, "test") == [4]
    assert numbers(tmp_path) == [4, 1, 2, 3]
    with pytest.raises(UsageError) as error:
        read(tmp_path, "validation")
    assert_one_line(error, "validation", "held, part, test, train, train_extra")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", [0, 1, 2]),
        ("[2:6]", [2, 3, 4, 5]),
        ("[-2:]", [8, 9]),
        ("[:50%]", [0, 1, 2, 3, 4]),
        ("train[5:100]", [5, 6, 7, 8, 9]),
    ],
)
def test_slice_counts_rows_over_all_files_in_order(tmp_path: Path, split: str, expected: list[int]) -> None:
    (tmp_path / "train-00000-of-00003.jsonl").write_text('{"n": 0}\n\n{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    pq.write_table(pa.Table.from_pylist(numbered(4, 5)), tmp_path / "train-00001-of-00003.parquet")
    (tmp_path / "train-00002-of-00003.json").write_text(json.dumps(numbered(6, 7, 8, 9)))
    assert numbers(tmp_path, split) == expected


@pytest.mark.parametrize("split", ["", "train[1:2:3]", "a/b", "train[x:]", "[5:5]", "[100:]"])
def test_split_that_cannot_be_meant_is_a_usage_error(tmp_path: Path, split: str) -> None:
    with pytest.raises(UsageError) as error:
        read(write_jsonl(tmp_path / "train.jsonl", numbered(1, 2)), split)
    assert_one_line(error, "split")


def test_revision_of_a_local_path_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1))
    with pytest.raises(UsageError) as error:
        resolve_sources(str(path), revision="main")
    assert_one_line(error, "revision", str(path))


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name / "a.jsonl" for name in ("x", "y", "z"))
    for path, value in ((first, 1), (second, 1), (other, 2)):
        write_jsonl(path, numbered(value))
    digests = [resolve_sources(str(path))[0].digest for path in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 32


def test_several_inputs_are_read_in_order_each_with_its_own_split(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", numbered(1, 2, 3))
    write_jsonl(tmp_path / "many" / "train.jsonl", numbered(4, 5, 6, 7))
    write_jsonl(tmp_path / "many" / "test.jsonl", numbered(8, 9))
    inputs = [f"{tmp_path / 'many'}:test", f"{first}:[:2]", f"{tmp_path / 'many'}:train[-2:]", f"{first}:[2:]"]
    sources = resolve_sources(inputs, split="train")
    assert values(sources) == [8, 9, 1, 2, 6, 7, 3]
    assert [source.split for source in sources] == ["test", "[:2]", "train[-2:]", "[2:]"]
    # A split of its own wins; without one, that of all is taken.
    assert values(resolve_sources([str(tmp_path / "many"), f"{first}:[:1]"], split="test")) == [8, 9, 1]


def values(sources: Sequence[Source]) -> list[int]:
    return [row.value["n"] for source in sources for row in iter_rows(source) if row.value is not None]


def test_what_exists_under_the_whole_text_is_that_file(tmp_path: Path) -> None:
    named = write_jsonl(tmp_path / "a:[1:].jsonl", numbered(1))
    write_jsonl(tmp_path / "b" / "train.jsonl", numbered(2, 3))
    odd = write_jsonl(tmp_path / "b:train" / "x.jsonl", numbered(4)).parent
    assert numbers(named) == [1]
    assert numbers(f"{named}:[:1]") == [1]
    assert numbers(odd) == [4]
    assert numbers(f"{tmp_path / 'b'}:train[1:]") == [3]
    assert numbers(write_jsonl(tmp_path / "v@1.jsonl", numbered(5))) == [5]


@pytest.mark.parametrize("suffix", [":[x:]", ":[1:2:3]", ":[5:5]", ":[100:]", ":[:0]", ":nothing"])
def test_own_split_that_cannot_be_meant_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UsageError) as error:
        read(f"{write_jsonl(tmp_path / 'train.jsonl', numbered(1, 2))}{suffix}")
    assert_one_line(error, suffix[1:])


def test_slice_from_the_front_reads_no_further_than_its_end(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", numbered(1, 2))
    (tmp_path / "b.parquet").write_bytes(b"not Parquet")
    assert numbers(f"{tmp_path / 'a.jsonl'}:[:2]") == [1, 2]
    assert [source.stop_row for source in resolve_sources(f"{tmp_path}:[1:2]")] == [2]
    with pytest.raises(DataError):
        resolve_sources(f"{tmp_path}:[1:]")


def test_files_of_one_name_stay_distinguishable(tmp_path: Path) -> None:
    inputs = []
    for place in ("x/data", "y/data"):
        for name in ("train.jsonl", "test.jsonl"):
            write_jsonl(tmp_path / place / name, numbered(1))
        inputs.append(str(tmp_path / place))
    names = [source.name for source in resolve_sources([*inputs, str(write_jsonl(tmp_path / "own.jsonl", [{}]))])]
    assert names == [
        "x/data/test.jsonl", "x/data/train.jsonl", "y/data/test.jsonl", "y/data/train.jsonl", "own.jsonl",
    ]  # fmt: skip
    parts = resolve_sources([f"{tmp_path / 'own.jsonl'}"])
    assert [source.name for source in parts] == ["own.jsonl"]


@pytest.mark.parametrize("again", ["{0}", "{0}:[1:]", "{1}", "{0}:[-1:]", "{1}:a"])
def test_rows_that_are_asked_for_twice_are_refused(tmp_path: Path, again: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1, 2, 3))
    with pytest.raises(UsageError) as error:
        resolve_sources([str(path), again.format(path, tmp_path)])
    assert_one_line(error, str(path), "twice")
    parts = [f"{path}:[2:]", f"{path}:[:1]"]
    assert values(resolve_sources(parts)) == [3, 1]
    assert [source.name for source in resolve_sources(parts)] == ["a.jsonl", "a.jsonl"]


def test_pinned_inputs_name_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", numbered(1, 2))
    write_jsonl(tmp_path / "b" / "train.jsonl", numbered(3, 4))
    monkeypatch.chdir(tmp_path)
    inputs = ("a.jsonl:[:1]", "b:train", "a.jsonl:[1:]")
    sources = resolve_sources(inputs)
    pinned = pinned_inputs(inputs, sources)
    monkeypatch.chdir("/")
    absolute = tuple(dataclasses.replace(source, path=tmp_path / str(source.path)) for source in sources)
    assert resolve_sources(pinned) == absolute
    assert pinned[0] == f"{tmp_path}/a.jsonl:[:1]"


@pytest.mark.parametrize("given", ["absent:[:3]", "owner/name@", "owner/name.jsonl:train", "a b:train"])
def test_input_that_is_nowhere_is_named(given: str) -> None:
    with pytest.raises(DataError) as error:
        resolve_sources(given)
    assert_one_line(error, given, "no such file")


def test_no_input_and_a_revision_of_a_local_path_are_usage_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1))
    for given in ([], f"{path}@main", f"{path}@main:[:1]", ["", str(path)]):
        with pytest.raises(UsageError) as error:
            resolve_sources(given)
        assert_one_line(error)


def test_without_digests_nothing_is_read_and_all_else_is_the_same(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1, 2))
    (with_digest,), (without,) = resolve_sources(str(path)), resolve_sources(str(path), digests=False)
    assert without.digest == ""
    assert without == dataclasses.replace(with_digest, digest="")

"""Which files, splits and slices are read, in which order, and what is said about input that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_offline.errors import DataError, UsageError
from eagle_offline.text.sources import resolve_sources
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

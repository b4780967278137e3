"""What is read from which files, in which order, and what is said about input that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_offline.errors import DataError, EagleOfflineError, UsageError
from eagle_offline.text.sources import Row, iter_rows, resolve_sources
from tests.text.tiny_tokenizers import write_jsonl


def read(path: Path | str, split: str | None = None) -> list[Row]:
    return [row for source in resolve_sources(str(path), split=split) for row in iter_rows(source)]


def numbers(path: Path | str, split: str | None = None) -> list[int]:
    return [row.value["n"] for row in read(path, split) if row.value is not None]


def numbered(*values: int) -> list[dict[str, int]]:
    return [{"n": value} for value in values]


def assert_one_line(error: pytest.ExceptionInfo[EagleOfflineError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_jsonl_json_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    rows = numbered(*range(600))
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "c.json", rows)  # JSON lines under another name
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        found = read(tmp_path / name)
        assert [row.value for row in found] == rows, name
        assert [row.row_number for row in found] == list(range(1, 601)), name


def test_directory_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", numbered(3))
    write_jsonl(tmp_path / "a" / "z.jsonl", numbered(1, 2))
    write_jsonl(tmp_path / ".hidden" / "x.jsonl", numbered(9))
    (tmp_path / "readme.md").write_text("not data")
    assert numbers(tmp_path) == [1, 2, 3]
    assert [source.name for source in resolve_sources(str(tmp_path))] == ["a/z.jsonl", "b.jsonl"]


def test_byte_order_mark_line_ends_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n   \n{"n": 2}\r\n{"n": 3, "x": NaN}')
    assert numbers(path) == [1, 2, 3]
    assert [row.row_number for row in read(path)] == [1, 4, 5]


def test_line_that_is_no_object_is_a_problem_of_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": \n[1]\n{"n": "\xff"}\n' + b"[" * 100_000 + b'\n{"n": 5}\n')
    rows = read(path)
    assert [row.value for row in rows] == [{"n": 1}, None, None, None, None, {"n": 5}]
    assert [row.reason for row in rows] == [None, "not-json", "not-an-object", "not-utf8", "not-json", None]
    assert "column 8" in str(rows[3].problem)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'[{"n": 1},\n {"n": x}]', "line 2, column 8"),
        (b'{"n":\n  oops}', "line 2, column 3"),
        (b'[{"n": 1},\n{"n": "\xff"}]', "line 2, column 8"),
    ],
)
def test_json_file_that_does_not_parse_is_named_with_line_and_column(
    tmp_path: Path, content: bytes, where: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)
    assert_one_line(error, str(path), where)


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


def test_hub_dataset_is_read_with_split_and_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []
    commit = "0123456789" * 4

    def load(hub_id: str, split: str | None, revision: str | None) -> datasets.DatasetDict | datasets.Dataset:
        calls.append((hub_id, split, revision))
        dataset = datasets.Dataset.from_list(numbered(1, 2), split="train")
        dataset.info.download_checksums = {f"hf://datasets/{hub_id}@{commit}/a.json": {}}
        return dataset if split else datasets.DatasetDict(train=dataset, test=dataset)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (source,) = resolve_sources("owner/name", split="[:2]", revision="main")
    assert [row.value for row in iter_rows(source)] == numbered(1, 2)
    assert calls == [("owner/name", "train[:2]", "main"), ("owner/name", "train[:2]", commit)]
    assert (source.name, source.revision) == ("owner/name", commit)
    assert [row.value for row in iter_rows(resolve_sources("owner/name")[0])] == numbered(1, 2)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConnectionError("Couldn't reach\nit"), DataError),
        (ValueError("Unknown split \"x\". Should be one of ['train']."), UsageError),
    ],
)
def test_hub_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[EagleOfflineError]
) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(expected) as error:
        resolve_sources("owner/name", split="x")
    assert_one_line(error, "owner/name")

"""What is read from a file, and what is said about rows and files that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_offline.errors import DataError
from tests.text.reading import assert_one_line, numbered, numbers, read
from tests.text.tiny_tokenizers import write_jsonl


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


def test_gzip_of_lines_and_lists_is_read_and_anything_else_is_told(tmp_path: Path) -> None:
    rows = numbered(1, 2, 3)
    lines, listed = "".join(json.dumps(row) + "\n" for row in rows).encode(), json.dumps(rows).encode()
    for name, content in (("a.jsonl.gz", lines), ("b.json.gz", listed), ("c.JSON.GZ", lines)):
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert [row.value for row in read(tmp_path / name)] == rows, name
    for name, content, told in (
        ("d.jsonl", gzip.compress(lines), "rename it to d.jsonl.gz"),
        ("e.json", gzip.compress(listed), "rename it to e.json.gz"),
        ("f.jsonl.gz", gzip.compress(lines)[:-9], "not readable as gzip"),
        ("g.json.gz", listed, "not readable as gzip"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            read(tmp_path / name)
        assert_one_line(error, str(tmp_path / name), told)

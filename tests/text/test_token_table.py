"""The token table as a reader sees it: every row in order, counts that are true, damage that is noticed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from eagle_offline.errors import DataError
from eagle_offline.text.token_builder import TokenTableSettings, ensure_token_table
from eagle_offline.text.token_table import open_token_table
from tests.text.tiny_tables import TOKENIZER, build, contents, write_chats, write_mixed


def test_table_gives_back_every_row_in_order_with_its_mask(tmp_path: Path) -> None:
    write_chats(tmp_path / "data" / "a.jsonl", 300)
    write_chats(tmp_path / "data" / "b.jsonl", 7)
    table = build(tmp_path / "data", tmp_path / "tokens")
    assert len(table) == table.meta.num_rows == 307
    assert table.meta.rows_per_batch < 300  # more than one record batch is looked into
    for index in (0, 255, 256, 299, 300, 306, -1):
        row = table[index]
        assert (row.source, row.row) == ((0, index + 1) if 0 <= index < 300 else (1, index % 307 - 299))
        number = row.row - 1
        told = TOKENIZER.decode(row.input_ids[row.loss_mask == 1])
        assert told == f"Answer {number}" + "!" * (number % 5) + "<|im_end|>"
        assert (row.input_ids.dtype, row.loss_mask.dtype) == (np.int32, np.uint8)
        assert not row.input_ids.flags.owndata
    rows = [table[index] for index in range(len(table))]
    assert table.lengths.dtype == np.int32
    assert table.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert [source.name for source in table.meta.sources] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(IndexError):
        table[307]


def test_counts_in_the_record_are_those_of_the_rows(tmp_path: Path) -> None:
    table = build(write_chats(tmp_path / "a.jsonl", 300), tmp_path / "tokens")
    rows = [table[index] for index in range(len(table))]
    counted = Counter(int(token) for row in rows for token in row.input_ids[row.loss_mask == 1])
    frequencies = table.supervised_counts()
    assert frequencies.dtype == np.int64
    assert {token: int(count) for token, count in enumerate(frequencies) if count} == counted
    meta = table.meta
    assert len(frequencies) == meta.max_token_id + 1 == max(row.input_ids.max() for row in rows) + 1
    assert meta.num_tokens == sum(len(row.input_ids) for row in rows) == table.lengths.sum()
    assert meta.num_supervised == counted.total()
    assert meta.max_length == table.lengths.max()
    assert (meta.truncated_rows, meta.num_quarantined, meta.reasons) == (0, 0, {})


def test_rows_digest_covers_lengths_ids_and_masks(tmp_path: Path) -> None:
    table = build(write_chats(tmp_path / "a.jsonl", 3), tmp_path / "tokens")
    digest = xxhash.xxh3_128()
    for index in range(3):
        row = table[index]
        digest.update(
            np.array([len(row.input_ids)], "<i8").tobytes() + row.input_ids.tobytes() + row.loss_mask.tobytes()
        )
    assert table.meta.rows_digest == digest.hexdigest()


@pytest.mark.parametrize("name", ["tokens.arrow", "quarantine.jsonl", "tokens.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_table_is_not_opened_and_is_rebuilt(tmp_path: Path, name: str, damage: str) -> None:
    path, directory = write_mixed(tmp_path / "a.jsonl"), tmp_path / "tokens"
    build(path, directory)
    whole = contents(directory)
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 0x80
    if damage == "remove":
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(
            data if damage == "flip" else whole[name][:-1] if name != "tokens.json" else b"{"
        )
    with pytest.raises(DataError) as error:
        open_token_table(directory)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    ensure_token_table(TokenTableSettings(input_data=str(path)), TOKENIZER, directory)
    assert contents(directory) == whole


def test_table_of_another_format_version_is_refused(tmp_path: Path) -> None:
    build(write_chats(tmp_path / "a.jsonl", 2), tmp_path / "tokens")
    meta = tmp_path / "tokens" / "tokens.json"
    meta.write_text(meta.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(DataError, match="format version 99, expected 2"):
        open_token_table(tmp_path / "tokens")

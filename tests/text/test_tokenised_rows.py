"""Rows that are tokens already: taken as they are, refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagle_offline.errors import MismatchError
from eagle_offline.text.conversations import RowProblem
from eagle_offline.text.tokenised_rows import parse_tokens
from tests.text import tiny_tokenizers as tiny
from tests.text.tiny_tables import build, chat

WITHOUT_TEMPLATE = tiny.byte_tokenizer(None)


def test_ids_and_mask_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]},
        {"input_ids": [8, 9], "loss_mask": [False, True], "messages": "not looked at"},
    ]
    table = build(tiny.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "tokens", WITHOUT_TEMPLATE)
    assert [row.input_ids.tolist() for row in (table[0], table[1])] == [[5, 6, 7], [8, 9]]
    assert [row.loss_mask.tolist() for row in (table[0], table[1])] == [[0, 0, 1], [0, 1]]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    again = build(tmp_path / "a.parquet", tmp_path / "parquet", WITHOUT_TEMPLATE)
    np.testing.assert_array_equal(again[0].input_ids, table[0].input_ids)


def test_a_conversation_among_them_needs_a_template(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6], "loss_mask": [0, 1]}, chat(1)])
    with pytest.raises(MismatchError, match="--chat-template FILE"):
        build(path, tmp_path / "tokens", WITHOUT_TEMPLATE)
    assert len(build(path, tmp_path / "tokens", tiny.byte_tokenizer(tiny.CHATML))) == 2


@pytest.mark.parametrize(
    ("ids", "mask", "named"),
    [
        ([1, 2, 3], [0, 1], "3 `input_ids` and a `loss_mask` of 2"),
        ([1, 10], [0, 1], "token id 10; the tokenizer has ids from 0 to 9"),
        ([1, -1], [0, 1], "token id -1"),
        ([1, 1 << 70], [0, 1], "input_ids"),
        ([1, 2], [0, 2], "`loss_mask` holds 2"),
        ([1, 2], [0, -1], "`loss_mask` holds -1"),
        ([1, 2.5], [0, 1], "'2.5'"),
        ([1, 2], [0.0, 1.0], "'0.0'"),
        ([1, "2"], [0, 1], "'2'"),
        ([1, None], [0, 1], "'None'"),
        ([[1, 2]], [[0, 1]], "whole numbers"),
        ([[1], [2, 3]], [0, 1], "whole numbers"),
        ([], [], "empty"),
        ([1], [1], "at least two"),
        ([1, 2], None, "null"),
        ("12", [0, 1], "text"),
        ([True, False], [0, 1], "whole numbers"),
    ],
)
def test_tokens_that_cannot_be_meant_say_why(ids: Any, mask: Any, named: str) -> None:
    with pytest.raises(RowProblem) as problem:
        parse_tokens({"input_ids": ids, "loss_mask": mask}, 10)
    assert problem.value.reason_code == "bad-tokens"
    assert named in problem.value.detail
    assert "\n" not in problem.value.detail


def test_supervision_that_nothing_precedes_or_that_is_cut_off_leaves_the_row_out(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4], "loss_mask": [1, 0, 0, 0]},
        {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 0, 0]},
        {"input_ids": [1, 2, 3, 4], "loss_mask": [1, 0, 0, 1]},
        {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]},
    ]
    table = build(tiny.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "tokens", WITHOUT_TEMPLATE, seq_length=3)
    assert table.meta.reasons == {"no-supervised-token": 2, "supervision-truncated": 1}
    assert [row.loss_mask.tolist() for row in (table[0], table[1])] == [[0, 0, 1], [0, 0, 1]]
    assert [row.row for row in (table[0], table[1])] == [4, 5]
    assert table.meta.truncated_rows == 1


def test_padding_at_either_end_is_cut_off_and_labels_may_stand_for_the_mask() -> None:
    row: dict[str, Any] = {"input_ids": [0, 5, 6, 7, 0, 0], "attention_mask": [0, 1, 1, 1, 0, 0]}
    for supervision in ({"loss_mask": [0, 0, 1, 1, 0, 1]}, {"labels": [-100, -100, 6, 7, -100, 0]}):
        found = parse_tokens({**row, **supervision}, 10)
        assert (found.input_ids.tolist(), found.loss_mask.tolist()) == ([5, 6, 7], [0, 1, 1])
    both = {"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [0, 1], "attention_mask": [True, True]}
    assert parse_tokens(both, 10).loss_mask.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"loss_mask": [0, 1, 1], "attention_mask": [1, 0, 1]}, "`attention_mask` is 0 at position 1"),
        ({"loss_mask": [0, 1, 1], "attention_mask": [1, 1]}, "an `attention_mask` of 2"),
        ({"loss_mask": [0, 1, 1], "attention_mask": [1, 2, 1]}, "`attention_mask` holds 2"),
        ({"loss_mask": [0, 1, 1], "attention_mask": [0, 0, 0]}, "0 tokens"),
        ({"labels": [-100, 5, 9]}, "`labels` holds 9 where the token is 6"),
        ({"labels": [-100, 5]}, "3 `input_ids` and `labels` of 2"),
        ({"labels": [-100, 5, -1]}, "`labels` holds -1"),
        ({"labels": None}, "`loss_mask` is null"),
    ],
)
def test_padding_and_labels_that_cannot_be_meant_say_why(row: dict[str, Any], named: str) -> None:
    with pytest.raises(RowProblem) as problem:
        parse_tokens({"input_ids": [4, 5, 6], **row}, 10)
    assert problem.value.reason_code == "bad-tokens"
    assert named in problem.value.detail

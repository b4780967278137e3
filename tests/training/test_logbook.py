"""Metrics lines stay whole and in order whatever cut the last one short."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from eagle_offline.training.logbook import METRICS_FILE, Logbook, MetricsRow, read_metrics


def row(step: int, kind: str = "train", **more: float) -> MetricsRow:
    return MetricsRow(
        kind=kind, step=step, epoch=step / 10, loss=1.0, accuracy=0.5, top1=[0.5], conditional_top1=[0.5],
        simulated_accept_length=1.5, **more,
    )  # fmt: skip


def up_to(step: int):
    return lambda line: line["step"] <= step


def steps(directory) -> list[int]:
    return [line["step"] for line in read_metrics(directory)]


def test_rows_are_read_back_as_written(tmp_path):
    logbook = Logbook(tmp_path / METRICS_FILE, up_to(0))
    rows = [row(0, "heldout", walked_accept_length=1.25), row(1, grad_norm=0.1), row(2, learning_rate=1e-300)]
    for each in rows:
        logbook.write(each)
    assert [MetricsRow.model_validate(line) for line in read_metrics(tmp_path)] == rows


def test_a_row_is_in_the_file_when_write_returns(tmp_path):
    logbook = Logbook(tmp_path / METRICS_FILE, up_to(0))
    logbook.write(row(1))
    assert json.loads((tmp_path / METRICS_FILE).read_text())["step"] == 1


def test_rows_after_the_checkpoint_are_dropped_and_written_again(tmp_path):
    logbook = Logbook(tmp_path / METRICS_FILE, up_to(0))
    for step in range(1, 6):
        logbook.write(row(step))
    logbook = Logbook(tmp_path / METRICS_FILE, up_to(3))
    assert steps(tmp_path) == [1, 2, 3]
    logbook.write(row(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, 20, 70])
def test_a_torn_last_line_is_left_out_and_removed_on_resume(tmp_path, cut):
    logbook = Logbook(tmp_path / METRICS_FILE, up_to(0))
    for step in (1, 2, 3):
        logbook.write(row(step))
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: len(whole) - last + cut])
    assert steps(tmp_path) == [1, 2]
    Logbook(tmp_path / METRICS_FILE, up_to(2)).write(row(3))
    assert path.read_bytes() == whole


def test_a_torn_line_in_the_middle_is_not_passed_over(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        read_metrics(tmp_path)


def test_a_run_without_metrics_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("change", [{"kind": "other"}, {"speed": 3}, {"loss": "low"}, {"step": "one"}])
def test_a_row_that_does_not_follow_the_schema_is_refused(change):
    with pytest.raises(ValidationError):
        MetricsRow.model_validate({**row(1).model_dump(), **change})

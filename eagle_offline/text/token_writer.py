"""Rows on their way to disk: those that go into a token table, those left out, and the counts of both.

Writes to open files; knows neither where rows come from nor how files become durable.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import xxhash

from eagle_offline.errors import DataError
from eagle_offline.text.assistant_spans import TEMPLATE_DISAGREES
from eagle_offline.text.templates import EDGE_IN_TOKEN
from eagle_offline.text.token_table import SCHEMA, TokenProgress

ROWS_PER_BATCH = 256  # bounds memory when building: at most this many rows are held

# Rows of which the template or the tokenizer does not say what is the assistant's. One of them may be an odd row; where
# more than half of at least so many are, the template is at fault, and not the data.
UNTOLD_REASONS = (TEMPLATE_DISAGREES, EDGE_IN_TOKEN)
ROWS_TO_JUDGE_BY = 20


@dataclass(frozen=True)
class EncodedRow:
    """A row that goes into the table: int32 [T], uint8 [T], its 1-based number, whether it was shortened, notes."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row_number: int
    truncated: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOutRow:
    """A row that stays out: a line of `quarantine.jsonl`."""

    file: str
    row: int
    reason: str
    detail: str


def template_problem(num_rows: int, reasons: Mapping[str, int], example: LeftOutRow | None) -> str | None:
    """Return one line if the rows so far say that the template is at fault: more than half of 20 or more are untold.

    Args:
        num_rows: Rows that are usable.
        reasons: Rows left out by reason.
        example: The first that is untold, None if none is.
    """
    untold = sum(reasons.get(reason, 0) for reason in UNTOLD_REASONS)
    seen = num_rows + untold
    if example is None or seen < ROWS_TO_JUDGE_BY or 2 * untold <= seen:
        return None
    return f"{example.file} row {example.row}: {example.detail} (so in {untold} of {seen} rows)"


def nothing_usable(input_data: str, reasons: Mapping[str, int], example: LeftOutRow | None) -> str:
    """Return the line that says why input without a usable row is refused: the counts by reason, and an example."""
    if example is None:
        return f"{input_data}: it holds no rows; expected one conversation a row"
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return (
        f"{input_data}: no usable row, {sum(reasons.values())} left out ({counts}); "
        f"the first: {example.file} row {example.row}: {example.detail}"
    )


class TokenWriter:
    """Streams rows into the two data files and keeps the counts of `tokens.json`.

    Args:
        tokens: Becomes `tokens.arrow`.
        quarantine: Becomes `quarantine.jsonl`.
    """

    def __init__(self, tokens: IO[bytes], quarantine: IO[bytes]) -> None:
        self._writer = pa.ipc.new_file(tokens, SCHEMA)
        self._quarantine = quarantine
        self._pending: list[tuple[EncodedRow, int]] = []
        self._rows_digest = xxhash.xxh3_128()
        self._first_left_out: LeftOutRow | None = None
        self._first_untold: LeftOutRow | None = None
        self.reasons: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.num_rows = self.num_tokens = self.num_supervised = self.truncated_rows = 0
        self.max_length = 0
        self.max_token_id = -1

    def add(self, outcome: EncodedRow | LeftOutRow, source: int) -> bool:
        """Take in one row of source index `source`; return whether a record batch was written.

        Raises:
            DataError: The rows so far say that the template is at fault; see `template_problem`.
        """
        written = self._take_in(outcome, source)
        if problem := template_problem(self.num_rows, self.reasons, self._first_untold):
            raise DataError(problem)
        return written

    def _take_in(self, outcome: EncodedRow | LeftOutRow, source: int) -> bool:
        if isinstance(outcome, LeftOutRow):
            self.reasons[outcome.reason] += 1
            self._first_left_out = self._first_left_out or outcome
            if outcome.reason in UNTOLD_REASONS:
                self._first_untold = self._first_untold or outcome
            self._quarantine.write((json.dumps(asdict(outcome), ensure_ascii=True) + "\n").encode())
            return False
        length = len(outcome.input_ids)
        self._rows_digest.update(np.int64(length).astype("<i8").tobytes())
        self._rows_digest.update(outcome.input_ids.astype("<i4", copy=False).tobytes())
        self._rows_digest.update(outcome.loss_mask.tobytes())
        self.num_rows += 1
        self.num_tokens += length
        self.num_supervised += int(outcome.loss_mask.sum())
        self.truncated_rows += outcome.truncated
        self.notes.update(outcome.notes)
        self.max_length = max(self.max_length, length)
        self.max_token_id = max(self.max_token_id, int(outcome.input_ids.max()))
        self._pending.append((outcome, source))
        if len(self._pending) < ROWS_PER_BATCH:
            return False
        self._write_batch()
        return True

    def close(self) -> None:
        """Write what is pending and the end of the Arrow file."""
        if self._pending:
            self._write_batch()
        self._writer.close()

    def _write_batch(self) -> None:
        rows = [row for row, _ in self._pending]
        offsets = pa.array(np.cumsum([0, *(len(row.input_ids) for row in rows)]), pa.int32())
        ids = pa.array(np.concatenate([row.input_ids for row in rows]), pa.int32())
        mask = pa.array(np.concatenate([row.loss_mask for row in rows]), pa.uint8())
        columns = [
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, mask),
            pa.array([source for _, source in self._pending], pa.int32()),
            pa.array([row.row_number for row in rows], pa.int64()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._pending.clear()

    def progress(self, source: str) -> TokenProgress:
        """Return how far the build is, in the source of that name."""
        return TokenProgress(source, self.num_rows + self.reasons.total(), self.num_rows, self.num_tokens)

    def rows_digest(self) -> str:
        """Return the digest of (length, ids, mask) of every row so far."""
        return self._rows_digest.hexdigest()

    def check_usable(self, input_data: str) -> None:
        """Check that there is a row.

        Raises:
            DataError: There is none; says the counts by reason and the first example.
        """
        if not self.num_rows:
            raise DataError(nothing_usable(input_data, self.reasons, self._first_left_out))

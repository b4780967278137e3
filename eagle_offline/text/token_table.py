"""The tokenised corpus on disk: built once from chat data, then opened by memory map.

A directory holds `tokens.arrow` (Arrow IPC file: `input_ids` list<int32>, `loss_mask` list<uint8>, `source` int32,
`row` int64), `quarantine.jsonl` (rows left out and why) and, written last, `tokens.json`: without it there is no table.
The bytes are a function of the input rows, the tokenizer, the template and the settings. Knows no model and no cache.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagle_offline.errors import DataError, SpaceError, UsageError
from eagle_offline.text.conversations import RowProblem, parse_conversation, parse_tools
from eagle_offline.text.sources import Row, Source, file_digest, iter_rows, one_line, resolve_sources
from eagle_offline.text.templates import ChatTemplate, template_digest, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.arrow"
QUARANTINE_FILE = "quarantine.jsonl"
META_FILE = "tokens.json"
LOCK_FILE = "tokens.lock"
ROWS_PER_BATCH = 256  # bounds memory when building: at most this many rows are held
LOCK_STALE_SECONDS = 60.0
LOCK_HEARTBEAT_SECONDS = 5.0
LOCK_POLL_SECONDS = 0.2
SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("loss_mask", pa.list_(pa.uint8())),
        pa.field("source", pa.int32()),
        pa.field("row", pa.int64()),
    ]
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenTableSettings(_Record):
    """What the user chooses about a token table.

    Attributes:
        input_data: A file, a directory or a hub id.
        split: Split name, slice, or both; None for every row.
        revision: Hub revision.
        seq_length: Longer rows keep their first `seq_length` tokens.
        chat_template_file: Jinja file used in place of the tokenizer's template.
        on_bad_row: Leave unusable rows out and say so, or stop at the first.
    """

    input_data: str
    split: str | None = None
    revision: str | None = None
    seq_length: int = Field(default=2048, ge=2)
    chat_template_file: Path | None = None
    on_bad_row: Literal["quarantine", "stop"] = "quarantine"


class SourceRecord(_Record):
    """A `Source` without the place where it lies on this machine."""

    name: str
    hub_id: str | None
    split: str | None
    revision: str | None
    num_bytes: int
    digest: str
    first_row: int
    stop_row: int | None


class FileRecord(_Record):
    """Size in bytes and xxh3_128 hex digest of a file of the table."""

    num_bytes: int
    digest: str


class TokenTableMeta(_Record):
    """`tokens.json`. `key` digests all that shapes the table; `rows_digest` covers (length, ids, mask) of every row."""

    format_version: int
    key: str
    tokenizer_digest: str
    template_digest: str
    seq_length: int
    on_bad_row: Literal["quarantine", "stop"]
    sources: tuple[SourceRecord, ...]
    num_rows: int
    num_tokens: int
    num_supervised: int
    max_length: int
    max_token_id: int
    truncated_rows: int
    num_quarantined: int
    reasons: dict[str, int]
    rows_digest: str
    rows_per_batch: int
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class TokenProgress:
    """How far a build is; passed to `report` after every record batch and at the end."""

    source: str
    rows_read: int
    num_rows: int
    num_tokens: int


Report = Callable[[TokenProgress], None]


@dataclass(frozen=True)
class EncodedRow:
    """A row that goes into the table: int32 [T], uint8 [T], its 1-based number, and whether it was shortened."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    row_number: int
    truncated: bool


@dataclass(frozen=True)
class LeftOutRow:
    """A row that stays out: a line of `quarantine.jsonl`."""

    file: str
    row: int
    reason: str
    detail: str


class TokenRow(NamedTuple):
    """A row of the table: int32 [T], uint8 [T] (read-only views of the file), index into the sources, row number."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: int
    row: int


def encode_row(row: Row, template: ChatTemplate, seq_length: int) -> EncodedRow | LeftOutRow:
    """Return the tokens of a row, or why it is left out; depends on nothing but its arguments.

    Raises:
        DataError: The template cannot say which tokens are the assistant's.
    """
    file = row.source.name
    if row.value is None:
        return LeftOutRow(file, row.row_number, row.reason or "unreadable", row.problem or "unreadable")
    try:
        encoded = template.encode(parse_conversation(row.value), parse_tools(row.value))
    except RowProblem as problem:
        return LeftOutRow(file, row.row_number, problem.reason_code, one_line(problem.detail))
    except DataError as error:
        raise DataError(f"{_where(row)}: {error}") from error
    input_ids, loss_mask = encoded.input_ids[:seq_length], encoded.loss_mask[:seq_length]
    if not loss_mask.any():
        if encoded.loss_mask.any():
            detail = f"the first {seq_length} of {len(encoded.input_ids)} tokens hold none of the assistant's"
            return LeftOutRow(file, row.row_number, "supervision-truncated", detail)
        return LeftOutRow(file, row.row_number, "no-supervised-token", "the template gives the assistant no token")
    return EncodedRow(input_ids, loss_mask, row.row_number, len(input_ids) < len(encoded.input_ids))


def build_token_table(
    settings: TokenTableSettings,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path | str,
    report: Report | None = None,
) -> TokenTable:
    """Tokenize every row into `directory` and open the table; memory stays at one record batch.

    Raises:
        DataError: No usable row; a bad row under `on_bad_row="stop"`; input that cannot be read or that changed.
        UsageError: Settings that cannot be meant, or a directory that cannot be written.
        MismatchError: The tokenizer has no chat template.
        SpaceError: The disk is full.
    """
    return _build(_plan(settings, tokenizer), Path(directory), report)


def ensure_token_table(
    settings: TokenTableSettings,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path | str,
    report: Report | None = None,
) -> TokenTable:
    """Open the table in `directory` if it is the one asked for, else build it.

    Of several processes one builds and the others wait for it on the file system. The lock only saves work: should
    two build at once, both write the same bytes and the last rename wins.

    Raises:
        As `build_token_table`.
    """
    directory = Path(directory)
    plan = _plan(settings, tokenizer)
    if table := _open_matching(plan, directory):
        return table
    with _plain_disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = directory / LOCK_FILE
        while not (token := _acquire_lock(lock)):
            if table := _open_matching(plan, directory):
                return table
            time.sleep(LOCK_POLL_SECONDS)
        with _held_lock(lock, token):
            return _open_matching(plan, directory) or _build(plan, directory, report)


def open_token_table(directory: Path | str) -> TokenTable:
    """Open a finished table by memory map, after checking size and digest of its files.

    Raises:
        DataError: There is no finished table, it has another format version, or its files disagree.
    """
    directory = Path(directory)
    path = directory / META_FILE
    again = "run `eagle-offline tokenize` again"
    try:
        stored = json.loads(path.read_bytes())
        version = stored.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version}, expected {FORMAT_VERSION}; {again}")
        meta = TokenTableMeta.model_validate(stored)
        for name, record in meta.files.items():
            num_bytes = (directory / name).stat().st_size
            if num_bytes != record.num_bytes:
                raise DataError(f"{directory / name}: {num_bytes} bytes, expected {record.num_bytes}; {again}")
            if file_digest(directory / name) != record.digest:
                raise DataError(f"{directory / name}: its digest is not the recorded {record.digest}; {again}")
        return TokenTable(directory, meta)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: not there, so this is no finished token table; {again}") from error
    except (ValidationError, ValueError, AttributeError, OSError) as error:
        raise DataError(f"{path}: not readable as a token table ({one_line(error)}); {again}") from error


class TokenTable:
    """A finished table, memory-mapped. `table[i]` and `lengths` are in input order.

    Attributes:
        meta: What `tokens.json` says.
    """

    def __init__(self, directory: Path, meta: TokenTableMeta) -> None:
        self.directory = directory
        self.meta = meta
        self._reader = pa.ipc.open_file(pa.memory_map(str(directory / TOKENS_FILE)))
        self._batches: dict[int, _BatchView] = {}

    def __len__(self) -> int:
        return self.meta.num_rows

    def __getitem__(self, index: int) -> TokenRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch_index, offset = divmod(index % len(self), self.meta.rows_per_batch)
        batch = self._batch(batch_index)
        start, stop = batch.offsets[offset], batch.offsets[offset + 1]
        tokens = slice(int(start), int(stop))
        return TokenRow(
            batch.input_ids[tokens], batch.loss_mask[tokens], int(batch.source[offset]), int(batch.row[offset])
        )

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, int32 [num_rows]."""
        parts = [np.diff(self._batch(index).offsets) for index in range(self._reader.num_record_batches)]
        return np.concatenate(parts).astype(np.int32, copy=False)

    def supervised_counts(self) -> np.ndarray:
        """How often each id is a supervised token, int64 [max_token_id + 1]; reads one record batch at a time."""
        counts = np.zeros(self.meta.max_token_id + 1, dtype=np.int64)
        for index in range(self._reader.num_record_batches):
            batch = self._batch(index)
            counts += np.bincount(batch.input_ids[batch.loss_mask == 1], minlength=len(counts))
        return counts

    def _batch(self, index: int) -> _BatchView:
        if index not in self._batches:
            self._batches[index] = _BatchView.of(self._reader.get_batch(index))
        return self._batches[index]


class _BatchView(NamedTuple):
    """Numpy views of one record batch: int32 [rows + 1], int32 [tokens], uint8 [tokens], int32 [rows], int64 [rows]."""

    offsets: np.ndarray
    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _BatchView:
        ids, mask, source, row = (batch.column(name) for name in SCHEMA.names)
        arrays = (ids.offsets, ids.values, mask.values, source, row)
        return cls(*(array.to_numpy(zero_copy_only=True) for array in arrays))


# Building


@dataclass(frozen=True)
class _Plan:
    """All that shapes a table, resolved; `key` is its digest."""

    settings: TokenTableSettings
    sources: tuple[Source, ...]
    template: ChatTemplate
    tokenizer_digest: str
    template_digest: str

    @property
    def source_records(self) -> tuple[SourceRecord, ...]:
        kept = SourceRecord.model_fields
        return tuple(
            SourceRecord(**{name: value for name, value in asdict(source).items() if name in kept})
            for source in self.sources
        )

    @property
    def key(self) -> str:
        shaping = {
            "format_version": FORMAT_VERSION,
            "sources": [record.model_dump() for record in self.source_records],
            "seq_length": self.settings.seq_length,
            "on_bad_row": self.settings.on_bad_row,
            "tokenizer": self.tokenizer_digest,
            "template": self.template_digest,
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(shaping, sort_keys=True).encode())


def _plan(settings: TokenTableSettings, tokenizer: PreTrainedTokenizerBase) -> _Plan:
    text = None
    if settings.chat_template_file is not None:
        try:
            text = settings.chat_template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = one_line(error)
            raise UsageError(f"--chat-template {settings.chat_template_file}: cannot be read ({reason})") from error
    template = ChatTemplate(tokenizer, text)
    sources = resolve_sources(settings.input_data, split=settings.split, revision=settings.revision)
    return _Plan(settings, sources, template, tokenizer_digest(tokenizer), template_digest(tokenizer, text))


def _open_matching(plan: _Plan, directory: Path) -> TokenTable | None:
    """Open the table in `directory` if it is whole and made by `plan`."""
    with suppress(DataError):
        table = open_token_table(directory)
        if table.meta.key == plan.key:
            return table
    return None


def _build(plan: _Plan, directory: Path, report: Report | None) -> TokenTable:
    with _plain_disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        with _staged(directory / TOKENS_FILE) as tokens, _staged(directory / QUARANTINE_FILE) as quarantine:
            writer = _TableWriter(tokens, quarantine)
            for source_index, source in enumerate(plan.sources):
                for row in iter_rows(source):
                    outcome = encode_row(row, plan.template, plan.settings.seq_length)
                    if isinstance(outcome, LeftOutRow) and plan.settings.on_bad_row == "stop":
                        raise DataError(f"{_where(row)}: {outcome.reason}: {outcome.detail}; stopped as asked")
                    if writer.add(outcome, source_index) and report is not None:
                        report(writer.progress(source.name))
            writer.close()
            if report is not None:
                report(writer.progress(plan.sources[-1].name))
            writer.check_usable(plan.settings.input_data)
            _check_unchanged(plan.sources)
        meta = writer.describe(plan, directory)
        with _staged(directory / META_FILE) as file:
            file.write((json.dumps(meta.model_dump(), indent=2, sort_keys=True) + "\n").encode())
    return open_token_table(directory)


def _check_unchanged(sources: tuple[Source, ...]) -> None:
    for source in sources:
        if source.path is not None and file_digest(source.path) != source.digest:
            raise DataError(f"{source.path}: it changed while it was read; run again when it is complete")


class _TableWriter:
    """Streams rows into the two data files and keeps the counts of `tokens.json`."""

    def __init__(self, tokens: IO[bytes], quarantine: IO[bytes]) -> None:
        self._writer = pa.ipc.new_file(tokens, SCHEMA)
        self._quarantine = quarantine
        self._pending: list[tuple[EncodedRow, int]] = []
        self._rows_digest = xxhash.xxh3_128()
        self._first_left_out: LeftOutRow | None = None
        self.reasons: Counter[str] = Counter()
        self.num_rows = self.num_tokens = self.num_supervised = self.truncated_rows = 0
        self.max_length = 0
        self.max_token_id = -1

    def add(self, outcome: EncodedRow | LeftOutRow, source: int) -> bool:
        """Take in one row of source index `source`; return whether a record batch was written."""
        if isinstance(outcome, LeftOutRow):
            self.reasons[outcome.reason] += 1
            self._first_left_out = self._first_left_out or outcome
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
        return TokenProgress(source, self.num_rows + self.reasons.total(), self.num_rows, self.num_tokens)

    def check_usable(self, input_data: str) -> None:
        """Raise DataError, with the counts by reason and the first example, when no row is usable."""
        if self.num_rows:
            return
        first = self._first_left_out
        if first is None:
            raise DataError(f"{input_data}: it holds no rows; expected one conversation a row")
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        raise DataError(
            f"{input_data}: no usable row, {self.reasons.total()} left out ({counts}); "
            f"the first: {first.file} row {first.row}: {first.detail}"
        )

    def describe(self, plan: _Plan, directory: Path) -> TokenTableMeta:
        """Return the content of `tokens.json`; the data files must be in place."""
        files = {
            name: FileRecord(num_bytes=(directory / name).stat().st_size, digest=file_digest(directory / name))
            for name in (TOKENS_FILE, QUARANTINE_FILE)
        }
        return TokenTableMeta(
            format_version=FORMAT_VERSION,
            key=plan.key,
            tokenizer_digest=plan.tokenizer_digest,
            template_digest=plan.template_digest,
            seq_length=plan.settings.seq_length,
            on_bad_row=plan.settings.on_bad_row,
            sources=plan.source_records,
            num_rows=self.num_rows,
            num_tokens=self.num_tokens,
            num_supervised=self.num_supervised,
            max_length=self.max_length,
            max_token_id=self.max_token_id,
            truncated_rows=self.truncated_rows,
            num_quarantined=self.reasons.total(),
            reasons=dict(sorted(self.reasons.items())),
            rows_digest=self._rows_digest.hexdigest(),
            rows_per_batch=ROWS_PER_BATCH,
            files=files,
        )


def _where(row: Row) -> str:
    return f"{row.source.path or row.source.name} row {row.row_number}"


# Durable files


@contextmanager
def _staged(path: Path) -> Iterator[IO[bytes]]:
    """Yield a sibling file that becomes `path`, durably and at once, when the block ends without an error."""
    staging = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(staging, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        _sync_directory(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    """Remove staging files of builders that died on this host."""
    host = socket.gethostname()
    for path in directory.glob(f".*.{host}.*.tmp"):
        pid = path.name.removesuffix(".tmp").split(".")[-2]
        if pid.isdigit() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


@contextmanager
def _plain_disk_errors(directory: Path) -> Iterator[None]:
    """Turn what a disk refuses into the one-line errors of this package."""
    try:
        yield
    except OSError as error:
        reason = one_line(error.strerror or error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(
                f"{directory}: no room for the token table ({reason}); free space and run again"
            ) from error
        raise UsageError(f"{directory}: the token table cannot be written ({reason}); choose another place") from error


# One builder at a time


def _acquire_lock(path: Path) -> str | None:
    """Create the lock and return its content, or None while another builder seems alive; a dead one's is removed."""
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex})
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        if _is_stale(path):
            path.unlink(missing_ok=True)
        return None
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    return content


def _is_stale(path: Path) -> bool:
    """Say whether the lock's holder has stopped: no heartbeat for long, or its process is gone from this host."""
    try:
        age_seconds = time.time() - path.stat().st_mtime
        holder: Any = json.loads(path.read_text() or "{}")
    except FileNotFoundError:
        return False
    except ValueError:
        holder = {}
    if age_seconds > LOCK_STALE_SECONDS:
        return True
    same_host = isinstance(holder, dict) and holder.get("host") == socket.gethostname()
    return same_host and isinstance(holder.get("pid"), int) and not _is_alive(holder["pid"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _held_lock(path: Path, content: str) -> Iterator[None]:
    """Keep the lock's modification time fresh during the block; remove it afterwards if it is still ours."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LOCK_HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="token-table-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            if path.read_text() == content:
                path.unlink()

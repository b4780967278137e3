"""Builds the token table: once from chat data, then found again by its key.

The bytes are a function of the input rows, the tokenizer with its template, and the settings. Knows no model and no
cache.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from eagle_offline.durable import explained_os_errors, make_directory, remove_abandoned, replacing, write_bytes
from eagle_offline.errors import DataError, EagleOfflineError
from eagle_offline.provenance import digest_bytes, digest_file
from eagle_offline.text.build_lock import acquire_lock, held_lock, remove_dead_lock
from eagle_offline.text.input_names import listed_inputs
from eagle_offline.text.row_encoding import Outcome
from eagle_offline.text.rows import Source, iter_rows
from eagle_offline.text.sources import resolve_sources
from eagle_offline.text.templates import template_digest, tokenizer_digest
from eagle_offline.text.token_table import (
    FORMAT_VERSION,
    META_FILE,
    QUARANTINE_FILE,
    TOKENS_FILE,
    FileRecord,
    SourceRecord,
    TokenProgress,
    TokenTable,
    TokenTableMeta,
    open_token_table,
)
from eagle_offline.text.token_writer import ROWS_PER_BATCH, LeftOutRow, TokenWriter
from eagle_offline.text.tokenize_pool import WorkerLost, encode_in_order, num_workers_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOCK_FILE = "tokens.lock"
LOCK_POLL_SECONDS = 0.2

# Part of every key: counted up when the same rows, tokenizer and settings come to give another table.
ENCODING_RULES = 3

Report = Callable[[TokenProgress], None]


class TokenTableSettings(BaseModel, frozen=True, extra="forbid"):
    """What the user chooses about a token table.

    Attributes:
        input_data: A file, a directory or a hub id, or several in order; see `resolve_sources`.
        split: Split name, slice, or both, of inputs that say none of their own; None for every row.
        revision: Hub revision of inputs that say none of their own.
        seq_length: Longer rows keep their first `seq_length` tokens.
        on_bad_row: Leave unusable rows out and say so, or stop at the first.
        num_workers: Processes that encode, which changes no byte; None for as many as are worth it.
    """

    input_data: str | tuple[str, ...]
    split: str | None = None
    revision: str | None = None
    seq_length: int = Field(default=2048, ge=2)
    on_bad_row: Literal["quarantine", "stop"] = "quarantine"
    num_workers: int | None = Field(default=None, ge=1)


def build_token_table(
    settings: TokenTableSettings,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path | str,
    report: Report | None = None,
) -> TokenTable:
    """Tokenize every row into `directory` and open the table; memory stays at a few hundred rows.

    Raises:
        DataError: No usable row; a template at fault, see `template_problem`; a bad row under `on_bad_row="stop"`;
            input that cannot be read or that changed.
        UsageError: Settings that cannot be meant.
        EagleOfflineError: A directory that cannot be written, or a process that was lost.
        MismatchError: A conversation, and the tokenizer has no chat template.
        SpaceError: The disk is full.
    """
    return _build(_plan(settings, tokenizer), Path(directory), report)


def ensure_token_table(
    settings: TokenTableSettings,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path | str | None,
    report: Report | None = None,
    *,
    tokens_dir: Path | str | None = None,
) -> TokenTable:
    """Open the table in `directory` if it is the one asked for, else build it.

    Of several processes one builds and the others wait for it on the file system. The lock only saves work: should
    two build at once, both write the same bytes and the last rename wins.

    Args:
        settings: What table.
        tokenizer: With its chat template.
        directory: Holds this one table; None where `tokens_dir` is all that is wanted.
        report: Called now and then while a table is built.
        tokens_dir: Holds any number of tables, each in a directory named by its key. The table is taken from there,
            by hard links where the file system has them, and built there if need be.

    Raises:
        As `build_token_table`.
    """
    plan = _plan(settings, tokenizer)
    if directory is None:
        if tokens_dir is None:
            raise ValueError("a directory, tokens_dir, or both")
        return _ensure(plan, Path(tokens_dir) / plan.key, report)
    directory = Path(directory)
    if tokens_dir is None:
        return _ensure(plan, directory, report)
    return _open_matching(plan, directory) or _take_over(_ensure(plan, Path(tokens_dir) / plan.key, report), directory)


def _ensure(plan: _Plan, directory: Path, report: Report | None) -> TokenTable:
    """Open the table in `directory`, or build it, or wait for who does."""
    if table := _open_matching(plan, directory):
        remove_dead_lock(directory / LOCK_FILE)
        return table
    make_directory(directory)
    lock = directory / LOCK_FILE
    while not (content := acquire_lock(lock)):
        if table := _open_matching(plan, directory):
            return table
        time.sleep(LOCK_POLL_SECONDS)
    with held_lock(lock, content):
        return _open_matching(plan, directory) or _build(plan, directory, report)


def _take_over(table: TokenTable, directory: Path) -> TokenTable:
    """Bring the files of a table to `directory`, `tokens.json` last, and open it there, which checks them again."""
    make_directory(directory)
    for name in (*table.meta.files, META_FILE):
        with replacing(directory / name) as sibling:
            try:
                os.link(table.directory / name, sibling)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(table.directory / name, sibling)
    return open_token_table(directory)


@dataclass(frozen=True)
class _Plan:
    """All that shapes a table, resolved; `key` is its digest."""

    settings: TokenTableSettings
    sources: tuple[Source, ...]
    tokenizer: PreTrainedTokenizerBase
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
            "encoding_rules": ENCODING_RULES,
            "sources": [record.model_dump() for record in self.source_records],
            "seq_length": self.settings.seq_length,
            "on_bad_row": self.settings.on_bad_row,
            "tokenizer": self.tokenizer_digest,
            "template": self.template_digest,
        }
        # Escaped to ASCII, unlike `digest_json`: the name of a local file need not be Unicode text.
        return digest_bytes(json.dumps(shaping, sort_keys=True).encode())


def _plan(settings: TokenTableSettings, tokenizer: PreTrainedTokenizerBase) -> _Plan:
    sources = resolve_sources(settings.input_data, split=settings.split, revision=settings.revision)
    return _Plan(settings, sources, tokenizer, tokenizer_digest(tokenizer), template_digest(tokenizer))


def _open_matching(plan: _Plan, directory: Path) -> TokenTable | None:
    """Open the table in `directory` if it is whole and made by `plan`."""
    with suppress(DataError):
        table = open_token_table(directory)
        if table.meta.key == plan.key:
            return table
    return None


def _build(plan: _Plan, directory: Path, report: Report | None) -> TokenTable:
    make_directory(directory)
    with explained_os_errors(directory):
        remove_abandoned(directory)
    with replacing(directory / TOKENS_FILE) as tokens, replacing(directory / QUARANTINE_FILE) as quarantine:
        with explained_os_errors(directory):
            writer = _write_rows(plan, tokens, quarantine, report)
        _check_unchanged(plan.sources)
    meta = _describe(plan, writer, directory)
    write_bytes(directory / META_FILE, (json.dumps(meta.model_dump(), indent=2, sort_keys=True) + "\n").encode())
    return open_token_table(directory)


def _write_rows(plan: _Plan, tokens: Path, quarantine: Path, report: Report | None) -> TokenWriter:
    """Write every row of the sources to one of the two files; return the writer for its counts."""
    with tokens.open("wb") as tokens_file, quarantine.open("wb") as quarantine_file:
        writer = TokenWriter(tokens_file, quarantine_file)
        try:
            with closing(_encoded_rows(plan)) as outcomes:
                for index, outcome in outcomes:
                    source = plan.sources[index]
                    if isinstance(outcome, LeftOutRow) and plan.settings.on_bad_row == "stop":
                        where = f"{source.path or source.name} row {outcome.row}"
                        raise DataError(f"{where}: {outcome.reason}: {outcome.detail}; stopped as asked")
                    if writer.add(outcome, index) and report is not None:
                        report(writer.progress(source.name))
        except WorkerLost as error:
            # A signal to all processes is one to stop, which is for `report` to say.
            if report is not None:
                report(writer.progress(plan.sources[0].name))
            raise EagleOfflineError(str(error)) from error
        writer.close()
        if report is not None:
            report(writer.progress(plan.sources[-1].name))
    writer.check_usable(", ".join(listed_inputs(plan.settings.input_data)))
    return writer


def _encoded_rows(plan: _Plan) -> Generator[tuple[int, Outcome]]:
    """Yield the index of its source and what became of every row, in order."""
    num_workers = plan.settings.num_workers or num_workers_for(plan.sources, plan.tokenizer)
    rows = ((index, row) for index, source in enumerate(plan.sources) for row in iter_rows(source))
    return encode_in_order(rows, plan.tokenizer, plan.settings.seq_length, num_workers)


def _check_unchanged(sources: tuple[Source, ...]) -> None:
    for source in sources:
        if source.path is not None and digest_file(source.path) != source.digest:
            raise DataError(f"{source.path}: it changed while it was read; run again when it is complete")


def _describe(plan: _Plan, writer: TokenWriter, directory: Path) -> TokenTableMeta:
    """Return the content of `tokens.json`; the data files must be in place."""
    files = {
        name: FileRecord(num_bytes=(directory / name).stat().st_size, digest=digest_file(directory / name))
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
        num_rows=writer.num_rows,
        num_tokens=writer.num_tokens,
        num_supervised=writer.num_supervised,
        max_length=writer.max_length,
        max_token_id=writer.max_token_id,
        truncated_rows=writer.truncated_rows,
        num_quarantined=writer.reasons.total(),
        reasons=dict(sorted(writer.reasons.items())),
        notes=dict(sorted(writer.notes.items())),
        rows_digest=writer.rows_digest(),
        rows_per_batch=ROWS_PER_BATCH,
        files=files,
    )

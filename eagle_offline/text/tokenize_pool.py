"""Encodes rows in several processes, in order; the outcomes are those of one process.

The workers are programs of their own, not forks and not re-imports of the caller's script. Knows no file format.
"""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from eagle_offline.errors import EagleOfflineError, one_line
from eagle_offline.text.row_encoding import Outcome, encode_row
from eagle_offline.text.rows import Row, Source
from eagle_offline.text.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WORKERS = 8
# Below these a process has encoded everything in the second or two that another takes to start.
SMALL_BYTES, SMALL_ROWS = 4 << 20, 4096

ROWS_PER_CHUNK = 32
_CHUNKS_AHEAD = 2  # a worker: one in hand, one to go on with

NumberedRow = tuple[int, Row]


class WorkerLost(Exception):
    """A process that encodes rows ended before its work did."""


def num_workers_for(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many processes are worth starting: one a CPU, at most 8; 1 for little input.

    A tokenizer with code of its own may not be one that another process can load: it stays in this one.
    """
    plain = tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")
    stops = [source.stop_row for source in sources]
    few_rows = (
        all(stop is not None for stop in stops)
        and sum((source.stop_row or 0) - source.first_row for source in sources) <= SMALL_ROWS
    )
    if not plain or few_rows or sum(source.num_bytes for source in sources) <= SMALL_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def encode_in_order(
    rows: Iterable[NumberedRow], tokenizer: PreTrainedTokenizerBase, seq_length: int, num_workers: int
) -> Generator[tuple[int, Outcome]]:
    """Yield the number that came with each row and what became of the row.

    Raises:
        EagleOfflineError: As `encode_row`, at the row in question; or a process was lost.
    """
    if num_workers == 1:
        template = ChatTemplate(tokenizer)
        for number, row in rows:
            yield number, encode_row(row, template, seq_length)
        return
    with ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        threads = stack.enter_context(ThreadPoolExecutor(num_workers, thread_name_prefix="tokenize"))
        first_message = pickle.dumps((_pickled(tokenizer), seq_length), protocol=5)
        for _ in range(num_workers):
            idle.put(stack.enter_context(_Worker(first_message)))

        def encode(chunk: list[Row]) -> tuple[list[Outcome], BaseException | None]:
            worker = idle.get()
            try:
                return worker.ask(chunk)
            finally:
                idle.put(worker)

        for numbers, future in _ahead(rows, lambda chunk: threads.submit(encode, chunk), num_workers * _CHUNKS_AHEAD):
            outcomes, error = future.result()
            yield from zip(numbers, outcomes, strict=False)
            if error is not None:
                raise error


def _ahead(rows: Iterable[NumberedRow], submit: Any, most: int) -> Iterator[tuple[list[int], Future[Any]]]:
    """Submit rows in chunks, at most so many ahead; yield in order what was submitted."""
    waiting: deque[tuple[list[int], Future[Any]]] = deque()
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, ROWS_PER_CHUNK)):
        waiting.append(([number for number, _ in chunk], submit([row for _, row in chunk])))
        if len(waiting) >= most:
            yield waiting.popleft()
    yield from waiting


def _pickled(tokenizer: PreTrainedTokenizerBase) -> bytes:
    try:
        return pickle.dumps(tokenizer, protocol=5)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise EagleOfflineError(
            f"the tokenizer cannot be given to another process ({one_line(error)}); use --tokenize-workers 1"
        ) from error


class _Worker:
    """One process that encodes; used by one thread at a time."""

    def __init__(self, first_message: bytes) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        # The workers are what is parallel; a library that splits its work further only gets in their way.
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eagle_offline.text.tokenize_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, **quiet},
        )
        self._first_message: bytes | None = first_message

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it holds nothing that is not here already, or not wanted any more
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was still to be flushed
                pipe.close()

    def ask(self, rows: list[Row]) -> tuple[list[Outcome], BaseException | None]:
        """Let the process encode rows.

        Raises:
            WorkerLost: It ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if self._first_message is not None:
                stdin.write(self._first_message)
                self._first_message = None
            pickle.dump(rows, stdin, protocol=5)
            stdin.flush()
            return pickle.load(stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            try:
                code = self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                code = None
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise WorkerLost(
                f"a process that tokenizes was lost ({how}); if memory ran out, use fewer --tokenize-workers; "
                "run the same command again"
            ) from error

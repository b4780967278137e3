"""A process that encodes rows for `tokenize_pool`: pickles on standard input, pickles on standard output.

It ends when its standard input does, so that it never outlives the process that started it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Sequence

from eagle_offline.text.row_encoding import Outcome, encode_row
from eagle_offline.text.rows import Row
from eagle_offline.text.templates import ChatTemplate


def encode_chunk(
    rows: Sequence[Row], template: ChatTemplate, seq_length: int
) -> tuple[list[Outcome], BaseException | None]:
    """Return what became of rows in order, up to the first that raised, and what it raised."""
    outcomes: list[Outcome] = []
    try:
        for row in rows:
            outcomes.append(encode_row(row, template, seq_length))
    except Exception as error:
        return outcomes, error
    return outcomes, None


def main() -> None:
    """Read (pickled tokenizer, sequence length), then lists of rows; answer each list."""
    # A terminal's interrupt goes to all; when to stop is for the process that started this one to say.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        pickled, seq_length = pickle.load(requests)
        template = _load(pickled)
        while True:
            pickle.dump(encode_chunk(pickle.load(requests), template, seq_length), answers, protocol=5)
            answers.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the other end is gone, or fell silent in a word
        os._exit(0)


def _load(pickled: bytes) -> ChatTemplate:
    from transformers.dynamic_module_utils import init_hf_modules

    init_hf_modules()  # where tokenizers with code of their own are found
    return ChatTemplate(pickle.loads(pickled))


if __name__ == "__main__":
    main()

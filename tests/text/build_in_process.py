"""A process that ensures a token table, run by the tests: INPUT DIRECTORY LOG [killed-at-batch].

Appends `start`, then `built` for every report, then `done KEY`, to LOG. While it builds, it waits for a second `start`.
"""

import os
import signal
import sys
import time
from pathlib import Path

from eagle_offline.text.token_builder import TokenTableSettings, ensure_token_table
from eagle_offline.text.token_table import TokenProgress
from tests.text import tiny_tokenizers as tiny

input_data, directory, log = sys.argv[1:4]
killed = len(sys.argv) > 4


def note(line: str) -> None:
    with open(log, "a") as file:
        file.write(line + "\n")


def report(progress: TokenProgress) -> None:
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    note(f"built {os.getpid()}")
    deadline = time.monotonic() + 20
    while Path(log).read_text().count("start") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # the other one is given time to build as well, if it would


tokenizer = tiny.byte_tokenizer(tiny.CHATML)
note("start")
table = ensure_token_table(TokenTableSettings(input_data=input_data), tokenizer, directory, report)
note(f"done {table.meta.key}")

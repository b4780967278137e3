"""Chat data to tokens and loss masks, in one process and in as many as there are CPUs.

The corpus is the example's generator's, the tokenizer a byte-level BPE trained on it, the template ChatML without
`{% generation %}` tags, so that masks come of rendered prefixes: what most templates need, and the slower way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Figures, alternating_seconds
from eagle_offline.example.corpus import generate_conversations, write_conversations
from eagle_offline.example.target import build_tokenizer
from eagle_offline.text.token_builder import TokenTableSettings, build_token_table

NAME = "tokenize_speed"
QUESTION = "How much faster do several processes turn chat data into tokens and loss masks?"

_NUM_CONVERSATIONS = 12_000
_REPEATS = 3

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return the cases: nothing here runs on a GPU."""
    return {"chat": measure} if device == "cpu" else {}


def measure(num_conversations: int = _NUM_CONVERSATIONS, repeats: int = _REPEATS) -> Figures:
    """Return rows a second, one process beside several."""
    num_workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "chat.jsonl"
        conversations = list(generate_conversations(num_conversations, seed=0))
        write_conversations(data, conversations)
        texts = [message["content"] for row in conversations[:2000] for message in row["messages"]]
        tokenizer = build_tokenizer(texts, vocab_size=2000)
        tokenizer.chat_template = _CHATML

        def build(workers: int) -> None:
            directory = Path(scratch) / "tokens"
            shutil.rmtree(directory, ignore_errors=True)
            build_token_table(TokenTableSettings(input_data=str(data), num_workers=workers), tokenizer, directory)

        ways: dict[str, Callable[[], object]] = {"one": lambda: build(1), "several": lambda: build(num_workers)}
        seconds = alternating_seconds(ways, repeats=repeats)
        return {
            "several_over_one_speed": seconds["one"] / seconds["several"],
            "processes": num_workers,
            "one_rows_per_s": num_conversations / seconds["one"],
            "several_rows_per_s": num_conversations / seconds["several"],
            "input_mb": data.stat().st_size / 1e6,
        }

"""Small chat data, good and bad rows, and the token tables made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from eagle_offline.text.token_builder import TokenTableSettings, build_token_table
from eagle_offline.text.token_table import TokenProgress, TokenTable
from tests.text import tiny_tokenizers as tiny

TOKENIZER = tiny.byte_tokenizer(tiny.CHATML)
BAD_ROWS = {
    2: ("not-json", '{"messages": '),
    3: ("unknown-role", {"messages": [{"role": "wizard", "content": "x"}]}),
    5: ("no-assistant-turn", {"messages": tiny.turns("Hi")}),
    6: ("no-conversation", {"prompt": "Hi"}),
    8: ("supervision-truncated", {"messages": tiny.turns("x" * 100, "too late")}),
}


def chat(index: int) -> dict[str, Any]:
    return {"messages": tiny.turns(f"Question {index}", f"Answer {index}" + "!" * (index % 5))}


def write_chats(path: Path, count: int) -> Path:
    return tiny.write_jsonl(path, [chat(index) for index in range(count)])


def write_mixed(path: Path) -> Path:
    rows: list[Any] = [chat(index) for index in range(1, 10)]
    for number, (_, row) in BAD_ROWS.items():
        rows[number - 1] = row
    return tiny.write_jsonl(path, rows)


def build(
    input_data: Path,
    directory: Path,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    report: Callable[[TokenProgress], None] | None = None,
    **settings: Any,
) -> TokenTable:
    return build_token_table(TokenTableSettings(input_data=str(input_data), **settings), tokenizer, directory, report)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}

"""Conversations to be answered: what is asked, turn by turn, the answers being the target's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eagle_offline.errors import DataError
from eagle_offline.text.conversations import CONVERSATION_KEYS, Message, RowProblem, parse_messages, parse_tools
from eagle_offline.text.rows import iter_rows
from eagle_offline.text.sources import resolve_sources

# Names under which prompt files say what kind of question a row is.
_TASK_KEYS = ("task", "category")
_NO_TASK = "all"

# What is asked when no file is given: two questions of each of eight kinds.
_QUESTIONS: tuple[tuple[str, str], ...] = (
    ("writing", "Write a short letter to a neighbour who has offered to water your plants while you are away."),
    ("writing", "Describe an old lighthouse at dawn in one paragraph."),
    ("code", "Write a Python function that returns the longest common prefix of a list of strings."),
    ("code", "Show a SQL query that lists the three customers with the highest total order value."),
    ("mathematics", "A train covers 180 km in 2.5 hours. What is its average speed? Show the steps."),
    ("mathematics", "Solve 3x + 7 = 2x - 5 and check the result."),
    ("reasoning", "All squares are rectangles, and some rectangles are red. Must some squares be red? Explain."),
    ("reasoning", "Anna is older than Ben, and Carl is younger than Ben. Who is the youngest? Explain."),
    ("extraction", "List every date in this text: On 3 May 2021 we met; the next call is on 12 June 2022."),
    ("extraction", "Return as JSON the name, age and city in: Maria, 34, moved from Porto to Lyon last year."),
    ("translation", "Translate into French: The library opens at nine and closes at six."),
    ("translation", "Translate into Spanish: Please leave the keys on the table before you go."),
    ("summary", "Summarise in one sentence: Bees visit flowers for nectar and carry pollen from plant to plant."),
    ("summary", "Give three bullet points on why cities plant trees along their streets."),
    ("chat", "What would you suggest for a rainy Sunday with two small children?"),
    ("chat", "I have twenty minutes and some eggs, rice and peas. What can I cook?"),
)


@dataclass(frozen=True)
class Conversation:
    """What a user asks.

    Attributes:
        task: the kind of question.
        turns: what stands before each answer: one tuple of messages an answer.
        tools: tool schemas for the template, or None.
    """

    task: str
    turns: tuple[tuple[Message, ...], ...]
    tools: list[dict[str, Any]] | None = None


def default_prompts() -> list[Conversation]:
    """Return sixteen general questions of eight kinds."""
    return [Conversation(task, ((Message("user", question),),)) for task, question in _QUESTIONS]


def read_prompts(input_data: str, *, split: str | None = None, limit: int | None = None) -> list[Conversation]:
    """Read conversations from a JSONL, JSON or Parquet file, a directory of them, or a hub dataset.

    Rows are ``messages`` or ``conversations`` (answers in them are not read, only asked for again), ``turns`` (a list
    of questions) or ``prompt`` (one); ``task`` or ``category`` says what kind a row is.

    Args:
        input_data: file, directory or hub id.
        split: split or slice of it.
        limit: read no more than this many rows.

    Raises:
        DataError: a row that cannot be read, with file and row number, or no rows. UsageError: no such split.
    """
    conversations: list[Conversation] = []
    for source in resolve_sources(input_data, split=split):
        for row in iter_rows(source):
            if limit is not None and len(conversations) >= limit:
                return conversations
            where = f"{source.path or source.name}, row {row.row_number}"
            if row.value is None:
                raise DataError(f"{where}: {row.problem}")
            try:
                conversations.append(_parse(row.value))
            except RowProblem as problem:
                raise DataError(f"{where}: {problem.detail}") from problem
    if not conversations:
        raise DataError(f"{input_data}: no prompts in it")
    return conversations


def _parse(value: Mapping[str, Any]) -> Conversation:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RowProblem("invalid-text", "half a surrogate pair in it; expected text") from error
    if not any(value.get(key) for key in (*CONVERSATION_KEYS, "turns", "prompt")):
        found = ", ".join(sorted(map(str, value))[:8]) or "none"
        expected = "`prompt`, `turns`, `messages` or `conversations`"
        raise RowProblem("no-question", f"nothing is asked in it: keys are {found}; expected {expected}, not empty")
    task = next((str(value[key]) for key in _TASK_KEYS if value.get(key)), _NO_TASK)
    questions = [value["prompt"]] if isinstance(value.get("prompt"), str) else value.get("turns")
    if isinstance(questions, list) and questions and all(isinstance(text, str) and text for text in questions):
        return Conversation(task, tuple((Message("user", text),) for text in questions))
    turns: list[tuple[Message, ...]] = []
    asked: list[Message] = []
    for message in parse_messages(value):
        if message.role == "assistant":
            if asked:
                turns.append(tuple(asked))
            asked = []
        else:
            asked.append(message)
    if asked:
        turns.append(tuple(asked))
    if not turns or all(message.role == "system" for message in turns[0]):
        raise RowProblem("no-question", "nothing is asked in it; expected a user turn, `turns` or `prompt`")
    return Conversation(task, tuple(turns), parse_tools(value))

"""Reads a row as a conversation: `messages` (role/content) or ShareGPT `conversations` (from/value).

Knows the shapes that chat data comes in; knows neither files nor templates nor tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CONVERSATION_KEYS = ("messages", "conversations")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_TURN_KEYS = ("role", "content", "from", "value")


class RowProblem(Exception):
    """A row that cannot become a sample; it is left out and counted under `reason_code`.

    Attributes:
        reason_code: A short kebab-case word, stable, for summaries.
        detail: One line for a reader: what was found, what was expected.
    """

    def __init__(self, reason_code: str, detail: str) -> None:
        super().__init__(reason_code, detail)
        self.reason_code = reason_code
        self.detail = detail


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: `system`, `developer`, `user`, `assistant` or `tool`.
        content: The text; may be empty for an assistant that only reasons or calls tools.
        extra: Further fields of the turn for the template: `reasoning_content`, `thinking`, `tool_calls`, `name`, …
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_template_input(self) -> dict[str, Any]:
        """Return the turn as chat templates read it."""
        return {"role": self.role, "content": self.content, **self.extra}


def parse_conversation(value: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the turns of a row. A row-level `system` string becomes the first turn unless there is one already.

    >>> parse_conversation({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]})
    (Message(role='user', content='Hi', extra={}), Message(role='assistant', content='Yes?', extra={}))

    Raises:
        RowProblem: `no-conversation`, `conversation-not-a-list`, `empty-conversation`, `turn-not-an-object`,
            `unknown-role`, `content-not-text`, `empty-assistant-turn` or `no-assistant-turn`.
    """
    messages = parse_messages(value)
    if not any(message.role == "assistant" for message in messages):
        found = ", ".join(dict.fromkeys(message.role for message in messages))
        raise RowProblem("no-assistant-turn", f"roles are {found}; expected at least one assistant turn")
    return messages


def parse_messages(value: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the turns of a row, whether or not the assistant has one; see `parse_conversation`.

    Raises:
        RowProblem: as `parse_conversation`, without `no-assistant-turn`.
    """
    turns = _find_turns(value)
    messages = [_parse_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    system = value.get("system")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return tuple(messages)


def parse_tools(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tool schemas of a row (a list, or the list as JSON text), None when it has none.

    Raises:
        RowProblem: `tools-not-a-list`.
    """
    tools = value.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise RowProblem("tools-not-a-list", "`tools` is text that is not JSON; expected a list") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem("tools-not-a-list", f"`tools` is {_kind(tools)}; expected a list of objects")
    return tools


def _find_turns(value: Mapping[str, Any]) -> list[Any]:
    key = next((key for key in CONVERSATION_KEYS if value.get(key) is not None), None)
    if key is None:
        found = ", ".join(sorted(map(str, value))[:8]) or "none"
        raise RowProblem("no-conversation", f"keys are {found}; expected `messages` or `conversations`")
    turns = value[key]
    if not isinstance(turns, list):
        raise RowProblem("conversation-not-a-list", f"`{key}` is {_kind(turns)}; expected a list of turns")
    if not turns:
        raise RowProblem("empty-conversation", f"`{key}` is an empty list; expected turns")
    return turns


def _parse_turn(turn: Any, number: int) -> Message:
    """Read one turn; `number` is 1-based and only for messages to the reader."""
    if not isinstance(turn, Mapping):
        raise RowProblem("turn-not-an-object", f"turn {number} is {_kind(turn)}; expected an object")
    named = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        shown = "missing" if named is None else repr(named)[:40]
        known = "system, user, assistant, tool or a ShareGPT name of them"
        raise RowProblem("unknown-role", f"turn {number}: the role is {shown}; expected {known}")
    extra = {key: item for key, item in turn.items() if key not in _TURN_KEYS and item is not None}
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    speaks_otherwise = role == "assistant" and any(extra.get(key) for key in (*REASONING_KEYS, "tool_calls"))
    text = "" if content is None and speaks_otherwise else _parse_content(content, number)
    if role == "assistant" and not text.strip() and not speaks_otherwise:
        raise RowProblem("empty-assistant-turn", f"turn {number}: the assistant says nothing; expected text")
    return Message(role, text, extra)


def _parse_content(content: Any, number: int) -> str:
    """Return the text of a str or of a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem("content-not-text", f"turn {number}: the content is {_kind(content)}; expected text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else _kind(part)
            raise RowProblem("content-not-text", f"turn {number}: a content part is {kind}; expected text")
        texts.append(text)
    return "".join(texts)


def _kind(value: Any) -> str:
    """Name the JSON kind of a value."""
    kinds = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")

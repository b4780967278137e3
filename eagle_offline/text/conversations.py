"""Reads a row as a conversation: `messages` (role/content), ShareGPT `conversations` (from/value), or a prompt and
its response.

Knows the shapes that chat data comes in; knows neither files nor templates nor tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
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
CONVERSATION_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue")
PROMPT_KEYS = ("prompt", "instruction", "question", "query")
CONTEXT_KEYS = ("input", "context")
RESPONSE_KEYS = ("response", "output", "answer", "completion")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_TURN_KEYS = ("role", "content", "from", "value")
_SYSTEM_KEYS = ("system", "system_prompt")
# What the template is given by us.
_OWN_ARGUMENTS = {
    "messages",
    "tools",
    "documents",
    "chat_template",
    "conversations",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
}


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
        supervised: Whether the turn is to be learned, should it be the assistant's; a `weight` of 0 says no.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    supervised: bool = True

    def as_template_input(self) -> dict[str, Any]:
        """Return the turn as chat templates read it."""
        return {"role": self.role, "content": self.content, **self.extra}


def parse_conversation(value: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the turns of a row. A row-level `system` string becomes the first turn unless there is one already.

    The list may be given as its JSON text. An assistant turn with a `weight` of 0 is not supervised (OpenAI).

    Without such a list a row is a prompt and its response, each a text or (TRL) a list of messages, in which the
    prompt's turns are not supervised; an `input` beside an `instruction` (Alpaca) follows it after a blank line, and
    `history` pairs come before.

    >>> parse_conversation({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]})[1]
    Message(role='assistant', content='Yes?', extra={}, supervised=True)

    Raises:
        RowProblem: `no-conversation`, `ambiguous-row`, `conversation-not-a-list`, `empty-conversation`,
            `turn-not-an-object`, `unknown-role`, `content-not-text`, `empty-assistant-turn` or `no-assistant-turn`.
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
    system = next((value[key] for key in _SYSTEM_KEYS if value.get(key)), None)
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
        raise RowProblem("tools-not-a-list", f"`tools` is {kind_of(tools)}; expected a list of objects")
    return tools


def parse_template_arguments(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row sets for the template: `chat_template_kwargs` (an object, or its JSON text), `enable_thinking`.

    Raises:
        RowProblem: `template-arguments`.
    """
    arguments = value.get("chat_template_kwargs")
    if isinstance(arguments, str):
        with suppress(ValueError):  # and is no object then
            arguments = json.loads(arguments) if arguments.strip() else None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowProblem("template-arguments", f"`chat_template_kwargs` is {kind_of(arguments)}; expected an object")
    if taken := sorted(_OWN_ARGUMENTS & arguments.keys()):
        raise RowProblem(
            "template-arguments", f"`chat_template_kwargs` has `{taken[0]}`, which is not the row's to set"
        )
    thinking = value.get("enable_thinking")
    if isinstance(thinking, bool):
        arguments = {"enable_thinking": thinking, **arguments}
    # A column of objects has every key in every row.
    return {key: item for key, item in arguments.items() if item is not None}


def _find_turns(value: Mapping[str, Any]) -> list[Any]:
    key = next((key for key in CONVERSATION_KEYS if value.get(key) is not None), None)
    if key is None:
        return _pair_turns(value)
    turns = _from_json(value[key])
    if not isinstance(turns, list):
        raise RowProblem("conversation-not-a-list", f"`{key}` is {kind_of(turns)}; expected a list of turns")
    if not turns:
        raise RowProblem("empty-conversation", f"`{key}` is an empty list; expected turns")
    return turns


def _from_json(turns: Any) -> Any:
    """Return a list that is given as JSON text, as tables without nested columns have it; all else as it is."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(turns)
    return turns


def _pair_turns(value: Mapping[str, Any]) -> list[Any]:
    """Return the turns of a prompt and its response."""
    prompt, context, response = (_only(value, keys) for keys in (PROMPT_KEYS, CONTEXT_KEYS, RESPONSE_KEYS))
    if prompt is None:
        prompt, context = context, None
    if prompt is None or not any(key in value for key in RESPONSE_KEYS):
        found = ", ".join(sorted(map(str, value))[:8]) or "none"
        expected = "`messages`, `conversations`, or a prompt (`prompt`, `instruction`, `question`, …) with a response"
        expected += " (`response`, `output`, `answer`, `completion`)"
        raise RowProblem("no-conversation", f"keys are {found}; expected {expected}")
    if context is not None:
        if not isinstance(prompt, str) or not isinstance(context, str):
            raise RowProblem("ambiguous-row", "beside the prompt there is an input, and they are not both text")
        prompt = f"{prompt}\n\n{context}"
    return [*_history_turns(value), *_unsupervised(_as_turns("user", prompt)), *_as_turns("assistant", response)]


def _only(value: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return what the row says under one of `keys`, None if nothing."""
    said = {key: value[key] for key in keys if value.get(key) is not None and value[key] not in ("", [])}
    first = next(iter(said.values()), None)
    if any(item != first for item in said.values()):
        raise RowProblem("ambiguous-row", f"{' and '.join(f'`{key}`' for key in said)} differ; expected one of them")
    return first


def _as_turns(role: str, said: Any) -> list[Any]:
    """Return a text, a message or a list of messages as turns."""
    if isinstance(said, list):
        return said
    return [said] if isinstance(said, Mapping) else [{"role": role, "content": "" if said is None else said}]


def _unsupervised(turns: list[Any]) -> list[Any]:
    return [{**turn, "weight": 0} if isinstance(turn, Mapping) else turn for turn in turns]


def _history_turns(value: Mapping[str, Any]) -> list[Any]:
    """Return the turns of `history`, a list of pairs of texts."""
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowProblem("conversation-not-a-list", "`history` is no list of pairs; expected [[prompt, response], …]")
    return [turn for asked, said in history for turn in (*_as_turns("user", asked), *_as_turns("assistant", said))]


def _parse_turn(turn: Any, number: int) -> Message:
    """Read one turn; `number` is 1-based and only for messages to the reader."""
    if not isinstance(turn, Mapping):
        raise RowProblem("turn-not-an-object", f"turn {number} is {kind_of(turn)}; expected an object")
    named = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        shown = "missing" if named is None else repr(named)[:40]
        known = "system, user, assistant, tool or a ShareGPT name of them"
        raise RowProblem("unknown-role", f"turn {number}: the role is {shown}; expected {known}")
    extra = {key: item for key, item in turn.items() if key not in _TURN_KEYS and item is not None}
    supervised = extra.pop("weight", 1) != 0
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    speaks_otherwise = role == "assistant" and any(extra.get(key) for key in (*REASONING_KEYS, "tool_calls"))
    text = "" if content is None and speaks_otherwise else _parse_content(content, number)
    if role == "assistant" and not text.strip() and not speaks_otherwise:
        raise RowProblem("empty-assistant-turn", f"turn {number}: the assistant says nothing; expected text")
    return Message(role, text, extra, supervised or role != "assistant")


def _parse_content(content: Any, number: int) -> str:
    """Return the text of a str or of a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem("content-not-text", f"turn {number}: the content is {kind_of(content)}; expected text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else kind_of(part)
            raise RowProblem("content-not-text", f"turn {number}: a content part is {kind}; expected text")
        texts.append(text)
    return "".join(texts)


def kind_of(value: Any) -> str:
    """Name the JSON kind of a value."""
    kinds = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")

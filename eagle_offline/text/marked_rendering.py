"""Finds what one message decides of a rendering: replaced by a marker, it shows from where to where the text changes.

Knows messages and how to have them rendered; nothing of turns, tokens or Jinja.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from eagle_offline.text.conversations import REASONING_KEYS

Span = tuple[int, int]
Messages = Sequence[dict[str, Any]]

# Of a plane that no text uses.
MARKER = "\U0010fffc\U0010fffb"


class Render(Protocol):
    """Renders messages, with the generation prompt if asked to."""

    def __call__(self, messages: Messages, *, prompt: bool = False) -> str: ...


class Disagreement(Exception):
    """Two renderings that have no turn in common."""


def own_part(render: Render, messages: Messages, index: int, text: str, *, prompt: bool = False) -> Span:
    """Return from where to where the data of one message decides `text`, the rendering of `messages`.

    Raises:
        Disagreement: The message's data does not show.
    """
    changed = [*messages[:index], _marked(messages[index]), *messages[index + 1 :]]
    other = render(changed, prompt=prompt)
    start = common_prefix(text, other)
    same_end = common_prefix(text[start:][::-1], other[start:][::-1])
    if MARKER not in other[start : len(other) - same_end]:
        raise Disagreement
    return start, len(text) - same_end


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message that says a marker wherever it says something; one that says nothing says it as content."""
    changed = dict(message)
    for key in ("content", *REASONING_KEYS):
        if isinstance(message.get(key), str) and message[key].strip():
            changed[key] = MARKER
    if isinstance(calls := message.get("tool_calls"), list):
        changed["tool_calls"] = [_marked_call(call) for call in calls]
    return changed if changed != message else {**message, "content": MARKER}


def _marked_call(call: Any) -> Any:
    """Return a tool call with other arguments; its name may be looked up by what follows."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _marked_call(call["function"])}
    if "arguments" not in call:
        return call
    marked = {MARKER: MARKER}
    return {
        **call,
        "arguments": json.dumps(marked, ensure_ascii=False) if isinstance(call["arguments"], str) else marked,
    }


def common_prefix(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

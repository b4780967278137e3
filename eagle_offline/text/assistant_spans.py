"""Finds what the assistant produced in the rendering of a chat template that does not say so itself.

Each assistant turn lies between two renderings: the conversation before it with the generation prompt, and the
conversation up to it. Where both are prefixes of the whole rendering, the turn is what lies between. Many templates
render a turn otherwise once others follow: they leave out earlier reasoning, or end the last turn with another token.
There the turn is found by its own data: replaced by a marker, it shows from where to where the data decides the text.
What comes before is then compared with the prompt, and what comes after with the end of the conversation up to the
turn, and every difference that is not one of those refuses the template.

Knows messages and renderings; knows neither tokens nor Jinja.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from eagle_offline.errors import DataError
from eagle_offline.text.conversations import REASONING_KEYS

Span = tuple[int, int]
Messages = Sequence[dict[str, Any]]

EXCERPT_CHARACTERS = 24
# Of a plane that no text uses.
_MARKER = "\U0010fffc\U0010fffb"
_END_OF_REASONING = "</think>"


class Render(Protocol):
    """Renders messages, with the generation prompt if asked to."""

    def __call__(self, messages: Messages, *, prompt: bool = False) -> str: ...


class _Disagreement(Exception):
    """Two renderings that have no turn in common."""


@dataclass(frozen=True)
class SpanFinder:
    """Finds assistant turns by rendering.

    Attributes:
        render: The template.
        end_markers: Patterns of special tokens, those that end a turn most likely first.
        eos_token: What the tokenizer ends a generation with, if it says.
    """

    render: Render
    end_markers: tuple[re.Pattern[str], ...]
    eos_token: str | None

    def find(self, messages: Messages) -> tuple[str, list[Span]]:
        """Return the rendering and the span of each assistant turn, its end-of-turn token included.

        Raises:
            DataError: The template renders a turn so differently that its part of the whole cannot be told.
        """
        whole = self.render(messages)
        return whole, [
            self._turn(messages, index, whole)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _turn(self, messages: Messages, index: int, whole: str) -> Span:
        turn = _Turn(self.render, messages, index, whole)
        if whole.startswith(turn.before) and whole.startswith(turn.until) and len(turn.before) < len(turn.until):
            start, end = len(turn.before), len(turn.until)
            if not turn.generation_prompt:
                start = turn.skip_header(whole, start, end)
            return start, self._turn_end(whole, start, end, messages[index]["content"])
        try:
            return self._aligned(turn)
        except _Disagreement:
            part, where = (turn.until, "up to") if whole.startswith(turn.before) else (turn.before, "before")
            raise _refusal(part, whole, f"{where} turn {index + 1}") from None

    def _turn_end(self, text: str, start: int, end: int, content: str) -> int:
        """Return where the assistant stops: after the last special token that follows its content.

        Without such a token: after the last character that is not white space.
        """
        found = text.find(content.strip(), start, end)
        content_end = found + len(content.strip()) if found >= 0 else start
        return self._end_behind(text, content_end, end)

    def _end_behind(self, text: str, content_end: int, end: int) -> int:
        for specials in self.end_markers:
            ends = [match.end() for match in specials.finditer(text, content_end, end)]
            if ends:
                return ends[-1]
        return content_end + len(text[content_end:end].rstrip())

    # Turns that the whole rendering has otherwise than the conversation up to them

    def _aligned(self, turn: _Turn) -> Span:
        """Return the span of a turn by where its own data stands."""
        own, alone = turn.own_in_whole(), turn.own_in_until()
        said, said_alone = turn.whole[slice(*own)], turn.until[slice(*alone)]
        # Of what the turn says when it is the last one, only reasoning may be left out.
        if said != said_alone and not (said_alone.endswith(said) and turn.answer() in said):
            raise _Disagreement
        start, end = turn.start(own), self._aligned_end(turn, own, alone)
        if not start < end:
            raise _Disagreement
        return start, end

    def _aligned_end(self, turn: _Turn, own: Span, alone: Span) -> int:
        """Return where the turn ends: as it does when it is the last one, but for the token that ends it."""
        tail, last_tail = turn.whole[own[1] : turn.next_start()], turn.until[alone[1] :]
        if tail.startswith(last_tail):
            return self._end_behind(turn.whole, own[1], own[1] + len(last_tail))
        same = _common_prefix(tail, last_tail)
        token, last_token = self._token_at(tail, same), self._token_at(last_tail, same)
        same = min([same, *(match.start() for match in (token, last_token) if match is not None)])
        if last_tail[same:].strip() and (last_token is None or last_tail[last_token.end() :].strip()):
            raise _Disagreement
        # A special token behind the turn may begin the next one; one that ends the turn before does not.
        if token is not None and token.start() == same and token[0] in (self.eos_token, self._end_before(turn)):
            return own[1] + token.end()
        return own[1] + len(tail[:same].rstrip())

    def _end_before(self, turn: _Turn) -> str | None:
        """Return the special token that ends the message before the turn, if one does."""
        ended = turn.prompt_tail().removesuffix(turn.generation_prompt)
        found = (match for specials in self.end_markers for match in specials.finditer(ended))
        first = min(found, key=lambda match: match.start(), default=None)
        return None if first is None else first[0]

    def _token_at(self, text: str, place: int) -> re.Match[str] | None:
        """Return the first special token that ends behind `place`, if it begins there or before."""
        found = (match for specials in self.end_markers for match in specials.finditer(text) if match.end() > place)
        first = min(found, key=lambda match: match.start(), default=None)
        return first if first is not None and first.start() <= place else None


@dataclass
class _Turn:
    """One assistant turn of a conversation, and the renderings that it is looked for in.

    Attributes:
        render: The template.
        messages, index: The conversation, and which of it the turn is.
        whole: The conversation, rendered.
        before, until: What comes before the turn, with the generation prompt; the conversation up to the turn.
    """

    render: Render
    messages: Messages
    index: int
    whole: str

    def __post_init__(self) -> None:
        self.before = self.render(self.messages[: self.index], prompt=True)
        is_last = self.index + 1 == len(self.messages)
        self.until = self.whole if is_last else self.render(self.messages[: self.index + 1])

    @cached_property
    def generation_prompt(self) -> str:
        """Return what the prompt has behind the messages; all of it where these are rendered otherwise without."""
        return self.before.removeprefix(self.render(self.messages[: self.index]))

    def own_in_whole(self) -> Span:
        return _own_part(self.render, self.messages, self.index, self.whole)

    def own_in_until(self) -> Span:
        return _own_part(self.render, self.messages[: self.index + 1], self.index, self.until)

    def next_start(self) -> int:
        """Return where the next message's data begins in the whole."""
        if self.index + 1 == len(self.messages):
            return len(self.whole)
        try:
            return _own_part(self.render, self.messages, self.index + 1, self.whole)[0]
        except _Disagreement:
            return len(self.whole)

    def prompt_tail(self) -> str:
        """Return what follows the data of the message before the turn, the generation prompt included."""
        if self.index == 0:
            return self.before
        prompted = self.messages[: self.index]
        return self.before[_own_part(self.render, prompted, self.index - 1, self.before, prompt=True)[1] :]

    def start(self, own: Span) -> int:
        """Return where the assistant begins in the whole: behind all of the prompt that stands there."""
        anchor = 0 if self.index == 0 else _own_part(self.render, self.messages, self.index - 1, self.whole)[1]
        tail = self.prompt_tail()
        if self.whole.startswith(tail, anchor):
            start = anchor + len(tail)
            return start if self.generation_prompt else self.skip_header(self.whole, start, own[1])
        # The prompt supplies more than the turn shows, such as the begin of a reasoning that is left out.
        for start in (own[0], self.content_start()):
            shown = self.whole[anchor:start]
            if tail.startswith(shown) and len(shown) > len(tail) - len(self.generation_prompt):
                return start
        raise _Disagreement

    def content_start(self) -> int:
        """Return where the turn's content would stand in the whole, 0 if nowhere."""
        marked = self._saying_marker(self.messages)
        start = marked.find(_MARKER)
        return start if start > 0 and self.whole.startswith(marked[:start]) else 0

    def _saying_marker(self, messages: Messages) -> str:
        """Render messages with a marker as the turn's content."""
        message = {**messages[self.index], "content": _MARKER}
        return self.render([*messages[: self.index], message, *messages[self.index + 1 :]])

    def answer(self) -> str:
        """Return what has to be rendered of the turn's content wherever it stands."""
        return self.messages[self.index]["content"].rpartition(_END_OF_REASONING)[2].strip()

    def skip_header(self, text: str, start: int, end: int) -> int:
        """Return where the assistant's text begins under a template that ignores the generation prompt.

        There the role header, if any, comes after the prompt and has to be stepped over.
        """
        message = self.messages[self.index]
        said = [message["content"], *(message.get(key) for key in REASONING_KEYS)]
        texts = [part.strip() for part in said if isinstance(part, str) and part.strip()]
        if texts:
            places = [text.find(part, start, end) for part in texts]
        else:  # it calls tools only: where would it say something?
            marked = self._saying_marker(self.messages[: self.index + 1])
            places = [_common_prefix(marked, self.until) if _MARKER in marked else start]
        found = min((place for place in places if place >= start), default=start)
        return found if text[start:found].strip() else start


def _own_part(render: Render, messages: Messages, index: int, text: str, *, prompt: bool = False) -> Span:
    """Return from where to where the data of one message decides `text`, the rendering of `messages`.

    Raises:
        _Disagreement: The message's data does not show.
    """
    changed = [*messages[:index], _marked(messages[index]), *messages[index + 1 :]]
    other = render(changed, prompt=prompt)
    start = _common_prefix(text, other)
    same_end = _common_prefix(text[start:][::-1], other[start:][::-1])
    if _MARKER not in other[start : len(other) - same_end]:
        raise _Disagreement
    return start, len(text) - same_end


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message that says a marker wherever it says something; one that says nothing says it as content."""
    changed = dict(message)
    for key in ("content", *REASONING_KEYS):
        if isinstance(message.get(key), str) and message[key].strip():
            changed[key] = _MARKER
    if isinstance(calls := message.get("tool_calls"), list):
        changed["tool_calls"] = [_marked_call(call) for call in calls]
    return changed if changed != message else {**message, "content": _MARKER}


def _marked_call(call: Any) -> Any:
    """Return a tool call with other arguments; its name may be looked up by what follows."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _marked_call(call["function"])}
    if "arguments" not in call:
        return call
    marked = {_MARKER: _MARKER}
    return {
        **call,
        "arguments": json.dumps(marked, ensure_ascii=False) if isinstance(call["arguments"], str) else marked,
    }


def _common_prefix(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _refusal(part: str, whole: str, where: str) -> DataError:
    """Return the error that shows where a rendering of part of a conversation departs from the whole one."""
    same = _common_prefix(part, whole)
    shown = [text[max(0, same - EXCERPT_CHARACTERS) : same + EXCERPT_CHARACTERS] for text in (part, whole)]
    return DataError(
        f"chat template: rendered {where}, the conversation reads {shown[0]!r} where the whole one reads {shown[1]!r}, "
        "so the assistant's tokens cannot be told; pass a template with {% generation %} tags: `--chat-template FILE`"
    )

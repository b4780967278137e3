"""Finds what the assistant produced in the rendering of a chat template that does not say so itself.

Each assistant turn lies between two renderings: the conversation before it with the generation prompt, and the
conversation up to it. Where both are prefixes of the whole rendering, the turn is what lies between. Many templates
render a turn otherwise once others follow: they leave out earlier reasoning, or end the last turn with another token.
There the turn is found by its own data: replaced by a marker, it shows from where to where the data decides the text.
What comes before is then compared with the prompt, and what comes after with the end of the conversation up to the
turn, and every difference that is not one of those leaves the conversation out.

Knows messages and renderings; knows neither tokens nor Jinja.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from eagle_offline.text.conversations import REASONING_KEYS, RowProblem
from eagle_offline.text.marked_rendering import MARKER, Disagreement, Messages, Render, Span, common_prefix, own_part

# Reason code of a row whose rendering does not say what the assistant produced.
TEMPLATE_DISAGREES = "template-disagrees"

EXCERPT_CHARACTERS = 24
_END_OF_REASONING = "</think>"


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
            RowProblem: `template-disagrees`: a turn is rendered so differently that its part of the whole cannot be
                told.
        """
        whole = self.render(messages)
        return whole, [
            self._turn(messages, index, whole)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _turn(self, messages: Messages, index: int, whole: str) -> Span:
        try:
            turn = _Turn(self.render, messages, index, whole, self.end_markers)
        except Disagreement:
            raise _refusal("", whole, f"before turn {index + 1}") from None
        if whole.startswith(turn.before) and whole.startswith(turn.until) and len(turn.before) < len(turn.until):
            start, end = len(turn.before), len(turn.until)
            if not turn.generation_prompt:
                start = turn.skip_header(whole, start, end)
            return start, self._turn_end(whole, start, end, messages[index]["content"])
        try:
            return self._aligned(turn)
        except Disagreement:
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
            raise Disagreement
        start, end = turn.start(own), self._aligned_end(turn, own, alone)
        if not start < end:
            raise Disagreement
        return start, end

    def _aligned_end(self, turn: _Turn, own: Span, alone: Span) -> int:
        """Return where the turn ends: as it does when it is the last one, but for the token that ends it."""
        tail, last_tail = turn.whole[own[1] : turn.next_start()], turn.until[alone[1] :]
        if tail.startswith(last_tail):
            return self._end_behind(turn.whole, own[1], own[1] + len(last_tail))
        same = common_prefix(tail, last_tail)
        token, last_token = turn.token_at(tail, same), turn.token_at(last_tail, same)
        same = min([same, *(match.start() for match in (token, last_token) if match is not None)])
        if last_tail[same:].strip() and (last_token is None or last_tail[last_token.end() :].strip()):
            raise Disagreement
        # A special token behind the turn may begin the next one; one that ends the turn before does not.
        if token is not None and token.start() == same and token[0] in (self.eos_token, turn.end_before()):
            return own[1] + token.end()
        return own[1] + len(tail[:same].rstrip())


@dataclass
class _Turn:
    """One assistant turn of a conversation, and the renderings that it is looked for in.

    Attributes:
        render: The template.
        messages, index: The conversation, and which of it the turn is.
        whole: The conversation, rendered.
        end_markers: As in `SpanFinder`.
        before, until: What comes before the turn, with the generation prompt; the conversation up to the turn.
    """

    render: Render
    messages: Messages
    index: int
    whole: str
    end_markers: tuple[re.Pattern[str], ...]

    def __post_init__(self) -> None:
        self.before, self.generation_prompt = self._prompted()
        is_last = self.index + 1 == len(self.messages)
        self.until = self.whole if is_last else self.render(self.messages[: self.index + 1])

    def _prompted(self) -> tuple[str, str]:
        """Return what comes before the turn, and what of it is the generation prompt.

        The prompt is all of it where the messages are rendered otherwise without. Before the first message there may
        be nothing that the template renders alone; then the prompt stands behind the whole, and begins it.
        """
        before_turn = self.messages[: self.index]
        try:
            before = self.render(before_turn, prompt=True)
            return before, before.removeprefix(self.render(before_turn))
        except RowProblem:
            if before_turn:
                raise
        prompted, header = self.render(self.messages, prompt=True), self.whole[: self.own_in_whole()[0]]
        if not prompted.startswith(self.whole):
            raise Disagreement
        prompt = prompted.removeprefix(self.whole)
        if prompt in header:
            return header[: header.rindex(prompt) + len(prompt)], prompt
        # It supplies more than the turn shows, such as the begin of a reasoning that is left out.
        shown = next((size for size in range(len(prompt), 0, -1) if header.endswith(prompt[:size])), 0)
        if not shown:
            raise Disagreement
        return header[:-shown] + prompt, prompt

    def token_at(self, text: str, place: int) -> re.Match[str] | None:
        """Return the first special token that ends behind `place`, if it begins there or before."""
        found = (match for specials in self.end_markers for match in specials.finditer(text) if match.end() > place)
        first = min(found, key=lambda match: match.start(), default=None)
        return first if first is not None and first.start() <= place else None

    def end_before(self) -> str | None:
        """Return the special token that ends the last message before the turn that is not the assistant's, if any."""
        if self.index and self.messages[self.index - 1]["role"] == "assistant":
            return _Turn(self.render, self.messages, self.index - 1, self.whole, self.end_markers).end_before()
        ended = self.prompt_tail().removesuffix(self.generation_prompt)
        found = sorted((match.start(), match[0]) for specials in self.end_markers for match in specials.finditer(ended))
        # Before the first message there is a text of the template's own, which its last token ends.
        return found[0 if self.index else -1][1] if found else None

    def own_in_whole(self) -> Span:
        return own_part(self.render, self.messages, self.index, self.whole)

    def own_in_until(self) -> Span:
        return own_part(self.render, self.messages[: self.index + 1], self.index, self.until)

    def next_start(self) -> int:
        """Return where the next message's data begins in the whole."""
        if self.index + 1 == len(self.messages):
            return len(self.whole)
        try:
            return own_part(self.render, self.messages, self.index + 1, self.whole)[0]
        except Disagreement:
            return len(self.whole)

    def prompt_tail(self) -> str:
        """Return what follows the data of the message before the turn, the generation prompt included."""
        if self.index == 0:
            return self.before
        prompted = self.messages[: self.index]
        return self.before[own_part(self.render, prompted, self.index - 1, self.before, prompt=True)[1] :]

    def start(self, own: Span) -> int:
        """Return where the assistant begins in the whole: behind all of the prompt that stands there."""
        anchor = 0 if self.index == 0 else own_part(self.render, self.messages, self.index - 1, self.whole)[1]
        tail = self._ended_as_in_whole(self.prompt_tail(), self.whole[anchor:])
        if self.whole.startswith(tail, anchor):
            start = anchor + len(tail)
            return start if self.generation_prompt else self.skip_header(self.whole, start, own[1])
        # The prompt supplies more than the turn shows, such as the begin of a reasoning that is left out.
        for start in (own[0], self.content_start()):
            shown = self.whole[anchor:start]
            if tail.startswith(shown) and len(shown) > len(tail) - len(self.generation_prompt):
                return start
        raise Disagreement

    def _ended_as_in_whole(self, tail: str, tail_in_whole: str) -> str:
        """Return the tail of the prompt with the token that ends the assistant's turn before, if there is one.

        Where it ends the conversation it may be another one.
        """
        if self.index == 0 or self.messages[self.index - 1]["role"] != "assistant":
            return tail
        same = common_prefix(tail, tail_in_whole)
        token, inner = self.token_at(tail, same), self.token_at(tail_in_whole, same)
        if token is None or inner is None or token.start() != inner.start():
            return tail
        return tail[: token.start()] + inner[0] + tail[token.end() :]

    def content_start(self) -> int:
        """Return where the turn's content would stand in the whole, 0 if nowhere."""
        marked = self._saying_marker(self.messages)
        start = marked.find(MARKER)
        return start if start > 0 and self.whole.startswith(marked[:start]) else 0

    def _saying_marker(self, messages: Messages) -> str:
        """Render messages with a marker as the turn's content."""
        message = {**messages[self.index], "content": MARKER}
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
            places = [common_prefix(marked, self.until) if MARKER in marked else start]
        found = min((place for place in places if place >= start), default=start)
        return found if text[start:found].strip() else start


def _refusal(part: str, whole: str, where: str) -> RowProblem:
    """Return the problem that shows where a rendering of part of a conversation departs from the whole one."""
    same = common_prefix(part, whole)
    shown = [text[max(0, same - EXCERPT_CHARACTERS) : same + EXCERPT_CHARACTERS] for text in (part, whole)]
    return RowProblem(
        TEMPLATE_DISAGREES,
        f"chat template: rendered {where}, the conversation reads {shown[0]!r} where the whole one reads {shown[1]!r}, "
        "so the assistant's tokens cannot be told; pass a template with {% generation %} tags: `--chat-template FILE`",
    )

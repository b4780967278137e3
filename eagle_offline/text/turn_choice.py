"""Chooses which of the assistant's turns are supervised, and notes what of them a template does not show.

Knows turns and the spans of a rendering; knows neither Jinja nor tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from eagle_offline.text.conversations import REASONING_KEYS, Message, RowProblem
from eagle_offline.text.marked_rendering import Span

REASONING_NOT_RENDERED = "reasoning-not-rendered"
TOOL_CALLS_NOT_RENDERED = "tool-calls-not-rendered"
_THINK, _END_OF_THINK = "<think>", "</think>"


def choose_turns(
    conversation: Sequence[Message], text: str, spans: Sequence[Span], end_markers: Sequence[re.Pattern[str]]
) -> tuple[list[Span], tuple[str, ...]]:
    """Return the spans to supervise, and notes about the row.

    A turn that the row does not want supervised is not, and neither is one of which nothing but special tokens is
    rendered because its tool calls are not.

    Args:
        conversation: The turns.
        text: Their rendering.
        spans: Where the assistant speaks, in order; tags of a template may give more or fewer than one a turn.
        end_markers: Patterns of the tokens that may end a turn.

    Raises:
        RowProblem: `nothing-rendered`: there is no other turn than such; `unwanted-turn`: which span is the one that is
            not to be supervised is not known.
    """
    turns = [message for message in conversation if message.role == "assistant"]
    if len(spans) != len(turns):
        if not all(turn.supervised for turn in turns):
            detail = f"{len(turns)} assistant turns have {len(spans)} {{% generation %}} parts; expected one each"
            raise RowProblem("unwanted-turn", f"a turn has weight 0, and the template's {detail}")
        said = [text] * len(turns)
    else:
        said = [text[slice(*span)] for span in spans]
    lost_calls = [any(name not in part for name in _called(turn)) for turn, part in zip(turns, said, strict=True)]
    found = {
        REASONING_NOT_RENDERED: any(reasoning not in text for turn in turns for reasoning in _reasonings(turn)),
        TOOL_CALLS_NOT_RENDERED: any(lost_calls),
    }
    notes = tuple(name for name, holds in found.items() if holds)
    if len(spans) != len(turns):
        return list(spans), notes
    empty = [lost and _is_bare(part, end_markers) for lost, part in zip(lost_calls, said, strict=True)]
    chosen = [span for span, turn, nothing in zip(spans, turns, empty, strict=True) if turn.supervised and not nothing]
    if not chosen and any(empty):
        raise RowProblem("nothing-rendered", "the assistant only calls tools, and the chat template renders no call")
    return chosen, notes


def _called(turn: Message) -> Iterator[str]:
    """Yield the name of every function that a turn calls."""
    calls = turn.extra.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            function = call["function"] if isinstance(call.get("function"), dict) else call
            if isinstance(name := function.get("name"), str):
                yield name


def _reasonings(turn: Message) -> Iterator[str]:
    """Yield what a turn reasons, in fields of its own or in its text."""
    fields = (turn.extra.get(key) for key in REASONING_KEYS)
    in_text = turn.content.rpartition(_END_OF_THINK)[0].rpartition(_THINK)[2]
    for reasoning in (*fields, in_text):
        if isinstance(reasoning, str) and reasoning.strip():
            yield reasoning.strip()


def _is_bare(part: str, end_markers: Sequence[re.Pattern[str]]) -> bool:
    """Say whether a turn's rendering is special tokens and white space."""
    for markers in end_markers:
        part = markers.sub("", part)
    return not part.strip()

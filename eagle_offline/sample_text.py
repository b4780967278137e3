"""A stretch of a sample as text, its supervised tokens marked; nothing in it acts on a terminal.

Where the sample comes from, a cache or chat data, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from eagle_offline.errors import printable
from eagle_offline.inspection_record import Example, SampleFacts

_MAX_LINE = 1000

_MARKS = ("[[", "]]")
_COLOURS = ("\x1b[1;32m", "\x1b[0m")

# Where supervision begins far behind the start of a sample, it is shown from a few tokens before.
_TOKENS_BEFORE = 16


class Room(NamedTuple):
    """How much of a sample is shown at most."""

    tokens: int
    characters: int
    lines: int


BRIEF = Room(tokens=256, characters=600, lines=60)
AMPLE = Room(tokens=1024, characters=4000, lines=120)


def first_shown(loss_mask: Sequence[int], room: Room = BRIEF) -> int:
    """Return where to begin so that supervised tokens are seen."""
    first_supervised = next((index for index, supervised in enumerate(loss_mask) if supervised), 0)
    return 0 if first_supervised < room.tokens // 4 else first_supervised - _TOKENS_BEFORE


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str], is_known: Callable[[int], bool]) -> list[str]:
    """Return what each token adds to the text; a character cut in two belongs to the token that completes it.

    Args:
        ids: the tokens.
        decode: returns their text, that of special tokens included.
        is_known: says whether the tokenizer has a token.
    """
    pieces: list[str] = []
    known: list[int] = []
    text = longer = ""
    for token in ids:
        if not is_known(token):
            pieces.append(f"<{token}>")
            continue
        known.append(token)
        longer = decode(known)
        if longer.endswith("\ufffd"):
            pieces.append("")
        else:
            pieces.append(longer[len(text) :])
            text = longer
    if len(longer) > len(text):  # the last character is cut in two by the end of the stretch
        pieces[-1] += longer[len(text) :]
    return pieces


def as_line(text: str) -> str:
    """Return text as one line that a terminal only shows, no longer than a line may be."""
    return printable(text if len(text) <= _MAX_LINE else text[:_MAX_LINE] + "…")


def sample_size(sample: SampleFacts) -> str:
    """Return a sample's number, and how many of its tokens are supervised."""
    return f"sample {sample.index} ({sample.num_supervised:,} of {sample.num_tokens:,} tokens)"


def sample_heading(example: Example) -> str:
    """Return which sample it is and where it stands in the input."""
    where = "" if example.file is None else f", {example.file} row {example.row}"
    return as_line(f"{sample_size(example.sample)}{where}")


def sample_lines(example: Example, *, colour: bool, room: Room = BRIEF) -> list[str]:
    """Return a sample's text, its supervised tokens marked, and what of it is not shown."""
    marked = "in colour" if colour else f"in {' '.join(_MARKS)}"
    lines = [f"{sample_heading(example)}; supervised tokens {marked}"]
    if example.problem is not None:
        lines.append(as_line(f"  not as text: {example.problem}"))
    if example.first_token:
        lines.append(f"  … {example.first_token:,} tokens before")
    pieces = shown_pieces(example, room)
    lines += [f"  | {line}" for line in _marked(pieces, example.loss_mask, colour).split("\n")] if pieces else []
    if after := example.sample.num_tokens - example.first_token - len(pieces):
        lines.append(f"  … {after:,} tokens after")
    return lines


def shown_pieces(example: Example, room: Room) -> list[str]:
    """Return what is shown of each token, its line breaks left in, of as many as there is room for."""
    tokens = [f"{token} " for token in example.token_ids] if example.tokens is None else example.tokens
    pieces: list[str] = []
    characters, num_lines = 0, 1
    for token in tokens:
        piece = "\n".join(map(as_line, token.split("\n")))
        characters, num_lines = characters + len(piece), num_lines + piece.count("\n")
        if characters > room.characters or num_lines > room.lines:
            break
        pieces.append(piece)
    return pieces


def _marked(pieces: list[str], loss_mask: list[int], colour: bool) -> str:
    """Return the pieces as one text with the supervised runs between marks; colour ends and begins with each line."""
    begin, end = _COLOURS if colour else _MARKS
    between = f"{end}\n{begin}" if colour else "\n"
    marked = ""
    for supervised, run in groupby(zip(pieces, loss_mask, strict=False), key=lambda item: bool(item[1])):
        text = "".join(piece for piece, _ in run)
        marked += begin + text.replace("\n", between) + end if supervised else text
    return marked

"""One sample of a cache as text, decoded by the tokenizer that lies in the cache; transformers is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eagle_offline.cache.index import SampleIndex
from eagle_offline.cache.layout import TARGET_DIRECTORY, TOKENS_DIRECTORY
from eagle_offline.errors import one_line
from eagle_offline.inspection_record import Example, SampleFacts
from eagle_offline.inspection_rows import TableRow, file_size, read_row
from eagle_offline.text.token_table import TOKENS_FILE, TokenTableMeta

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = f"{TARGET_DIRECTORY}/tokenizer.json"

# The first sample of a length in between is shown: long enough to have turns, short enough to be seen whole.
_MODERATE_TOKENS = (32, 512)
_SHOWN_TOKENS = 256

# Of a sample whose supervision begins far behind its start, what is shown begins this many tokens before it.
_TOKENS_BEFORE = 16

# Ten times the largest tokenizer of today.
_MAX_TOKENIZER_BYTES = 512 << 20


def sample_facts(index: SampleIndex, number: int) -> SampleFacts:
    """Return what the index says of a sample."""
    return SampleFacts(
        index=number,
        sample_id=int(index.sample_id[number]),
        num_tokens=int(index.num_tokens[number]),
        num_supervised=int(index.num_supervised[number]),
    )


def choose_sample(index: SampleIndex) -> int | None:
    """Return the first sample of moderate length with a supervised token, else the first; None when there is none."""
    low, high = _MODERATE_TOKENS
    moderate = (index.num_tokens >= low) & (index.num_tokens <= high) & (index.num_supervised > 0)
    return int(moderate.argmax()) if len(index) else None


def read_example(path: Path, index: SampleIndex, number: int, meta: TokenTableMeta | None) -> Example:
    """Return a stretch of a sample, by the token table that lies in the cache."""
    facts = sample_facts(index, number)
    found = read_row(path, meta, facts.sample_id)
    sizes = None if found is None else (len(found.input_ids), sum(found.loss_mask))
    if found is None or sizes != (facts.num_tokens, facts.num_supervised):
        what = "cannot be read" if found is None else "holds another sample in its place"
        nothing = TableRow(None, None, [], [])
        return _example(facts, nothing, 0, tokens=None, problem=f"{TOKENS_DIRECTORY}/{TOKENS_FILE} {what}")
    first = _first_shown(found.loss_mask)
    tokens, problem = _decoded(path / TOKENIZER_FILE, found.input_ids[first : first + _SHOWN_TOKENS])
    return _example(facts, found, first, tokens=tokens, problem=problem)


def _example(
    facts: SampleFacts, found: TableRow, first: int, *, tokens: list[str] | None, problem: str | None
) -> Example:
    return Example(
        sample=facts,
        file=found.file,
        row=found.row,
        first_token=first,
        token_ids=found.input_ids[first : first + _SHOWN_TOKENS],
        loss_mask=found.loss_mask[first : first + _SHOWN_TOKENS],
        tokens=tokens,
        problem=problem,
    )


def _first_shown(loss_mask: list[int]) -> int:
    """Return where to begin so that supervised tokens are seen."""
    first_supervised = loss_mask.index(1) if 1 in loss_mask else 0
    return 0 if first_supervised < _SHOWN_TOKENS // 4 else first_supervised - _TOKENS_BEFORE


def _decoded(file: Path, ids: list[int]) -> tuple[list[str] | None, str | None]:
    """Return the text of each token, or why there is none."""
    size = file_size(file)
    if size is None:
        return None, f"{TOKENIZER_FILE} is missing"
    if size > _MAX_TOKENIZER_BYTES:
        return None, f"{TOKENIZER_FILE} has {size} bytes, expected at most {_MAX_TOKENIZER_BYTES}"
    try:
        from tokenizers import Tokenizer

        return _pieces(Tokenizer.from_file(str(file)), ids), None
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are not even that
        return None, f"{TOKENIZER_FILE} cannot be used: {one_line(error)}"


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; a character cut in two belongs to the token that completes it."""
    pieces: list[str] = []
    known: list[int] = []
    text = longer = ""
    for token in ids:
        if token < 0 or tokenizer.id_to_token(token) is None:
            pieces.append(f"<{token}>")
            continue
        known.append(token)
        longer = tokenizer.decode(known, skip_special_tokens=False)
        if longer.endswith("\ufffd"):
            pieces.append("")
        else:
            pieces.append(longer[len(text) :])
            text = longer
    if len(longer) > len(text):  # the last character is cut in two by the end of the stretch
        pieces[-1] += longer[len(text) :]
    return pieces

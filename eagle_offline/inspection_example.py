"""One sample of a cache as text, decoded by the tokenizer that lies in the cache; transformers is not needed."""

from __future__ import annotations

from pathlib import Path

from eagle_offline.cache.index import SampleIndex
from eagle_offline.cache.layout import TARGET_DIRECTORY, TOKENS_DIRECTORY
from eagle_offline.errors import one_line
from eagle_offline.inspection_record import Example, SampleFacts
from eagle_offline.inspection_rows import TableRow, file_size, read_row
from eagle_offline.sample_text import BRIEF, first_shown, token_texts
from eagle_offline.text.token_table import TOKENS_FILE, TokenTableMeta

TOKENIZER_FILE = f"{TARGET_DIRECTORY}/tokenizer.json"

# The first sample of a length in between is shown: long enough to have turns, short enough to be seen whole.
_MODERATE_TOKENS = (32, 512)

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
    first = first_shown(found.loss_mask)
    tokens, problem = _decoded(path / TOKENIZER_FILE, found.input_ids[first : first + BRIEF.tokens])
    return _example(facts, found, first, tokens=tokens, problem=problem)


def _example(
    facts: SampleFacts, found: TableRow, first: int, *, tokens: list[str] | None, problem: str | None
) -> Example:
    return Example(
        sample=facts,
        file=found.file,
        row=found.row,
        first_token=first,
        token_ids=found.input_ids[first : first + BRIEF.tokens],
        loss_mask=found.loss_mask[first : first + BRIEF.tokens],
        tokens=tokens,
        problem=problem,
    )


def _decoded(file: Path, ids: list[int]) -> tuple[list[str] | None, str | None]:
    """Return the text of each token, or why there is none."""
    size = file_size(file)
    if size is None:
        return None, f"{TOKENIZER_FILE} is missing"
    if size > _MAX_TOKENIZER_BYTES:
        return None, f"{TOKENIZER_FILE} has {size} bytes, expected at most {_MAX_TOKENIZER_BYTES}"
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return token_texts(
            ids,
            lambda known: tokenizer.decode(known, skip_special_tokens=False),
            lambda token: token >= 0 and tokenizer.id_to_token(token) is not None,
        ), None
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are not even that
        return None, f"{TOKENIZER_FILE} cannot be used: {one_line(error)}"

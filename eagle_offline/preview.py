"""Looks at chat data the way capture will read it: what becomes of its rows, and a few of them as text.

Knows sources, rows and tokens; loads no weights and writes nothing.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from eagle_offline.cache.layout import Frozen
from eagle_offline.inspection_record import Example, LeftOut, SampleFacts
from eagle_offline.sample_text import AMPLE, first_shown, token_texts
from eagle_offline.text.row_encoding import encode_row
from eagle_offline.text.rows import Source, iter_rows
from eagle_offline.text.templates import ChatTemplate
from eagle_offline.text.token_table import QUARANTINE_FILE, SourceRecord, TokenTable
from eagle_offline.text.token_writer import UNTOLD_REASONS, LeftOutRow, nothing_usable, template_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SourcePreview(Frozen):
    """What became of the rows of one source that were looked at.

    Attributes:
        name, split: of the source.
        rows: looked at; whole: these are all of it.
        taken, shortened: of these, how many become samples, and how many are cut to the sequence length.
        left_out: how many are left out for which reason; examples: one a reason.
        tokens, supervised_tokens, shortest, longest: of the samples, in tokens.
    """

    name: str
    split: str | None
    rows: int
    whole: bool
    taken: int
    shortened: int | None
    left_out: dict[str, int]
    examples: list[LeftOut]
    tokens: int
    supervised_tokens: int
    shortest: int
    longest: int


class Preview(Frozen):
    """What a look at chat data found.

    Attributes:
        target: whose tokenizer; seq_length: of the samples.
        sources: those looked at, in order; sources_not_read: how many more there are.
        notes: how many of the rows taken have something that the template does not render.
        samples: some of the samples.
    """

    target: str
    seq_length: int
    sources: list[SourcePreview]
    sources_not_read: int
    notes: dict[str, int]
    samples: list[Example]

    @property
    def whole(self) -> bool:
        """Whether all rows of all sources were looked at."""
        return self.sources_not_read == 0 and all(source.whole for source in self.sources)

    @property
    def taken(self) -> int:
        """Return how many of the rows become samples."""
        return sum(source.taken for source in self.sources)

    @property
    def problem(self) -> str | None:
        """Return why capture would refuse these rows, in one line; None if it would not."""
        reasons: Counter[str] = Counter()
        for source in self.sources:
            reasons.update(source.left_out)
        examples = [LeftOutRow(**item.model_dump()) for source in self.sources for item in source.examples]
        if not self.taken:
            return nothing_usable(
                ", ".join(source.name for source in self.sources), reasons, next(iter(examples), None)
            )
        untold = (example for example in examples if example.reason in UNTOLD_REASONS)
        return template_problem(self.taken, reasons, next(untold, None))


@dataclass
class _Found:
    """Counts the rows of one source."""

    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, LeftOut] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    supervised_tokens: int = 0
    shortened: int | None = 0

    def leave_out(self, row: LeftOutRow) -> None:
        self.left_out[row.reason] += 1
        self.examples.setdefault(row.reason, LeftOut(**asdict(row)))

    def of(self, source: Source | SourceRecord, *, whole: bool) -> SourcePreview:
        return SourcePreview(
            name=source.name,
            split=source.split,
            rows=len(self.lengths) + self.left_out.total(),
            whole=whole,
            taken=len(self.lengths),
            shortened=self.shortened,
            left_out=dict(self.left_out.most_common()),
            examples=list(self.examples.values()),
            tokens=sum(self.lengths),
            supervised_tokens=self.supervised_tokens,
            shortest=min(self.lengths, default=0),
            longest=max(self.lengths, default=0),
        )


def preview_rows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    target: str,
    seq_length: int,
    num_rows: int,
    num_samples: int,
    seed: int,
) -> Preview:
    """Encode the first rows of each source and return what became of them.

    Args:
        sources: in order.
        tokenizer: with its chat template.
        target: what it is called.
        seq_length: of the samples.
        num_rows: how many rows are read in all, as many of each source.
        num_samples: how many of the samples are shown, chosen by ``seed``.

    Raises:
        DataError: a file that cannot be read.
    """
    template = ChatTemplate(tokenizer)
    share = max(1, num_rows // len(sources))
    read = sources[:num_rows]
    found, samples = [], []
    notes: Counter[str] = Counter()
    for source in read:
        counted = _Found()
        rows = iter_rows(source)
        for row in itertools.islice(rows, share):
            outcome = encode_row(row, template, seq_length)
            if isinstance(outcome, LeftOutRow):
                counted.leave_out(outcome)
                continue
            counted.lengths.append(len(outcome.input_ids))
            counted.supervised_tokens += int(outcome.loss_mask.sum())
            notes.update(outcome.notes)
            counted.shortened = (counted.shortened or 0) + outcome.truncated
            samples.append((source.name, outcome.row_number, outcome.input_ids, outcome.loss_mask))
        found.append(counted.of(source, whole=next(rows, None) is None))
    shown = _chosen(len(samples), num_samples, seed)
    return Preview(
        target=target,
        seq_length=seq_length,
        sources=found,
        sources_not_read=len(sources) - len(read),
        notes=dict(sorted(notes.items())),
        samples=[_example(tokenizer, number, *samples[number]) for number in shown],
    )


def preview_table(
    table: TokenTable, tokenizer: PreTrainedTokenizerBase, *, target: str, num_samples: int, seed: int
) -> Preview:
    """Return what became of every row of a corpus that is tokenised."""
    sources = table.meta.sources
    found = [_Found(shortened=None) for _ in sources]
    rows = []
    for index in range(len(table)):
        row = table[index]
        found[row.source].lengths.append(len(row.input_ids))
        found[row.source].supervised_tokens += int(row.loss_mask.sum())
        rows.append(row)
    by_name = {source.name: number for number, source in enumerate(sources)}
    with (table.directory / QUARANTINE_FILE).open("rb") as lines:
        for line in lines:
            left_out = LeftOutRow(**json.loads(line))
            found[by_name[left_out.file]].leave_out(left_out)
    shown = _chosen(len(table), num_samples, seed)
    return Preview(
        target=target,
        seq_length=table.meta.seq_length,
        sources=[counted.of(source, whole=True) for counted, source in zip(found, sources, strict=True)],
        sources_not_read=0,
        notes=table.meta.notes,
        samples=[
            _example(tokenizer, number, sources[table[number].source].name, table[number].row, *table[number][:2])
            for number in shown
        ],
    )


def _chosen(count: int, wanted: int, seed: int) -> list[int]:
    """Return which of ``count`` samples are shown, in order."""
    return sorted(random.Random(seed).sample(range(count), min(wanted, count)))


def _example(
    tokenizer: PreTrainedTokenizerBase, number: int, file: str, row: int, input_ids: np.ndarray, loss_mask: np.ndarray
) -> Example:
    """Return a stretch of a sample as text."""
    first = first_shown(loss_mask.tolist(), AMPLE)
    ids = input_ids[first : first + AMPLE.tokens].tolist()
    return Example(
        sample=SampleFacts(
            index=number, sample_id=number, num_tokens=len(input_ids), num_supervised=int(loss_mask.sum())
        ),
        file=file,
        row=row,
        first_token=first,
        token_ids=ids,
        loss_mask=loss_mask[first : first + AMPLE.tokens].tolist(),
        tokens=token_texts(ids, _decoder(tokenizer), lambda token: tokenizer.convert_ids_to_tokens(token) is not None),
        problem=None,
    )


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode

"""A look at chat data as a page, for a terminal or a browser; what the data says acts on neither."""

from __future__ import annotations

import html
from itertools import groupby
from pathlib import Path

from eagle_offline.inspection_record import Example
from eagle_offline.pages import Row, html_facts, html_table, text_facts, text_table, write_page
from eagle_offline.preview import Preview, SourcePreview
from eagle_offline.sample_text import AMPLE, as_line, sample_heading, sample_lines, shown_pieces

_MAX_SOURCES = 20
_HEAD = ("rows of each input", "looked at", "taken", "left out", "tokens", "supervised", "lengths")
_MARK = "background: #c8f0c8"


def render_text(preview: Preview, *, colour: bool) -> str:
    """Return the page for a terminal.

    Args:
        preview: what was found.
        colour: show supervised tokens in colour; else in marks.
    """
    sections = [
        text_facts(_facts(preview)),
        [line for row in _source_rows(preview) for line in _table_lines(row)],
        _left_out(preview),
    ]
    page = "\n\n".join("\n".join(map(as_line, section)) for section in sections if section)
    return "\n\n".join(
        [page, *("\n".join(sample_lines(sample, colour=colour, room=AMPLE)) for sample in preview.samples)]
    )


def write_html(preview: Preview, path: Path) -> None:
    """Write the page for a browser."""
    left_out = "".join(f"<li>{html.escape(as_line(line.strip()))}</li>" for line in _left_out(preview))
    sections = [
        ("Rows", html_facts(_facts(preview)) + html_table([_HEAD, *map(_source_row, preview.sources[:_MAX_SOURCES])])),
        ("Left out", f"<ul>{left_out}</ul>" if left_out else "<p>No row.</p>"),
        *((sample_heading(sample), _html_sample(sample)) for sample in preview.samples),
    ]
    write_page(path, f"preview for {preview.target}", sections)


def _facts(preview: Preview) -> list[Row]:
    tokens = sum(source.tokens for source in preview.sources)
    supervised = sum(source.supervised_tokens for source in preview.sources)
    rows = sum(source.rows for source in preview.sources)
    seen = f"{rows:,}, all there are" if preview.whole else f"{rows:,}, the first of each input; --num-rows for more"
    if preview.sources_not_read:
        seen += f"; {preview.sources_not_read:,} more files were not opened"
    facts: list[Row] = [
        ("target", preview.target),
        ("rows looked at", seen),
        ("samples", f"{preview.taken:,} of at most {preview.seq_length:,} tokens"),
    ]
    if tokens:
        mean = tokens / preview.taken
        facts.append(("tokens", f"{tokens:,}, {mean:,.1f} a sample, {supervised / tokens:.1%} of them supervised"))
    facts += [(note.replace("-", " "), f"of {count:,} samples") for note, count in preview.notes.items()]
    shortened = [source.shortened for source in preview.sources if source.shortened]
    if shortened:
        facts.append(("shortened", f"{sum(shortened):,} samples, to {preview.seq_length:,} tokens"))
    return facts


def _source_rows(preview: Preview) -> list[Row]:
    more = len(preview.sources) - _MAX_SOURCES
    rows = [_HEAD, *map(_source_row, preview.sources[:_MAX_SOURCES])]
    return [*rows, *([(f"and {more} more",)] if more > 0 else [])]


def _table_lines(row: Row) -> list[str]:
    """Return a row of the table; a name that is too long for its column has a line of its own."""
    (line,) = text_table([row])
    (name,) = text_table([row[:1]])
    return [row[0], *text_table([("", *row[1:])])] if len(row) > 1 and not name.endswith(" ") else [line]


def _source_row(source: SourcePreview) -> Row:
    share = f"{source.supervised_tokens / source.tokens:.1%}" if source.tokens else "-"
    return (
        as_line(source.name + (f":{source.split}" if source.split else "")),
        f"{source.rows:,}" + ("" if source.whole else " +"),
        f"{source.taken:,}",
        f"{source.rows - source.taken:,}",
        f"{source.tokens:,}",
        share,
        f"{source.shortest}–{source.longest}",
    )


def _left_out(preview: Preview) -> list[str]:
    lines = []
    for source in preview.sources[:_MAX_SOURCES]:
        first = {example.reason: example for example in reversed(source.examples)}
        for reason, count in source.left_out.items():
            example = first[reason]
            lines.append(f"  {count:>6,}  {reason}, such as {example.file} row {example.row}: {example.detail}")
    return ["left out, and why", *lines] if lines else []


def _html_sample(sample: Example) -> str:
    """Return a sample's text with its supervised tokens marked."""
    text = f"… {sample.first_token:,} tokens before\n" if sample.first_token else ""
    pieces = shown_pieces(sample, AMPLE)
    for supervised, run in groupby(zip(pieces, sample.loss_mask, strict=False), key=lambda item: bool(item[1])):
        said = html.escape("".join(piece for piece, _ in run))
        text += f'<mark style="{_MARK}">{said}</mark>' if supervised else said
    after = sample.sample.num_tokens - sample.first_token - len(pieces)
    text += f"\n… {after:,} tokens after" if after else ""
    return f'<pre style="white-space: pre-wrap">{text}</pre>'

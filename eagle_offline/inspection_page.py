"""An inspection as a page to read on a terminal; what a stranger's cache says never reaches it unescaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eagle_offline.cache.manifest import Conversion, ImportedStates
from eagle_offline.inspection_record import Inspection, LeftOut
from eagle_offline.pages import Row, text_facts, text_table
from eagle_offline.sample_text import as_line, sample_lines, sample_size

_BAR_WIDTH = 40
_MAX_LISTED = 8
_MAX_PROBLEMS = 20


def render_text(description: dict[str, Any], *, colour: bool = False) -> str:
    """Return a description as a page to read.

    Args:
        description: what `describe_cache` returned.
        colour: show supervised tokens of the example in colour; else in marks.
    """
    inspection = Inspection.model_validate(description)
    sections = [
        text_facts([*_standing(inspection), *_origin(inspection)]),
        text_facts([*_contents(inspection), *_size_facts(inspection)]),
        text_table([("room on disk", "size", "share", "bytes a token"), *_size_rows(inspection)]),
        text_table(_field_rows(inspection)),
        ["samples by length in tokens", *_bars(inspection)],
        _left_out(inspection),
    ]
    lines = "\n\n".join("\n".join(map(as_line, section)) for section in sections if section)
    example = [] if inspection.example is None else sample_lines(inspection.example, colour=colour)
    return "\n\n".join([lines, *(["\n".join(example)] if example else []), *_problems(inspection.problems)])


def _standing(inspection: Inspection) -> list[Row]:
    """Return how complete the cache is and how its last runs ended."""
    shards, ranges = inspection.shards, inspection.shards.missing_ranges
    rows: list[Row] = [("cache", inspection.path), ("", "complete" if inspection.complete else "incomplete")]
    done = f"{shards.committed:,} of {shards.total:,}"
    if missing := shards.total - shards.committed:
        named = _listed(f"{r.first}" if r.first == r.last else f"{r.first}–{r.last}" for r in ranges)
        rows.append(("shards", f"{done}; {missing} shards missing: {named}"))
    else:
        rows.append(("shards", done))
    runs = [run for run in inspection.last_runs if run.state != "done"]
    if runs:
        rows += [("last run", f"{run.state} ({run.file}, exit code {run.exit_code}): {run.why}") for run in runs[:3]]
        rows += [("", f"and {len(runs) - 3} more")] if len(runs) > 3 else []
    else:
        rows.append(("last run", "done" if inspection.last_runs else "not ended yet, or cut off"))
    if inspection.problems:
        rows.append(("problems", f"{len(inspection.problems)}, below"))
    return rows


def _origin(inspection: Inspection) -> list[Row]:
    """Return what the cache was made of, where and when."""
    identity = inspection.manifest.identity
    target, capture, text, dataset = identity.target, identity.capture, identity.text, identity.dataset
    layers = " ".join(map(str, capture.aux_layer_ids))
    sources = [
        f"{source.name}{f' {source.split}' if source.split else ''}{_source_size(source.num_bytes)}"
        for source in dataset.sources
    ]
    chosen = [f"shuffled, seed {dataset.shuffle_seed}"] * (dataset.shuffle_seed is not None)
    rows = [
        ("target", f"{target.id}  {target.architecture}, revision {target.revision or '-'}"),
        ("", f"{target.num_layers} layers, H {target.hidden_size}, V {target.vocab_size}"),
        ("  checkpoint", target.checkpoint_digest),
        ("layers captured", f"{layers}  ({len(capture.aux_layer_ids)} of {target.num_layers}, 0-based outputs)"),
        ("tokenizer", f"{text.tokenizer_digest}, template {text.template_digest}"),
        ("", f"samples of at most {text.seq_length:,} tokens"),
        ("corpus", ", ".join([_listed(sources), *chosen])),
        ("identity", inspection.identity_digest),
    ]
    return [
        *rows,
        *([] if identity.imported_from is None else [("imported from", _import(identity.imported_from))]),
        *_conversions(identity.converted_from),
        ("begun", f"{inspection.begun_at}  {_environment(inspection.manifest.environment)}"),
    ]


def _import(origin: ImportedStates) -> str:
    """Return which tool's states a cache was made from."""
    tool = {"speculators": "speculators or vLLM", "nemo": "NeMo AutoModel"}[origin.tool]
    return f"states of {tool}, {origin.digest}"


def _conversions(origin: Conversion | None) -> list[Row]:
    """Return the caches that this one was made from, the nearest first."""
    rows: list[Row] = []
    while origin is not None and len(rows) < _MAX_LISTED:
        rows.append(("" if rows else "converted from", f"{origin.identity_digest}, {origin.samples or 'all samples'}"))
        origin = origin.earlier
    return rows


def _source_size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f" ({_bytes(num_bytes)})"


def _environment(environment: dict[str, Any]) -> str:
    """Return the machine and the libraries; a stranger's may say anything."""
    packages = environment.get("packages")
    known = packages if isinstance(packages, dict) else {}
    libraries = [f"{name} {known[name]}" for name in ("torch", "transformers") if name in known]
    where = [f"on {environment['device_model']}"] if "device_model" in environment else []
    return ", ".join([*where, *libraries])


def _contents(inspection: Inspection) -> list[Row]:
    """Return what is in the cache, in numbers."""
    vocabulary, dataset = inspection.draft_vocabulary, inspection.manifest.identity.dataset
    rows = [
        ("samples", f"{inspection.samples:,} of {dataset.num_samples:,}"),
        ("tokens", f"{inspection.tokens:,}"),
        ("supervised tokens", f"{inspection.supervised_tokens:,}, {_part(inspection)}"),
    ]
    if inspection.extremes is not None:
        ends = inspection.extremes
        rows += [
            ("  most, least", f"{sample_size(ends.most_supervised)}; {sample_size(ends.least_supervised)}"),
            ("longest, shortest", f"{sample_size(ends.longest)}; {sample_size(ends.shortest)}"),
        ]
    return [
        *rows,
        ("draft vocabulary", f"{vocabulary.size:,} tokens, {vocabulary.digest}"),
        ("  supervised tokens", f"{vocabulary.supervised_tokens_share:.2%} in it"),
        ("  target's choices", _inside(vocabulary.argmax_share, vocabulary.note)),
        ("  target's probability", _inside(vocabulary.mass_share, vocabulary.note)),
    ]


def _part(inspection: Inspection) -> str:
    return f"{inspection.supervised_tokens / inspection.tokens:.1%}" if inspection.tokens > 0 else "-"


def _inside(share: float | None, note: str | None) -> str:
    return f"not known: {note or 'no plausible number'}" if share is None else f"{share:.2%} in it"


def _size_facts(inspection: Inspection) -> list[Row]:
    """Return what the cache takes, and beside what."""
    shard_bytes, raw_bytes = inspection.shard_bytes, sum(inspection.raw_field_bytes.values())
    beside = sum(part.num_bytes for part in inspection.parts) - shard_bytes
    size = f"{_bytes(shard_bytes)} in shards, {_bytes(beside)} beside them"
    if inspection.free_bytes is not None:
        size += f"; {_bytes(inspection.free_bytes)} free there"
    rows: list[Row] = [("size", size)]
    if inspection.bytes_per_token is not None:
        rows.append(("bytes a token", f"{inspection.bytes_per_token:,.1f}"))
    if raw_bytes > 0:
        rows.append(("  of its values unencoded", f"{shard_bytes / raw_bytes:.1%}"))
    if inspection.share_of_raw_states is not None:
        num_layers = inspection.manifest.identity.target.num_layers
        share = f"{inspection.share_of_raw_states:.1%}"
        rows.append(("  of raw states", f"{share}: bf16, all {num_layers} layers at every position"))
    return rows


def _size_rows(inspection: Inspection) -> list[Row]:
    tokens = inspection.tokens
    return [
        (
            part.name,
            _bytes(part.num_bytes),
            f"{part.share:.1%}",
            f"{part.num_bytes / tokens:,.1f}" if tokens > 0 else "-",
        )
        for part in inspection.parts
    ]


def _error_of(inspection: Inspection) -> str:
    """Return what the recorded errors are against: of a conversion, the values of the cache that it was made from."""
    return "rms error" if inspection.manifest.identity.converted_from is None else "rms error of the last step"


def _field_rows(inspection: Inspection) -> list[Row]:
    rows: list[Row] = [("encoding", "stored as", "bits a value", _error_of(inspection), "lost")]
    for field in inspection.fields:
        bits = "-" if field.bits_per_value is None else f"{field.bits_per_value:.2f}"
        error = "0" if field.exact else "not known"
        if field.relative_rms_error is not None:
            error = f"{field.relative_rms_error:.2e}"
        lost = "nothing" if field.exact else ", ".join(field.losses)
        rows.append((field.name, f"{field.dtype} {field.encoding}", bits, error, f"  {lost}"))
    return rows


def _bars(inspection: Inspection) -> list[str]:
    most = max((bar.samples for bar in inspection.length_histogram), default=1)
    return [
        f"  {bar.from_:>6}–{bar.to:<6} {bar.samples:>10,}  {'█' * round(_BAR_WIDTH * bar.samples / most)}"
        for bar in inspection.length_histogram
    ]


def _left_out(inspection: Inspection) -> list[str]:
    """Return what is not in the cache, by reason, with an example of each."""
    quarantine = inspection.quarantine
    rows = ["" if quarantine.rows is None else f"left out of the corpus: {quarantine.rows:,} rows"]
    rows[0] = rows[0] or "left out of the corpus: not recorded"
    rows += _reasons(quarantine.reasons, quarantine.examples)
    if quarantine.reasons:
        rows.append(f"  all of them: {inspection.path}/{quarantine.file}")
    if quarantine.shortened:
        rows.append(f"shortened to {inspection.manifest.identity.text.seq_length:,} tokens: {quarantine.shortened:,}")
    if inspection.lost_in_capture:
        rows.append(f"lost in capture: {sum(inspection.lost_in_capture.values()):,} samples")
        rows += _reasons(inspection.lost_in_capture, inspection.lost_examples)
        rows.append("  all of them: `lost` in the commit records")
    return rows


def _reasons(reasons: dict[str, int], examples: list[LeftOut]) -> list[str]:
    first = {example.reason: example for example in reversed(examples)}
    shown = [f"  {count:>8,}  {reason}{_such_as(first.get(reason))}" for reason, count in reasons.items()]
    more = len(shown) - _MAX_LISTED
    return [*shown[:_MAX_LISTED], *([f"  and {more} more reasons"] if more > 0 else [])]


def _such_as(example: LeftOut | None) -> str:
    if example is None:
        return ""
    where = "" if example.file is None else f"{example.file} row {example.row}: "
    return f", such as {where}{example.detail or example.reason}"


def _problems(problems: list[str]) -> list[str]:
    """Return the section of what is wrong, none when all is well."""
    if not problems:
        return []
    more = len(problems) - _MAX_PROBLEMS
    shown = [f"  {as_line(problem)}" for problem in problems[:_MAX_PROBLEMS]]
    rest = [f"  and {more} more (--json has them)"] if more > 0 else []
    return ["\n".join([f"PROBLEMS ({len(problems)})", *shown, *rest])]


def _listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    more = len(listed) - _MAX_LISTED
    return ", ".join(listed[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"

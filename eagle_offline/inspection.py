"""What `inspect-manifest` shows: what a cache is, how complete, how large, and, when asked, what is wrong with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from eagle_offline.cache.layout import TOKENS_DIRECTORY, CommitRecord
from eagle_offline.cache.manifest import Manifest, read_json_object, read_manifest
from eagle_offline.cache.writer import committed_shards, read_record
from eagle_offline.errors import DataError
from eagle_offline.progress import Progress

_MAX_TOKENS_META_BYTES = 16 << 20
_HISTOGRAM_BARS = 8
_BAR_WIDTH = 40


def describe_cache(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Return everything `inspect-manifest --json` prints.

    Args:
        path: the cache's directory.
        verify: also read the whole cache; what is wrong stands under ``problems``.

    Raises:
        DataError: no cache there. MismatchError: of another version.
    """
    manifest = read_manifest(path)
    problems, records = _read_records(path)
    description = {
        "path": str(path),
        "identity_digest": manifest.identity.digest,
        "manifest": manifest.model_dump(mode="json"),
        "complete": len(records) == manifest.identity.num_shards,
        "shards": {"total": manifest.identity.num_shards, "committed": len(records)},
        **_totals(path, manifest, records),
        "quarantine": _quarantine(path),
        "problems": problems,
    }
    if verify:
        from eagle_offline.cache.verify import verify_cache

        with Progress("verify", len(records), unit="shards") as progress:
            description["problems"] = [str(p) for p in verify_cache(path, lambda done, _: progress.reach(done))]
    return description


def _read_records(path: Path) -> tuple[list[str], list[CommitRecord]]:
    problems, records = [], []
    for shard in committed_shards(path):
        try:
            records.append(read_record(path, shard))
        except DataError as error:
            problems.append(str(error))
    return problems, records


def _totals(path: Path, manifest: Manifest, records: list[CommitRecord]) -> dict[str, Any]:
    lengths = [length for record in records for length in record.samples.num_tokens]
    tokens, shard_bytes = sum(lengths), sum(record.file_bytes for record in records)
    columns: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for record in records:
        columns.update(record.column_bytes)
        lost.update(item.reason for item in record.lost)
    target_positions = sum(sum(record.samples.num_target_positions) for record in records)
    rows = {"tokens": tokens, "supervised_positions": target_positions}
    return {
        "samples": len(lengths),
        "tokens": tokens,
        "supervised_tokens": sum(sum(record.samples.num_supervised) for record in records),
        "target_positions": target_positions,
        "lost_in_capture": dict(lost),
        "shard_bytes": shard_bytes,
        "companion_bytes": sum(file.num_bytes for file in manifest.files.values()),
        "bytes_per_token": shard_bytes / tokens if tokens else None,
        "column_bytes": dict(columns),
        "raw_field_bytes": {
            field.name: field.row_bytes * rows[field.rows] for field in manifest.identity.capture.fields
        },
        "length_histogram": _histogram(lengths),
    }


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    if not lengths:
        return []
    width = max(1, -(-max(lengths) // _HISTOGRAM_BARS))
    counts = Counter((length - 1) // width for length in lengths)
    return [
        {"from": bar * width + 1, "to": (bar + 1) * width, "samples": counts[bar]} for bar in range(max(counts) + 1)
    ]


def _quarantine(path: Path) -> dict[str, Any]:
    meta_file = path / TOKENS_DIRECTORY / "tokens.json"
    if not meta_file.is_file():
        return {"rows": None, "reasons": {}}
    meta = read_json_object(meta_file, _MAX_TOKENS_META_BYTES)
    reasons = meta.get("reasons")
    return {
        "rows": meta.get("num_quarantined"),
        "reasons": reasons if isinstance(reasons, dict) else {},
        "shortened": meta.get("truncated_rows"),
    }


def render_text(description: dict[str, Any]) -> str:
    """Return a description as a page to read."""
    manifest = Manifest.model_validate(description["manifest"])
    identity = manifest.identity
    shards, vocabulary = description["shards"], manifest.defaults.draft_vocabulary
    state = "complete" if description["complete"] else f"{shards['total'] - shards['committed']} shards missing"
    per_token = description["bytes_per_token"]
    raw = sum(description["raw_field_bytes"].values())
    stored = description["shard_bytes"]
    capture = identity.capture
    rows = [
        ("cache", f"{description['path']}  ({state})"),
        ("target", f"{identity.target.id}  {identity.target.architecture}, revision {identity.target.revision or '-'}"),
        ("", f"{identity.target.num_layers} layers, H {identity.target.hidden_size}, V {identity.target.vocab_size}"),
        ("data", ", ".join(source.name for source in identity.dataset.sources)),
        ("samples", f"{description['samples']:,} of {identity.dataset.num_samples:,} in {shards['committed']} shards"),
        ("tokens", f"{description['tokens']:,}, supervised {_share(description['supervised_tokens'], description)}"),
        ("aux layers", f"{' '.join(map(str, capture.aux_layer_ids))}  (outputs of decoder layers, 0-based)"),
        ("stored as", f"{capture.dtype} {capture.state_encoding}, target {capture.target_encoding}"),
        ("draft vocabulary", f"{vocabulary.size:,} tokens, {vocabulary.coverage:.2%} of supervised tokens"),
        ("size", f"{_bytes(stored)} in shards, {_bytes(description['companion_bytes'])} beside them"),
        ("per token", f"{_bytes(per_token)}, {stored / raw:.2f} of raw states" if per_token else "-"),
        ("left out", _left_out(description)),
        ("identity", description["identity_digest"]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", "bytes by column"]
    columns = sorted(description["column_bytes"].items(), key=lambda item: -item[1])
    lines += [f"  {name:<28} {_bytes(size):>10}  {size / max(stored, 1):6.1%}" for name, size in columns]
    lines += ["", "samples by length in tokens"]
    most = max((bar["samples"] for bar in description["length_histogram"]), default=1)
    for bar in description["length_histogram"]:
        drawn = "█" * round(_BAR_WIDTH * bar["samples"] / most)
        lines.append(f"  {bar['from']:>6}–{bar['to']:<6} {bar['samples']:>8,}  {drawn}")
    if description["problems"]:
        lines += ["", f"PROBLEMS ({len(description['problems'])})", *(f"  {item}" for item in description["problems"])]
    return "\n".join(lines)


def _share(part: int, description: dict[str, Any]) -> str:
    return f"{part / description['tokens']:.1%}" if description["tokens"] else "-"


def _left_out(description: dict[str, Any]) -> str:
    reasons = {**description["quarantine"]["reasons"], **description["lost_in_capture"]}
    if not reasons:
        return "no row"
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{listed}  (see {TOKENS_DIRECTORY}/quarantine.jsonl)"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

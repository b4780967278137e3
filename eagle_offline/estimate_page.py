"""An estimate as a page to read on a terminal."""

from __future__ import annotations

from eagle_offline.amounts import duration, size
from eagle_offline.cache.codec import TYPICAL_COMPRESSED_SHARE
from eagle_offline.pages import text_facts, text_table
from eagle_offline.precompute.estimate_record import Cost, Estimate, Probe


def render_text(estimate: Estimate) -> str:
    """Return what `estimate` prints."""
    corpus, probe = estimate.corpus, estimate.probe
    left_out = f", {corpus.num_left_out:,} rows left out" if corpus.num_left_out else ""
    facts = [
        (
            "target",
            f"{estimate.target}, layers {' '.join(map(str, estimate.aux_layer_ids))}, width {estimate.hidden_size}",
        ),
        ("draft vocabulary", f"{estimate.draft_vocab_size:,} tokens"),
        (
            "corpus",
            f"{corpus.num_samples:,} samples, {corpus.num_tokens:,} tokens, "
            f"{corpus.num_supervised:,} supervised{left_out}",
        ),
        ("free", f"{size(estimate.free_bytes)} at {estimate.directory}"),
        ("probe", _probe_in_words(estimate.device, probe)),
    ]
    head = ("", "whole", "an epoch", "KiB a token", "time", "state error", "", "  lost")
    rows = [_row(cost) for cost in estimate.choices]
    notes = ["→ what the flags say. Lost is beyond the stored dtype. An epoch is what training reads."]
    if probe is not None:
        notes.append(f"Time is of one process on {estimate.device}; N processes (--process-count N) divide them.")
    going_on = [estimate.advice] if estimate.command is None else [estimate.advice, f"  {estimate.command}"]
    if estimate.asked not in (None, estimate.command):
        going_on = ["go on with what the flags say (→):", f"  {estimate.asked}", f"or {going_on[0]}", *going_on[1:]]
    lines = [*text_facts(facts), "", *text_table([head, *rows]), "", *notes, "", *going_on]
    return "\n".join(line.rstrip() for line in lines)


def _probe_in_words(device: str, probe: Probe | None) -> str:
    if probe is None:
        return f"none: typical compression ({TYPICAL_COMPRESSED_SHARE:.0%}) is assumed; no times, no errors"
    bad = f"; {probe.num_nonfinite} samples have states that are not finite" if probe.num_nonfinite else ""
    disk = probe.disk_bytes_per_second
    written = "" if disk is None else f", {size(disk)}/s written"
    return f"{probe.num_tokens:,} tokens on {device}, {probe.tokens_per_second:,.0f}/s{written}{bad}"


def _row(cost: Cost) -> list[str]:
    error = "–" if cost.state_error is None else f"{cost.state_error:.2%}" if cost.state_error else "0"
    return [
        f"{'→' if cost.chosen else ' '} {cost.name}",
        size(cost.num_bytes),
        size(cost.epoch_bytes),
        f"{cost.bytes_per_token / 1024:.2f}",
        "–" if cost.hours is None else duration(cost.hours),
        error,
        "fits" if cost.fits else "does not fit",
        f"  {', '.join(cost.losses) or 'nothing'}",
    ]

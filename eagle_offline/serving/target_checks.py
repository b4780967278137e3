"""Checks of a draft against the target it is to be served with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from eagle_offline.provenance import digest_checkpoint, digest_merged
from eagle_offline.serving.config_checks import effective_rope
from eagle_offline.serving.findings import Finding, checks, not_applicable, note, problem
from eagle_offline.serving.subject import Subject

_NO_TARGET = "no target was given"
# What transformers gives a Llama config that does not say.
_DEFAULT_CONTEXT = 2048
_TOO_LONG = 1 << 53


@checks("target-vocabulary")
def _target_vocabulary(subject: Subject) -> Iterator[Finding]:
    found = None if subject.target is None else subject.target.get("vocab_size")
    found = subject.origin.target_vocab_size if found is None and subject.origin is not None else found
    if found is None:
        yield not_applicable(_NO_TARGET)
    elif found != subject.vocab_size:
        yield problem(f"vocab_size {subject.vocab_size}, and the target's is {found}")


@checks("target-width")
def _target_width(subject: Subject) -> Iterator[Finding]:
    found = None if subject.target is None else subject.target.get("hidden_size")
    found = subject.origin.target_hidden_size if found is None and subject.origin is not None else found
    if found is None:
        yield not_applicable(_NO_TARGET)
    elif found != subject.config.target_hidden_size:
        yield problem(f"the draft reads states of width {subject.config.target_hidden_size}, the target's are {found}")


@checks("target-context")
def _target_context(subject: Subject) -> Iterator[Finding]:
    if subject.target is None or "max_position_embeddings" not in subject.target:
        yield not_applicable("no target was given, or it does not say how long its context is")
        return
    own, theirs = _context(subject.config.fields), _context(subject.target)
    if own is None or theirs is None:
        yield problem("max_position_embeddings, or a RoPE factor, is no number of positions", "sglang")
    elif own < theirs:
        found = f"a context of {own} positions, the target's is {theirs}"
        yield problem(f"{found}: refused, unless served with --context-length {own}", "sglang")
        yield note(f"{found}: the longer is taken where the RoPE type allows, else the shorter for both", "vllm")


def _context(fields: Mapping[str, Any]) -> int | None:
    """Return how many positions SGLang derives from a config.

    Source: SGLang `utils/hf_transformers/common.py`, `get_context_length`; the keys of other families are left out.
    """
    length, rope = fields.get("max_position_embeddings", _DEFAULT_CONTEXT), effective_rope(dict(fields))
    factor = 1.0
    if isinstance(rope, dict) and "original_max_position_embeddings" not in rope and rope.get("rope_type") != "llama3":
        factor = rope.get("factor", 1.0)
    if not all(isinstance(value, int | float) and 0 < value < _TOO_LONG for value in (length, factor)):
        return None
    return int(factor * length)


@checks("target-rope")
def _target_rope(subject: Subject) -> Iterator[Finding]:
    if subject.target is None:
        yield not_applicable(_NO_TARGET)
        return
    own, theirs = effective_rope(subject.config.fields), effective_rope(dict(subject.target))
    if own != theirs:
        yield note(f"RoPE {own} of the draft, {theirs} of the target")


@checks("target-identity")
def _target_identity(subject: Subject) -> Iterator[Finding]:
    origin, adapter = subject.origin, subject.adapter
    if origin is not None and origin.target_adapter is not None and adapter is None:
        yield note(
            f"trained for {origin.target_id} with the adapter {origin.target_adapter} merged: engines have to serve "
            "the merged model; pass --adapter to compare with both"
        )
        return
    if subject.target_directory is None or origin is None:
        yield not_applicable("no target was given, or the draft does not say which it was trained for")
        return
    found = digest_merged(digest_checkpoint(subject.target_directory), None if adapter is None else adapter.digest())
    if found != origin.target_digest:
        yield note(f"trained for a target of digest {origin.target_digest}, this one's is {found}")

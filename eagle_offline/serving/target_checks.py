"""Checks of a draft against the target it is to be served with."""

from __future__ import annotations

from collections.abc import Iterator

from eagle_offline.provenance import digest_checkpoint
from eagle_offline.serving.config_checks import effective_rope
from eagle_offline.serving.findings import Finding, checks, not_applicable, note, problem
from eagle_offline.serving.subject import Subject

_NO_TARGET = "no target was given"


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
    if subject.target_directory is None or subject.origin is None:
        yield not_applicable("no target was given, or the draft does not say which it was trained for")
        return
    found = digest_checkpoint(subject.target_directory)
    if found != subject.origin.target_digest:
        yield note(f"trained for a target of digest {subject.origin.target_digest}, this one's is {found}")

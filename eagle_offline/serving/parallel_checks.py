"""Checks of what a P-EAGLE draft has beside an EAGLE-3 draft."""

from __future__ import annotations

from collections.abc import Iterator

from eagle_offline.errors import DataError
from eagle_offline.serving.findings import Finding, checks, not_applicable, problem
from eagle_offline.serving.layouts import MASK_TENSOR, SPECULATORS_KINDS
from eagle_offline.serving.subject import Subject


@checks("parallel-drafting")
def _parallel_drafting(subject: Subject) -> Iterator[Finding]:
    if subject.is_parallel:
        yield problem("P-EAGLE is not served")


@checks("mask-token")
def _mask_token(subject: Subject) -> Iterator[Finding]:
    if not subject.is_parallel:
        yield not_applicable("not a P-EAGLE draft")
        return
    try:
        subject.config.mask_token_id()
    except DataError as error:
        yield problem(str(error).removeprefix(f"{subject.config.path}: "))
    if MASK_TENSOR not in subject.files.headers:
        yield problem(f"{MASK_TENSOR} is missing")
    said = subject.config.content.get("parallel_drafting", True)
    if said is not True:
        yield problem(f"parallel_drafting is {said!r} and {MASK_TENSOR} is there: expected true")


@checks("peagle-type")
def _peagle_type(subject: Subject) -> Iterator[Finding]:
    expected, _ = SPECULATORS_KINDS[subject.is_parallel]
    found = subject.config.content.get("speculators_model_type")
    if subject.is_flat or not subject.is_parallel:
        yield not_applicable("no speculators config of a P-EAGLE draft")
    elif found != expected:
        yield problem(f"speculators_model_type {found!r} of a draft with {MASK_TENSOR}: expected {expected}")

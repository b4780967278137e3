"""Checks of the draft vocabulary: its size, its offsets, its members."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from eagle_offline.serving.findings import Finding, checks, not_applicable, note, problem
from eagle_offline.serving.layouts import HEAD_TENSOR, MEMBERS_TENSOR, OFFSETS_TENSOR, members_of
from eagle_offline.serving.subject import Subject


@checks("draft-vocab-size")
def _draft_vocab_size(subject: Subject) -> Iterator[Finding]:
    content, header = subject.config.content, subject.files.headers.get(HEAD_TENSOR)
    rows = header.shape[0] if header is not None and header.shape else None
    if content.get("draft_vocab_size") is None:
        found = "null" if "draft_vocab_size" in content else "missing"
        yield problem(f"draft_vocab_size is {found}", "sglang", "speculators", "eagle")
        if rows is not None and rows != subject.vocab_size:
            yield problem(f"draft_vocab_size is {found}: vLLM takes {subject.vocab_size}, lm_head has {rows}", "vllm")
    elif rows is not None and content["draft_vocab_size"] != rows:
        yield problem(f"draft_vocab_size {content['draft_vocab_size']!r}, and lm_head has {rows} rows")


@checks("vocab-mapping")
def _vocab_mapping(subject: Subject) -> Iterator[Finding]:
    if subject.draft_vocab_size == subject.vocab_size:
        yield not_applicable("the vocabulary is full")
        return
    if OFFSETS_TENSOR not in subject.files.headers:
        yield problem(f"{OFFSETS_TENSOR} is missing: draft ids are taken for the target's")
    elif MEMBERS_TENSOR not in subject.files.headers:
        yield problem(f"{MEMBERS_TENSOR} is missing", "speculators")


@checks("full-vocabulary")
def _full_vocabulary(subject: Subject) -> Iterator[Finding]:
    if subject.draft_vocab_size != subject.vocab_size:
        yield not_applicable("the vocabulary is reduced")
    elif OFFSETS_TENSOR in subject.files.headers:
        yield problem(f"{OFFSETS_TENSOR} beside a full vocabulary", "vllm")
        yield note(f"{OFFSETS_TENSOR} beside a full vocabulary changes nothing", "sglang", "speculators", "eagle")


@checks("d2t-offsets")
def _d2t_offsets(subject: Subject) -> Iterator[Finding]:
    header = subject.files.headers.get(OFFSETS_TENSOR)
    if header is None:
        yield not_applicable(f"no {OFFSETS_TENSOR}")
        return
    ids = subject.ids
    if ids is None:
        yield problem(f"{OFFSETS_TENSOR}: expected int64 [Vd], found {header.dtype} {list(header.shape)}")
        return
    if header.shape != (subject.draft_vocab_size,):
        yield problem(f"{OFFSETS_TENSOR} has {header.shape[0]} entries, the head {subject.draft_vocab_size} rows")
    elif int(ids.min()) < 0 or int(ids.max()) >= subject.vocab_size:
        yield problem(
            f"{OFFSETS_TENSOR} leads to ids from {int(ids.min())} to {int(ids.max())}, outside a vocabulary of "
            f"{subject.vocab_size}"
        )
    elif len(ids.unique()) != len(ids):
        yield problem(f"{OFFSETS_TENSOR} leads to the same id twice")


@checks("d2t-order")
def _d2t_order(subject: Subject) -> Iterator[Finding]:
    ids = subject.ids
    if ids is None:
        yield not_applicable(f"no {OFFSETS_TENSOR}")
    elif bool((ids.diff() < 0).any()):
        yield problem("ids of the draft vocabulary are not in order", "speculators")
        yield note("ids of the draft vocabulary are not in order, which changes nothing", "vllm", "sglang", "eagle")


@checks("t2d-members")
def _t2d_members(subject: Subject) -> Iterator[Finding]:
    ids, members = subject.ids, subject.members
    if ids is None or members is None:
        yield not_applicable(f"no {OFFSETS_TENSOR} or no {MEMBERS_TENSOR}")
        return
    in_range = ids[(ids >= 0) & (ids < subject.vocab_size)]
    if members.shape != (subject.vocab_size,) or members.dtype != torch.bool:
        wrong = f"{MEMBERS_TENSOR}: expected bool [{subject.vocab_size}], found {members.dtype} {list(members.shape)}"
    elif not torch.equal(members, members_of(in_range, subject.vocab_size)):
        wrong = f"{MEMBERS_TENSOR} does not mark the ids that {OFFSETS_TENSOR} leads to"
    else:
        return
    yield problem(wrong, "speculators")
    yield note(f"{wrong}, which is left unread", "vllm", "sglang", "eagle")

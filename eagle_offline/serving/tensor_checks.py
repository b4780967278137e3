"""Checks of tensors: names, shapes, values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from eagle_offline.serving.findings import Finding, checks, not_applicable, note, problem
from eagle_offline.serving.layouts import (
    EMBEDDINGS_TENSOR,
    FIRST_LAYER,
    FLAT_FIRST_LAYER,
    HEAD_NORM_SUFFIXES,
    HEAD_TENSOR,
    MASK_TENSOR,
    MEMBERS_TENSOR,
    OFFSETS_TENSOR,
    parameter_name,
)
from eagle_offline.serving.subject import Subject
from eagle_offline.serving.tensor_files import DTYPES, FLOAT_DTYPES

_INPUT_NORM = "input_norm.weight"
_FC_NORM = "fc_norm."
_PREFIX = "model."
# Tensors with rules of their own.
_RULED = (OFFSETS_TENSOR, MEMBERS_TENSOR, MASK_TENSOR, _INPUT_NORM)
_BUFFER_SUFFIX = "rotary_emb.inv_freq"
_RULED_SUFFIXES = (".bias", *HEAD_NORM_SUFFIXES, _BUFFER_SUFFIX)
_NOT_PARAMETERS = (OFFSETS_TENSOR, MEMBERS_TENSOR)
# As safetensors headers begin for integers and truth values; what is neither this nor a float of ours is quantized.
_WHOLE_NUMBERS = ("I", "U", "BOOL")
_QUANTIZED = ("quantization_config", "compression_config")


@checks("norm-flags")
def _norm_flags(subject: Subject) -> Iterator[Finding]:
    for flag, stored in (
        ("fc_norm", any(name.startswith(_FC_NORM) for name in subject.stored)),
        ("norm_before_fc", _INPUT_NORM in subject.stored),
    ):
        if subject.config.flag(flag) and not stored:
            yield problem(f"{flag} is true, and its weights are missing")
        elif stored and not subject.config.flag(flag):
            yield problem(f"weights of {flag}, and the config does not say so")


@checks("tensors-complete")
def _tensors_complete(subject: Subject) -> Iterator[Finding]:
    missing = _missing(subject)
    if _is_prefixed(subject):
        yield problem("names begin with `model.`", "vllm", "speculators", "eagle")
    elif missing:
        yield problem(f"missing: {', '.join(missing[:4])}")
    if HEAD_TENSOR in subject.stored:
        return
    if subject.draft_vocab_size == subject.vocab_size:
        yield note("no lm_head: the target's is taken", "vllm")
    else:
        yield problem("no lm_head, and the target's has more rows", "vllm")
    if not subject.is_flat or subject.config.content.get("draft_vocab_size", 0) is not None:
        yield problem("lm_head.weight is missing", "sglang", "speculators")
    else:
        yield note("no lm_head: the target's is taken", "sglang")
    yield problem("lm_head.weight is missing", "eagle")


def _missing(subject: Subject) -> list[str]:
    """Return parameters, by our names, that no engine can do without and that are not there."""
    # The mask's states have a rule of their own.
    optional = {EMBEDDINGS_TENSOR, HEAD_TENSOR, MASK_TENSOR}
    return [
        name
        for name in subject.shapes
        if name not in subject.stored
        and name not in optional
        and not name.startswith(_FC_NORM)
        and not name.endswith(HEAD_NORM_SUFFIXES)
    ]


def _prefixed_twins(subject: Subject) -> dict[str, str]:
    """Return names that begin with `model.`, each with our name of the tensor that it would be without."""
    return {name: parameter_name(name.removeprefix(_PREFIX)) for name in subject.stored if name.startswith(_PREFIX)}


def _is_prefixed(subject: Subject) -> bool:
    """Say whether all that is missing is there under `model.`."""
    missing = _missing(subject)
    return bool(missing) and set(_prefixed_twins(subject).values()).issuperset(missing)


def _has_place(subject: Subject, name: str) -> bool:
    further = {f"layers.{index}.hidden_norm.weight" for index in range(1, subject.model.num_hidden_layers)}
    known = {*subject.shapes, *further, *_RULED}
    return name in known or name.startswith(_FC_NORM) or name.endswith(_RULED_SUFFIXES)


@checks("layer-zero-name")
def _layer_zero_name(subject: Subject) -> Iterator[Finding]:
    names = subject.files.headers
    if any(name.startswith(FIRST_LAYER) for name in names):
        yield problem("layer 0 is not called midlayer, and stays random", "eagle")
    if any(name.startswith(FLAT_FIRST_LAYER) for name in names):
        yield problem("layer 0 is called midlayer, and stays random", "speculators")


@checks("tensors-known")
def _tensors_known(subject: Subject) -> Iterator[Finding]:
    twins = _prefixed_twins(subject)
    # What `tensors-complete` reports.
    reported = (
        {name for name, plain in twins.items() if plain not in subject.stored and _has_place(subject, plain)}
        if _is_prefixed(subject)
        else set()
    )
    extra = [subject.stored[name] for name in subject.stored if not _has_place(subject, name) and name not in reported]
    if not extra:
        return
    shown = ", ".join(extra[:4])
    yield problem(f"tensors without a place: {shown}", "vllm")
    read_twice = (subject.stored.keys() & subject.shapes.keys()) - {HEAD_TENSOR}
    doubled = [name for name, plain in twins.items() if plain in read_twice]
    if doubled:
        yield problem(f"loaded in the place of tensors without the prefix: {', '.join(doubled[:4])}", "sglang")
    yield note(f"left unread: {shown}", "sglang", "speculators", "eagle")


@checks("parameter-dtype")
def _parameter_dtype(subject: Subject) -> Iterator[Finding]:
    quantized = any(part.get(name) for part in (subject.config.content, subject.config.fields) for name in _QUANTIZED)
    dtypes = {
        subject.stored[name]: subject.header(name).dtype  # type: ignore[union-attr]
        for name in subject.stored
        if _has_place(subject, name) and name not in _NOT_PARAMETERS and not name.endswith(_BUFFER_SUFFIX)
    }
    other = {name: dtype for name, dtype in dtypes.items() if DTYPES.get(dtype) not in FLOAT_DTYPES}
    whole = [f"{name} {dtype}" for name, dtype in other.items() if dtype.startswith(_WHOLE_NUMBERS)]
    if quantized:
        yield note("quantized, as the config says: nothing here vouches for its weights")
    elif whole:
        yield problem(f"parameters of whole numbers: {', '.join(whole[:4])}")
    elif other:
        shown = ", ".join(f"{name} {dtype}" for name, dtype in list(other.items())[:4])
        yield note(f"of a dtype whose values are not checked: {shown}")


@checks("shapes")
def _shapes(subject: Subject) -> Iterator[Finding]:
    wrong = []
    for name, shape in subject.shapes.items():
        header = subject.header(name)
        if name != HEAD_TENSOR and header is not None and header.shape != shape:
            wrong.append(f"{subject.stored[name]} {list(header.shape)} instead of {list(shape)}")
    head = subject.header(HEAD_TENSOR)
    if head is not None and (len(head.shape) != 2 or head.shape[1] != subject.model.hidden_size):
        wrong.append(f"{HEAD_TENSOR} {list(head.shape)}")
    if wrong:
        yield problem(f"shapes: {'; '.join(wrong[:4])}")


@checks("finite")
def _finite(subject: Subject) -> Iterator[Finding]:
    for name, header in subject.files.headers.items():
        if DTYPES.get(header.dtype) not in FLOAT_DTYPES:
            continue
        if not all(bool(piece.isfinite().all()) for piece in subject.files.pieces(name)):
            yield problem(f"{name} holds NaN or infinity")
            return


@checks("single-layer")
def _single_layer(subject: Subject) -> Iterator[Finding]:
    if subject.model.num_hidden_layers > 1:
        yield problem(f"the draft has {subject.model.num_hidden_layers} layers")


@checks("further-layers")
def _further_layers(subject: Subject) -> Iterator[Finding]:
    if subject.model.num_hidden_layers == 1:
        yield not_applicable("the draft has one layer")
        return
    for index in range(1, subject.model.num_hidden_layers):
        read, plain = f"layers.{index}.hidden_norm.weight", f"layers.{index}.input_layernorm.weight"
        if read not in subject.stored:
            yield problem(f"{read} is missing, and stays one")
        elif plain in subject.stored and not torch.equal(
            subject.files.read(subject.stored[read]), subject.files.read(subject.stored[plain])
        ):
            yield problem(f"{read} differs from {plain}")


@checks("own-embeddings")
def _own_embeddings(subject: Subject) -> Iterator[Finding]:
    if subject.header(EMBEDDINGS_TENSOR) is None or _own_width(subject):
        return
    if subject.origin is None:
        yield note("the target's embeddings take the place of those in the file")
    elif subject.origin.embeddings_trained:
        yield problem("the target's embeddings take the place of trained ones")


@checks("shared-embeddings")
def _shared_embeddings(subject: Subject) -> Iterator[Finding]:
    if subject.header(EMBEDDINGS_TENSOR) is not None:
        return
    if _own_width(subject):
        yield problem("no embeddings, and the target's have another width")
    elif subject.origin is not None and subject.origin.embeddings_trained:
        yield problem("no embeddings, and the draft was trained with its own")


@checks("embeddings-written")
def _embeddings_written(subject: Subject) -> Iterator[Finding]:
    if subject.is_flat:
        yield not_applicable("engines that read a flat directory take the target's")
    elif subject.header(EMBEDDINGS_TENSOR) is None:
        yield problem("embed_tokens.weight is missing, and stays unset", "speculators")


def _own_width(subject: Subject) -> bool:
    return subject.config.target_hidden_size != subject.config.integer("hidden_size")

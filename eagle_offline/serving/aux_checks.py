"""Checks of which target layers a draft reads, and of how engines find out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from eagle_offline.serving.findings import Finding, checks, not_applicable, note, problem
from eagle_offline.serving.layouts import AUX_IDS_FIELD, layers_executed, outputs_of
from eagle_offline.serving.subject import Subject

_DEFAULT_NUM_AUX = 3


@checks("num-aux")
def _num_aux(subject: Subject) -> Iterator[Finding]:
    found = subject.num_aux_in_fc
    if found is None:
        yield problem("fc.weight is missing, or its width is no number of aux states")
        return
    nested, top = subject.outputs, subject.executed
    written = subject.config.fields.get("num_aux_hidden_states")
    by_ids = nested if subject.is_flat else None
    if subject.is_qwen3:
        written = subject.config.fields.get("num_aux_layers", written)
        by_ids = top or by_ids
    counts = {
        "vllm": _count(written, by_ids),
        "sglang": _count(subject.config.fields.get("num_aux_hidden_states"), nested),
        "speculators": _count(None, top),
    }
    for engine, count in counts.items():
        if count != found:
            yield problem(f"fc.weight reads {found} aux states, this engine counts {count}", engine)  # type: ignore[arg-type]
    for ids in (top, nested):
        if ids is not None and len(ids) != found:
            yield problem(f"{len(ids)} aux ids {ids}, and fc.weight reads {found} states", "vllm", "sglang")


def _count(written: object, ids: list[int] | None) -> object:
    if written is not None:
        return written
    return len(ids) if ids else _DEFAULT_NUM_AUX


@checks("three-aux-states")
def _three_aux_states(subject: Subject) -> Iterator[Finding]:
    found = subject.num_aux_in_fc
    if found not in (None, _DEFAULT_NUM_AUX):
        yield problem(f"the draft reads {found} aux states")


@checks("aux-states-used")
def _aux_states_used(subject: Subject) -> Iterator[Finding]:
    if subject.config.eagle_config.get("use_aux_hidden_state", True) is not True:
        yield problem("eagle_config.use_aux_hidden_state is not true")


@checks("fc-applied")
def _fc_applied(subject: Subject) -> Iterator[Finding]:
    header = subject.files.headers.get("fc.weight")
    if header is not None and len(header.shape) == 2 and header.shape[0] == header.shape[1]:
        yield problem("fc.weight is square, and is skipped")


@checks("aux-ids-written")
def _aux_ids_written(subject: Subject) -> Iterator[Finding]:
    top, nested, default = subject.executed, subject.outputs, subject.default_outputs
    trained = subject.origin.aux_layer_ids if subject.origin is not None else None
    if top is None and nested is None:
        if trained is not None and trained != default:
            yield problem(f"no aux ids: engines take outputs {default}, the draft was trained on {trained}")
        else:
            yield note("no aux ids: engines take outputs [1, L//2-1, L-4], right only if it was trained on these")
        return
    if top is None:
        yield problem(f"no {AUX_IDS_FIELD} at top level: vLLM takes eagle_config's {nested} as layers executed", "vllm")
        yield problem(f"no {AUX_IDS_FIELD} at top level: it takes outputs [1, L//2-1, L-4]", "speculators")
    if nested is None and subject.is_flat:
        taken = outputs_of(top or [])
        if default is None or taken != default:
            yield problem(
                f"eagle_config has no {AUX_IDS_FIELD}: SGLang takes [1, L//2-1, L-4] instead of {taken}",
                "sglang",
            )
        else:
            yield note(f"eagle_config has no {AUX_IDS_FIELD}, and SGLang's default is the same", "sglang")


@checks("aux-ids-agree")
def _aux_ids_agree(subject: Subject) -> Iterator[Finding]:
    top, nested = subject.executed, subject.outputs
    trained = subject.origin.aux_layer_ids if subject.origin is not None else None
    if trained is not None:
        if top is not None and top != layers_executed(trained):
            message = f"top-level ids {top}: trained on outputs {trained}, so {layers_executed(trained)}"
            yield problem(message, "vllm", "speculators")
        if nested is not None and nested != trained:
            yield problem(f"eagle_config's ids {nested}: trained on outputs {trained}", "sglang")
    elif top is not None and nested is not None and outputs_of(top) != nested:
        yield problem(f"top-level ids {top} mean outputs {outputs_of(top)}, eagle_config says {nested}")


@checks("aux-ids-order")
def _aux_ids_order(subject: Subject) -> Iterator[Finding]:
    top, nested = subject.executed, subject.outputs
    if top is not None and not _increases(outputs_of(top)):
        yield problem(f"top-level ids {top} do not increase from 1", "vllm", "speculators")
    if nested is not None and not _increases(nested):
        yield problem(f"eagle_config's ids {nested} do not increase from 0", "sglang")


def _increases(outputs: list[int]) -> bool:
    return bool(outputs) and outputs[0] >= 0 and all(low < high for low, high in pairwise(outputs))


@checks("aux-ids-in-range")
def _aux_ids_in_range(subject: Subject) -> Iterator[Finding]:
    depth = subject.num_target_layers
    outputs = subject.outputs if subject.executed is None else outputs_of(subject.executed)
    if depth is None or not outputs:
        yield not_applicable("the target's depth, or the ids, are unknown")
        return
    if max(outputs) >= depth:
        yield problem(f"outputs {outputs} of a target of {depth} layers")
    elif max(outputs) == depth - 1:
        yield problem(f"the output of the last layer, {depth - 1}, cannot be captured", "sglang")


@checks("default-aux-ids")
def _default_aux_ids(subject: Subject) -> Iterator[Finding]:
    written = subject.outputs if subject.executed is None else outputs_of(subject.executed)
    trained = subject.origin.aux_layer_ids if subject.origin is not None else None
    outputs = written if trained is None else trained
    if subject.default_outputs is None:
        yield note("the target's depth is unknown: right only for outputs [1, L//2-1, L-4]")
    elif outputs and outputs != subject.default_outputs:
        meant = "the config says" if trained is None else "the draft was trained on"
        yield problem(f"reads outputs {subject.default_outputs}, {meant} {outputs}")

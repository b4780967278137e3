"""Checks of what the config says about layout, layers and RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle_offline.errors import one_line
from eagle_offline.serving.configs import QWEN3_ARCHITECTURES, quiet_transformers
from eagle_offline.serving.findings import Finding, checks, not_applicable, note, problem
from eagle_offline.serving.layouts import (
    FLAT_ARCHITECTURE,
    HEAD_NORM_SUFFIXES,
    ORIGINAL_ROPE_TYPES,
    SPECULATORS_KINDS,
)
from eagle_offline.serving.subject import Subject

# What vLLM resolves to its Llama draft, a prefix `Eagle3` added where there is none.
_VLLM_LLAMA = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM", "PeagleLlamaForCausalLM")
_VLLM_PARALLEL = ("PEagleDraftModel",)
_WRITTEN_OUT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters",
)  # fmt: skip
_DEFAULT_ROPE_BASE = 10000
_ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings")


@checks("layout")
def _layout(subject: Subject) -> Iterator[Finding]:
    if subject.is_flat:
        yield problem("a flat directory is no speculators model: export it in that layout", "speculators")
    else:
        yield problem("a speculators directory has no model fields at top level: export it flat", "sglang", "eagle")


@checks("architecture")
def _architecture(subject: Subject) -> Iterator[Finding]:
    if not subject.is_flat:
        yield not_applicable("vLLM names it by speculators_model_type")
        return
    names = subject.config.content.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        yield problem(f"architectures: expected one name, found {names!r}")
        return
    if names[0] != FLAT_ARCHITECTURE:
        yield problem(f"architectures {names}: SGLang's draft is {FLAT_ARCHITECTURE}", "sglang")
    if names[0] not in (*_VLLM_LLAMA, *_VLLM_PARALLEL, *QWEN3_ARCHITECTURES):
        yield problem(f"architectures {names} is no draft that vLLM builds", "vllm")


@checks("model-type")
def _model_type(subject: Subject) -> Iterator[Finding]:
    found = subject.config.fields.get("model_type")
    if found is None:
        yield problem("model_type is missing")
    elif found not in ("llama", "qwen3"):
        yield problem(f"model_type {found!r}: expected llama or qwen3")


@checks("qwen3-layers")
def _qwen3_layers(subject: Subject) -> Iterator[Finding]:
    norms = {name for name in subject.stored if name.endswith(HEAD_NORM_SUFFIXES)}
    if norms:
        yield problem("q/k norms in the draft's layers are left out", "sglang", "eagle")
    if norms and not subject.is_qwen3:
        yield problem("q/k norms, and a config of Llama layers", "vllm", "speculators")
    missing = [name for name in subject.shapes if name.endswith(HEAD_NORM_SUFFIXES) and name not in norms]
    if missing and not norms:
        yield problem("a config of Qwen3 layers, and no q/k norms", "vllm", "speculators")
    elif missing:
        yield problem(f"q/k norms are missing: {', '.join(missing[:4])}", "vllm", "speculators")


@checks("speculators-fields")
def _speculators_fields(subject: Subject) -> Iterator[Finding]:
    if subject.is_flat:
        yield not_applicable("a flat directory")
        return
    content = subject.config.content
    kind, settings = content.get("speculators_model_type"), content.get("speculators_config")
    known = [name for name, _ in SPECULATORS_KINDS.values()]
    if kind not in known:
        yield problem(f"speculators_model_type {kind!r}: expected {' or '.join(known)}")
    if not isinstance(settings, dict):
        yield problem("speculators_config is missing")
        return
    methods, verifier = settings.get("proposal_methods"), settings.get("verifier")
    first = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    if not isinstance(first.get("speculative_tokens"), int):
        yield problem("speculators_config.proposal_methods[0].speculative_tokens is missing")
    if not isinstance(verifier, dict) or "name_or_path" not in verifier:
        yield problem("speculators_config.verifier.name_or_path is missing")
    elif not isinstance(verifier.get("architectures"), list):
        yield problem("speculators_config.verifier.architectures is missing", "speculators")
    if not isinstance(settings.get("algorithm"), str):
        yield problem("speculators_config.algorithm is missing", "speculators")
    if settings.get("default_proposal_method") is None or settings["default_proposal_method"] != first.get(
        "proposal_type"
    ):
        yield problem("speculators_config.default_proposal_method names none of the methods", "speculators")


@checks("llama-fields")
def _llama_fields(subject: Subject) -> Iterator[Finding]:
    if subject.is_flat:
        yield not_applicable("a flat directory")
        return
    missing = [name for name in _WRITTEN_OUT if subject.config.fields.get(name) is None]
    if missing:
        yield problem(f"transformer_layer_config does not say {', '.join(missing)}")


@checks("activation")
def _activation(subject: Subject) -> Iterator[Finding]:
    found = subject.config.fields.get("hidden_act", "silu")
    if not isinstance(found, str) or found not in ACT2FN:
        yield problem(f"hidden_act {found!r} is no activation: expected silu")
    elif found != "silu":
        yield problem(f"hidden_act {found!r}: expected silu", "vllm", "sglang")


@checks("no-biases")
def _no_biases(subject: Subject) -> Iterator[Finding]:
    biases = [name for name in subject.stored if name.endswith(".bias")]
    written = bool(subject.config.fields.get("attention_bias"))
    unread = [name for name in biases if not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    if biases:
        yield problem(f"{subject.stored[biases[0]]} is left unread", "sglang", "eagle")
    if unread or (biases and not written):
        yield problem(f"{subject.stored[(unread or biases)[0]]} has no place", "vllm")
    if biases and not written:
        yield problem(f"{subject.stored[biases[0]]}, and attention_bias is not true", "speculators")
    if written and not biases:
        yield problem("attention_bias is true, and there are no biases", "vllm", "speculators")


@checks("full-attention")
def _full_attention(subject: Subject) -> Iterator[Finding]:
    found = subject.config.fields.get("layer_types")
    if isinstance(found, list) and "sliding_attention" in found:
        yield problem("layer_types has sliding attention, which is left out")


@checks("residual-before-norm")
def _residual_before_norm(subject: Subject) -> Iterator[Finding]:
    if subject.config.flag("norm_before_residual"):
        yield problem("norm_before_residual true is left out")


@checks("norm-before-residual-written")
def _norm_before_residual_written(subject: Subject) -> Iterator[Finding]:
    if subject.is_flat:
        yield not_applicable("absent means false in a flat directory")
    elif subject.config.content.get("norm_before_residual") is None:
        yield problem("norm_before_residual is not written: vLLM takes it for true")


@checks("norm-before-fc")
def _norm_before_fc(subject: Subject) -> Iterator[Finding]:
    if subject.config.flag("norm_before_fc"):
        yield problem("norm_before_fc is left out", "eagle")
        if subject.config.flag("fc_norm"):
            yield problem("norm_before_fc and fc_norm exclude each other", "speculators")


@checks("fc-norm")
def _fc_norm(subject: Subject) -> Iterator[Finding]:
    if not subject.config.flag("fc_norm"):
        return
    yield problem("fc_norm is left out", "eagle")
    if subject.is_parallel and not subject.is_flat:
        yield problem("the speculators peagle config drops fc_norm: export it flat", "vllm")


@checks("norm-output")
def _norm_output(subject: Subject) -> Iterator[Finding]:
    if subject.config.flag("norm_output"):
        yield problem("norm_output is not known")


@checks("logit-transforms")
def _logit_transforms(subject: Subject) -> Iterator[Finding]:
    fields = subject.config.fields
    if fields.get("logit_scale") not in (None, 1, 1.0):
        yield problem(f"logit_scale {fields['logit_scale']!r} scales the draft's logits", "vllm")
    if fields.get("final_logit_softcapping"):
        yield problem(
            f"final_logit_softcapping {fields['final_logit_softcapping']!r} caps the draft's logits", "sglang"
        )


@checks("tie-word-embeddings")
def _tie_word_embeddings(subject: Subject) -> Iterator[Finding]:
    if subject.config.fields.get("tie_word_embeddings"):
        yield problem("tie_word_embeddings true: the embeddings become the head", "sglang")
        yield note("tie_word_embeddings true is not followed", "vllm", "speculators", "eagle")


@checks("target-hidden-size")
def _target_hidden_size(subject: Subject) -> Iterator[Finding]:
    content = subject.config.content
    if not subject.is_flat or "target_hidden_size" not in content:
        return
    if content["target_hidden_size"] is None:
        yield problem("target_hidden_size is null")
    elif subject.header("embed_tokens.weight") is None:
        yield problem("target_hidden_size is there and embed_tokens is not: embeddings stay random", "eagle")


@checks("same-width")
def _same_width(subject: Subject) -> Iterator[Finding]:
    width, own = subject.config.target_hidden_size, subject.config.integer("hidden_size")
    if width != own:
        yield problem(f"the draft is {own} wide, its target {width}")


@checks("rope-type")
def _rope_type(subject: Subject) -> Iterator[Finding]:
    for field, kind in _unknown_rope_types(subject.config.fields):
        known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
        yield problem(f"{field} has the type {kind!r}; known are {known}")


def _unknown_rope_types(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for field in ("rope_parameters", "rope_scaling"):
        written = fields.get(field)
        kind = written.get("rope_type", written.get("type", "default")) if isinstance(written, dict) else "default"
        if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS):
            found.append((field, kind))
    return found


@checks("rope-spellings")
def _rope_spellings(subject: Subject) -> Iterator[Finding]:
    fields = subject.config.fields
    written = fields.get("rope_parameters")
    if not isinstance(written, dict) or not written or _unknown_rope_types(fields):
        return
    effective = effective_rope(fields)
    if isinstance(effective, str):
        yield problem(f"RoPE settings cannot be read: {effective}")
        return
    wanted = {"rope_type": written.get("type", "default"), **without_alias(written)}
    differing = sorted(key for key, value in wanted.items() if effective.get(key) != value)
    if differing:
        yield problem(f"rope_parameters and rope_theta/rope_scaling differ in {', '.join(differing)}")
    theta, top = written.get("rope_theta", _DEFAULT_ROPE_BASE), fields.get("rope_theta")
    if theta != (_DEFAULT_ROPE_BASE if top is None else top):
        yield problem(f"the base at top level is {top!r}, in rope_parameters {theta}", "eagle")
        if top is not None:
            yield problem(f"rope_theta is {top} at top level and {theta} in rope_parameters")
    if wanted["rope_type"] != "default" and not fields.get("rope_scaling"):
        yield problem("rope_scaling is not written at top level", "eagle")


@checks("rope-scaling")
def _rope_scaling(subject: Subject) -> Iterator[Finding]:
    fields = subject.config.fields
    scaling = fields.get("rope_scaling")
    if not scaling:
        return
    known = isinstance(scaling, dict) and scaling.keys() == {"type", "factor"}
    if not known or scaling["type"] not in ORIGINAL_ROPE_TYPES:
        yield problem(f"rope_scaling {scaling!r} is refused")
    elif fields.get("rope_theta", _DEFAULT_ROPE_BASE) != _DEFAULT_ROPE_BASE:
        yield problem(f"with rope_scaling the base is {_DEFAULT_ROPE_BASE}, not {fields['rope_theta']!r}")


def effective_rope(fields: dict[str, Any]) -> dict[str, Any] | str:
    """Return the RoPE parameters that transformers makes of a config, or what it says against them."""
    given = {name: fields[name] for name in _ROPE_FIELDS if fields.get(name) is not None}
    given = {name: dict(value) if isinstance(value, dict) else value for name, value in given.items()}
    try:
        with quiet_transformers():
            return without_alias(dict(LlamaConfig(**given).rope_parameters or {}))
    except Exception as error:  # transformers validates with exceptions of several kinds
        return one_line(error)


def without_alias(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE parameters without ``type``, the former name of ``rope_type``."""
    return {key: value for key, value in parameters.items() if key != "type"}

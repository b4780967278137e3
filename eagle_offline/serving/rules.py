"""What each engine silently expects of a draft's directory, as a table.

Read from vLLM 0.33, SGLang 0.5.23, speculators 0.9.0 and the code published with EAGLE-3. `python -m
eagle_offline.serving.rules FILE` writes the table; `eagle_offline.serving.check` holds a directory against it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Engine = Literal["vllm", "sglang", "speculators", "eagle"]
Effect = Literal["fails", "silent", "ignored", "overwritten", "note"]

ENGINES: Final[tuple[Engine, ...]] = ("vllm", "sglang", "speculators", "eagle")
# Engines that people serve with; the original code is what the method was published with.
SERVING_ENGINES: Final[tuple[Engine, ...]] = ("vllm", "sglang", "speculators")
ENGINE_NAMES: Final[dict[Engine, str]] = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "speculators": "speculators",
    "eagle": "original EAGLE",
}
EFFECTS: Final[dict[Effect, str]] = {
    "fails": "refuses or breaks, at load or at the first token",
    "silent": "loads, and then is not the draft that was trained",
    "ignored": "leaves it unread, at no harm",
    "overwritten": "puts the target's in its place",
    "note": "worth knowing, at no harm by itself",
}


@dataclass(frozen=True)
class Rule:
    """One expectation.

    Attributes:
        id: short name.
        statement: what must hold, and what happens otherwise.
        effects: by engine, what it does when the rule does not hold; an engine not named is not concerned.
        is_feature: True when breaking it means a kind of draft that the engine does not serve, and no defect.
    """

    id: str
    statement: str
    effects: Mapping[Engine, Effect]
    is_feature: bool = False


def _all(effect: Effect) -> dict[Engine, Effect]:
    return dict.fromkeys(ENGINES, effect)


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "layout",
        "The directory is in a layout the engine parses: flat for SGLang and the original EAGLE code, speculators for "
        "speculators (whose `convert` of a flat one loses aux ids and further layers), either for vLLM.",
        {"sglang": "fails", "speculators": "fails", "eagle": "fails"},
        is_feature=True,
    ),
    Rule(
        "architecture",
        'A flat config\'s `architectures` is `["LlamaForCausalLMEagle3"]`: SGLang has no other Llama draft; vLLM also '
        "takes `Eagle3LlamaForCausalLM`, `LlamaForCausalLM` (as `Eagle3LlamaForCausalLM`) and "
        "`Eagle3Qwen3ForCausalLM`.",
        {"vllm": "fails", "sglang": "fails"},
    ),
    Rule(
        "model-type",
        "`model_type` is written: `llama`, or `qwen3` where q/k norms are run. Without it a flat config is not "
        "recognised; in `transformer_layer_config` vLLM takes llama and speculators qwen3.",
        {"vllm": "fails", "sglang": "fails", "speculators": "silent"},
    ),
    Rule(
        "qwen3-layers",
        "Draft layers are Llama's: no q/k norms. Qwen3's run in vLLM (flat: `architectures` is "
        '`["Eagle3Qwen3ForCausalLM"]`) and in speculators (nested `model_type` is `qwen3`), with both norms in every '
        "layer; under a Llama config vLLM raises on the norms, and the rest leave them unread.",
        {"vllm": "fails", "sglang": "silent", "speculators": "silent", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "speculators-fields",
        "A speculators config has `speculators_model_type` (eagle3 or peagle), `transformer_layer_config`, and under "
        "`speculators_config` `algorithm`, `default_proposal_method` (one of the methods), "
        "`proposal_methods[0].speculative_tokens`, `verifier.name_or_path` and `verifier.architectures`.",
        {"vllm": "fails", "speculators": "fails"},
    ),
    Rule(
        "llama-fields",
        "`transformer_layer_config` writes out `vocab_size`, `hidden_size`, `intermediate_size`, `num_hidden_layers`, "
        "`num_attention_heads`, `num_key_value_heads`, `head_dim`, `rms_norm_eps`, `hidden_act` and `rope_parameters`: "
        "vLLM reads it without Llama's defaults, speculators fills in defaults that training did not use.",
        {"vllm": "fails", "speculators": "silent"},
    ),
    Rule(
        "activation",
        "`hidden_act` is `silu`: vLLM and SGLang have no other for Llama layers, speculators and the original code "
        "those of transformers.",
        _all("fails"),
        is_feature=True,
    ),
    Rule(
        "no-biases",
        "No biases in attention, feed-forward or `fc`: SGLang and the original code leave them unread; vLLM has those "
        "of q, k and v when `attention_bias` is true and raises on others.",
        {"vllm": "fails", "sglang": "silent", "speculators": "silent", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "full-attention",
        "No `sliding_attention` among `layer_types`: SGLang and the original code attend fully all the same.",
        {"sglang": "silent", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "residual-before-norm",
        "The residual stream is taken before `hidden_norm`: only vLLM and speculators run "
        "`norm_before_residual: true`.",
        {"sglang": "silent", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "norm-before-residual-written",
        "A speculators config writes `norm_before_residual` out: absent means true to vLLM and false to speculators.",
        {"vllm": "silent"},
    ),
    Rule(
        "norm-before-fc",
        "No single norm before `fc` (`norm_before_fc`, `input_norm`): the original code leaves it out; with `fc_norm` "
        "as well speculators refuses.",
        {"speculators": "fails", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "fc-norm",
        "No norm of each aux state (`fc_norm`) where the engine has none: the original code leaves it out; vLLM drops "
        "the flag of a speculators peagle config and then raises on the tensors.",
        {"vllm": "fails", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "norm-flags",
        "`fc_norm` and `norm_before_fc` are true exactly when their tensors are there: the flag alone runs a norm with "
        "weights of one; tensors alone make vLLM raise and are left unread by others.",
        {"vllm": "fails", "sglang": "silent", "speculators": "silent"},
    ),
    Rule(
        "norm-output",
        "The state fed back is the one before the last norm; the original code does not know `norm_output`.",
        {"eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "logit-transforms",
        "The draft's config has neither `logit_scale` (vLLM multiplies the draft's logits by it) nor "
        "`final_logit_softcapping` (SGLang caps them).",
        {"vllm": "silent", "sglang": "silent"},
    ),
    Rule(
        "tie-word-embeddings",
        "`tie_word_embeddings` is not true: SGLang uses the embeddings as the head.",
        {"vllm": "ignored", "sglang": "silent", "speculators": "ignored", "eagle": "ignored"},
    ),
    Rule(
        "target-hidden-size",
        "A flat config has no `target_hidden_size` unless it differs from `hidden_size`: null breaks vLLM and SGLang; "
        "with any value the original code takes no embeddings over from the target, and needs its own in the file.",
        {"vllm": "fails", "sglang": "fails", "eagle": "silent"},
    ),
    Rule(
        "same-width",
        "The draft is as wide as its target: speculators knows no other.",
        {"speculators": "fails"},
        is_feature=True,
    ),
    Rule(
        "draft-vocab-size",
        "`draft_vocab_size` is there and counts the rows of `lm_head`: absent breaks SGLang and the original code, "
        "null makes SGLang use the target's head, speculators takes 32000.",
        _all("fails"),
    ),
    Rule(
        "vocab-mapping",
        "A reduced vocabulary comes with `d2t`: without it vLLM, SGLang and the original code take draft ids for the "
        "target's. speculators needs `t2d` as well.",
        {"vllm": "silent", "sglang": "silent", "speculators": "fails", "eagle": "silent"},
    ),
    Rule(
        "full-vocabulary",
        "A full vocabulary comes without `d2t`: vLLM has no place for it and raises.",
        {"vllm": "fails", "sglang": "ignored", "speculators": "ignored", "eagle": "ignored"},
    ),
    Rule(
        "d2t-offsets",
        "`d2t` holds int64 or int32 offsets (target id minus draft id; engines widen int32 as they load) that lead to "
        "distinct ids inside the vocabulary; ids stored as they are lead outside.",
        _all("silent"),
    ),
    Rule(
        "d2t-order",
        "`d2t` leads to increasing ids: speculators pairs the head's rows with `t2d` in order when it trains on; "
        "engines serve any order.",
        {"vllm": "ignored", "sglang": "ignored", "speculators": "silent", "eagle": "ignored"},
    ),
    Rule(
        "t2d-members",
        "`t2d` is bool `[V]` and marks exactly the ids that `d2t` leads to; only speculators reads it.",
        {"vllm": "ignored", "sglang": "ignored", "speculators": "silent", "eagle": "ignored"},
    ),
    Rule(
        "num-aux",
        "`fc` reads as many aux states as the engine counts: vLLM and SGLang by `num_aux_hidden_states`, else the ids "
        "in `eagle_config`, else 3 (vLLM sees only what is inside `transformer_layer_config`); speculators by the ids "
        "at top level, else 3.",
        {"vllm": "fails", "sglang": "fails", "speculators": "fails"},
    ),
    Rule(
        "three-aux-states",
        "The draft reads three aux states: the original code knows no other number.",
        {"eagle": "fails"},
        is_feature=True,
    ),
    Rule(
        "aux-states-used",
        "`eagle_config.use_aux_hidden_state` is not false: vLLM and SGLang then capture none.",
        {"vllm": "silent", "sglang": "silent"},
    ),
    Rule(
        "fc-applied",
        "Aux states together are not as wide as the draft: SGLang and the original code skip `fc` when they are.",
        {"sglang": "silent", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "aux-ids-written",
        "Aux ids are where the engine looks: `eagle_aux_hidden_state_layer_ids` at top level, as layers executed, for "
        "vLLM and speculators; in `eagle_config`, as 0-based outputs, for SGLang. vLLM takes the latter as layers "
        "executed when the former is missing, one too low; with neither, engines take outputs [1, L//2-1, L-4].",
        {"vllm": "silent", "sglang": "silent", "speculators": "silent"},
    ),
    Rule(
        "aux-ids-agree",
        "Top-level aux ids are those of `eagle_config` plus one, and mean the layers in `origin.json`: one layer off "
        "costs nearly all acceptance.",
        {"vllm": "silent", "sglang": "silent", "speculators": "silent"},
    ),
    Rule(
        "aux-ids-order",
        "Aux ids increase strictly from 0: engines concatenate states in the order in which layers run.",
        {"vllm": "silent", "sglang": "silent", "speculators": "fails"},
    ),
    Rule(
        "aux-ids-in-range",
        "Aux ids name layers of the target; SGLang cannot capture the last layer's output.",
        {"vllm": "fails", "sglang": "fails", "speculators": "fails"},
        is_feature=True,
    ),
    Rule(
        "default-aux-ids",
        "Aux ids are outputs [1, L//2-1, L-4] of a target of L layers: the original code ignores what the config says.",
        {"eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "tensors-complete",
        "Every weight is there under its name, without a `model.` prefix (which only SGLang takes): a missing one is "
        "left as it was initialised. Engines take the embeddings, and vLLM a full head, from the target.",
        _all("silent"),
    ),
    Rule(
        "layer-zero-name",
        "Layer 0 is `midlayer` in a flat directory (the original code knows no other name) and `layers.0` in a "
        "speculators one (speculators knows no other).",
        {"speculators": "silent", "eagle": "silent"},
    ),
    Rule(
        "tensors-known",
        "No tensors beyond those: vLLM raises, the rest leave them unread; but SGLang loads `model.x` over `x` or `x` "
        "over `model.x`, whichever comes last.",
        {"vllm": "fails", "sglang": "silent", "speculators": "ignored", "eagle": "ignored"},
    ),
    Rule(
        "parameter-dtype",
        "Parameters are of 16-, 32- or 64-bit floats: every engine casts whole numbers without a word. Quantized ones "
        "(8-bit floats, or a config with `quantization_config`) are noted: nothing here vouches for their values.",
        _all("silent"),
    ),
    Rule(
        "shapes",
        "Every tensor has the shape that the config gives it.",
        _all("fails"),
    ),
    Rule(
        "finite",
        "Weights are finite; speculators takes NaN in embeddings or head for absent.",
        _all("silent"),
    ),
    Rule(
        "single-layer",
        "The draft has one layer: the original code builds no other.",
        {"eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "further-layers",
        "Layers after the first have `hidden_norm` equal to `input_layernorm` in a flat directory: SGLang norms by the "
        "former, vLLM by the latter.",
        {"sglang": "silent"},
    ),
    Rule(
        "own-embeddings",
        "Embeddings are the target's: SGLang puts the target's in place of trained ones unless `target_hidden_size` "
        "says another width.",
        {"sglang": "overwritten"},
        is_feature=True,
    ),
    Rule(
        "shared-embeddings",
        "A draft without embeddings is as wide as its target: otherwise there is nothing to take over.",
        _all("silent"),
    ),
    Rule(
        "embeddings-written",
        "A speculators directory has `embed_tokens`: speculators takes the target's only where it finds NaN, and "
        "transformers 5 leaves an absent weight unset, at whatever the memory held.",
        {"vllm": "ignored", "speculators": "silent"},
    ),
    Rule(
        "rope-type",
        "The RoPE type is one that transformers knows; engines refuse others.",
        {"vllm": "fails", "sglang": "fails", "speculators": "fails", "eagle": "fails"},
    ),
    Rule(
        "rope-spellings",
        "`rope_parameters` and top-level `rope_theta`/`rope_scaling` say the same: `rope_scaling` wins where both are "
        "read, and the original code reads the base at top level only, 10000 without it.",
        {"vllm": "silent", "sglang": "silent", "speculators": "silent", "eagle": "silent"},
    ),
    Rule(
        "rope-scaling",
        "RoPE is unscaled, or `rope_scaling` has exactly `type` (linear or dynamic) and `factor`: the original code "
        "takes no other, and with scaling its base is 10000 whatever `rope_theta` says.",
        {"eagle": "fails"},
        is_feature=True,
    ),
    Rule(
        "parallel-drafting",
        "The draft is not P-EAGLE: only vLLM and speculators have it.",
        {"sglang": "fails", "eagle": "silent"},
        is_feature=True,
    ),
    Rule(
        "mask-token",
        "A P-EAGLE draft has `mask_hidden`, `parallel_drafting` is true where it is written, and its mask id is under "
        "`mask_token_id`, `pard_token` or `ptd_token_id`, looked up in this order (by older runners from the second "
        "on), the same under each; in a speculators peagle config under `mask_token_id`.",
        {"vllm": "fails", "speculators": "fails"},
    ),
    Rule(
        "peagle-type",
        "`speculators_model_type` of a P-EAGLE draft is peagle: as eagle3 its `mask_hidden` is left unread, and a "
        "chain is drafted that it was not trained for.",
        {"vllm": "silent", "speculators": "silent"},
    ),
    Rule(
        "target-vocabulary",
        "`vocab_size` is the target's.",
        _all("fails"),
    ),
    Rule(
        "target-width",
        "`target_hidden_size`, or else `hidden_size`, is the target's width.",
        _all("fails"),
    ),
    Rule(
        "target-context",
        "The draft's context (`max_position_embeddings`, times `factor` of a RoPE scaling that does not name the "
        "original length) is no shorter than the target's: SGLang refuses unless it serves fewer positions or "
        "`SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1` is set; vLLM raises it to the target's where it only sizes a "
        "table (default, linear, llama3, ntk and proportional RoPE), and otherwise serves no more than the draft's.",
        {"vllm": "note", "sglang": "fails"},
    ),
    Rule(
        "target-rope",
        "The draft's RoPE is usually its target's; both are read from their own configs.",
        _all("note"),
    ),
    Rule(
        "target-identity",
        "The target is the one in `origin.json`; with other weights fewer tokens are accepted.",
        _all("note"),
    ),
)


def rules_page() -> str:
    """Return the table as Markdown."""
    lines = [
        "# What serving engines expect of a draft",
        "",
        "Generated from `eagle_offline/serving/rules.py` (`python -m eagle_offline.serving.rules "
        "schemas/serving-rules.md`). A cell says what the engine does when the rule does not hold; `-`: not concerned.",
        "",
        *(f"- *{effect}*: {meaning}" for effect, meaning in EFFECTS.items()),
        "",
        "Rules marked ◇ name kinds of drafts that an engine does not serve; the others name defects.",
        "",
        "| id | rule | " + " | ".join(ENGINE_NAMES[engine] for engine in ENGINES) + " |",
        "|---|---|" + "---|" * len(ENGINES),
    ]
    for rule in RULES:
        cells = [rule.effects.get(engine, "-") for engine in ENGINES]
        mark = " ◇" if rule.is_feature else ""
        lines.append(f"| `{rule.id}`{mark} | {rule.statement} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(rules_page(), encoding="utf-8")

"""Every rule is broken once in an otherwise clean directory, and only its own verdicts change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from eagle_offline.errors import DataError, MismatchError
from eagle_offline.provenance import digest_checkpoint
from eagle_offline.serving.check import CHECKS, check_draft
from eagle_offline.serving.rules import ENGINES, RULES, rules_page
from tests.builders import shared_target
from tests.serving.directories import (
    AUX_IDS,
    HEAD_DIM,
    HIDDEN_SIZE,
    KINDS,
    LAYOUTS,
    OUTPUTS,
    SELECTED,
    VOCAB_SIZE,
    Directory,
    Kind,
    flat,
    make_model,
    make_origin,
    speculators,
)

PAGE = Path(__file__).parents[2] / "schemas" / "serving-rules.md"
ENGINES_THAT_READ = {"flat": ("vllm", "sglang", "eagle"), "speculators": ("vllm", "speculators")}


@dataclass(frozen=True)
class Broken:
    """A change that breaks one rule.

    Attributes:
        rule: the rule.
        change: what is done to a clean directory.
        problems, notes: engines that see one.
        layout, kind: of the clean directory.
        origin: whether it says where it comes from.
        also: verdicts on other rules that follow of necessity.
    """

    rule: str
    change: Callable[[Directory], object]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layout: str = "flat"
    kind: Kind = field(default_factory=Kind)
    origin: bool = True
    also: frozenset[tuple[str, str]] = frozenset()


def put(name, value):
    return lambda made: made.config.__setitem__(name, value)


def put_field(name, value):
    return lambda made: made.fields.__setitem__(name, value)


def without(name):
    return lambda made: made.config.pop(name)


def tensor(name, value):
    return lambda made: made.tensors.__setitem__(name, value)


def cast(name, dtype):
    return lambda made: made.tensors.__setitem__(name, made.tensors[name].to(dtype))


def no_tensor(*names):
    return lambda made: [made.tensors.pop(name) for name in names]


def both(*changes):
    return lambda made: [change(made) for change in changes]


def settings(*path_and_value):
    def change(made):
        place = made.config["speculators_config"]
        for key in path_and_value[:-2]:
            place = place[key]
        place[path_and_value[-2]] = path_and_value[-1]

    return change


def aux(top, nested):
    return both(put(AUX_IDS, top), put("eagle_config", {AUX_IDS: nested, "use_aux_hidden_state": True}))


def become(other):
    """Take the content of a directory of another make, origin kept."""

    def change(made):
        replaced = other()
        made.config, made.tensors = replaced.config, replaced.tensors

    return change


def offsets(ids):
    return torch.tensor(ids) - torch.arange(len(ids))


def shuffled(made):
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7, 8, 9])
    made.tensors["d2t"] = offsets(torch.tensor(SELECTED)[order].tolist())


def nan(made):
    made.tensors["norm.weight"][3] = torch.nan


def renamed(old, new):
    def change(made):
        made.tensors = {name.replace(old, new): value for name, value in made.tensors.items()}

    return change


def prefixed(made):
    made.tensors = {
        name if name in ("d2t", "t2d", "lm_head.weight", "fc.weight") else f"model.{name}": value
        for name, value in made.tensors.items()
    }


ALL_FLAT, ALL_NESTED = ENGINES_THAT_READ["flat"], ENGINES_THAT_READ["speculators"]
Q_BIAS, FC_NORM, ETC = "midlayer.self_attn.q_proj.bias", "fc_norm.0.weight", Kind(full_vocabulary=True)
QWEN3 = Kind(layer_style="qwen3")
PEAGLE = KINDS["peagle"]
QK_NORMS = both(*(tensor(f"midlayer.self_attn.{part}_norm.weight", torch.ones(HEAD_DIM)) for part in "qk"))
ROPE2 = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
UNTIED_NOTES = ("vllm", "eagle")
WIDE = both(
    put("target_hidden_size", 24),
    tensor("fc.weight", torch.zeros(HIDDEN_SIZE, 72)),
    tensor("embed_tokens.weight", torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)),
)

BROKEN = [
    Broken("architecture", put("architectures", ["Eagle3LlamaForCausalLM"]), ("sglang",)),
    Broken("architecture", put("architectures", ["GPT2LMHeadModel"]), ("vllm", "sglang")),
    Broken("architecture", put("architectures", []), ("vllm", "sglang")),
    Broken("model-type", without("model_type"), ("vllm", "sglang")),
    Broken("model-type", put_field("model_type", "gpt2"), ALL_NESTED, layout="speculators"),
    Broken("qwen3-layers", QK_NORMS, ALL_FLAT),
    Broken(
        "qwen3-layers",
        both(QK_NORMS, put("architectures", ["Eagle3Qwen3ForCausalLM"]), put("model_type", "qwen3")),
        ("sglang", "eagle"),
        also=frozenset({("architecture", "sglang")}),
    ),
    Broken("qwen3-layers", put_field("model_type", "qwen3"), ALL_NESTED, layout="speculators"),
    Broken("qwen3-layers", become(lambda: flat(QWEN3)), ("sglang", "eagle"),
           also=frozenset({("architecture", "sglang")})),
    Broken("qwen3-layers", no_tensor("layers.0.self_attn.q_norm.weight"), ALL_NESTED, layout="speculators",
           kind=QWEN3),
    Broken("qwen3-layers", put_field("model_type", "llama"), ALL_NESTED, layout="speculators", kind=QWEN3),
    Broken("shapes", tensor("layers.0.self_attn.k_norm.weight", torch.ones(3)), ALL_NESTED, layout="speculators",
           kind=QWEN3),
    Broken("finite", tensor("layers.0.self_attn.k_norm.weight", torch.full((4,), torch.nan)), ALL_NESTED,
           layout="speculators", kind=QWEN3),
    Broken("speculators-fields", settings("proposal_methods", []), ALL_NESTED, layout="speculators"),
    Broken("speculators-fields", settings("verifier", {}), ALL_NESTED, layout="speculators"),
    Broken("speculators-fields", put("speculators_model_type", "dflash"), ALL_NESTED, layout="speculators"),
    Broken("speculators-fields", settings("algorithm", None), ("speculators",), layout="speculators"),
    Broken("speculators-fields", settings("default_proposal_method", "x"), ("speculators",), layout="speculators"),
    Broken("llama-fields", put_field("num_key_value_heads", None), ALL_NESTED, layout="speculators",
           also=frozenset({("shapes", "vllm"), ("shapes", "speculators")})),
    Broken("llama-fields", put_field("rms_norm_eps", None), ALL_NESTED, layout="speculators"),
    Broken("activation", put("hidden_act", "gelu"), ("vllm", "sglang")),
    Broken("activation", put("hidden_act", "xyz"), ALL_FLAT),
    Broken("activation", put_field("hidden_act", "xyz"), ALL_NESTED, layout="speculators"),
    Broken("no-biases", tensor(Q_BIAS, torch.zeros(16)), ALL_FLAT),
    Broken("no-biases", both(tensor(Q_BIAS, torch.zeros(16)), put("attention_bias", True)), ("sglang", "eagle")),
    Broken("no-biases", put_field("attention_bias", True), ALL_NESTED, layout="speculators"),
    Broken("full-attention", put("layer_types", ["sliding_attention"]), ("sglang", "eagle")),
    Broken("residual-before-norm", put("norm_before_residual", True), ("sglang", "eagle")),
    Broken("norm-before-residual-written", without("norm_before_residual"), ("vllm",), layout="speculators"),
    Broken("norm-before-fc", both(put("norm_before_fc", True), tensor("input_norm.weight", torch.ones(48))),
           ("eagle",)),
    Broken("fc-norm", become(lambda: flat(Kind(fc_norm=True))), ("eagle",)),
    Broken(
        "fc-norm",
        become(lambda: speculators(Kind(fc_norm=True, mask_token_id=5))),
        ("vllm",),
        layout="speculators",
        kind=PEAGLE,
    ),
    Broken("norm-flags", tensor(FC_NORM, torch.ones(16)), ("vllm", "sglang")),
    Broken("norm-flags", put("norm_before_fc", True), ("vllm", "speculators"), layout="speculators"),
    Broken("norm-output", put("norm_output", True), ("eagle",)),
    Broken("logit-transforms", put("logit_scale", 0.5), ("vllm",)),
    Broken("logit-transforms", put("final_logit_softcapping", 30.0), ("sglang",)),
    Broken("tie-word-embeddings", put("tie_word_embeddings", True), ("sglang",), UNTIED_NOTES),
    Broken("target-hidden-size", put("target_hidden_size", None), ALL_FLAT),
    Broken("target-hidden-size", put("target_hidden_size", HIDDEN_SIZE), ("eagle",)),
    Broken("same-width", both(WIDE), ("speculators",), layout="speculators", origin=False),
    Broken("draft-vocab-size", without("draft_vocab_size"), ALL_FLAT),
    Broken("draft-vocab-size", put("draft_vocab_size", None), ("sglang", "eagle"), kind=ETC),
    Broken("draft-vocab-size", put("draft_vocab_size", 11), ALL_NESTED, layout="speculators"),
    Broken("vocab-mapping", no_tensor("d2t", "t2d"), ALL_FLAT),
    Broken("vocab-mapping", no_tensor("t2d"), ("speculators",), layout="speculators"),
    Broken("full-vocabulary", tensor("d2t", torch.zeros(VOCAB_SIZE, dtype=torch.int64)), ("vllm",), ("sglang", "eagle"),
           kind=ETC),
    Broken("d2t-offsets", both(tensor("d2t", torch.tensor(SELECTED)), no_tensor("t2d")), ALL_FLAT),
    Broken("d2t-offsets", both(tensor("d2t", torch.zeros(10)), no_tensor("t2d")), ALL_FLAT),
    Broken("d2t-offsets", both(tensor("d2t", offsets([0, 0, *range(2, 10)])), no_tensor("t2d")), ALL_FLAT),
    Broken("d2t-offsets", both(tensor("d2t", offsets(SELECTED[:9])), no_tensor("t2d")), ALL_FLAT),
    Broken("d2t-order", shuffled, (), ("vllm", "sglang", "eagle")),
    Broken("d2t-order", shuffled, ("speculators",), ("vllm",), layout="speculators"),
    Broken("t2d-members", tensor("t2d", torch.ones(VOCAB_SIZE, dtype=torch.bool)), (), ("vllm", "sglang", "eagle")),
    Broken("t2d-members", tensor("t2d", torch.zeros(VOCAB_SIZE, dtype=torch.bool)), ("speculators",), ("vllm",),
           layout="speculators"),
    Broken("num-aux", put("num_aux_hidden_states", 4), ("vllm", "sglang")),
    Broken("num-aux", lambda made: made.fields.pop("num_aux_hidden_states"), ("vllm",), layout="speculators",
           kind=Kind(num_aux=4)),
    Broken("num-aux", tensor("fc.weight", torch.zeros(HIDDEN_SIZE, 47)), ("vllm", "sglang"),
           also=frozenset({("shapes", engine) for engine in ALL_FLAT})),
    Broken("three-aux-states", become(lambda: flat(Kind(num_aux=4))), ("eagle",), origin=False),
    Broken("aux-states-used", put("eagle_config", {AUX_IDS: OUTPUTS, "use_aux_hidden_state": False}),
           ("vllm", "sglang")),
    Broken(
        "fc-applied",
        both(aux([2], [1]), put("num_aux_hidden_states", 1), tensor("fc.weight", torch.zeros(16, 16))),
        ("sglang", "eagle"),
        origin=False,
        also=frozenset({("three-aux-states", "eagle")}),
    ),
    Broken("aux-ids-written", without(AUX_IDS), ("vllm",)),
    Broken("aux-ids-written", without(AUX_IDS), ("speculators", "vllm"), layout="speculators",
           kind=Kind(num_aux=4), also=frozenset({("num-aux", "speculators")})),
    Broken("aux-ids-written", without("eagle_config"), (), ("sglang",)),
    Broken("aux-ids-written", without("eagle_config"), ("sglang",), origin=False),
    Broken("aux-ids-written", both(without(AUX_IDS), without("eagle_config")), (), ("vllm", "sglang"), origin=False),
    Broken("aux-ids-agree", aux(OUTPUTS, OUTPUTS), ("vllm",)),
    Broken("aux-ids-agree", aux([2, 4, 5], [2, 4, 5]), ("sglang",)),
    Broken("aux-ids-agree", aux(OUTPUTS, OUTPUTS), ("vllm", "sglang"), origin=False),
    Broken("aux-ids-agree", put(AUX_IDS, OUTPUTS), ALL_NESTED, layout="speculators"),
    Broken("aux-ids-order", aux([4, 2, 5], [3, 1, 4]), ("vllm", "sglang"), origin=False),
    Broken("aux-ids-order", put(AUX_IDS, [0, 4, 5]), ALL_NESTED, layout="speculators", origin=False),
    Broken("aux-ids-in-range", both(aux([2, 4, 8], [1, 3, 7]), lambda m: m.origin.update(aux_layer_ids=[1, 3, 7])),
           ("sglang",), also=frozenset({("default-aux-ids", "eagle")})),
    Broken("aux-ids-in-range", both(aux([2, 4, 9], [1, 3, 8]), lambda m: m.origin.update(aux_layer_ids=[1, 3, 8])),
           ("vllm", "sglang"), also=frozenset({("default-aux-ids", "eagle")})),
    Broken("default-aux-ids", both(aux([1, 4, 5], [0, 3, 4]), lambda m: m.origin.update(aux_layer_ids=[0, 3, 4])),
           ("eagle",)),
    Broken("tensors-complete", no_tensor("norm.weight"), ALL_FLAT),
    Broken("tensors-complete", prefixed, ("vllm", "eagle")),
    Broken("tensors-complete", no_tensor("lm_head.weight"), ALL_FLAT),
    Broken("tensors-complete", no_tensor("lm_head.weight"), ("sglang", "eagle"), ("vllm",), kind=ETC),
    Broken("layer-zero-name", renamed("midlayer.", "layers.0."), ("eagle",)),
    Broken("layer-zero-name", renamed("layers.0.", "midlayer."), ("speculators",), layout="speculators"),
    Broken("tensors-known", tensor("extra.weight", torch.zeros(2)), ("vllm",), ("sglang", "eagle")),
    Broken("tensors-known", tensor("verifier_norm.weight", torch.zeros(2)), ("vllm",), ("speculators",),
           layout="speculators"),
    Broken("tensors-known", tensor("model.foo", torch.zeros(2)), ("vllm",), ("sglang", "eagle")),
    Broken("tensors-known", tensor("model.norm.weight", torch.zeros(HIDDEN_SIZE)), ("vllm", "sglang"), ("eagle",)),
    Broken("tensors-known", both(prefixed, tensor("model.foo", torch.zeros(2))), ("vllm",), ("sglang", "eagle"),
           also=frozenset({("tensors-complete", "vllm"), ("tensors-complete", "eagle")})),
    Broken("parameter-dtype", cast("fc.weight", torch.int32), ALL_FLAT),
    Broken("parameter-dtype", cast("midlayer.mlp.up_proj.weight", torch.uint8), ALL_FLAT),
    Broken("parameter-dtype", cast("fc.weight", torch.int32), ALL_NESTED, layout="speculators"),
    Broken("parameter-dtype", cast("fc.weight", torch.float8_e4m3fn), (), ALL_FLAT),
    Broken("parameter-dtype", put("quantization_config", {"quant_method": "fp8"}), (), ALL_FLAT),
    Broken("parameter-dtype", put_field("quantization_config", {"bits": 8}), (), ALL_NESTED, layout="speculators"),
    Broken("shapes", tensor("midlayer.mlp.up_proj.weight", torch.zeros(3, 16)), ALL_FLAT),
    Broken("finite", nan, ALL_FLAT),
    Broken("single-layer", become(lambda: flat(KINDS["two_layers"])), ("eagle",)),
    Broken("further-layers", no_tensor("layers.1.hidden_norm.weight"), ("sglang",), kind=KINDS["two_layers"]),
    Broken("further-layers", tensor("layers.1.hidden_norm.weight", torch.zeros(16)), ("sglang",),
           kind=KINDS["two_layers"]),
    Broken("own-embeddings", both(tensor("embed_tokens.weight", torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)),
                                  lambda m: m.origin.update(embeddings_trained=True)), ("sglang",)),
    Broken("own-embeddings", tensor("embed_tokens.weight", torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)), (), ("sglang",),
           origin=False),
    Broken("shared-embeddings", lambda m: m.origin.update(embeddings_trained=True), ALL_FLAT),
    Broken("shared-embeddings", both(WIDE, no_tensor("embed_tokens.weight")), ALL_FLAT, origin=False,
           also=frozenset({("target-hidden-size", "eagle")})),
    Broken("embeddings-written", no_tensor("embed_tokens.weight"), ("speculators",), layout="speculators"),
    Broken("rope-type", put("rope_parameters", {"rope_type": "weird", "rope_theta": 10000.0}), ALL_FLAT),
    Broken("rope-type", put("rope_parameters", {"rope_type": ["weird"], "rope_theta": 10000.0}), ALL_FLAT),
    Broken("rope-spellings", put("rope_theta", 500000.0), ALL_FLAT),
    Broken("rope-spellings", both(put("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
                                  without("rope_theta")), ("eagle",)),
    Broken("rope-spellings", both(put("rope_parameters", ROPE2)), ("eagle",)),
    Broken("rope-spellings", put_field("rope_scaling", {"rope_type": "linear", "factor": 2.0}), ALL_NESTED,
           layout="speculators"),
    Broken("rope-scaling", both(put("rope_parameters", KINDS["llama3_rope"].rope), put("rope_theta", 5e5),
                                put("rope_scaling", {k: v for k, v in KINDS["llama3_rope"].rope.items()
                                                     if k != "rope_theta"})), ("eagle",)),
    Broken("rope-scaling", both(put("rope_parameters", {**ROPE2, "rope_theta": 5e5}), put("rope_theta", 5e5),
                                put("rope_scaling", {"type": "linear", "factor": 2.0})), ("eagle",)),
    Broken("parallel-drafting", become(lambda: flat(PEAGLE)), ("sglang", "eagle")),
    Broken("mask-token", without("mask_token_id"), ALL_NESTED, layout="speculators", kind=PEAGLE),
    Broken("mask-token", both(without("mask_token_id"), without("pard_token")), ("vllm",), kind=PEAGLE),
    Broken("mask-token", put("pard_token", 6), ("vllm",), kind=PEAGLE),
    Broken("mask-token", put("ptd_token_id", "5"), ("vllm",), kind=PEAGLE),
    Broken("mask-token", put("parallel_drafting", False), ("vllm",), kind=PEAGLE),
    Broken("mask-token", put("parallel_drafting", "true"), ALL_NESTED, layout="speculators", kind=PEAGLE),
    Broken("mask-token", no_tensor("mask_hidden"), ALL_NESTED, layout="speculators", kind=PEAGLE),
    Broken("mask-token", no_tensor("mask_hidden"), ("vllm",), kind=PEAGLE),
    Broken("mask-token", put("mask_token_id", VOCAB_SIZE), ALL_NESTED, layout="speculators", kind=PEAGLE),
    Broken("mask-token", put("mask_token_id", -1), ("vllm",), kind=PEAGLE),
    Broken("mask-token", put("mask_token_id", True), ("vllm",), kind=PEAGLE),
    Broken("peagle-type", put("speculators_model_type", "eagle3"), ALL_NESTED, layout="speculators", kind=PEAGLE),
    Broken("shapes", tensor("mask_hidden", torch.zeros(1, 1, 47)), ALL_FLAT, kind=PEAGLE),
    Broken("shapes", tensor("mask_hidden", torch.zeros(1, 48)), ALL_NESTED, layout="speculators", kind=PEAGLE),
    Broken("finite", tensor("mask_hidden", torch.full((1, 1, 48), torch.nan)), ALL_FLAT, kind=PEAGLE),
    Broken("further-layers", no_tensor("layers.3.hidden_norm.weight"), ("sglang",), kind=KINDS["peagle_four_layers"]),
    Broken("target-vocabulary", lambda m: m.origin.update(target_vocab_size=41), ALL_FLAT),
    Broken("target-width", lambda m: m.origin.update(target_hidden_size=17), ALL_FLAT),
]  # fmt: skip


def clean(broken: Broken) -> Directory:
    made = LAYOUTS[broken.layout](broken.kind)
    made.origin = make_origin(broken.kind).model_dump() if broken.origin else None
    return made


def remarks(report):
    return {(v.rule, v.engine): v.status for v in report.verdicts if v.status in ("problem", "note")}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.rule)
def test_a_broken_rule_is_seen_by_its_engines_alone(tmp_path, broken):
    made = clean(broken)
    before = remarks(check_draft(made.write(tmp_path / "clean")))
    broken.change(made)
    report = check_draft(made.write(tmp_path / "broken"))
    # A change may settle what was only noted before.
    changed = {key: status for key, status in remarks(report).items() if before.get(key) != status}
    also = {key: changed.pop(key, None) for key in broken.also}
    assert None not in also.values(), also
    expected = {(broken.rule, engine): "problem" for engine in broken.problems}
    expected |= {(broken.rule, engine): "note" for engine in broken.notes}
    assert changed == expected
    for engine in ENGINES:
        seen = {v.rule for v in report.problems(engine)}
        assert report.is_clean(engine) == (not seen)
        assert all(v.message and v.effect for v in report.problems(engine))


def test_every_rule_is_broken_somewhere():
    # These need a target, or are broken by the other layout.
    elsewhere = {"layout", "target-rope", "target-identity", "target-context"}
    assert {broken.rule for broken in BROKEN} | elsewhere == {rule.id for rule in RULES} == set(CHECKS)


def test_every_silent_effect_is_seen_for_its_engine():
    seen = {(broken.rule, engine) for broken in BROKEN for engine in broken.problems}
    silent = {
        (rule.id, engine)
        for rule in RULES
        for engine, effect in rule.effects.items()
        if effect in ("silent", "overwritten") and engine in ENGINES_THAT_READ["flat"]
    }
    assert silent <= seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_decides_who_reads_a_draft(tmp_path, layout):
    report = check_draft(LAYOUTS[layout]().write(tmp_path))
    for engine in ENGINES:
        meant = engine in ENGINES_THAT_READ[layout]
        assert report.is_clean(engine) == meant
        assert (engine in report.claimed) == meant
        if not meant:
            assert [v.rule for v in report.problems(engine)] == ["layout"]


def test_another_layout_than_expected_names_both(tmp_path):
    with pytest.raises(MismatchError, match="expected the flat layout, found speculators"):
        check_draft(speculators().write(tmp_path), layout="flat")


def test_what_no_engine_reads_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a draft directory"):
        check_draft(tmp_path)
    make_model().config.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="export it first"):
        check_draft(tmp_path)


def test_a_report_has_one_verdict_a_rule_and_engine_and_says_them(tmp_path):
    made = flat()
    made.config["logit_scale"] = 2.0
    report = check_draft(made.write(tmp_path))
    assert len(report.verdicts) == len(RULES) * len(ENGINES)
    content = json.loads(json.dumps(report.to_json()))
    assert content["engines"]["vllm"]["problems"][0]["rule"] == "logit-transforms"
    assert content["engines"]["sglang"]["clean"]
    assert not report.is_clean_as_claimed
    text = report.render_text()
    assert all(rule.id in text for rule in RULES)
    assert "logit_scale 2.0 scales the draft's logits" in text
    assert "vLLM: 1 problem" in text


def test_a_target_is_compared(tmp_path):
    target = shared_target()
    made = flat()
    report = check_draft(made.write(tmp_path / "a"), target=target)
    assert {v.rule for v in report.problems("vllm")} == {"target-vocabulary", "target-width"}
    made.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    made.config["rope_theta"] = 5e5
    made.origin = make_origin().model_dump()
    report = check_draft(made.write(tmp_path / "b"), target=target)
    assert report.verdict("target-rope", "vllm").status == "note"
    assert report.verdict("target-identity", "sglang").status == "note"
    made.origin["target_digest"] = digest_checkpoint(target)
    report = check_draft(made.write(tmp_path / "c"), target=target)
    assert report.verdict("target-identity", "sglang").status == "ok"


def written_target(directory, **fields):
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 8, **fields})
    )
    return directory


def test_a_context_shorter_than_the_targets_is_refused_by_sglang(tmp_path):
    short = {"max_position_embeddings": 64}
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    llama3 = {"rope_parameters": KINDS["llama3_rope"].rope}
    directory = flat().write(tmp_path / "draft")
    for index, (fields, status) in enumerate(
        [(short, "ok"), ({"max_position_embeddings": 65}, "problem"), (short | linear, "problem"),
         (short | llama3, "ok"), ({}, "not applicable")]
    ):  # fmt: skip
        report = check_draft(directory, target=written_target(tmp_path / str(index), **fields))
        assert report.verdict("target-context", "sglang").status == status, fields
        expected = "note" if status == "problem" else status
        assert report.verdict("target-context", "vllm").status == expected, fields
        assert report.verdict("target-context", "eagle").status == "not applicable"
    assert report.verdict("target-context", "sglang").status == "not applicable"
    assert check_draft(directory).verdict("target-context", "sglang").status == "not applicable"


@pytest.mark.parametrize("activation", ["gelu", "xyz"])
def test_a_draft_that_no_serving_engine_takes_is_not_clean(tmp_path, activation):
    made = flat()
    made.config["hidden_act"] = activation
    report = check_draft(made.write(tmp_path))
    assert set(report.claimed) <= {"eagle"}
    assert report.passes("eagle") == (activation == "gelu")
    assert not report.is_clean_as_claimed
    assert not report.passes(None)
    assert report.conclusions()[-1] == "verdict: not clean, none of vLLM, SGLang, speculators serves this kind of draft"


def test_the_verdict_names_the_engines_that_it_covers(tmp_path):
    report = check_draft(flat().write(tmp_path))
    assert [report.passes(engine) for engine in (None, "sglang", "speculators")] == [True, True, False]
    assert report.conclusions()[-1] == "verdict: clean (covers vLLM, SGLang, original EAGLE)"
    assert report.conclusions("sglang")[-1] == "verdict: clean (covers SGLang)"
    assert report.render_text("speculators").endswith("verdict: not clean (covers speculators)")


def test_default_aux_ids_are_held_against_those_of_training(tmp_path):
    made = flat()
    made.origin = make_origin(aux_layer_ids=[0, 3, 4]).model_dump()
    message = check_draft(made.write(tmp_path / "a")).verdict("default-aux-ids", "eagle").message
    assert message == "reads outputs [1, 3, 4], the draft was trained on [0, 3, 4]"
    made.origin = make_origin().model_dump()
    made.config |= {AUX_IDS: [1, 4, 5], "eagle_config": {AUX_IDS: [0, 3, 4]}}
    assert check_draft(made.write(tmp_path / "b")).verdict("default-aux-ids", "eagle").status == "ok"
    made.origin = None
    target = written_target(tmp_path / "target")
    (tmp_path / "b" / "origin.json").unlink()
    message = check_draft(made.write(tmp_path / "b"), target=target).verdict("default-aux-ids", "eagle").message
    assert message == "reads outputs [1, 3, 4], the config says [0, 3, 4]"


def test_int32_offsets_are_as_good_as_int64(tmp_path):
    made = flat()
    made.tensors["d2t"] = made.tensors["d2t"].int()
    assert check_draft(made.write(tmp_path)).is_clean_as_claimed


def test_what_transformers_thinks_of_a_config_is_not_logged(tmp_path, capfd):
    made = flat()
    made.config |= {"rope_parameters": {"rope_type": "weird", "rope_theta": 1e4}}
    check_draft(made.write(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_the_rules_page_is_that_of_the_code():
    assert PAGE.read_text() == rules_page(), "run python -m eagle_offline.serving.rules schemas/serving-rules.md"


def test_a_flat_draft_of_another_trainer_is_clean_where_it_runs(tmp_path):
    # The first EAGLE-3 checkpoints: no aux ids, no RoPE fields but the base, embeddings along.
    made = flat()
    later = ("eagle_config", "rope_parameters", "num_aux_hidden_states", "fc_norm", "norm_output", "head_dim")
    for name in (AUX_IDS, *later):
        del made.config[name]
    made.tensors["embed_tokens.weight"] = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    report = check_draft(made.write(tmp_path))
    assert report.claimed == ("vllm", "sglang", "eagle")
    assert report.is_clean_as_claimed
    notes = {v.rule for v in report.verdicts if v.status == "note"}
    assert notes == {"aux-ids-written", "own-embeddings", "default-aux-ids"}


def test_a_speculators_draft_of_another_trainer_is_clean_where_it_runs(tmp_path):
    made = speculators()
    made.config |= {"norm_before_residual": True, "target_hidden_size": None, AUX_IDS: None, "has_no_defaults": False}
    del made.fields["num_aux_hidden_states"]
    report = check_draft(made.write(tmp_path))
    assert report.claimed == ("vllm", "speculators")
    assert report.is_clean_as_claimed


def test_large_tensors_are_looked_at_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("eagle_offline.serving.tensor_files._PIECE_VALUES", 50)
    made = flat()
    made.tensors["lm_head.weight"][-1, -1] = torch.inf
    report = check_draft(made.write(tmp_path))
    assert report.verdict("finite", "vllm").message == "lm_head.weight holds NaN or infinity"

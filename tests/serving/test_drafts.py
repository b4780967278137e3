"""Drafts of any layout are read whole, or refused in one line that names what is wrong."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from eagle_offline.draft.files import write_draft
from eagle_offline.errors import DataError, EagleOfflineError, MismatchError
from eagle_offline.serving.check import check_draft
from eagle_offline.serving.drafts import detect_layout, read_draft
from tests.serving.directories import (
    AUX_IDS,
    FLAT_KINDS,
    HIDDEN_SIZE,
    KINDS,
    LAYOUTS,
    OUTPUTS,
    SELECTED,
    VOCAB_SIZE,
    flat,
    make_model,
    make_origin,
    speculators,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_as_it_was_written(tmp_path, kind):
    model, origin = make_model(KINDS[kind]), make_origin(KINDS[kind])
    write_draft(tmp_path, model, torch.tensor(KINDS[kind].selected), origin)
    draft = read_draft(tmp_path)
    assert (draft.layout, draft.has_embeddings, draft.origin) == ("native", True, origin)
    assert draft.aux_layer_ids == KINDS[kind].outputs
    assert draft.selected_token_ids.tolist() == KINDS[kind].selected
    assert_same_weights(draft.model, model)
    assert not draft.model.training
    assert draft.model.config.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_draft_is_read(tmp_path, layout):
    draft = read_draft(LAYOUTS[layout]().write(tmp_path))
    embedded = layout == "speculators"
    assert (draft.layout, draft.has_embeddings, draft.origin, draft.aux_layer_ids) == (layout, embedded, None, OUTPUTS)
    assert draft.selected_token_ids.tolist() == SELECTED
    assert_same_weights(draft.model, make_model(), without=() if embedded else ("embed_tokens.weight",))
    assert draft.model.embed_tokens.weight.any() == embedded
    assert detect_layout(tmp_path) == layout


@pytest.mark.parametrize("kind", ["narrow", "narrow_qwen3"])
def test_a_foreign_draft_of_another_width_brings_its_embeddings(tmp_path, kind):
    draft = read_draft(flat(FLAT_KINDS[kind]).write(tmp_path))
    assert draft.has_embeddings
    assert_same_weights(draft.model, make_model(FLAT_KINDS[kind]))
    made = flat(FLAT_KINDS[kind])
    del made.tensors["embed_tokens.weight"]
    refused(made.write(tmp_path), DataError, "missing tensors: embed_tokens.weight")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_draft_of_qwen3_layers_is_read(tmp_path, layout):
    kind = KINDS["qwen3_two_layers_31"]
    draft = read_draft(LAYOUTS[layout](kind).write(tmp_path))
    assert draft.model.config.layer_style == "qwen3"
    without = () if layout == "speculators" else ("embed_tokens.weight",)
    assert_same_weights(draft.model, make_model(kind), without)


def test_a_checkpoint_that_names_no_layer_style_is_of_llama_layers(tmp_path):
    write_draft(tmp_path, make_model(), torch.tensor(SELECTED), make_origin())
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("layer_style") == "llama"
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_draft(tmp_path).model.config.layer_style == "llama"
    (tmp_path / "config.json").write_text(json.dumps(content | {"layer_style": ["gemma"]}))
    refused(tmp_path, DataError, "layer_style: expected one of llama, qwen3, found")


def test_a_directory_without_aux_ids_or_t2d_says_so(tmp_path):
    made = flat()
    del made.config[AUX_IDS], made.config["eagle_config"], made.tensors["t2d"]
    assert read_draft(made.write(tmp_path)).aux_layer_ids is None


def test_top_level_ids_alone_are_layers_executed(tmp_path):
    made = flat()
    del made.config["eagle_config"]
    assert read_draft(made.write(tmp_path)).aux_layer_ids == OUTPUTS


def test_unordered_ids_are_put_in_order_with_their_rows(tmp_path):
    made = flat()
    order = torch.tensor([3, 1, 0, 2, 9, 8, 7, 6, 5, 4])
    made.tensors["lm_head.weight"] = made.tensors["lm_head.weight"][order]
    made.tensors["d2t"] = torch.tensor(SELECTED)[order] - torch.arange(10)
    draft = read_draft(made.write(tmp_path))
    assert draft.selected_token_ids.tolist() == SELECTED
    assert torch.equal(draft.model.lm_head.weight, make_model().lm_head.weight)


def test_several_files_with_an_index_are_one_draft(tmp_path):
    made = flat().write(tmp_path)
    tensors = flat().tensors
    names = sorted(tensors)
    (made / "model.safetensors").unlink()
    places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, made / file)
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same_weights(read_draft(made).model, make_model(), without=("embed_tokens.weight",))
    (made / "model-1.safetensors").unlink()
    refused(made, DataError, "model-1.safetensors")


def test_dtype_is_the_one_stored(tmp_path):
    made = flat()
    made.tensors = {n: t.to(torch.float16) if t.is_floating_point() else t for n, t in made.tensors.items()}
    assert read_draft(made.write(tmp_path)).model.lm_head.weight.dtype == torch.float16


def test_a_pickle_is_not_opened_and_the_way_out_is_named(tmp_path):
    made = flat().write(tmp_path)
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    refused(made, DataError, "pytorch_model.bin.*pickle.*save_file")


def test_what_is_no_draft_is_refused(tmp_path):
    refused(tmp_path / "absent", DataError, "not a draft directory")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    refused(tmp_path, DataError, "not a draft's config")


def drop(name):
    return lambda made: made.tensors.pop(name)


def put(name, tensor):
    return lambda made: made.tensors.__setitem__(name, tensor)


def write(name, value):
    return lambda made: made.config.__setitem__(name, value)


def spoil(name, value):
    return lambda made: made.tensors[name].view(-1)[3:4].fill_(value)


def prefix(made):
    made.tensors = {f"model.{name}": tensor for name, tensor in made.tensors.items() if name != "fc.weight"} | {
        "fc.weight": made.tensors["fc.weight"]
    }


REFUSED = {
    "missing norm": (drop("norm.weight"), DataError, "missing tensors: norm.weight"),
    "missing fc": (drop("fc.weight"), DataError, "fc.weight"),
    "missing d2t": (drop("d2t"), DataError, "d2t is missing"),
    "prefix": (prefix, DataError, "must not begin with"),
    "shape": (put("midlayer.mlp.up_proj.weight", torch.zeros(3, HIDDEN_SIZE)), DataError, "up_proj.*shape"),
    "rows of the head": (put("lm_head.weight", torch.zeros(9, HIDDEN_SIZE)), MismatchError, "draft_vocab_size"),
    "absolute ids": (put("d2t", torch.tensor(SELECTED)), MismatchError, "outside a vocabulary"),
    "t2d": (put("t2d", torch.zeros(VOCAB_SIZE, dtype=torch.bool)), MismatchError, "t2d"),
    "twice": (
        lambda made: (put("d2t", torch.zeros(10, dtype=torch.int64) - torch.arange(10))(made), drop("t2d")(made)),
        MismatchError,
        "twice",
    ),
    "ids disagree": (write(AUX_IDS, OUTPUTS), MismatchError, "layers executed"),
    "too many ids": (
        lambda made: (write(AUX_IDS, [2, 3, 4, 5])(made), write("eagle_config", {})(made)),
        MismatchError,
        "4 aux layers",
    ),
    "num aux": (write("num_aux_hidden_states", 2), MismatchError, "num_aux_hidden_states 2"),
    "fc width": (put("fc.weight", torch.zeros(HIDDEN_SIZE, 47)), MismatchError, "47"),
    "attention bias": (write("attention_bias", True), MismatchError, "attention_bias"),
    "q norm": (put("midlayer.self_attn.q_norm.weight", torch.ones(4)), MismatchError, "q/k norm"),
    "qwen3 by type alone": (write("model_type", "qwen3"), MismatchError, "model_type 'qwen3' with llama layers"),
    "qwen3 by name alone": (write("architectures", ["Eagle3Qwen3ForCausalLM"]), MismatchError, "'llama' with qwen3"),
    "qwen3 without norms": (
        lambda made: made.config.update(architectures=["Eagle3Qwen3ForCausalLM"], model_type="qwen3"),
        DataError,
        "missing tensors: layers.0.self_attn.q_norm.weight, layers.0.self_attn.k_norm.weight",
    ),
    "window": (write("use_sliding_window", True), MismatchError, "sliding attention"),
    "another model type": (write("model_type", "gemma3"), MismatchError, "model_type 'gemma3'"),
    "norm before residual": (write("norm_before_residual", True), MismatchError, "norm_before_residual"),
    "norm before fc": (write("norm_before_fc", True), MismatchError, "norm_before_fc"),
    "mask of no token": (
        put("mask_hidden", torch.zeros(1, 1, 48)),
        DataError,
        "no mask token id under mask_token_id, p",
    ),
    "unknown tensor": (put("adapter.weight", torch.zeros(2)), MismatchError, "adapter.weight"),
    "unknown rope": (write("rope_scaling", {"rope_type": "nonsense", "factor": 2.0}), MismatchError, "config"),
    "activation": (write("hidden_act", "nonsense"), MismatchError, "hidden_act"),
    "no size": (write("hidden_size", "wide"), DataError, "hidden_size.*positive integer"),
    "absurd vocabulary": (write("vocab_size", 10**12), DataError, "vocab_size"),
    "absurd layers": (write("num_hidden_layers", 10**12), DataError, "num_hidden_layers"),
    "heads": (write("num_key_value_heads", 3), MismatchError, "heads"),
    "NaN": (spoil("norm.weight", float("nan")), DataError, "model.safetensors: norm.weight holds NaN"),
    "infinity": (spoil("lm_head.weight", float("-inf")), DataError, "lm_head.weight holds NaN or infinity"),
    "whole numbers": (put("fc.weight", torch.ones(HIDDEN_SIZE, 48, dtype=torch.int32)), MismatchError, "quantized"),
    "logit scale": (write("logit_scale", 0.5), MismatchError, "logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(tmp_path, name):
    change, error, pattern = REFUSED[name]
    made = flat()
    change(made)
    refused(made.write(tmp_path), error, pattern)


PARALLEL_REFUSED = {
    "no mask": (drop("mask_hidden"), DataError, "missing tensors: mask_hidden"),
    "mask of another shape": (
        put("mask_hidden", torch.zeros(1, 48)),
        DataError,
        r"mask_hidden: expected shape \[1, 1, 48",
    ),
    "mask of another width": (put("mask_hidden", torch.zeros(1, 1, 16)), DataError, r"found \[1, 1, 16\]"),
    "NaN in the mask": (spoil("mask_hidden", float("nan")), DataError, "mask_hidden holds NaN"),
    "no token": (
        lambda made: made.config.update(mask_token_id=None, pard_token=None),
        DataError,
        "a P-EAGLE draft, and no mask token id under mask_token_id",
    ),
    "outside": (
        write("mask_token_id", VOCAB_SIZE),
        DataError,
        "mask_token_id: expected an id in a vocabulary of 40 tok",
    ),
    "negative": (write("mask_token_id", -1), DataError, "mask_token_id: .*found -1"),
    "truth": (write("mask_token_id", True), DataError, "mask_token_id: .*found True"),
    "text": (write("mask_token_id", "5"), DataError, "mask_token_id: .*found '5'"),
    "number": (write("mask_token_id", 5.0), DataError, "mask_token_id: .*found 5.0"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PARALLEL_REFUSED)
def test_what_does_not_fit_a_p_eagle_draft_is_named(tmp_path, name, layout):
    change, error, pattern = PARALLEL_REFUSED[name]
    made = LAYOUTS[layout](KINDS["peagle"])
    change(made)
    refused(made.write(tmp_path), error, pattern)


@pytest.mark.parametrize("name", ["pard_token", "ptd_token_id"])
def test_a_foreign_p_eagle_draft_names_its_mask_token_otherwise(tmp_path, name):
    made = flat(KINDS["peagle"])
    made.config[name] = made.config.pop("mask_token_id")
    config = read_draft(made.write(tmp_path)).model.config
    assert (config.parallel_drafting, config.mask_token_id) == (True, 5)
    made.config[name] = 6
    made.config["mask_token_id"] = 5
    refused(made.write(tmp_path), DataError, f"mask_token_id is 5 and {name} is 6: readers would disagree$")
    made = speculators(KINDS["peagle"])
    made.config[name] = made.config.pop("mask_token_id")
    refused(made.write(tmp_path), DataError, "no mask token id under mask_token_id$")


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_p_eagle_draft_is_read_with_its_mask(tmp_path, layout, embedded):
    kind = KINDS["peagle_four_layers"]
    made, expected = LAYOUTS[layout](kind), make_model(kind)
    del made.config["parallel_drafting"]  # what the tensor, or the type of a speculators config, says
    made.tensors.pop("embed_tokens.weight", None)
    if embedded:
        made.tensors["embed_tokens.weight"] = expected.embed_tokens.weight.detach()
    draft = read_draft(made.write(tmp_path))
    assert (draft.has_embeddings, draft.model.config.mask_token_id) == (embedded, 0)
    assert draft.model.config.parallel_drafting
    assert_same_weights(draft.model, expected, without=() if embedded else ("embed_tokens.weight",))


def test_a_speculators_config_of_another_type_than_its_tensors_is_refused(tmp_path):
    made = speculators(KINDS["peagle"])
    made.config["speculators_model_type"] = "eagle3"
    refused(made.write(tmp_path), MismatchError, "speculators_model_type 'eagle3' of peagle parts")


def test_further_layers_that_engines_read_differently_are_refused(tmp_path):
    made = flat(KINDS["two_layers"])
    made.tensors["layers.1.hidden_norm.weight"] += 1
    refused(made.write(tmp_path), MismatchError, "differ")


def test_origin_and_config_must_name_the_same_layers(tmp_path):
    made = flat()
    made.origin = make_origin(aux_layer_ids=[0, 3, 4]).model_dump()
    refused(made.write(tmp_path), MismatchError, "origin.json")


def test_an_unknown_rope_type_is_one_line_with_field_value_and_what_is_known(tmp_path, capfd):
    known = "expected one of default, .*linear, llama3, .*yarn, found 'weird'"
    for fields, where in (
        ({"rope_parameters": {"rope_type": "weird", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"type": "weird", "factor": 2.0}}, "rope_scaling.type"),
    ):
        made = flat()
        made.config |= fields
        refused(made.write(tmp_path), MismatchError, f"config.json: {where}: {known}")
    assert capfd.readouterr() == ("", "")


def test_a_bad_origin_is_one_phrase(tmp_path):
    made = flat()
    made.origin = make_origin().model_dump() | {"step": -1, "ttt_steps": "x"}
    refused(
        made.write(tmp_path), DataError, r"origin\.json: not a draft's origin: ttt_steps: Input should be a valid int"
    )
    for content, pattern in (("{", "Invalid JSON"), ("{}", "target_id: Field required$"), ("[]", "an object$")):
        (tmp_path / "origin.json").write_text(content)
        refused(tmp_path, DataError, pattern)
        with pytest.raises(DataError) as raised:
            read_draft(tmp_path)
        assert "http" not in str(raised.value)
        assert len(str(raised.value)) < len(str(tmp_path)) + 140


JUNK = [None, True, 0, -1, 3, 10**30, 1.5, float("nan"), "", "x", [], [None], [1, "a"], {}, {"a": 1}]


def test_changed_configs_never_end_in_a_traceback(tmp_path):
    rng = random.Random(0)
    for layout, make in LAYOUTS.items():
        directory = make().write(tmp_path / layout)
        for _ in range(150):
            made = make(rng.choice([KINDS["plain"], KINDS["peagle"]]))
            places = [made.config, made.fields]
            places += [part for part in (made.config.get("eagle_config"), made.fields["rope_parameters"]) if part]
            place = rng.choice(places)
            key = rng.choice(sorted(place))
            if rng.random() < 0.3:
                del place[key]
            else:
                place[key] = rng.choice(JUNK)
            (directory / "config.json").write_text(json.dumps(made.config))
            survives(directory)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "origin.json"])
def test_damaged_files_never_end_in_a_traceback(tmp_path, file):
    made = flat()
    made.origin = make_origin().model_dump()
    path = made.write(tmp_path) / file
    content, rng = path.read_bytes(), random.Random(1)
    for trial in range(60):
        damaged = bytearray(content)
        if trial % 3 == 0:
            damaged = damaged[: rng.randrange(len(damaged))]
        elif trial % 3 == 1:
            damaged = bytearray(rng.randbytes(rng.randrange(200)))
        else:
            for _ in range(4):
                damaged[rng.randrange(min(len(damaged), 2000))] = rng.randrange(256)
        path.write_bytes(damaged)
        survives(tmp_path)


def test_deeply_nested_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    refused(tmp_path, DataError, "cannot be read")


def survives(directory):
    for read in (read_draft, check_draft):
        with suppress(EagleOfflineError):
            read(directory)


def refused(directory, error, pattern):
    with pytest.raises(error) as raised:
        read_draft(directory)
    assert re.search(pattern, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)


def assert_same_weights(ours, expected, without=()):
    theirs = expected.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name not in without:
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_speculators_reader_takes_the_nested_fields(tmp_path):
    made = speculators()
    made.fields["rms_norm_eps"] = 1e-3
    assert read_draft(made.write(tmp_path)).model.config.rms_norm_eps == 1e-3

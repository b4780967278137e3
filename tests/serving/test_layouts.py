"""The two layouts are what their readers expect, written down by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from eagle_offline.serving.layouts import (
    flat_layout,
    ids_of,
    layers_executed,
    offsets_of,
    outputs_of,
    rope_fields,
    speculators_layout,
)
from tests.serving.directories import EXECUTED, FLAT_KINDS, KINDS, LAYOUTS, OUTPUTS, SELECTED, Kind, make_model

NAMED = {"target_name": "org/target", "target_architectures": ["LlamaForCausalLM"], "num_draft_tokens": 3}
UNSCALED = [name for name in KINDS if not name.endswith("rope")]
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default_other_base": {"rope_type": "default", "rope_theta": 5e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": KINDS["llama3_rope"].rope,
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 32,
    },
}


def laid_out(layout: str, kind: Kind, dtype: str = "fp32", include_embeddings: bool = False):
    model, ids = make_model(kind), torch.tensor(kind.selected)
    if layout == "flat":
        return flat_layout(model, ids, kind.outputs, include_embeddings=include_embeddings, dtype=dtype)
    return speculators_layout(model, ids, kind.outputs, include_embeddings=include_embeddings, dtype=dtype, **NAMED)


@pytest.mark.parametrize("kind", UNSCALED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_the_directory_written_by_hand(layout, kind):
    config, tensors = laid_out(layout, KINDS[kind], include_embeddings=layout == "speculators")
    expected = LAYOUTS[layout](KINDS[kind])
    assert config == expected.config
    assert tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def test_a_p_eagle_draft_with_normed_aux_states_is_the_flat_directory_written_by_hand():
    config, tensors = laid_out("flat", FLAT_KINDS["peagle_normed"])
    expected = LAYOUTS["flat"](FLAT_KINDS["peagle_normed"])
    assert config == expected.config
    assert tensors["mask_hidden"].shape == (1, 1, 48)
    assert tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("kind", ["narrow", "narrow_qwen3", "peagle_narrow"])
def test_a_narrow_draft_is_the_flat_directory_written_by_hand_with_its_embeddings(kind):
    config, tensors = laid_out("flat", FLAT_KINDS[kind], include_embeddings=True)
    expected = LAYOUTS["flat"](FLAT_KINDS[kind])
    assert config == expected.config
    assert tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_qwen3_fields_are_those_that_transformers_reads(layout):
    config, _ = laid_out(layout, KINDS["qwen3"])
    fields = config.get("transformer_layer_config", config)
    read = Qwen3Config(**fields)
    assert (read.head_dim, read.num_key_value_heads, read.sliding_window, read.layer_types) == (
        4, 2, None, ["full_attention"],
    )  # fmt: skip


def test_aux_ids_are_one_more_at_the_border_and_back():
    assert layers_executed(OUTPUTS) == EXECUTED
    assert outputs_of(EXECUTED) == OUTPUTS


def test_offsets_lead_back_to_the_ids():
    offsets = offsets_of(torch.tensor(SELECTED))
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [0, 1, 1, 4, 7, 7, 14, 14, 25, 30]
    assert ids_of(offsets).tolist() == SELECTED


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reader_gets_the_rope_of_training(layout, name):
    kind = Kind(rope=ROPES[name])
    config, _ = laid_out(layout, kind)
    fields = config.get("transformer_layer_config", config)
    read = dict(LlamaConfig(**fields).rope_parameters)
    assert read.pop("type", read["rope_type"]) == read["rope_type"]  # the alias that older readers want
    assert read == ROPES[name]
    # A reader that knows only the former fields.
    former = {key: value for key, value in fields.items() if key != "rope_parameters"}
    read = dict(LlamaConfig(**former).rope_parameters)
    read.pop("type", None)
    assert read == ROPES[name]


def test_default_rope_leaves_out_what_training_did_not_use():
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    config = make_model(Kind()).config
    config.rope_parameters = rope
    plain = {"rope_type": "default", "rope_theta": 1e6}
    assert rope_fields(config) == {"rope_parameters": plain, "rope_theta": 1e6}


@pytest.mark.parametrize("name", ["linear", "dynamic"])
def test_scaling_that_the_original_code_knows_has_its_two_fields(name):
    config, _ = laid_out("flat", Kind(rope=ROPES[name]))
    assert config["rope_scaling"] == {"type": name, "factor": ROPES[name]["factor"]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_is_that_of_floats_alone(layout):
    config, tensors = laid_out(layout, Kind(), dtype="bf16")
    assert config["dtype"] == "bfloat16"
    assert {name: str(t.dtype) for name, t in tensors.items() if t.dtype != torch.bfloat16} == {
        "d2t": "torch.int64",
        "t2d": "torch.bool",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_go_along_when_asked_for(layout):
    _, tensors = laid_out(layout, Kind(), include_embeddings=True)
    assert torch.equal(tensors["embed_tokens.weight"], make_model().embed_tokens.weight)


def test_another_target_width_is_written_and_the_own_is_not():
    assert laid_out("flat", Kind(target_hidden_size=24))[0]["target_hidden_size"] == 24
    assert "target_hidden_size" not in laid_out("flat", Kind())[0]

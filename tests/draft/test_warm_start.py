"""A fresh draft takes over what fits of another, token by token in the head, and refuses the rest by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import draft_config, initial_draft
from eagle_offline.draft.warm_start import DraftWeights, warm_start
from eagle_offline.errors import MismatchError
from eagle_offline.supervision import Head
from tests.draft.test_from_target import target_config

LAYERS = [1, 3, 4]
OURS, THEIRS = torch.tensor([0, 3, 4, 5, 17, 30]), torch.tensor([1, 3, 5, 8, 30])


def target_parts() -> tuple[torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(31, 32, generator=generator).bfloat16(), Head(torch.randn(31, 32, generator=generator))


def fresh(ids: torch.Tensor = OURS, seed: int = 0, **changes: Any) -> Eagle3DraftModel:
    given = {"draft_vocab_size": len(ids), "num_aux_hidden_states": 3, **changes}
    return initial_draft(draft_config(target_config().to_dict(), **given), *target_parts(), ids, seed=seed)


def source(ids: torch.Tensor = THEIRS, layers: list[int] | None = LAYERS, **changes: Any) -> DraftWeights:
    """Another draft, every weight of its own; its embeddings are the target's."""
    model = fresh(ids, seed=9, **changes)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "embed_tokens.weight":
                parameter.add_(torch.randn_like(parameter))
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return DraftWeights("org/draft", model.config, tensors, ids, layers)


def without(given: DraftWeights, *names: str) -> DraftWeights:
    return replace(given, tensors={name: tensor for name, tensor in given.tensors.items() if name not in names})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_style": "qwen3", "num_layers": 2},
        {"hidden_size": 16},
        {"fc_norm": True, "norm_output": True},
        {"mask_token_id": 7, "num_layers": 4},
    ],
)
def test_every_parameter_is_taken_and_rows_of_the_head_by_token(changes):
    model, start, given = fresh(**changes), fresh(**changes), source(**changes)
    record = warm_start(model, OURS, LAYERS, given)
    found = dict(model.named_parameters())
    for name, tensor in given.tensors.items():
        if name != "lm_head.weight":
            assert torch.equal(found[name], tensor), name
    for row, token in enumerate(OURS.tolist()):
        both = token in THEIRS.tolist()
        expected = given.tensors["lm_head.weight"][THEIRS.tolist().index(token)] if both else start.lm_head.weight[row]
        assert torch.equal(found["lm_head.weight"][row], expected), token
    assert (record.name, record.head_rows, record.num_head_rows) == ("org/draft", 3, 6)
    assert (record.own_embeddings, record.aux_layers_known, record.differing) == (False, True, {})
    assert set(record.parameters) == given.tensors.keys() - {"embed_tokens.weight"}
    mask = "; mask_hidden its own" if "mask_token_id" in changes else ""
    assert record.describe() == f"start from org/draft: 3 of 6 head rows taken, embeddings the target's{mask}"


def test_the_same_vocabulary_takes_every_row():
    model, given = fresh(), source(OURS)
    assert warm_start(model, OURS, LAYERS, given).head_rows == 6
    assert torch.equal(model.lm_head.weight, given.tensors["lm_head.weight"])


def test_no_common_token_takes_no_row():
    model, start = fresh(), fresh()
    record = warm_start(model, OURS, LAYERS, source(torch.tensor([1, 2])))
    assert record.head_rows == 0
    assert "lm_head.weight" not in record.parameters
    assert torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_half_precision_is_widened():
    given = source()
    given = replace(given, tensors={name: tensor.bfloat16() for name, tensor in given.tensors.items()})
    model = fresh()
    warm_start(model, OURS, LAYERS, given)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.fc.weight, given.tensors["fc.weight"].float())


def test_absent_embeddings_stay_the_target_s_and_frozen():
    model, start = fresh(), fresh()
    record = warm_start(model, OURS, LAYERS, without(source(), "embed_tokens.weight"))
    assert torch.equal(model.embed_tokens.weight, start.embed_tokens.weight)
    assert not model.embed_tokens.weight.requires_grad
    assert not record.own_embeddings


def test_trained_embeddings_are_taken_and_said_so():
    given = source()
    given.tensors["embed_tokens.weight"][3] += 1  # type: ignore[index]
    model = fresh()
    record = warm_start(model, OURS, LAYERS, given)
    assert record.own_embeddings
    assert "embed_tokens.weight" in record.parameters
    assert torch.equal(model.embed_tokens.weight, given.tensors["embed_tokens.weight"])
    assert record.describe().endswith("embeddings its own")


def test_the_target_s_embeddings_rounded_by_an_export_stay_the_target_s():
    model = fresh()
    with torch.no_grad():
        model.embed_tokens.weight.add_(1e-3)  # a target in float32, whose embeddings bf16 cannot hold
    exact = model.embed_tokens.weight.detach().clone()
    given = source()
    given = replace(given, tensors={**given.tensors, "embed_tokens.weight": exact.bfloat16()})
    assert not warm_start(model, OURS, LAYERS, given).own_embeddings
    assert torch.equal(model.embed_tokens.weight, exact)


def test_layers_that_the_source_does_not_name_are_taken_for_the_same_and_noted():
    record = warm_start(fresh(), OURS, LAYERS, source(layers=None))
    assert not record.aux_layers_known
    assert "does not say which target layers" in record.describe()


def test_what_changes_no_shape_is_noted():
    given = source()
    given.config.rope_parameters = {"rope_type": "default", "type": "default", "rope_theta": 10.0}
    given.config.rms_norm_eps = 1e-6
    record = warm_start(fresh(), OURS, LAYERS, given)
    assert record.differing["rms_norm_eps"] == (1e-6, 1e-4)
    assert record.differing["rope_parameters"][0] == {"rope_type": "default", "rope_theta": 10.0}
    assert "rms_norm_eps was 1e-06, is 0.0001" in record.describe()


@pytest.mark.parametrize("norm_output", [False, True])
def test_a_p_eagle_draft_starts_from_an_eagle_3_draft_with_a_random_mask(norm_output):
    """It feeds nothing back, so what the other fed back is no obstacle."""
    model, start, given = fresh(mask_token_id=7), fresh(mask_token_id=7), source(norm_output=norm_output)
    record = warm_start(model, OURS, LAYERS, given)
    assert torch.equal(model.mask_hidden, start.mask_hidden)
    assert torch.equal(model.fc.weight, given.tensors["fc.weight"])
    assert "mask_hidden" not in record.parameters
    assert record.describe().endswith("; mask_hidden random, it is an EAGLE-3 draft")


@pytest.mark.parametrize("norm_output", [False, True])
def test_an_eagle_3_draft_starts_from_a_p_eagle_draft_without_its_mask(norm_output):
    model, given = fresh(norm_output=norm_output), source(mask_token_id=7)
    record = warm_start(model, OURS, LAYERS, given)
    assert model.mask_hidden is None
    assert set(record.parameters) == given.tensors.keys() - {"embed_tokens.weight", "mask_hidden"}
    assert torch.equal(model.fc.weight, given.tensors["fc.weight"])
    assert record.describe().endswith("; its mask_hidden left out, it is a P-EAGLE draft")


def test_another_mask_token_is_said_and_no_obstacle():
    """The other's may occur in new data, where no draft can have it."""
    model, given = fresh(mask_token_id=8), source(mask_token_id=7)
    record = warm_start(model, OURS, LAYERS, given)
    assert model.config.mask_token_id == 8
    assert torch.equal(model.mask_hidden, given.tensors["mask_hidden"])
    assert record.describe().endswith("; mask_hidden its own; mask_token_id was 7, is 8")


def test_a_p_eagle_source_without_its_mask_is_damaged():
    with pytest.raises(MismatchError, match="mask_hidden is missing"):
        warm_start(fresh(mask_token_id=7), OURS, LAYERS, without(source(mask_token_id=7), "mask_hidden"))


# What is changed in the source, and the line that names it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_layers": 2}, "num_hidden_layers: expected 1, found 2 (give --num-draft-layers 2)"),
    "width": ({"hidden_size": 16}, "hidden_size: expected 32, found 16 (give --draft-hidden-size 16)"),
    "middle": ({"intermediate_size": 8}, "intermediate_size: expected 40, found 8 (give --draft-intermediate-size 8)"),
    "heads": ({"num_attention_heads": 2}, "num_attention_heads: expected 4, found 2 (give --draft-num-attention-heads"),
    "head width": ({"num_attention_heads": 4}, "head_dim: expected 16, found 8 (give --draft-num-attention-heads 4)"),
    "key heads": ({"num_key_value_heads": 4}, "num_key_value_heads: expected 2, found 4 (give --draft-num-key-value-"),
    "style": ({"layer_style": "qwen3"}, "layer_style: expected llama, found qwen3 (give --layer-style qwen3)"),
    "fc norm": ({"fc_norm": True}, "fc_norm: expected False, found True (give --fc-norm)"),
    "norm output": ({"norm_output": True}, "norm_output: expected False, found True (give --norm-output)"),
    "other layers": ({"layers": [1, 3, 5]}, "expected [1, 3, 4], found [1, 3, 5] (give --aux-layer-ids 1,3,5, of a"),
    "two layers": (
        {"layers": [1, 3], "num_aux_hidden_states": 2},
        "aux_layer_ids: expected [1, 3, 4], found [1, 3] (give --aux-layer-ids 1,3, of a cache that holds them)",
    ),
    "unnamed layers": (
        {"layers": None, "num_aux_hidden_states": 2},
        "num_aux_hidden_states: expected 3, found 2 (give --aux-layer-ids with 2 layers)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_kind_of_draft_names_field_values_and_flag(name):
    changes, line = REFUSED[name]
    refused(source(**changes), line)


def test_a_switch_that_is_on_here_alone_is_turned_off():
    with pytest.raises(MismatchError, match=r"fc_norm: expected True, found False \(give --no-fc-norm\)"):
        warm_start(fresh(fc_norm=True), OURS, LAYERS, source())


def test_every_difference_is_named_at_once():
    refused(source(num_layers=2, fc_norm=True), "num_hidden_layers", "fc_norm")


def test_a_draft_of_another_target_is_refused():
    given = source()
    given.config.vocab_size = 40
    refused(given, "vocab_size: expected 31, found 40 (it was made for another target)")


def test_a_missing_or_foreign_tensor_is_named():
    refused(without(source(), "layers.0.self_attn.q_proj.weight"), "layers.0.self_attn.q_proj.weight is missing")
    refused(without(source(), "lm_head.weight"), "lm_head.weight is missing")
    given = source()
    given = replace(given, tensors={**given.tensors, "fc.weight": torch.zeros(32, 5)})
    refused(given, "fc.weight: expected shape [32, 96], found [32, 5]")
    given = replace(given, tensors={**source().tensors, "lm_head.weight": torch.zeros(5, 7)})
    refused(given, "lm_head.weight: expected")


def refused(given: DraftWeights, *lines: str) -> None:
    """Refused in one line, and the fresh draft is as it was."""
    model, start = fresh(), fresh().state_dict()
    with pytest.raises(MismatchError, match=re.escape("--init-from org/draft: ")) as raised:
        warm_start(model, OURS, LAYERS, given)
    for line in lines:
        assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())

"""The draft model: parameter names, one step as an ordinary forward, and the key/value cache of an unroll."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle_offline import Eagle3DraftModel
from tests.oracles import ttt
from tests.oracles.drafts import SHAPES, Shape, make_config, make_draft, twin
from tests.oracles.samples import DRAFT_VOCAB_SIZE, NUM_AUX, TARGET_HIDDEN_SIZE, VOCAB_SIZE

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides


def inputs(seed: int, batch_size: int = 2, num_slots: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, T], aux states [B, T, A * Ht] and an attention mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (batch_size, num_slots), generator=generator)
    aux = torch.randn(batch_size, num_slots, NUM_AUX * TARGET_HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    return ids, aux, torch.ones_like(ids)


def expected_names(shape: Shape) -> set[str]:
    names = {"embed_tokens.weight", "fc.weight", "norm.weight", "lm_head.weight", "layers.0.hidden_norm.weight"}
    if shape.fc_norm:
        names |= {f"fc_norm.{i}.weight" for i in range(NUM_AUX)}
    for layer in range(shape.num_layers):
        prefix = f"layers.{layer}"
        names |= {f"{prefix}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        names |= {f"{prefix}.self_attn.{part}_proj.weight" for part in "qkvo"}
        names |= {f"{prefix}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    return names


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_have_the_names_and_widths_that_serving_engines_read(shape: str) -> None:
    model = make_draft(SHAPES[shape], 0)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected_names(SHAPES[shape])
    hidden = model.config.hidden_size
    heads, key_heads, size = SHAPES[shape].num_heads, SHAPES[shape].num_key_value_heads, SHAPES[shape].head_dim
    assert parameters["fc.weight"].shape == (hidden, NUM_AUX * TARGET_HIDDEN_SIZE)
    assert parameters["embed_tokens.weight"].shape == (VOCAB_SIZE, hidden)
    assert parameters["lm_head.weight"].shape == (DRAFT_VOCAB_SIZE, hidden)
    assert parameters["layers.0.self_attn.q_proj.weight"].shape == (heads * size, 2 * hidden)
    assert parameters["layers.0.self_attn.k_proj.weight"].shape == (key_heads * size, 2 * hidden)
    assert parameters["layers.0.self_attn.o_proj.weight"].shape == (hidden, heads * size)
    if SHAPES[shape].num_layers > 1:
        assert parameters["layers.1.self_attn.q_proj.weight"].shape == (heads * size, hidden)
    if SHAPES[shape].fc_norm:
        assert parameters["fc_norm.0.weight"].shape == (TARGET_HIDDEN_SIZE,)


@pytest.mark.parametrize("shape", ["plain", "fc_norm"])
def test_projection_is_one_linear_map_after_a_norm_per_chunk_when_asked(shape: str) -> None:
    model = make_draft(SHAPES[shape], 1)
    _, aux, _ = inputs(1)
    expected = torch.stack([twin(model).project(row) for row in aux])
    torch.testing.assert_close(model.project_hidden_states(aux), expected, **TOLERANCE)


@pytest.mark.parametrize("cache", ["absent", "empty"])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_zero_is_an_ordinary_causal_forward(shape: str, cache: str) -> None:
    model = make_draft(SHAPES[shape], 2)
    draft = twin(model)
    ids, aux, mask = inputs(2)
    found = model(
        ids,
        projected_hidden_states=model.project_hidden_states(aux),
        attention_mask=mask,
        cache_hidden=None if cache == "absent" else [[], []],
    )
    plain = torch.stack([ttt.causal_forward(draft, i, draft.project(a)) for i, a in zip(ids, aux, strict=True)])
    normed = draft.norm("norm", plain)
    torch.testing.assert_close(found, normed if SHAPES[shape].norm_output else plain, **TOLERANCE)
    torch.testing.assert_close(model.compute_logits(found), draft.linear("lm_head", normed), **TOLERANCE)


@pytest.mark.parametrize("shape", ["plain", "two_layers"])
def test_a_slot_does_not_read_what_comes_after_it(shape: str) -> None:
    model = make_draft(SHAPES[shape], 3)
    ids, aux, mask = inputs(3)
    other_ids, other_aux, _ = inputs(4)
    changed_ids, changed_aux = ids.clone(), aux.clone()
    changed_ids[:, 4:], changed_aux[:, 4:] = other_ids[:, 4:], other_aux[:, 4:]
    before = model(ids, model.project_hidden_states(aux), mask)
    after = model(changed_ids, model.project_hidden_states(changed_aux), mask)
    torch.testing.assert_close(after[:, :4], before[:, :4], **TOLERANCE)
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize("shape", ["plain", "two_layers", "all_at_once"])
def test_an_unroll_driven_by_hand_follows_the_definition_at_every_step(shape: str) -> None:
    model = make_draft(SHAPES[shape], 5)
    draft = twin(model)
    ids, aux, mask = inputs(5)
    rows = [ttt.Row([0] * 7, [False] * 7, list(range(7))) for _ in ids]
    states = [draft.project(row) for row in aux]
    fed_back, cache = model.project_hidden_states(aux), [[], []]
    for k in range(4):
        fed_back = model(ttt.shifted(ids, k), fed_back, mask, cache_hidden=cache)
        states = [ttt.draft_step(draft, rows[b], k, ttt.shifted(ids, k)[b], states[b]) for b in range(len(ids))]
        expected = torch.stack(states)
        torch.testing.assert_close(fed_back, expected, **TOLERANCE)
        torch.testing.assert_close(model.compute_logits(fed_back), draft.logits(expected), **TOLERANCE)


@pytest.mark.parametrize("shape", ["plain", "two_layers"])
def test_the_cache_is_extended_in_place_by_one_entry_a_step(shape: str) -> None:
    model = make_draft(SHAPES[shape], 6)
    ids, aux, mask = inputs(6)
    keys: list[object] = []
    values: list[object] = []
    cache = [keys, values]
    fed_back = model.project_hidden_states(aux)
    for k in range(3):
        kept = [*keys, *values]
        fed_back = model(ids, fed_back, mask, cache_hidden=cache)
        assert cache[0] is keys
        assert cache[1] is values
        assert len(keys) == len(values) == k + 1
        assert all(a is b for a, b in zip(kept, [*keys[:k], *values[:k]], strict=True))
    num_layers = SHAPES[shape].num_layers
    for entry in [*keys, *values]:
        if num_layers == 1:
            assert isinstance(entry, torch.Tensor)
        else:
            assert isinstance(entry, tuple)
            assert len(entry) == num_layers


def test_two_steps_that_share_a_cache_differ_from_two_that_do_not() -> None:
    model = make_draft(SHAPES["plain"], 7)
    ids, aux, mask = inputs(7)
    shared = [[], []]
    first = model(ids, model.project_hidden_states(aux), mask, cache_hidden=shared)
    together = model(ttt.shifted(ids, 1), first, mask, cache_hidden=shared)
    apart = model(ttt.shifted(ids, 1), first, mask, cache_hidden=[[], []])
    assert not torch.allclose(together, apart, atol=1e-3)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (3, 7), (2, 6)], ids=["right", "left", "both_sides"])
def test_padding_is_not_read_and_gives_no_nan(first: int, last: int) -> None:
    model = make_draft(SHAPES["two_layers"], 8)
    ids, aux, mask = inputs(8, batch_size=3)
    mask[1, :first], mask[1, last:] = 0, 0
    mask[2] = 0
    fed_back, cache = model.project_hidden_states(aux), [[], []]
    alone, alone_cache = model.project_hidden_states(aux[1:2, first:last]), [[], []]
    for k in range(3):
        fed_back = model(ttt.shifted(ids, k), fed_back, mask, cache_hidden=cache)
        alone_ids = ttt.shifted(ids, k)[1:2, first:last]
        alone = model(alone_ids, alone, mask[1:2, first:last], cache_hidden=alone_cache)
        assert torch.isfinite(fed_back).all()
        torch.testing.assert_close(fed_back[1:2, first:last], alone, **TOLERANCE)  # rotary angles are relative


def test_documents_of_a_row_are_read_apart_and_counted_from_zero() -> None:
    model = make_draft(SHAPES["plain"], 9)
    ids, aux, mask = inputs(9, batch_size=1, num_slots=8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    packed = model(ids, model.project_hidden_states(aux), mask, position_ids=positions, seq_lens=torch.tensor([[3, 4]]))
    for first, last in ((0, 3), (3, 7)):
        alone = model(ids[:, first:last], model.project_hidden_states(aux[:, first:last]), mask[:, first:last])
        torch.testing.assert_close(packed[:, first:last], alone, **TOLERANCE)
    assert torch.isfinite(packed).all()


def test_rotation_follows_the_given_positions() -> None:
    """Keys and queries that move together see the same past; a gap between them is seen."""
    model = make_draft(SHAPES["plain"], 10)
    ids, aux, mask = inputs(10)
    g = model.project_hidden_states(aux)
    counted = model(ids, g, mask)
    moved = model(ids, g, mask, position_ids=torch.arange(5, 12).expand(2, -1))
    stretched = model(ids, g, mask, position_ids=torch.arange(0, 21, 3).expand(2, -1))
    torch.testing.assert_close(moved, counted, **TOLERANCE)
    assert not torch.allclose(stretched, counted, atol=1e-3)


def test_a_saved_draft_comes_back_the_same(tmp_path: Path) -> None:
    model = make_draft(SHAPES["all_at_once"], 11).float()
    model.save_pretrained(tmp_path)
    back = Eagle3DraftModel.from_pretrained(tmp_path)
    assert back.config.fc_norm is True
    assert back.config.norm_output is True
    assert back.config.draft_vocab_size == DRAFT_VOCAB_SIZE
    assert back.config.target_hidden_size == TARGET_HIDDEN_SIZE
    for (name, parameter), (back_name, back_parameter) in zip(
        model.named_parameters(), back.named_parameters(), strict=True
    ):
        assert name == back_name
        assert torch.equal(parameter, back_parameter)
    ids, aux, mask = inputs(11)
    g = model.project_hidden_states(aux.float())
    assert torch.equal(model(ids, g, mask), back(ids, back.project_hidden_states(aux.float()), mask))


def test_defaults_of_the_configuration_are_those_of_the_contract() -> None:
    config = type(make_config(Shape()))(vocab_size=VOCAB_SIZE, hidden_size=8, num_attention_heads=2)
    assert config.num_aux_hidden_states == 3
    assert config.fc_norm is False
    assert config.norm_output is False


def test_bfloat16_weights_give_a_bfloat16_state_near_the_exact_one() -> None:
    model = make_draft(SHAPES["plain"], 12)
    ids, aux, mask = inputs(12)
    exact = model(ids, model.project_hidden_states(aux), mask)
    model.to(torch.bfloat16)
    rough = model(ids, model.project_hidden_states(aux.to(torch.bfloat16)), mask)
    assert rough.dtype == torch.bfloat16
    error = (rough.double() - exact).norm() / exact.norm()
    assert error < 0.05  # bfloat16 keeps 8 bits: 0.4% a rounding, a dozen roundings in a row


def test_the_oracle_layer_is_a_llama_layer() -> None:
    """Ties the oracle to an implementation that neither it nor the package wrote."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(13)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        attn_implementation="eager",
    )
    model = LlamaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    draft = ttt.read_draft(dict(model.named_parameters()), config)
    ids = torch.randint(0, VOCAB_SIZE, (6,))
    row = ttt.Row([0] * 6, [False] * 6, list(range(6)))
    x = draft.parameters["embed_tokens.weight"][ids]
    for layer in range(3):
        x = ttt.plain_layer(draft, row, layer, 0, x)
    expected = model(input_ids=ids[None]).last_hidden_state[0].double()
    torch.testing.assert_close(draft.norm("norm", x), expected, rtol=1e-4, atol=1e-5)  # the other side is float32

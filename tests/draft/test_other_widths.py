"""A draft of another width than its target's: sizes that make a model, and the best start that it can have."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eagle_offline.draft import from_target
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import draft_config, embeddings_differ, initial_draft, of_width
from eagle_offline.errors import UsageError
from eagle_offline.supervision import Head
from tests.draft.test_from_target import parts, target_config

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 4.0,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip


def config_of(target: dict | None = None, **sizes: object):
    """The target's hidden size is 32, its 4 heads of 16 share 2 key-value heads."""
    target = target_config().to_dict() if target is None else target
    return draft_config(target, draft_vocab_size=6, num_aux_hidden_states=3, **sizes)


def start(seed: int = 0, head_start: str = "target", train_embeddings: bool = False, **sizes: object):
    embeddings, head, ids = parts()
    config = config_of(**sizes)
    options = {"seed": seed, "head_start": head_start, "train_embeddings": train_embeddings}
    return initial_draft(config, embeddings, head, ids, **options)


def shape(config) -> tuple[int, ...]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return tuple(getattr(config, name) for name in names)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (32, 40, 4, 2, 16)),
        ({"hidden_size": 16}, (16, 40, 4, 2, 16)),  # a head stays as wide as the target's
        ({"hidden_size": 64, "intermediate_size": 24}, (64, 24, 4, 2, 16)),
        ({"num_key_value_heads": 4}, (32, 40, 4, 4, 16)),
        ({"num_attention_heads": 2}, (32, 40, 2, 2, 16)),  # heads given: they share the width
        ({"num_attention_heads": 8}, (32, 40, 8, 2, 4)),
        ({"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3}, (24, 40, 6, 3, 4)),
    ],
)
def test_sizes_left_out_are_the_target_s(sizes, expected):
    config = config_of(**sizes)
    assert shape(config) == expected
    assert config.target_hidden_size == 32
    model = Eagle3DraftModel(config)
    ids, aux = torch.zeros(1, 3, dtype=torch.int64), torch.randn(1, 3, 96)
    fed_back = model(ids, model.project_hidden_states(aux), torch.ones_like(ids))
    assert fed_back.shape == (1, 3, config.hidden_size)
    assert model.compute_logits(fed_back).shape == (1, 3, 6)


def test_a_target_that_does_not_say_how_wide_its_heads_are():
    target = target_config().to_dict()
    del target["head_dim"], target["num_key_value_heads"]
    assert shape(config_of(target, hidden_size=16)) == (16, 40, 4, 4, 8)


def test_layer_style_is_of_the_config():
    assert config_of(layer_style="qwen3").layer_style == "qwen3"
    assert config_of().layer_style == "llama"


@pytest.mark.parametrize(
    ("sizes", "pattern"),
    [
        ({"hidden_size": 18}, "--draft-hidden-size 18: .* no multiple of 4 .*--draft-num-attention-heads"),
        ({"num_attention_heads": 5}, "--draft-num-attention-heads 5: .* no multiple of 5"),
        ({"hidden_size": 24, "num_attention_heads": 8}, "--draft-num-attention-heads 8: heads of 3 values"),
        ({"num_key_value_heads": 3}, "--draft-num-key-value-heads 3: .*one of 1, 2, 4$"),
        ({"num_key_value_heads": 8}, "--draft-num-key-value-heads 8: "),
        (
            {"hidden_size": 30, "num_attention_heads": 3},
            "--draft-num-attention-heads 3: .*--draft-num-key-value-heads one of 1, 3$",
        ),
    ],
)
def test_sizes_that_make_no_model_name_the_flag(sizes, pattern):
    with pytest.raises(UsageError, match=pattern) as raised:
        config_of(**sizes)
    assert "\n" not in str(raised.value)


def test_heads_that_the_target_s_rope_cannot_turn_name_the_flag():
    target = target_config(rope_parameters=LONGROPE).to_dict()
    assert shape(config_of(target, hidden_size=16)) == (16, 40, 4, 2, 16)
    with pytest.raises(UsageError, match="--draft-num-attention-heads 8: the target's RoPE") as raised:
        config_of(target, num_attention_heads=8)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("width", [1, 5, 16, 31])
def test_narrower_rows_have_the_inner_products_of_the_best_approximation(width):
    """Eckart and Young: no matrix of that rank is nearer than the truncated singular value decomposition."""
    rows = np.random.default_rng(0).normal(size=(200, 32)) @ np.diag(np.linspace(3, 0.1, 32))
    found = of_width(torch.from_numpy(rows), width)
    assert found.shape == (200, width)
    assert found.dtype == torch.float32
    left, sizes, _ = np.linalg.svd(rows, full_matrices=False)
    best = (left[:, :width] * sizes[:width] ** 2) @ left[:, :width].T
    np.testing.assert_allclose((found @ found.T).numpy(), best, rtol=1e-4, atol=1e-3)  # sums of float32


def test_narrower_rows_are_the_same_in_any_order_and_any_portions(monkeypatch):
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.2, 12)
    expected = of_width(rows, 5)
    assert torch.equal(of_width(rows.clone(), 5), expected)
    order = torch.randperm(50)
    torch.testing.assert_close(of_width(rows[order], 5), expected[order], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(from_target, "_CHUNK_ROWS", 7)
    torch.testing.assert_close(of_width(rows, 5), expected, rtol=1e-5, atol=1e-6)


def test_directions_come_strongest_first_and_point_to_their_largest_coordinate():
    rows = torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, -5.0], [1.0, 0.0, 0.0]])
    assert of_width(rows, 2).tolist() == [[0.0, -3.0], [-5.0, 0.0], [0.0, 0.0]]


def test_the_sign_of_a_direction_is_not_the_library_s(monkeypatch):
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    expected, eigh = of_width(rows, 5), torch.linalg.eigh

    def turned(moments: torch.Tensor) -> SimpleNamespace:
        signs = torch.tensor([1.0, -1.0] * 6, dtype=moments.dtype)
        return SimpleNamespace(eigenvectors=eigh(moments).eigenvectors * signs)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    assert torch.equal(of_width(rows, 5), expected)


def test_wider_rows_keep_every_inner_product():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = of_width(rows, 7)
    assert torch.equal(found[:, :4], rows.float())
    assert not found[:, 4:].any()


@pytest.mark.parametrize("width", [16, 64])
def test_a_draft_of_another_width_starts_from_the_target_s_rows(width):
    embeddings, head, ids = parts()
    draft = start(hidden_size=width)
    assert torch.equal(draft.embed_tokens.weight, of_width(embeddings, width))
    assert torch.equal(draft.lm_head.weight, of_width(head.weight[ids].float() * 0.25, width))
    assert not draft.embed_tokens.weight.requires_grad
    assert not embeddings_differ(draft, embeddings)
    again = start(hidden_size=width).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in draft.state_dict().items())


def test_a_random_head_is_of_the_seed_and_the_rest_is_as_before():
    embeddings, _, _ = parts()
    one, two, other = start(head_start="random"), start(head_start="random"), start(seed=1, head_start="random")
    plain = start()
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, plain.lm_head.weight)
    assert 0.01 < float(one.lm_head.weight.detach().std()) < 0.04  # Llama's initializer_range
    assert torch.equal(one.embed_tokens.weight, embeddings.float())
    for name, tensor in plain.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(one.state_dict()[name], tensor), name


def test_embeddings_that_were_trained_are_told_from_the_target_s():
    embeddings, _, _ = parts()
    draft = start()
    assert not embeddings_differ(draft, embeddings)
    draft.embed_tokens.weight.data[3, 5] += 0.5
    assert embeddings_differ(draft, embeddings)


def test_a_head_s_scale_is_in_the_rows_of_another_width():
    embeddings, head, ids = parts()
    scaled = initial_draft(config_of(hidden_size=16), embeddings, head, ids, seed=0)
    whole = initial_draft(config_of(hidden_size=16), embeddings, Head(head.weight), ids, seed=0)
    torch.testing.assert_close(scaled.lm_head.weight, whole.lm_head.weight * 0.25)

"""A draft starts as its target's twin: same width, same rotary positions, its embeddings and its head rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle_offline.draft.from_target import draft_config, initial_draft, read_target_config
from eagle_offline.draft.layers import RotaryEmbedding
from eagle_offline.errors import DataError
from eagle_offline.supervision import Head

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def target_config(**changes: object) -> LlamaConfig:
    values = {
        "vocab_size": 31, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-4,
        "hidden_act": "gelu", "bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**{**values, **changes})


def saved(directory: Path, config: LlamaConfig) -> dict:
    config.save_pretrained(directory)
    return read_target_config(directory / "config.json")


def parts(generator_seed: int = 0) -> tuple[torch.Tensor, Head, torch.Tensor]:
    generator = torch.Generator().manual_seed(generator_seed)
    embeddings = torch.randn(31, 32, generator=generator).bfloat16()
    head = Head(torch.randn(31, 32, generator=generator).bfloat16(), scale=0.25)
    return embeddings, head, torch.tensor([0, 3, 4, 5, 17, 30])


def start(target: dict, seed: int = 0, **options: bool):
    embeddings, head, ids = parts()
    config = draft_config(target, draft_vocab_size=6, num_aux_hidden_states=3)
    return initial_draft(config, embeddings, head, ids, seed=seed, **options)


def test_config_takes_over_the_target_s_shape(tmp_path):
    target = target_config()
    config = draft_config(saved(tmp_path, target), draft_vocab_size=6, num_aux_hidden_states=4)
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(target, name), name
    assert (config.draft_vocab_size, config.num_aux_hidden_states, config.num_hidden_layers) == (6, 4, 1)
    assert config.target_hidden_size == 32
    assert config.tie_word_embeddings is False, "a draft's head is over another vocabulary"


def test_config_takes_the_draft_s_own_options():
    config = draft_config(
        target_config().to_dict(),
        draft_vocab_size=6,
        num_aux_hidden_states=3,
        num_layers=2,
        fc_norm=True,
        norm_output=True,
    )
    assert (config.num_hidden_layers, config.fc_norm, config.norm_output) == (2, True, True)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_positions_are_the_target_s(rope, tmp_path):
    target = target_config(rope_parameters=ROPES[rope])
    config = draft_config(saved(tmp_path, target), draft_vocab_size=6, num_aux_hidden_states=3)
    positions = torch.arange(200)[None]
    cos, sin = RotaryEmbedding(config)(positions, torch.float32)
    expected = LlamaRotaryEmbedding(target)(torch.zeros(1, 200, 4), positions)
    for ours, theirs in zip((cos[:, 0], sin[:, 0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


def test_rotary_settings_of_older_config_files_are_read(tmp_path):
    """Before transformers 5 the base stood at the top and the scaling beside it."""
    config = target_config(rope_parameters=ROPES["llama3"]).to_dict()
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = draft_config(read_target_config(tmp_path / "config.json"), draft_vocab_size=6, num_aux_hidden_states=3)
    positions = torch.arange(100)[None]
    expected = LlamaRotaryEmbedding(target_config(rope_parameters=ROPES["llama3"]))(torch.zeros(1, 100, 4), positions)
    torch.testing.assert_close(
        RotaryEmbedding(older)(positions, torch.float32)[0][:, 0], expected[0], rtol=0, atol=3e-5
    )


def test_a_draft_starts_from_the_target_s_embeddings_and_head_rows():
    embeddings, head, ids = parts()
    draft = start(target_config().to_dict())
    assert torch.equal(draft.embed_tokens.weight, embeddings.float())
    # The draft's head has no scale of its own: it is folded into the rows.
    hidden = torch.randn(4, 32)
    torch.testing.assert_close(draft.lm_head(hidden), (hidden @ head.weight.float().T * 0.25)[:, ids])
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}


def test_embeddings_are_frozen_unless_asked():
    frozen, trained = (start(target_config().to_dict(), train_embeddings=asked) for asked in (False, True))
    assert not frozen.embed_tokens.weight.requires_grad
    assert all(parameter.requires_grad for name, parameter in frozen.named_parameters() if "embed" not in name)
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_the_rest_is_random_by_the_seed_alone():
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    one = start(target_config().to_dict(), seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator moved"
    torch.manual_seed(7)
    again, other = (start(target_config().to_dict(), seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(again[name], tensor) for name, tensor in one.items())
    differing = {name for name, tensor in one.items() if not torch.equal(other[name], tensor)}
    assert "fc.weight" in differing
    assert "layers.0.self_attn.q_proj.weight" in differing
    assert not {"embed_tokens.weight", "lm_head.weight"} & differing


def test_the_text_part_of_a_config_is_what_counts(tmp_path):
    text = target_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "both", "hidden_size": 9, "text_config": text}))
    assert read_target_config(tmp_path / "config.json")["hidden_size"] == 32


@pytest.mark.parametrize("content", [None, "", "{", "\xff"])
def test_a_config_that_cannot_be_read_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"config\.json: the target's config cannot be read"):
        read_target_config(path)

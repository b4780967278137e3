"""A draft's sizes from configs that call them otherwise, or leave out what is their architecture's default."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.from_target import draft_config, read_target_config
from eagle_offline.errors import DataError, UsageError
from tests.builders import make_cache, make_tokenizer, run_cli
from tests.target.architectures import ARCHITECTURES

# As such checkpoints are published, less what no draft asks for; and hidden, middle, heads, key-value heads, a head's
# width, positions.
WRITTEN: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 6, "n_positions": 64}, (32, 128, 4, 4, 8, 64)),
    "gpt_bigcode": ({"n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64}, (32, 48, 4, 1, 8, 64)),
    "gptj": ({"n_embd": 32, "n_head": 4, "n_inner": None, "n_positions": 64}, (32, 128, 4, 4, 8, 64)),
    "gpt_neo": ({"hidden_size": 32, "num_heads": 4, "max_position_embeddings": 64}, (32, 128, 4, 4, 8, 64)),
    "mpt": ({"d_model": 32, "n_heads": 4, "max_seq_len": 64}, (32, 128, 4, 4, 8, 64)),
    "bloom": ({"hidden_size": 32, "n_head": 4, "seq_length": 64}, (32, 128, 4, 4, 8, 64)),
    "opt": (
        {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64},
        (32, 48, 4, 4, 8, 64),
    ),
    # Heads, their width and the vocabulary are the class's own defaults.
    "gemma3": (
        {"text_config": {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 48}},
        (64, 48, 8, 4, 256, 131072),
    ),
}
# Layers, positions and tokens enough for a capture; fields that these classes do not know are left out.
LARGER = {"num_hidden_layers": 8, "max_position_embeddings": 128, "vocab_size": 272}
SIX = ("GPT2", "GPTBigCode", "GPTJ", "GPTNeo", "Mpt", "Bloom")


def written(directory: Path, **fields: Any) -> dict[str, Any]:
    (directory / "config.json").write_text(json.dumps(fields))
    return read_target_config(directory / "config.json")


@pytest.mark.parametrize("model_type", WRITTEN)
def test_sizes_under_other_names_and_by_default(model_type: str, tmp_path: Path) -> None:
    fields, expected = WRITTEN[model_type]
    vocabulary = {} if "text_config" in fields else {"vocab_size": 96}
    target = written(tmp_path, model_type=model_type, **vocabulary, **fields)
    config = draft_config(target, draft_vocab_size=6, num_aux_hidden_states=3)
    found = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    assert (*found, config.head_dim, config.max_position_embeddings) == expected
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_a_draft(name: str, tmp_path: Path) -> None:
    config = ARCHITECTURES[name].config()
    config.save_pretrained(tmp_path)
    target = read_target_config(tmp_path / "config.json")
    draft = Eagle3DraftModel(draft_config(target, draft_vocab_size=6, num_aux_hidden_states=3))
    assert draft.config.target_hidden_size == config.get_text_config().hidden_size == 32
    assert draft.config.num_attention_heads == 4


def test_what_no_config_says_is_named_with_its_flag(tmp_path: Path) -> None:
    sizes = {"draft_vocab_size": 6, "num_aux_hidden_states": 3}
    target = written(tmp_path, model_type="unheard_of", hidden_size=32, vocab_size=96)
    with pytest.raises(UsageError, match=r"has no num_attention_heads .*--draft-num-attention-heads"):
        draft_config(target, **sizes)
    config = draft_config(target, num_attention_heads=4, **sizes)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (4, 8, 128)
    with pytest.raises(DataError, match="no hidden_size"):
        draft_config(written(tmp_path, model_type="unheard_of", vocab_size=96), **sizes)
    with pytest.raises(DataError, match="cannot be read"):
        written(tmp_path, model_type="gemma3", text_config=[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIX)
def test_a_draft_is_trained_and_exported(kind: str, tmp_path: Path) -> None:
    known = ARCHITECTURES[kind]
    layers = {"attention_types": [[["global", "local"], 4]]} if kind == "GPTNeo" else {}
    unknown = ("intermediate_size", "num_key_value_heads")
    target = replace(known, changes={**known.changes, **LARGER, **layers}, drop=unknown).save(tmp_path / "target")
    make_tokenizer().save_pretrained(target)
    cache = make_cache(tmp_path / "cache", target)
    run = tmp_path / "run"
    arguments = ("--heldout-share", 0, "--max-steps", 2, "--ttt-steps", 2, "--device", "cpu", "--tokens-per-batch", 200)
    trained = run_cli("train", "--cache", cache, "--output-dir", run, *arguments)
    assert trained.code == 0, trained.err
    exported = run_cli("export", run, "--target", target)
    assert exported.code == 0, exported.err
    assert (run / "export" / "flat" / "model.safetensors").is_file()

"""A target spread over devices gives the states of one that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle_offline.target import spread
from eagle_offline.target.capture import TokenSample, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import input_embeddings, read_head
from eagle_offline.target.load import load_model, resolve_target
from tests import builders
from tests.precompute.runs import alone, arguments, assert_same_bytes

pytest.importorskip("accelerate")


def places(**changes: str) -> dict[str, str]:
    layers = {f"model.layers.{number}": "cpu" for number in range(builders.NUM_LAYERS)}
    return {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu", **layers} | {
        name.replace("__", "."): place for name, place in changes.items()
    }


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize(
    "changes",
    [
        {"model__layers__2": "disk", "model__layers__7": "disk"},
        {"model__layers__6": "disk", "lm_head": "disk", "model__norm": "disk"},
        {"model__embed_tokens": "disk", "model__layers__0": "disk"},
    ],
)
def test_parts_that_are_put_away_give_the_same_states(kind, changes, tmp_path):
    ends = {"lm_head", "model__embed_tokens"}
    if kind == "Gemma2" and ends & changes.keys():
        changes = {**changes, **dict.fromkeys(ends, "disk")}  # its head is its embeddings
    source = resolve_target(str(builders.shared_target(kind)))
    offload = {"device_map": places(**changes), "offload_folder": str(tmp_path)}
    whole, parts = load_model(source, "cpu", None), spread.load_spread(source, "cpu", None, **offload)
    assert any(parameter.device.type == "meta" for parameter in parts.parameters())
    assert torch.equal(read_head(parts).weight, read_head(whole).weight)
    assert torch.equal(input_embeddings(parts).weight, input_embeddings(whole).weight)
    ids = torch.arange(40).reshape(2, 20)
    found, expected = (HFEagle3TargetModel(model).capture(ids) for model in (parts, whole))
    for one, two in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
        assert torch.equal(one, two)
    sample = TokenSample(0, ids[0].int().numpy(), torch.ones(20, dtype=torch.uint8).numpy())
    check_capture(HFEagle3TargetModel(parts), read_head(parts), sample)


def test_a_spread_target_makes_the_same_cache(tmp_path):
    ended = builders.run_cli(*arguments(tmp_path / "cache", device_map="auto"))
    assert ended.code == 0, ended.err
    assert_same_bytes(tmp_path / "cache", alone())


def test_without_accelerate_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(spread, "find_spec", lambda _: None)
    ended = builders.run_cli(*arguments(tmp_path / "cache", device_map="auto"))
    assert ended.code == 2
    assert ended.errors[-1].startswith("error: --device-map needs accelerate: pip install")
    assert Path(tmp_path / "cache").is_dir()

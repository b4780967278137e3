"""An adapter merged at load gives what the adapter gives beside its model, or is refused in a line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from eagle_offline.errors import DataError, MismatchError, UsageError
from eagle_offline.target.load import load_config, load_model, resolve_target, target_digest
from tests import builders
from tests.target.architectures import ARCHITECTURES, VOCAB_SIZE

IDS = torch.randint(3, VOCAB_SIZE, (1, 30), generator=torch.Generator().manual_seed(1))
LAYERS = ["q_proj", "v_proj", "down_proj"]
BOTH_ENDS = ["embed_tokens", "lm_head"]
MORE_TOKENS = VOCAB_SIZE + 4


def save_adapter(base: Path, directory: Path, *, rows: int | None = None, **settings: Any) -> torch.Tensor:
    """Save a random adapter; return the logits that it gives unmerged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if rows is not None:
        model.resize_token_embeddings(rows)
    config = LoraConfig(**{"r": 4, "target_modules": LAYERS, "init_lora_weights": False, **settings})
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
        logits = adapted(input_ids=IDS).logits
    adapted.save_pretrained(directory, save_embedding_layers=True if rows is not None else "auto")
    return logits


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Llama tied", pytest.param("Llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": BOTH_ENDS},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": [*LAYERS, "embed_tokens"]},
        {"rows": MORE_TOKENS},
        {"rows": MORE_TOKENS, "modules_to_save": BOTH_ENDS},
    ],
    ids=["layers", "ends saved", "head saved", "embeddings adapted", "more tokens", "more tokens, saved"],
)
def test_a_merged_adapter_gives_what_it_gives_unmerged(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = ARCHITECTURES[name].save(tmp_path / "base")
    expected = save_adapter(base, tmp_path / "adapter", **settings)
    source = resolve_target(str(base), adapter=str(tmp_path / "adapter"))
    model = load_model(source, "cpu", None)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        plain = load_model(resolve_target(str(base)), "cpu", None)(input_ids=IDS).logits
    assert (plain - expected[..., :VOCAB_SIZE]).abs().max() > 0.1
    assert load_config(source).vocab_size == settings.get("rows", VOCAB_SIZE) == expected.shape[-1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["GPTNeoX", "fewer layers", "more layers", "wider"])
def test_an_adapter_of_another_model_is_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    save_adapter(ARCHITECTURES["Llama"].save(tmp_path / "base"), tmp_path / "adapter")
    changes: dict[str, Any] = {"fewer layers": {"num_hidden_layers": 3}, "more layers": {"num_hidden_layers": 8}}.get(
        kind, {"intermediate_size": 64}
    )
    architecture = ARCHITECTURES.get(kind) or replace(ARCHITECTURES["Llama"], changes=changes)
    other = architecture.save(tmp_path / "other")
    with pytest.raises(MismatchError, match="--adapter adapter was made for another model") as caught:
        load_model(resolve_target(str(other), adapter=str(tmp_path / "adapter")), "cpu", None)
    assert "\n" not in str(caught.value)


def test_another_base_of_the_same_shape_is_said_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ARCHITECTURES["Llama"].save(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    load_model(resolve_target(str(base), adapter=str(tmp_path / "adapter")), "cpu", None)
    assert "made for" not in capsys.readouterr().err
    moved = shutil.copytree(base, tmp_path / "moved")
    load_model(resolve_target(str(moved), adapter=str(tmp_path / "adapter")), "cpu", None)
    assert f"--adapter adapter: made for {base}" in capsys.readouterr().err


def test_prompts_are_no_adapter_that_can_be_merged(tmp_path: Path) -> None:
    base = ARCHITECTURES["Llama"].save(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "prompts"
    )
    with pytest.raises(MismatchError, match="adds prompts"):
        load_model(resolve_target(str(base), adapter=str(tmp_path / "prompts")), "cpu", None)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    base = ARCHITECTURES["Llama"].save(tmp_path / "base")
    with pytest.raises(DataError, match=r"no adapter_config\.json"):
        resolve_target(str(base), adapter=str(base))
    with pytest.raises(UsageError, match="--adapter nowhere: no such directory"):
        resolve_target(str(base), adapter="nowhere")


def test_a_cache_of_an_adapted_target_is_another_cache_and_says_so(tmp_path: Path) -> None:
    base = builders.shared_target()
    save_adapter(base, tmp_path / "adapter")
    arguments = [*builders.precompute_arguments(tmp_path / "cache", base), "--adapter", tmp_path / "adapter"]
    ended = builders.run_cli(*arguments)
    assert ended.code == 0, ended.err
    target = json.loads((tmp_path / "cache" / "manifest.json").read_text())["identity"]["target"]
    source = resolve_target(str(base), adapter=str(tmp_path / "adapter"))
    assert source.adapter is not None
    assert target["adapter"] == {"id": "adapter", "revision": None, "digest": source.adapter.digest()}
    assert target_digest(source) != target_digest(resolve_target(str(base)))
    again = builders.run_cli(*builders.precompute_arguments(tmp_path / "cache", base), "--resume")
    assert again.code == 3
    assert "adapter" in again.errors[-1]

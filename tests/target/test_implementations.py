"""The implementations that are chosen are the fastest that the architecture, the device and the dtype allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from eagle_offline.target.architectures import Implementations, implementations
from eagle_offline.target.layout import find_decoder
from eagle_offline.target.load import load_model, resolve_target
from tests.target.architectures import ARCHITECTURES


def config_of(name: str) -> Any:
    return ARCHITECTURES[name].make().config


@pytest.mark.parametrize(
    ("name", "on_cpu", "on_cuda"),
    [
        ("Llama", ("sdpa", None), ("sdpa", None)),
        ("Gemma2", ("eager", None), ("flex_attention", None)),
        ("GptOss", ("eager", "eager"), ("flex_attention", "grouped_mm")),
        ("Qwen3Moe", ("sdpa", "eager"), ("sdpa", "grouped_mm")),
        ("DeepseekV3", ("sdpa", "eager"), ("sdpa", "grouped_mm")),
        ("GPTJ", ("eager", None), ("eager", None)),
        ("Qwen2.5-VL", ("sdpa", None), ("sdpa", None)),
    ],
)
def test_without_further_packages(name: str, on_cpu: tuple[str, str | None], on_cuda: tuple[str, str | None]) -> None:
    config = config_of(name)
    assert implementations(config, "cpu", torch.float32) == Implementations(*on_cpu)
    assert implementations(config, "cuda", torch.bfloat16) == Implementations(*on_cuda)


def test_flash_attention_where_it_is_installed_and_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    llama, gpt_oss = config_of("Llama"), config_of("GptOss")
    assert implementations(llama, "cuda", torch.bfloat16).attention == "flash_attention_2"
    assert implementations(llama, "cuda", torch.float32).attention == "sdpa"
    assert implementations(llama, "cpu", torch.bfloat16).attention == "sdpa"
    # Its sinks are not in that package.
    assert implementations(gpt_oss, "cuda", torch.bfloat16).attention == "flex_attention"
    monkeypatch.setattr(transformers.utils, "is_flash_attn_3_available", lambda: True)
    assert implementations(llama, "cuda", torch.float16).attention == "flash_attention_3"


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "Llava", "Qwen3Moe"])
def test_a_loaded_target_runs_with_what_was_chosen(name: str, tmp_path: Path) -> None:
    model = load_model(resolve_target(str(ARCHITECTURES[name].save(tmp_path))), "cpu", None)
    chosen = implementations(config_of(name), "cpu", torch.float32)
    decoder: Any = find_decoder(model)[0]
    assert decoder.config._attn_implementation == chosen.attention
    if chosen.experts is not None:
        assert decoder.config._experts_implementation == chosen.experts

"""The implementations that are chosen on a CUDA device give what the plain ones give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.load import load_model, resolve_target
from tests.target.architectures import ARCHITECTURES, VOCAB_SIZE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "Qwen3Moe", "DeepseekV3", "Phi3 longrope"])
def test_what_is_fast_is_what_is_plain(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    directory = architecture.save(tmp_path)
    target = HFEagle3TargetModel(load_model(resolve_target(str(directory)), "cuda", "fp32"), [0, 2, 4])
    kind = getattr(transformers, architecture.model or f"{architecture.kind}ForCausalLM")
    plain = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").to("cuda").eval()
    plain.set_experts_implementation("eager")
    lengths = [61, 40, 7]
    batch = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(1)) for length in lengths]
    for number, row in enumerate(rows):
        batch[number, : len(row)] = row
    _, last = target.capture(batch.to("cuda"), lengths)
    for number, row in enumerate(rows):
        with torch.no_grad():
            expected = plain.model(input_ids=row[None].to("cuda")).last_hidden_state[0]
        torch.testing.assert_close(last[number, : len(row)], expected, rtol=1e-3, atol=1e-3)

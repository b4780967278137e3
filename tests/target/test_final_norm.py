"""What a target applies to its last layer's output, loaded without any layer, is what the whole target applies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from eagle_offline.errors import MismatchError
from eagle_offline.target.final_norm import find_final_norm, load_without_layers
from eagle_offline.target.layout import find_decoder
from eagle_offline.target.load import resolve_target
from tests import builders

KINDS = ["Llama", "Mistral", "Qwen3", "Phi3", "Gemma2", "Cohere", "Granite", "Olmo2", "Glm4"]
LARGE_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("Qwen3Moe", "GptOss", "GPTNeoX")]


@pytest.mark.parametrize("kind", [*KINDS, *LARGE_KINDS])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_norm_and_the_head_are_those_of_the_whole_target(kind: str, dtype: str) -> None:
    path = builders.shared_target(kind)
    caught: dict[str, torch.Tensor] = {}
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    whole: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype).eval()
    _, layers = find_decoder(whole)
    layers[-1].register_forward_hook(
        lambda _m, _i, out: caught.update(before=out[0] if isinstance(out, tuple) else out)
    )
    whole.get_output_embeddings().register_forward_pre_hook(lambda _m, inputs: caught.update(after=inputs[0]))
    with torch.no_grad():
        whole(input_ids=torch.tensor([[5, 17, 200, 3, 99]]), use_cache=False)

    model = load_without_layers(resolve_target(str(path)), "cpu", dtype)
    assert not find_decoder(model)[1]
    with torch.no_grad():
        assert torch.equal(find_final_norm(model)(caught["before"]), caught["after"])
    assert torch.equal(model.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)


def test_a_decoder_that_does_something_after_its_norm_is_refused() -> None:
    model: Any = builders.make_model("Llama")
    find_final_norm(model)

    class Scaled(nn.Module):
        def __init__(self, decoder: nn.Module):
            super().__init__()
            self.layers, self.norm, self.inner = decoder.layers, decoder.norm, [decoder]

        def forward(self, *arguments: Any, **named: Any) -> Any:
            return (self.inner[0](*arguments, **named).last_hidden_state * 2,)

    model.model = Scaled(model.model)
    model.get_input_embeddings = lambda: model.model.inner[0].embed_tokens
    with pytest.raises(MismatchError, match="returns something else than its final norm gives"):
        find_final_norm(model)


def test_layers_that_are_damaged_do_not_matter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = builders.save_target(tmp_path / "target")
    tensors = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if "layers" not in name}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert not find_decoder(load_without_layers(resolve_target(str(path)), "cpu", None))[1]

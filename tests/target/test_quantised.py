"""A quantised checkpoint is captured as it runs, with the rows that its head and embeddings stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.target.capture import TokenSample, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import embedding_rows, read_head
from eagle_offline.target.load import load_config, load_model, resolve_target, run_dtype, target_digest
from tests.target.architectures import ARCHITECTURES, VOCAB_SIZE

IDS = torch.randint(3, VOCAB_SIZE, (1, 30), generator=torch.Generator().manual_seed(1))
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def save_half(name: str, directory: Path, **changes: Any) -> Path:
    """A target as most are published: bf16."""
    architecture = ARCHITECTURES[name]
    replace(architecture, changes={**architecture.changes, **changes}).make().to(torch.bfloat16).save_pretrained(
        directory
    )
    return directory


def quantise(directory: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def fp8_checkpoint(directory: Path) -> tuple[Path, Path]:
    """A checkpoint in blocks of fp8 as DeepSeek publishes them, and the plain one of the values that it stands for."""
    plain, quantised = save_half("Llama", directory / "plain"), save_half("Llama", directory / "fp8")
    tensors, values = load_file(plain / "model.safetensors"), load_file(plain / "model.safetensors")
    for name, weight in values.items():
        if "_proj" in name:
            scale = weight.float().abs().max() / 448
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
            values[name] = tensors[name].float() * scale
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    quantise(
        quantised, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, tensors
    )
    return quantised, plain


def mxfp4_checkpoint(directory: Path) -> tuple[Path, Path]:
    """The experts in blocks of 32 fp4 values and a power of two, as gpt-oss is published, and the plain one."""
    sizes = {"hidden_size": 32, "intermediate_size": 32}
    plain, quantised = save_half("GptOss", directory / "p", **sizes), save_half("GptOss", directory / "q", **sizes)
    tensors, values = load_file(plain / "model.safetensors"), load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in values if name.endswith("_proj") and "experts" in name]:
        num_experts, width, rows = tensors.pop(name).shape  # of one block each
        codes = torch.randint(0, 16, (num_experts, rows, 1, width), generator=generator)
        exponents = torch.randint(122, 126, (num_experts, rows, 1), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
        value = FP4[codes] * torch.exp2(exponents.float() - 127).unsqueeze(-1)
        values[name] = value.flatten(2).transpose(1, 2).to(torch.bfloat16).contiguous()
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    quantise(quantised, {"quant_method": "mxfp4"}, tensors)
    return quantised, plain


def logits_of(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    """Of a plain forward, with the expert loop that is used here: in bf16 another one gives other values."""
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0].float()


def captured_logits(directory: Path, compute_dtype: str | None) -> torch.Tensor:
    target = HFEagle3TargetModel(load_model(resolve_target(str(directory)), "cpu", compute_dtype), [0, 2, 4])
    head = read_head(target.model)
    check_capture(target, head, TokenSample(0, IDS[0].numpy().astype(np.int32), np.ones(IDS.shape[1], np.uint8)))
    return head.logits(target.capture(IDS)[1][0])


def test_blocks_of_fp8_are_the_values_that_they_stand_for(tmp_path: Path) -> None:
    quantised, plain = fp8_checkpoint(tmp_path)
    torch.testing.assert_close(
        captured_logits(quantised, "fp32"), logits_of(plain, torch.float32), rtol=1e-4, atol=1e-4
    )


def test_blocks_of_fp4_are_the_values_that_they_stand_for(tmp_path: Path) -> None:
    quantised, plain = mxfp4_checkpoint(tmp_path)
    model = load_model(resolve_target(str(quantised)), "cpu", None)
    for name, values in load_file(plain / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), values), name
    own = logits_of(plain, torch.bfloat16)
    assert (captured_logits(quantised, None) - own).abs().max() < 0.02 * own.abs().max()  # bf16


def test_a_quantised_checkpoint_keeps_its_dtype_on_a_cpu(tmp_path: Path) -> None:
    quantised, plain = fp8_checkpoint(tmp_path)
    assert run_dtype(load_config(resolve_target(str(quantised))), "cpu", None) == torch.bfloat16
    assert run_dtype(load_config(resolve_target(str(plain))), "cpu", None) == torch.float32
    own = logits_of(plain, torch.bfloat16)
    assert (captured_logits(quantised, None) - own).abs().max() < 0.02 * own.abs().max()  # bf16


def test_weights_that_do_not_run_here_are_refused_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, quantised = save_half("Llama", tmp_path / "plain"), tmp_path / "nf4"
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    kind = transformers.AutoModelForCausalLM
    kind.from_pretrained(plain, quantization_config=settings).save_pretrained(quantised)
    with pytest.raises(MismatchError, match="quantised in a way that does not run on cpu"):  # rows of 32 are too short
        load_model(resolve_target(str(quantised)), "cpu", None)


def test_how_a_checkpoint_is_quantised_is_part_of_its_digest(tmp_path: Path) -> None:
    quantised, _ = fp8_checkpoint(tmp_path)
    before = target_digest(resolve_target(str(quantised)))
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "static"
    (quantised / "config.json").write_text(json.dumps(config))
    assert target_digest(resolve_target(str(quantised))) != before


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.quantizers.quantizer_hqq, "is_hqq_available", lambda: False)
    directory = save_half("Llama", tmp_path)
    quantise(directory, {"quant_method": "hqq", "quant_config": {}}, load_file(directory / "model.safetensors"))
    with pytest.raises(UsageError, match=r"package is missing.*hqq"):
        load_model(resolve_target(str(directory)), "cpu", None)


@pytest.mark.parametrize("whole", [False, True], ids=["layers", "head and embeddings too"])
def test_int8_weights_of_torchao(whole: bool, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    plain, quantised = save_half("Llama", tmp_path / "plain"), tmp_path / "int8"
    transformers.AutoModelForCausalLM.from_pretrained(
        plain,
        dtype=torch.bfloat16,
        quantization_config=transformers.TorchAoConfig(
            torchao.Int8WeightOnlyConfig(version=2), include_input_output_embeddings=whole
        ),
    ).save_pretrained(quantised)
    own = logits_of(quantised, torch.bfloat16)
    assert (captured_logits(quantised, None) - own).abs().max() < 0.02 * own.abs().max()  # bf16
    model = load_model(resolve_target(str(quantised)), "cpu", None)
    for rows, name in ((read_head(model).weight, "lm_head"), (embedding_rows(model), "model.embed_tokens")):
        exact = load_file(plain / "model.safetensors")[f"{name}.weight"].float()
        assert type(rows) in (torch.Tensor, torch.nn.Parameter)
        assert rows.shape == exact.shape
        assert (rows.float() - exact).norm() < 0.02 * exact.norm()


def test_int8_weights_of_compressed_tensors(tmp_path: Path) -> None:
    """They are unpacked by the first forward of the whole model; capture runs its decoder alone."""
    pytest.importorskip("compressed_tensors")
    plain, quantised = save_half("Llama", tmp_path / "plain"), save_half("Llama", tmp_path / "int8")
    tensors, values = load_file(plain / "model.safetensors"), load_file(plain / "model.safetensors")
    for name, weight in values.items():
        if "_proj" in name:
            scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).to(torch.bfloat16)
            tensors[name] = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale
            values[name] = (tensors[name].float() * scale.float()).to(torch.bfloat16)
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"format": "int-quantized", "targets": ["Linear"], "weights": weights}},
    }
    quantise(quantised, settings, tensors)
    own = logits_of(plain, torch.bfloat16)
    assert (captured_logits(quantised, None) - own).abs().max() < 0.02 * own.abs().max()  # bf16

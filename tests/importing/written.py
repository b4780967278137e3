"""Dumps as vLLM (speculators) and NeMo AutoModel write them, by plain code: one row alone through the whole model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests import builders

SEQ_LENGTH = 96
LAYERS = [1, 3, 4]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Forward:
    """One row: ids and loss mask, the outputs of all layers ``[L, T, H]``, and the logits ``[T, V]``."""

    input_ids: list[int]
    loss_mask: list[int]
    layers: torch.Tensor
    logits: torch.Tensor


def rows_of(chat: Path, seq_length: int = SEQ_LENGTH) -> list[tuple[list[int], list[int]]]:
    """Ids and masks of a ChatML file, turn by turn: answers and what ends them are supervised."""
    tokenizer = builders.make_tokenizer()
    rows = []
    for line in chat.read_text().splitlines():
        ids: list[int] = []
        mask: list[int] = []
        for turn in json.loads(line)["messages"]:
            said = int(turn["role"] == "assistant")
            pieces = ((f"<|im_start|>{turn['role']}\n", 0), (turn["content"] + "<|im_end|>", said), ("\n", 0))
            for text, supervised in pieces:
                piece = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += piece
                mask += [supervised] * len(piece)
        if any(mask[:seq_length]):
            rows.append((ids[:seq_length], mask[:seq_length]))
    return rows


@cache
def model_of(target: Path, dtype: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(target, dtype=DTYPES[dtype]).eval()


@cache
def forwards(target: Path, chat: Path, dtype: str = "fp32", seq_length: int = SEQ_LENGTH) -> tuple[Forward, ...]:
    """Every row of a chat through a target that runs in a dtype."""
    return tuple(forward(model_of(target, dtype), ids, mask) for ids, mask in rows_of(chat, seq_length))


def forward(model: Any, ids: list[int], mask: list[int]) -> Forward:
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return Forward(ids, mask, torch.cat(outputs), logits)


def write_speculators(
    directory: Path, rows: Sequence[Forward], dtype: str = "fp32", layers: Sequence[int] = LAYERS
) -> Path:
    """One file a row: the outputs of the layers and of the last one, ``[T, A + 1, H]``, and the ids."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        states = torch.stack([row.layers[layer] for layer in (*layers, -1)], dim=1).to(DTYPES[dtype])
        tensors = {"hidden_states": states.contiguous(), "token_ids": torch.tensor(row.input_ids)}
        save_file(tensors, directory / f"hs_{number}.safetensors")
    return directory


def write_loss_masks(directory: Path, rows: Sequence[Forward]) -> Path:
    """The Arrow dataset that speculators prepares."""
    import datasets

    columns = {
        "input_ids": [row.input_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        "seq_len": [len(row.input_ids) for row in rows],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(directory)
    return directory


def unsorted_vocabulary(size: int = builders.DRAFT_VOCAB_SIZE, vocab_size: int = builders.VOCAB_SIZE) -> list[int]:
    """A draft vocabulary in no order, the printable bytes and the special tokens for the most part."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(5)).tolist()
    return sorted(order, key=lambda token: (token not in (256, 257, 258, 259), order.index(token)))[:size]


def write_nemo(
    directory: Path,
    rows: Sequence[Forward],
    vocabulary: Sequence[int],
    dtype: str = "fp32",
    *,
    layers: Sequence[int] = LAYERS,
    shard_size: int = 4,
    top_k: int = 0,
    slots: int = SEQ_LENGTH,
) -> Path:
    """The manifest and the padded shards, all but attention mask and aux states shifted left by one."""
    directory.mkdir(parents=True, exist_ok=True)
    width = len(layers) * rows[0].layers.shape[-1]
    manifest = {
        "format_version": 2,
        "target_model": "somewhere/target",
        "target_vocab_size": rows[0].logits.shape[-1],
        "draft_vocab_size": len(vocabulary),
        "seq_length": slots,
        "dtype": dtype,
        "num_samples": len(rows),
        "shard_size": shard_size,
        "target_probs_topk": top_k,
        "aux_hidden_dim": width,
        "aux_layer_ids": list(layers),
        "selected_token_ids": list(vocabulary),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
    for shard in range(-(-len(rows) // shard_size)):
        samples = [
            nemo_sample(row, vocabulary, dtype, layers, top_k, slots)
            for row in rows[shard * shard_size : (shard + 1) * shard_size]
        ]
        tensors = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        save_file(tensors, directory / f"shard-{shard:06d}.safetensors")
    return directory


def nemo_sample(
    row: Forward, vocabulary: Sequence[int], dtype: str, layers: Sequence[int], top_k: int, slots: int
) -> dict[str, torch.Tensor]:
    length = len(row.input_ids)

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values.new_zeros(slots - length, *values.shape[1:])])

    def shifted(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[1:], torch.zeros_like(values[:1])])

    ids, mask = padded(torch.tensor(row.input_ids)), padded(torch.tensor(row.loss_mask))
    logits = shifted(padded(row.logits))
    inside = torch.zeros(logits.shape[-1], dtype=torch.bool)
    inside[list(vocabulary)] = True
    probs = logits[:, list(vocabulary)].float().softmax(dim=-1)
    sample = {
        "input_ids": shifted(ids),
        "attention_mask": padded(torch.ones(length, dtype=torch.int64)),
        "loss_mask": shifted(mask),
        "aux_hidden_states": padded(torch.cat([row.layers[layer] for layer in layers], dim=-1)).to(DTYPES[dtype]),
        "position_mask": (inside[logits.argmax(dim=-1)] & shifted(mask).bool()).unsqueeze(-1),
    }
    if top_k:
        values, columns = probs.topk(top_k, dim=-1)
        values = values / values.sum(dim=-1, keepdim=True)
        return {
            **sample,
            "target_probs_values": values.to(DTYPES[dtype]),
            "target_probs_indices": columns.to(torch.int32),
        }
    return {**sample, "target_probs": probs.to(DTYPES[dtype])}


def import_arguments(
    states: Path, output_dir: Path, target: Path | None = None, data: Path | None = None, **flags: Any
) -> list[str]:
    """The command line of a small import, with the flags of `builders.precompute_arguments`."""
    given = {"batch_size": None, "draft_vocab_size": None, **flags}
    return ["import", str(states), *builders.precompute_arguments(output_dir, target, data, **given)[1:]]


def run_import(
    states: Path, output_dir: Path, target: Path | None = None, data: Path | None = None, **flags: Any
) -> builders.Ended:
    """Run a small import in this process."""
    return builders.run_cli(*import_arguments(states, output_dir, target, data, **flags))

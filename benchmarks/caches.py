"""Caches that benchmarks read: a small real one, and shards of synthetic states at any shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.states import hidden_states
from eagle_offline import stages
from eagle_offline.cache import codec
from eagle_offline.cache.arrow import ArrowShardWriter
from eagle_offline.cache.choices import EncodingChoice
from eagle_offline.cache.layout import FieldLayout, SampleTable
from eagle_offline.cache.samples import StoredSample
from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.example.corpus import generate_conversations, write_conversations
from eagle_offline.supervision import supervised_positions

IDENTITY_DIGEST = "0" * 32


def small_cache(directory: Path, num_conversations: int = 32, device: str = "cpu") -> Path:
    """Precompute a cache of the example's corpus with an untrained target; return its directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from eagle_offline.example.target import build_tokenizer

    conversations = list(generate_conversations(num_conversations, seed=0))
    data, target = directory / "chat.jsonl", directory / "target"
    write_conversations(data, conversations)
    tokenizer = build_tokenizer([m["content"] for c in conversations for m in c["messages"]], vocab_size=400)
    tokenizer.save_pretrained(target)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(target)
    settings = PrecomputeSettings(
        target_model=str(target), input_data=str(data), output_dir=directory / "cache", shard_size=8, device=device
    )
    stages.precompute(settings)
    return settings.output_dir


def write_synthetic_shard(
    path: Path, lengths: np.ndarray, choice: EncodingChoice, hidden_size: int, num_aux_layers: int = 3
) -> tuple[SampleTable, int, list[FieldLayout]]:
    """Write a shard of synthetic samples, half of their tokens supervised; return its table, bytes and layout."""
    fields = choice.fields(range(num_aux_layers), hidden_size, hidden_size)
    writer = ArrowShardWriter(path, fields, 0, IDENTITY_DIGEST)
    for sample_id, length in enumerate(lengths):
        writer.append(_synthetic_sample(sample_id, int(length), fields))
    table, _, num_bytes = writer.close()
    return table, num_bytes, fields


def _synthetic_sample(sample_id: int, length: int, fields: list[FieldLayout]) -> StoredSample:
    loss_mask = torch.zeros(length, dtype=torch.bool)
    loss_mask[length // 2 :] = True
    num_positions = int(supervised_positions(loss_mask).sum())
    rows = {"tokens": length, "supervised_positions": num_positions}
    columns: list[bytes | memoryview] = []
    for number, field in enumerate(fields):
        columns.extend(codec.encode(field, hidden_states(rows[field.rows], sample_id * 10 + number, field.width)))
    generator = np.random.Generator(np.random.PCG64(sample_id))
    return StoredSample(
        sample_id=sample_id,
        input_ids=generator.integers(0, 1000, length, dtype=np.int32),
        loss_mask=loss_mask.numpy().astype(np.uint8),
        target_argmax=generator.integers(0, 1000, num_positions, dtype=np.int32),
        target_log_normalizer=generator.random(num_positions, dtype=np.float32),
        columns=columns,
    )

"""Whole caches of synthetic samples at any shape, written by the writer that capture uses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.states import hidden_states
from eagle_offline.cache import codec
from eagle_offline.cache.choices import EncodingChoice, StateEncoding
from eagle_offline.cache.companions import embeddings_bytes, head_bytes, vocab_bytes, vocab_file
from eagle_offline.cache.layout import EMBEDDINGS_FILE, HEAD_FILE, FieldLayout
from eagle_offline.cache.manifest import (
    BatchPlan,
    CaptureIdentity,
    CompanionFile,
    DatasetIdentity,
    Defaults,
    DraftVocabulary,
    Identity,
    Manifest,
    SourceIdentity,
    TargetIdentity,
    TextIdentity,
    write_manifest,
)
from eagle_offline.cache.samples import StoredSample
from eagle_offline.cache.writer import write_shard
from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.provenance import digest_bytes
from eagle_offline.supervision import Head, supervised_positions
from eagle_offline.vocab import digest_ids

NUM_AUX_LAYERS = 3


@dataclass(frozen=True)
class Shape:
    """What is cached and trained: widths of target and draft, and the draft vocabulary, which is the target's too."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    draft_vocab_size: int

    def draft_config(self) -> Eagle3DraftConfig:
        """Return the config of a draft as wide as the target."""
        return Eagle3DraftConfig(
            vocab_size=self.draft_vocab_size,
            draft_vocab_size=self.draft_vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            num_aux_hidden_states=NUM_AUX_LAYERS,
        )


def write_cache(directory: Path, lengths: np.ndarray, shape: Shape, encoding: StateEncoding = "planes") -> None:
    """Write a whole cache of synthetic samples, the second half of each supervised, factored."""
    size, width = shape.draft_vocab_size, shape.hidden_size
    identity = identity_of(lengths, shape, encoding)
    fields = identity.capture.fields
    ids = np.arange(size)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(size, width, generator=generator).bfloat16()
    contents = {
        HEAD_FILE: head_bytes(Head(embeddings / width**0.5), tied=False),
        EMBEDDINGS_FILE: embeddings_bytes(embeddings),
        vocab_file(digest_ids(ids)): vocab_bytes(ids),
        "target/config.json": json.dumps(_target_config(shape)).encode(),
    }
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    files = {
        name: CompanionFile(num_bytes=len(content), digest=digest_bytes(content)) for name, content in contents.items()
    }
    vocabulary = DraftVocabulary(size=size, digest=digest_ids(ids), coverage=1.0)
    write_manifest(
        directory,
        Manifest(identity=identity, defaults=Defaults(draft_vocabulary=vocabulary), files=files, environment={}),
    )
    # States are drawn once, for the longest sample; every sample begins at a row of its own.
    longest = int(lengths.max())
    states = [hidden_states(2 * longest, seed, width) / 100 for seed in range(len(fields))]
    shard_size = identity.capture.shard_size
    for shard in range(identity.num_shards):
        numbers = range(shard * shard_size, min((shard + 1) * shard_size, len(lengths)))
        samples = (_sample(number, int(lengths[number]), fields, states, size) for number in numbers)
        write_shard(directory, identity, shard, samples, {})


def _sample(
    number: int, length: int, fields: list[FieldLayout], states: list[torch.Tensor], vocab_size: int
) -> StoredSample:
    loss_mask = torch.zeros(length, dtype=torch.bool)
    loss_mask[length // 2 :] = True
    num_positions = int(supervised_positions(loss_mask).sum())
    rows = {"tokens": length, "supervised_positions": num_positions}
    start = number * 97 % (len(states[0]) - length)
    columns: list[bytes | memoryview] = []
    for field, values in zip(fields, states, strict=True):
        columns.extend(codec.encode(field, values[start : start + rows[field.rows]]))
    generator = np.random.Generator(np.random.PCG64(number))
    return StoredSample(
        sample_id=number,
        input_ids=generator.integers(0, vocab_size, length, dtype=np.int32),
        loss_mask=loss_mask.numpy().astype(np.uint8),
        target_argmax=generator.integers(0, vocab_size, num_positions, dtype=np.int32),
        target_log_normalizer=generator.random(num_positions, dtype=np.float32),
        columns=columns,
    )


def identity_of(lengths: np.ndarray, shape: Shape, encoding: StateEncoding, shard_size: int = 32) -> Identity:
    """Return what a cache of synthetic samples of the given lengths is."""
    choice = EncodingChoice(state_encoding=encoding)
    fields = choice.fields(range(NUM_AUX_LAYERS), shape.hidden_size, shape.draft_vocab_size)
    nothing = "0" * 32
    return Identity(
        target=TargetIdentity(
            id="synthetic",
            revision=None,
            checkpoint_digest=nothing,
            adapter=None,
            architecture="LlamaForCausalLM",
            num_layers=8,
            hidden_size=shape.hidden_size,
            vocab_size=shape.draft_vocab_size,
        ),
        text=TextIdentity(tokenizer_digest=nothing, template_digest=nothing, seq_length=int(lengths.max())),
        dataset=DatasetIdentity(
            sources=[SourceIdentity(name="synthetic", digest=nothing, num_bytes=None, revision=None, split=None)],
            shuffle_seed=None,
            num_samples=len(lengths),
            rows_digest=nothing,
        ),
        capture=CaptureIdentity(
            aux_layer_ids=list(range(NUM_AUX_LAYERS)),
            dtype="bf16",
            compute_dtype="fp32",
            state_encoding=encoding,
            target_encoding="factored",
            target_statistics="full",
            draft_vocab_digest=None,
            shard_size=shard_size,
            format="arrow",
            compressor=None,
            fields=fields,
        ),
        batch_plan=BatchPlan(
            batch_size=1,
            max_batch_tokens=None,
            order="length",
            attention_implementation="sdpa",
            experts_implementation=None,
            tensor_parallel_size=1,
            device_kind="cpu",
        ),
    )


def _target_config(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "num_hidden_layers": 8,
        "vocab_size": shape.draft_vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
    }

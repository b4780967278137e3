"""How near precompute comes to the arithmetic that cannot be avoided, and how far it is from doing it plainly.

One target, one corpus, three ways in one run. *Ours* is `precompute` from the loaded target to committed shards. *Bare*
is the decoder over the same samples and the head where supervision is stored (logits, argmax and log-normaliser), with
nothing copied, encoded or written: samples one by one, without padding, or in our batches, whichever is faster. *As
NeMo AutoModel does it*: batches of four in the order of the data, padded to the sequence length, logits of the whole
vocabulary at every slot, projected probabilities at every slot, shards gathered on the host and written between
batches. Lengths are log-normal as in chat data, cut at the sequence length; half of the tokens are supervised.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.harness import Figures, alternating_seconds
from benchmarks.states import chat_lengths
from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.interrupts import StopRequest
from eagle_offline.precompute.fill import Filler
from eagle_offline.precompute.stream import token_sample
from eagle_offline.stages import begun_precompute
from eagle_offline.supervision import compute_target_distribution, supervised_positions
from eagle_offline.target.architectures import implementations
from eagle_offline.target.capture import TokenSample

NAME = "capture_speed"
QUESTION = "How near does precompute come to the bare forward, and how far is it from a padded, synchronous loop?"

_NEMO_BATCH_SIZE = 4
_REPEATS = 7


@dataclass(frozen=True)
class Shape:
    """A target of random weights and a corpus for it.

    Attributes:
        kind: the model class's name without ``ForCausalLM``; config: its sizes.
        seq_length: of the corpus; num_samples, shard_size, draft_vocab_size: as for precompute.
        dtype: that the target runs in.
    """

    kind: str
    config: dict[str, Any]
    seq_length: int
    num_samples: int
    shard_size: int
    draft_vocab_size: int
    dtype: torch.dtype


# A target that a CPU can run while its forward still outweighs all else: 0.1 billion weights.
SMALL = Shape(
    "Llama",
    {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    seq_length=512,
    num_samples=16,
    shard_size=8,
    draft_vocab_size=8192,
    dtype=torch.float32,
)
LLAMA_8B = Shape(
    "Llama",
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    seq_length=2048,
    num_samples=512,
    shard_size=128,
    draft_vocab_size=32000,
    dtype=torch.bfloat16,
)
QWEN3_30B_A3B = Shape(
    "Qwen3Moe",
    {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    seq_length=2048,
    num_samples=384,
    shard_size=128,
    draft_vocab_size=32000,
    dtype=torch.bfloat16,
)


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return the cases for a device."""
    if torch.device(device).type == "cpu":
        return {"0.1b": partial(measure, SMALL, device)}
    return {"8b": partial(measure, LLAMA_8B, device), "30b-a3b": partial(measure, QWEN3_30B_A3B, device)}


def measure(shape: Shape, device: str, repeats: int = _REPEATS) -> Figures:
    """Return the ratios of one shape."""
    with tempfile.TemporaryDirectory() as scratch, StopRequest(0) as stop:
        job = Job(shape, device, Path(scratch), stop)
        bare_ways = {"bare_unpadded": job.bare_unpadded, "bare_batched": job.bare_batched}
        seconds = alternating_seconds({**bare_ways, "ours": job.ours}, repeats=repeats)
        # By itself: what it leaves of the machine's memory is not for the next one to pay.
        beside = alternating_seconds(
            {"nemo_like": job.nemo_like, "ours_beside": job.ours}, repeats=max(1, repeats // 3)
        )
        seconds |= beside
        bare = min(seconds["bare_unpadded"], seconds["bare_batched"])
        return {
            "ours_over_bare_speed": bare / seconds["ours"],
            "ours_over_nemo_like_speed": seconds["nemo_like"] / seconds["ours_beside"],
            "waited_for_disk_share": job.waited_share,
            "tokens": job.num_tokens,
            "ours_tokens_per_s": job.num_tokens / seconds["ours"],
            "written_mb_per_s": job.num_bytes / 1e6 / seconds["ours"],
            "padding_of_nemo_like": shape.num_samples * shape.seq_length / job.num_tokens - 1,
            "padding_of_ours": job.num_slots / job.num_tokens - 1,
            "max_batch_tokens": job.max_batch_tokens,
            **{f"{name}_s": value for name, value in seconds.items()},
        }


class Job:
    """One target and one corpus, and the ways to go through it."""

    def __init__(self, shape: Shape, device: str, scratch: Path, stop: StopRequest):
        self._shape, self._device, self._scratch, self._stop = shape, device, scratch, stop
        target = scratch / "target"
        self.model = _make_target(shape, device, target)
        data = scratch / "data.jsonl"
        _write_tokens(shape, data)
        settings = PrecomputeSettings(
            target_model=str(target),
            input_data=(str(data),),
            output_dir=scratch / "cache",
            seq_length=shape.seq_length,
            draft_vocab_size=shape.draft_vocab_size,
            shard_size=shape.shard_size,
            device=device,
        )
        with begun_precompute(settings, stop, with_status=False) as begun:
            self._filler = Filler(begun, stop, lambda *_: self.model)
        self._plan = self._filler.plan
        self._samples = [token_sample(self._plan.table, row) for row in range(len(self._plan.table))]
        self._selected = torch.from_numpy(self._plan.vocab.selected_token_ids).to(device)
        lengths = self._plan.table.lengths
        self.num_tokens = int(lengths.sum())
        batching = self._plan.batching
        assert batching is not None
        self.max_batch_tokens = batching.max_batch_tokens or 0
        self._batches = [
            [int(rows[place]) for place in places]
            for rows in map(self._plan.rows, range(self._plan.identity.num_shards))
            for places in batching.batches(lengths[rows].tolist())
        ]
        self.num_slots = sum(len(rows) * int(lengths[rows].max()) for rows in self._batches)
        self.num_bytes, self.waited_share = 0, 0.0

    def ours(self) -> None:
        """Precompute, up to committed shards."""
        cache = self._plan.settings.output_dir
        for path in (*cache.glob("shard-*"), *cache.glob("commit-*"), *cache.glob("index-*")):
            path.unlink()
        self._filler.make(range(self._plan.identity.num_shards))
        self.waited_share = self._filler.waited_share
        self.num_bytes = sum(path.stat().st_size for path in cache.glob("shard-*"))

    def bare_unpadded(self) -> None:
        """Run the decoder over one sample after another."""
        for sample in self._samples:
            self._bare([sample])
        self._wait()

    def bare_batched(self) -> None:
        """Run the decoder over the batches that precompute makes."""
        for rows in self._batches:
            self._bare([self._samples[row] for row in rows])
        self._wait()

    def nemo_like(self) -> None:
        """Run the whole model over padded batches, and write what came of each shard's before the next."""
        gathered: dict[str, list[torch.Tensor]] = {}
        for start in range(0, len(self._samples), _NEMO_BATCH_SIZE):
            for name, tensor in self._nemo_batch(self._samples[start : start + _NEMO_BATCH_SIZE]).items():
                gathered.setdefault(name, []).append(tensor)
            done = min(start + _NEMO_BATCH_SIZE, len(self._samples))
            if done % self._shape.shard_size == 0 or done == len(self._samples):
                shard = {name: torch.cat(tensors) for name, tensors in gathered.items()}
                save_file(shard, self._scratch / f"shard-{done:06d}.safetensors")
                gathered = {}

    def _bare(self, samples: list[TokenSample]) -> None:
        input_ids, masks = self._padded(samples, max(len(sample.input_ids) for sample in samples))
        with torch.inference_mode():
            hidden = self.model.model(input_ids, use_cache=False).last_hidden_state
            where = torch.cat([supervised_positions(mask) for mask in masks]).nonzero().squeeze(-1).to(self._device)
            logits = self.model.lm_head(hidden.flatten(0, 1)[where]).float()
            logits.argmax(dim=-1)
            logits.logsumexp(dim=-1)

    def _nemo_batch(self, samples: list[TokenSample]) -> dict[str, torch.Tensor]:
        input_ids, masks = self._padded(samples, self._shape.seq_length)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            attention_mask[row, : len(sample.input_ids)] = 1
        loss_mask = masks.to(self._device)
        with torch.inference_mode():
            output = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
            aux = torch.cat(
                [output.hidden_states[layer + 1] for layer in self._plan.identity.capture.aux_layer_ids], -1
            )
            inside = torch.zeros(output.logits.shape[-1], dtype=torch.bool, device=self._device)
            inside[self._selected] = True
            probs, position_mask = compute_target_distribution(output.logits, self._selected, inside, loss_mask)
            tensors = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "loss_mask": loss_mask,
                "aux_hidden_states": aux.bfloat16(),
                "target_probs": probs.bfloat16(),
                "position_mask": position_mask,
            }
            return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _padded(self, samples: list[TokenSample], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids = torch.zeros(len(samples), width, dtype=torch.int64)
        masks = torch.zeros(len(samples), width, dtype=torch.uint8)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.input_ids)] = torch.from_numpy(sample.input_ids)
            masks[row, : len(sample.loss_mask)] = torch.from_numpy(sample.loss_mask)
        return input_ids.to(self._device), masks

    def _wait(self) -> None:
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize()


def _make_target(shape: Shape, device: str, directory: Path) -> Any:
    """Return a target of random weights on its device; its config and a tokenizer are saved, as precompute wants."""
    import transformers
    from tokenizers import Tokenizer, models

    config = getattr(transformers, f"{shape.kind}Config")(**shape.config, max_position_embeddings=4096)
    config.architectures = [f"{shape.kind}ForCausalLM"]
    chosen = implementations(config, device, shape.dtype)
    config._attn_implementation = chosen.attention
    if chosen.experts is not None:
        config._experts_implementation = chosen.experts
    torch.manual_seed(0)
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{shape.kind}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    config.save_pretrained(directory)
    words = {f"t{number}": number for number in range(shape.config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(directory)
    return model


def _write_tokens(shape: Shape, path: Path) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    # A quarter of the usual lengths for a quarter of the usual sequence length, and so on.
    lengths = np.maximum(chat_lengths(shape.num_samples, 0) * shape.seq_length // 2048, 4)
    with path.open("w") as file:
        for length in lengths.tolist():
            ids = generator.integers(0, shape.config["vocab_size"], length).tolist()
            mask = [0] * (length // 2) + [1] * (length - length // 2)
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")

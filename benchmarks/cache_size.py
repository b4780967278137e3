"""How many bytes does a real token take on disk, beside what others store, and what does each choice lose?

An 8B shape (H 4096, V 128256, Vd 32000, 3 layers), lengths as in chat data, half of the tokens supervised. The
alternatives' layouts are written by plain code in the same run: NeMo AutoModel's as safetensors (rows padded to the
sequence length; aux states, dense probabilities, ids and masks at every slot, bf16), of which a few samples say what
all take, and DeepSpec/SpecForge's (ids, loss mask, raw bf16 aux and final states at every real position).

Shards are counted; what a cache holds once, the head above all, is not. Errors are relative and root mean square, over
all channels and over those that are not massive. Distributions are compared at supervised positions, over the draft
vocabulary: the Kullback-Leibler divergence of the exact one from what the stored values give, in nats, and how often
the likeliest token is another one; over the full vocabulary where final states are stored. `benchmarks.states` says
what the states and the head are. One thread, so that figures do not depend on how many there are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.harness import Figures
from benchmarks.states import (
    DRAFT_VOCAB_SIZE,
    HIDDEN_SIZE,
    NUM_AUX_LAYERS,
    VOCAB_SIZE,
    SyntheticHead,
    chat_lengths,
    final_states,
    hidden_states,
    massive_channels,
    token_ids,
)
from benchmarks.synthetic_cache import Shape, identity_of
from eagle_offline.cache import codec
from eagle_offline.cache.choices import EncodingChoice
from eagle_offline.cache.formats import frames_columns, shard_writer
from eagle_offline.cache.layout import FieldLayout
from eagle_offline.cache.manifest import Identity
from eagle_offline.cache.samples import StoredSample
from eagle_offline.supervision import supervised_positions

NAME = "cache_size"
QUESTION = __doc__

CHOICES: dict[str, EncodingChoice] = {
    "planes": EncodingChoice(),
    "raw": EncodingChoice(state_encoding="raw"),
    **{f"planes, {bits} mantissa bits": EncodingChoice(mantissa_bits=bits) for bits in (5, 4, 3, 2)},
    "fp8": EncodingChoice(state_encoding="fp8"),
    "planes, dense": EncodingChoice(target_encoding="dense"),
    "planes, top 64": EncodingChoice(target_encoding="topk", top_k=64),
    **{
        f"{encoding}, zarr {compressor}": EncodingChoice(state_encoding=encoding, format="zarr", compressor=compressor)
        for encoding in ("planes", "raw", "fp8")
        for compressor in ("zstd", "blosc")
    },
}

# Samples of NeMo's layout that are written; all of them take the same.
_NUM_PADDED = 2


@dataclass(frozen=True)
class Sizes:
    """What is measured: the shape, how many samples, and at how many positions distributions are compared."""

    hidden_size: int = HIDDEN_SIZE
    vocab_size: int = VOCAB_SIZE
    draft_vocab_size: int = DRAFT_VOCAB_SIZE
    seq_length: int = 2048
    num_samples: int = 12
    num_compared: int = 256


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case a choice; they use no device."""
    if device != "cpu":
        return {}
    return {name: lambda choice=choice: measure(choice) for name, choice in CHOICES.items()}


def measure(choice: EncodingChoice, sizes: Sizes = Sizes()) -> Figures:
    """Return KiB a real token, its share of the alternatives', and what the choice loses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        corpus = _corpus(sizes)
        with tempfile.TemporaryDirectory() as directory:
            per_token, nemo, deepspec = (
                num_bytes / corpus.num_tokens / 1024
                for num_bytes in (
                    _our_bytes(Path(directory) / "ours", corpus, choice),
                    _padded_bytes(Path(directory) / "padded.safetensors", corpus),
                    _raw_bytes(Path(directory) / "raw", corpus),
                )
            )
        fields = _fields(choice, sizes)
        return {
            "share_of_nemo": per_token / nemo,
            "share_of_deepspec": per_token / deepspec,
            "kib_per_token": per_token,
            "nemo_kib_per_token": nemo,
            "deepspec_kib_per_token": deepspec,
            "tokens": corpus.num_tokens,
            **_aux_errors(corpus, fields[:-1]),
            **_distribution_losses(corpus, fields[-1]),
        }
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Corpus:
    """States that samples are rows of, and what the exact ones give.

    Attributes:
        lengths: int64 ``[N]``.
        aux: bf16 ``[seq_length, H]`` of each layer; final: of the final states.
        head: reads them.
        argmax: int64 ``[num_compared]`` over the full vocabulary, of the first final states.
        probs: float32 ``[num_compared, Vd]``, theirs over the draft vocabulary.
    """

    sizes: Sizes
    lengths: np.ndarray
    aux: list[torch.Tensor]
    final: torch.Tensor
    head: SyntheticHead
    argmax: torch.Tensor
    probs: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def samples(self) -> Iterator[_Sample]:
        """Yield every sample: the rows of states from a place of its own on."""
        for number, length in enumerate(self.lengths.tolist()):
            start = number * 97 % (self.sizes.seq_length - length + 1)
            loss_mask = torch.zeros(length, dtype=torch.bool)
            loss_mask[length // 2 :] = True
            yield _Sample(number, slice(start, start + length), token_ids(length, number), loss_mask)

    def probs_from(self, start: int, count: int) -> torch.Tensor:
        """Return float32 ``[count, Vd]``; those that were computed, in turn."""
        return self.probs[torch.arange(start, start + count) % len(self.probs)]


@dataclass(frozen=True)
class _Sample:
    number: int
    rows: slice
    input_ids: np.ndarray
    loss_mask: torch.Tensor


@lru_cache(maxsize=1)
def _corpus(sizes: Sizes) -> _Corpus:
    final, head = final_states(sizes.seq_length, NUM_AUX_LAYERS, sizes.hidden_size, sizes.vocab_size)
    argmax, probs = _distributions(head, final[: sizes.num_compared], sizes)
    return _Corpus(
        sizes=sizes,
        lengths=chat_lengths(sizes.num_samples, seed=0, longest=sizes.seq_length),
        aux=[hidden_states(sizes.seq_length, layer, sizes.hidden_size) for layer in range(NUM_AUX_LAYERS)],
        final=final,
        head=head,
        argmax=argmax,
        probs=probs,
    )


def _distributions(head: SyntheticHead, final: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest token of all, and the distribution over the draft vocabulary: the most frequent tokens."""
    logits = head.logits(final)
    return logits.argmax(dim=1), logits[:, : sizes.draft_vocab_size].softmax(dim=1)


def _fields(choice: EncodingChoice, sizes: Sizes) -> list[FieldLayout]:
    return choice.fields(range(NUM_AUX_LAYERS), sizes.hidden_size, sizes.draft_vocab_size)


def _our_bytes(path: Path, corpus: _Corpus, choice: EncodingChoice) -> int:
    fields = _fields(choice, corpus.sizes)
    writer = shard_writer(path, _identity_of(corpus, choice, fields), 0)
    for sample in corpus.samples():
        positions = supervised_positions(sample.loss_mask)
        count, first = int(positions.sum()), sample.rows.start
        target = corpus.final[sample.rows][positions]
        if choice.target_encoding != "factored":
            target = corpus.probs_from(first, count)
        columns: list[bytes | memoryview] = []
        for field, values in zip(fields, [*(aux[sample.rows] for aux in corpus.aux), target], strict=True):
            columns.extend(codec.encode(field, values, framed=frames_columns(choice.format)))
        writer.append(
            StoredSample(
                sample_id=sample.number,
                input_ids=sample.input_ids,
                loss_mask=sample.loss_mask.numpy().astype(np.uint8),
                target_argmax=sample.input_ids[positions.numpy()],
                target_log_normalizer=target.float().logsumexp(dim=1).numpy(),
                columns=columns,
                framed=frames_columns(choice.format),
            )
        )
    _, _, num_bytes = writer.close()
    return num_bytes


def _identity_of(corpus: _Corpus, choice: EncodingChoice, fields: list[FieldLayout]) -> Identity:
    shape = Shape(corpus.sizes.hidden_size, 0, 0, 0, corpus.sizes.draft_vocab_size)
    identity = identity_of(corpus.lengths, shape, choice.state_encoding, shard_size=corpus.sizes.num_samples)
    chosen = {
        "target_encoding": choice.target_encoding,
        "format": choice.format,
        "compressor": choice.zarr_compressor,
        "fields": fields,
    }
    return identity.model_copy(
        update={
            "capture": identity.capture.model_copy(update=chosen),
            "text": identity.text.model_copy(update={"seq_length": corpus.sizes.seq_length}),
        }
    )


def _padded_bytes(path: Path, corpus: _Corpus) -> int:
    """Write a few samples as NeMo AutoModel does; return what all would take."""
    sizes, count = corpus.sizes, min(_NUM_PADDED, corpus.sizes.num_samples)
    slots = (count, sizes.seq_length)
    tensors = {name: torch.zeros(slots, dtype=torch.int64) for name in ("input_ids", "attention_mask", "loss_mask")}
    tensors |= {
        "aux_hidden_states": torch.zeros(*slots, NUM_AUX_LAYERS * sizes.hidden_size, dtype=torch.bfloat16),
        "target_probs": torch.zeros(*slots, sizes.draft_vocab_size, dtype=torch.bfloat16),
        "position_mask": torch.zeros(*slots, 1, dtype=torch.bool),
    }
    for sample, row in zip(corpus.samples(), range(count), strict=False):
        length = len(sample.input_ids)
        tensors["input_ids"][row, :length] = torch.from_numpy(sample.input_ids)
        tensors["attention_mask"][row, :length] = 1
        tensors["loss_mask"][row, :length] = sample.loss_mask.long()
        tensors["position_mask"][row, :length, 0] = sample.loss_mask
        tensors["aux_hidden_states"][row, :length] = torch.cat([aux[sample.rows] for aux in corpus.aux], dim=1)
        tensors["target_probs"][row, :length] = corpus.probs_from(sample.rows.start, length).bfloat16()
    save_file(tensors, path)
    return path.stat().st_size * sizes.num_samples // count


def _raw_bytes(path: Path, corpus: _Corpus) -> int:
    """Write every sample as DeepSpec and SpecForge do, states at all positions; return what they take."""
    with path.open("wb") as file:
        for sample in corpus.samples():
            file.write(sample.input_ids.tobytes())
            file.write(sample.loss_mask.numpy().tobytes())
            for states in (*corpus.aux, corpus.final):
                file.write(states[sample.rows].view(torch.uint8).numpy().tobytes())
    return path.stat().st_size


def _stored(field: FieldLayout, values: torch.Tensor) -> torch.Tensor:
    """Return what comes back of values."""
    columns = [memoryview(column) for column in codec.encode(field, values)]
    return codec.merge(field, [torch.from_numpy(plane) for plane in codec.unpack(field, columns, len(values))])


def _aux_errors(corpus: _Corpus, fields: list[FieldLayout]) -> Figures:
    sums = {"aux_error": [0.0, 0.0], "aux_error_without_massive": [0.0, 0.0]}
    for layer, (field, exact) in enumerate(zip(fields, corpus.aux, strict=True)):
        usual = torch.from_numpy(~massive_channels(layer, corpus.sizes.hidden_size))
        error, wide = (_stored(field, exact).float() - exact.float()).double(), exact.double()
        for sum_, channels in zip(sums.values(), (slice(None), usual), strict=True):
            sum_[0] += float(error[:, channels].square().sum())
            sum_[1] += float(wide[:, channels].square().sum())
    return {name: (error / size) ** 0.5 for name, (error, size) in sums.items()}


def _distribution_losses(corpus: _Corpus, field: FieldLayout) -> Figures:
    exact, lost = corpus.probs, {}
    if field.width == corpus.sizes.hidden_size and field.name != "target_probs":
        argmax, stored = _distributions(corpus.head, _stored(field, corpus.final[: len(exact)]), corpus.sizes)
        lost["flips_full_vocabulary"] = _share(argmax != corpus.argmax)
    else:
        stored = _stored(field, exact).float()
        stored = stored / stored.sum(dim=1, keepdim=True)
    smallest = torch.finfo(torch.float32).tiny
    # In float64: what is asked for is the small difference of large sums.
    logs = [probs.double().clamp_min(smallest).log() for probs in (exact, stored)]
    divergence = (exact.double() * (logs[0] - logs[1])).sum(dim=1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_largest": float(divergence.max()),
        **lost,
        "flips_draft_vocabulary": _share(stored.argmax(dim=1) != exact.argmax(dim=1)),
        "exact_entropy": float(-(exact.double() * logs[0]).sum(dim=1).mean()),
        "exact_top1": float(exact.max(dim=1).values.mean()),
        "compared_positions": len(exact),
    }


def _share(flags: torch.Tensor) -> float:
    return float(flags.double().mean())

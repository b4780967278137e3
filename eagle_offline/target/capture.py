"""Samples through the frozen target: aux states everywhere, final states and head statistics where supervised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eagle_offline.errors import MismatchError
from eagle_offline.supervision import Head, supervised_positions
from eagle_offline.target.hooks import HFEagle3TargetModel

# How far logits recomputed from the final state may be from the model's own, relative to their largest value.
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# Tokens of the start-up check: enough to cross every layer with more than one position.
_CHECK_TOKENS = 32


@dataclass(frozen=True)
class TokenSample:
    """A tokenised sample: its row in the token table, int32 ``[T]`` ids, uint8 ``[T]`` loss mask."""

    sample_id: int
    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class CapturedSample:
    """A sample's states, on the CPU, in the stored dtype.

    Attributes:
        tokens: the sample.
        aux_hidden_states: one ``[T, H]`` a layer.
        last_hidden_state: ``[P, H]`` at supervised positions.
        target_probs: float32 ``[P, Vd]`` at supervised positions when they were asked for, else None.
        target_argmax: int32 ``[P]``; target_log_normalizer: float32 ``[P]``.
        num_in_vocab: supervised tokens whose position has its argmax in the draft vocabulary; vocab_mass: the target's
            probability inside the draft vocabulary, summed over positions with ``m_t``.
        finite: whether every value above is.
    """

    tokens: TokenSample
    aux_hidden_states: list[Tensor]
    last_hidden_state: Tensor
    target_probs: Tensor | None
    target_argmax: np.ndarray
    target_log_normalizer: np.ndarray
    num_in_vocab: int
    vocab_mass: float
    finite: bool


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return positions grouped into batches of similar length: sorted by length, ties in order.

    Example:
        >>> length_batches([5, 2, 9, 2], 2)
        [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda position: lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Capture:
    """Captures samples in the dtype they are stored in.

    Args:
        target: the frozen target.
        head: its head in the stored dtype, on the target's device.
        dtype: of stored states.
        selected_token_ids: int64 ``[Vd]``, the draft vocabulary.
        with_probs: probabilities over it are to be stored.
    """

    def __init__(
        self,
        target: HFEagle3TargetModel,
        head: Head,
        dtype: torch.dtype,
        selected_token_ids: Tensor,
        *,
        with_probs: bool = False,
    ):
        self._target, self._head, self._dtype = target, head, dtype
        self._selected_head = head.select(selected_token_ids) if with_probs else None
        self._selected_token_mask = torch.zeros(head.vocab_size, dtype=torch.bool)
        self._selected_token_mask[selected_token_ids] = True

    def run(self, samples: Sequence[TokenSample], batch_size: int) -> Iterator[CapturedSample]:
        """Yield every sample captured, shorter ones first; what is held in memory is one batch."""
        for batch in length_batches([len(sample.input_ids) for sample in samples], batch_size):
            yield from self._run_batch([samples[position] for position in batch])

    def _run_batch(self, samples: Sequence[TokenSample]) -> Iterator[CapturedSample]:
        input_ids = torch.zeros(len(samples), max(len(sample.input_ids) for sample in samples), dtype=torch.int64)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        layers, last = self._target.capture(input_ids)
        positions = [supervised_positions(torch.tensor(sample.loss_mask)).nonzero().squeeze(-1) for sample in samples]
        hidden = torch.cat([last[row, where.to(last.device)] for row, where in enumerate(positions)]).to(self._dtype)
        with torch.inference_mode():
            argmax, log_normalizer, mass = self._head.statistics(hidden, self._selected_token_mask)
            probs = None if self._selected_head is None else self._selected_head.logits(hidden).softmax(dim=-1)
        counts = [len(where) for where in positions]
        split_hidden = hidden.cpu().split(counts)
        split_argmax, split_normalizer = argmax.cpu().split(counts), log_normalizer.cpu().split(counts)
        split_mass = mass.cpu().split(counts)
        split_probs = [None] * len(samples) if probs is None else probs.cpu().split(counts)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            aux = [layer[row, :length].to(self._dtype).cpu() for layer in layers]
            stored = [*aux, split_hidden[row], split_normalizer[row]]
            supervised = torch.tensor(sample.loss_mask).bool()[positions[row]]
            in_vocab = self._selected_token_mask[split_argmax[row].long()]
            yield CapturedSample(
                tokens=sample,
                aux_hidden_states=aux,
                last_hidden_state=split_hidden[row],
                target_probs=split_probs[row],
                target_argmax=split_argmax[row].numpy(),
                target_log_normalizer=split_normalizer[row].numpy(),
                num_in_vocab=int((supervised & in_vocab).sum()),
                vocab_mass=float(split_mass[row][supervised].double().sum()),
                finite=all(bool(tensor.isfinite().all()) for tensor in stored),
            )


def check_capture(target: HFEagle3TargetModel, head: Head, sample: TokenSample) -> None:
    """Check, on the start of one sample, that what is captured is what the whole model computes.

    Args:
        head: the target's head in the compute dtype.

    Raises:
        MismatchError: states differ from a plain forward's, or the head does not reproduce the model's logits.
    """
    input_ids = torch.tensor(sample.input_ids[:_CHECK_TOKENS], dtype=torch.int64)[None]
    layers, last = target.capture(input_ids)
    device = target.get_input_embeddings().weight.device
    whole = target.generate_batch(
        input_ids.to(device), torch.ones_like(input_ids, device=device), torch.ones_like(input_ids, device=device)
    )
    name = type(target.model).__name__
    tolerance = _LOGIT_TOLERANCE.get(last.dtype, _LOGIT_TOLERANCE[torch.float32])
    aux = torch.cat([layer.to(whole.aux_hidden_states.device) for layer in layers], dim=-1)
    if not torch.isfinite(last).all():
        return  # the capture of this sample reports it, with the sample's number
    if not torch.allclose(aux.float(), whole.aux_hidden_states.float(), rtol=tolerance, atol=tolerance):
        raise MismatchError(f"{name}: states captured without the head differ from those of a whole forward")
    assert whole.logits is not None
    own = whole.logits[0, :-1].float()
    recomputed = head.logits(last[0, 1:]).to(own.device)
    if recomputed.shape != own.shape or (recomputed - own).abs().max() > tolerance * own.abs().max().clamp_min(1):
        raise MismatchError(
            f"{name}: logits recomputed from the final hidden state differ from the model's own; "
            "it applies something after its head that is not supported"
        )

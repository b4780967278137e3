"""Samples through the frozen target: aux states everywhere, final states and head statistics where supervised."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eagle_offline.errors import MismatchError
from eagle_offline.supervision import Head, supervised_positions
from eagle_offline.target.copies import Copies
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.padding import check_padding
from eagle_offline.target.supervise import Supervise

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


class Capture:
    """Captures samples in the dtype they are stored in.

    Args:
        target: the frozen target.
        head: its head in the stored dtype, on the device that what was captured goes through.
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
        self._device = head.weight.device
        self._target, self._dtype = target, dtype
        self._supervise = Supervise(head, selected_token_ids, with_probs=with_probs)
        self._copies = Copies(self._device)

    def run(self, samples: Sequence[TokenSample]) -> list[CapturedBatch]:
        """Put samples through the target together, or in halves where memory does not suffice.

        What is returned may still be on its way from the device; what was returned before has arrived.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for one sample.
        """
        try:
            return [self._run(samples)]
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise
        # Not in the handler: its traceback holds what is to be freed.
        gc.collect()
        torch.cuda.empty_cache()
        middle = len(samples) // 2
        return [replace(half, halved=True) for part in (samples[:middle], samples[middle:]) for half in self.run(part)]

    def _run(self, samples: Sequence[TokenSample]) -> CapturedBatch:
        lengths = [len(sample.input_ids) for sample in samples]
        width = max(lengths)
        input_ids = torch.zeros(len(samples), width, dtype=torch.int64)
        places, supervised = [], []
        for row, sample in enumerate(samples):
            input_ids[row, : lengths[row]] = torch.from_numpy(sample.input_ids)
            places.append(torch.arange(row * width, row * width + lengths[row]))
            supervised.append(places[-1][supervised_positions(torch.from_numpy(sample.loss_mask))])
        layers, last = self._target.capture(self._copies.to_device(input_ids), lengths)
        with torch.inference_mode():
            # Padding stays behind: a batch travels as its tokens end to end.
            real = self._copies.to_device(torch.cat(places))
            aux = [self._stored(layer, real) for layer in layers]
            hidden = self._stored(last, self._copies.to_device(torch.cat(supervised)))
            by_tokens = {f"aux_{number}": states for number, states in enumerate(aux)}
            by_tokens["finite"] = torch.stack([states.isfinite().all(dim=-1) for states in aux]).all(dim=0)
            by_positions = self._supervise(hidden)
        arrived = self._copies.to_host(by_tokens, by_positions)
        return CapturedBatch(samples, [len(where) for where in supervised], arrived)

    def _stored(self, states: Tensor, places: Tensor) -> Tensor:
        """Return ``[N, H]`` in the stored dtype: the states ``[B, T, H]`` at places of the batch laid end to end."""
        return states.flatten(0, 1).index_select(0, places.to(states.device)).to(self._device, self._dtype)


@dataclass(frozen=True)
class CapturedBatch:
    """Samples that went through the target together, their states perhaps still on the way to the host.

    Attributes:
        samples: in the batch's order.
        num_positions: supervised positions of each.
        arrived: waits for what came of them, and returns it by name: ``[ΣT, …]``, and ``[ΣP, …]``.
        halved: memory did not suffice for all that were to go together.
    """

    samples: Sequence[TokenSample]
    num_positions: Sequence[int]
    arrived: Callable[[], Sequence[dict[str, Tensor]]]
    halved: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    def __iter__(self) -> Iterator[CapturedSample]:
        """Yield the samples, once their states are there; views of the batch's."""
        by_tokens, by_positions = self.arrived()
        lengths = [len(sample.input_ids) for sample in self.samples]
        tokens = {name: tensor.split(lengths) for name, tensor in by_tokens.items()}
        positions = {name: tensor.split(list(self.num_positions)) for name, tensor in by_positions.items()}
        aux_names = [name for name in tokens if name.startswith("aux_")]
        for row, sample in enumerate(self.samples):
            of_sample = {name: parts[row] for name, parts in positions.items()}
            mask = torch.from_numpy(sample.loss_mask).bool()
            supervised = mask[supervised_positions(mask)]
            yield CapturedSample(
                tokens=sample,
                aux_hidden_states=[tokens[name][row] for name in aux_names],
                last_hidden_state=of_sample["hidden"],
                target_probs=of_sample.get("probs"),
                target_argmax=of_sample["argmax"].numpy(),
                target_log_normalizer=of_sample["log_normalizer"].numpy(),
                num_in_vocab=int((supervised & of_sample["in_vocab"]).sum()),
                vocab_mass=float(of_sample["mass"][supervised].double().sum()),
                finite=bool(tokens["finite"][row].all()) and bool(of_sample["finite"].all()),
            )


def check_capture(target: HFEagle3TargetModel, head: Head, sample: TokenSample) -> None:
    """Check, on the start of one sample, that what is captured is what the whole model computes.

    Args:
        head: the target's head in the compute dtype.

    Raises:
        MismatchError: states differ from a plain forward's, or the head does not reproduce the model's logits.
    """
    input_ids = torch.tensor(sample.input_ids[:_CHECK_TOKENS], dtype=torch.int64)[None]
    check_padding(target, input_ids)
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

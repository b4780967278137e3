"""From sums over supervised slots to the loss of an unroll: decay over steps, soft cross-entropy or LK losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eagle_offline.errors import UsageError

# Weight of unroll step k relative to step k - 1. Source: EAGLE-3, arXiv 2503.01840.
STEP_DECAY = 0.8

LK_LOSS_TYPES = ("alpha", "lambda")


class StepSums(Protocol):
    """Sums over supervised slots, one entry a step; see `eagle_offline.objectives.ttt.UnrollSums`."""

    @property
    def losses(self) -> Tensor: ...
    @property
    def counts(self) -> Tensor: ...
    @property
    def overlaps(self) -> Tensor: ...
    @property
    def log_overlaps(self) -> Tensor: ...


@dataclass(frozen=True)
class StepWeights:
    """What one supervised slot adds to the loss at each step: ``a_k · CE − b_k · α − c_k · log α``.

    Attributes:
        cross_entropy, overlap, log_overlap: float ``[K]``: ``a``, ``b`` and ``c``; None for zero.
        kl_divergence: ``CE`` less the target's entropy, another number with the same gradient.
    """

    cross_entropy: Tensor
    overlap: Tensor | None = None
    log_overlap: Tensor | None = None
    kl_divergence: bool = False


@dataclass(frozen=True)
class TTTLoss:
    """The loss of an unroll, each mean over what is summed.

    Source: EAGLE-3, arXiv 2503.01840; LK losses, arXiv 2602.23881.

    Attributes:
        ttt_steps: ``K``.
        step_decay: weight of a step relative to the one before.
        lk_loss_type: None for soft cross-entropy, ``"alpha"`` or ``"lambda"``.
        lk_kl_scale, lk_kl_decay: ``s`` in ``[0, 1]`` and ``d ≥ 0`` of the ``lambda`` loss.

    Raises:
        UsageError: for a loss type or a factor out of range.
    """

    ttt_steps: int = 7
    step_decay: float = STEP_DECAY
    lk_loss_type: str | None = None
    lk_kl_scale: float = 1.0
    lk_kl_decay: float = 3.0

    def __post_init__(self) -> None:
        if self.lk_loss_type is not None and self.lk_loss_type not in LK_LOSS_TYPES:
            expected = ", ".join(LK_LOSS_TYPES)
            raise UsageError(f"lk_loss_type is {self.lk_loss_type!r}; expected one of {expected} or None")
        if self.ttt_steps < 1 or not 0 <= self.lk_kl_scale <= 1 or self.lk_kl_decay < 0 or self.step_decay <= 0:
            raise UsageError("expected ttt_steps >= 1, lk_kl_scale in [0, 1], lk_kl_decay >= 0 and step_decay > 0")

    @property
    def weighs_by_overlap(self) -> bool:
        """Whether a step's weights depend on its mean overlap, which has to be known before them."""
        return self.lk_loss_type == "lambda"

    @property
    def num_steps(self) -> int:
        return self.ttt_steps

    def no_weights(self) -> StepWeights:
        """Return weights of 0, for sums alone."""
        return StepWeights(torch.zeros(self.ttt_steps, dtype=torch.float64))

    def step_losses(self, sums: StepSums) -> Tensor:
        """Return ``ℓ_k`` ``[K]``, 0 for steps without supervision."""
        counts = sums.counts.clamp_min(1)
        if self.lk_loss_type is None:
            return sums.losses / counts
        if self.lk_loss_type == "alpha":
            return -sums.log_overlaps / counts
        mean_overlap = sums.overlaps / counts
        share = self._share(mean_overlap)
        blended = share * sums.losses / counts + (1 - share) * (1 - mean_overlap)
        return torch.where(sums.counts > 0, blended, sums.losses * 0)

    def loss(self, sums: StepSums) -> Tensor:
        """Return ``Σ_k decay^k ℓ_k / Σ_k decay^k``."""
        losses = self.step_losses(sums)
        return (self._decays(losses.device).to(losses.dtype) * losses).sum()

    def weights(self, counts: Tensor, overlaps: Tensor | None = None) -> StepWeights:
        """Return what a slot of each step adds to `loss`, constants left out, in float64.

        Args:
            counts: int64 ``[K]``, ``N_k`` of everything that the means are over.
            overlaps: float ``[K]``, ``Σ α`` of the same; needed where `weighs_by_overlap`.
        """
        means = self._decays(counts.device) / counts.clamp_min(1)
        if self.lk_loss_type is None:
            return StepWeights(means)
        if self.lk_loss_type == "alpha":
            return StepWeights(torch.zeros_like(means), log_overlap=means)
        if overlaps is None:
            raise UsageError("the lambda loss needs the mean overlaps before its weights")
        share = self._share(overlaps.double() / counts.clamp_min(1))
        return StepWeights(means * share, overlap=means * (1 - share))

    def _share(self, mean_overlap: Tensor) -> Tensor:
        return self.lk_kl_scale * torch.exp(-self.lk_kl_decay * mean_overlap.detach())

    def _decays(self, device: torch.device) -> Tensor:
        decays = self.step_decay ** torch.arange(self.ttt_steps, dtype=torch.float64)
        return (decays / decays.sum()).to(device)

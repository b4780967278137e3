"""The loss of a parallel forward: KL over elements of all depths, one mean or a mean a depth (P-EAGLE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_offline.errors import UsageError
from eagle_offline.objectives.ttt_loss import StepSums, StepWeights


@dataclass(frozen=True)
class ParallelLoss:
    """``Σ_d w_d Σ KL / Σ_d w_d N_d`` over the elements of each depth, or ``Σ_d w_d (Σ KL / N_d) / Σ_d w_d``.

    With all weights 1 and one mean over all elements this is the loss of P-EAGLE, arXiv 2602.01469: depths count as
    often as they were drawn.

    Attributes:
        num_depths: ``D``.
        depth_weights: ``w``; None for all 1.
        mean_by_depth: the second form; depths without elements are left out of it.

    Raises:
        UsageError: as many finite weights as depths are expected, none below 0 and the first above.
    """

    num_depths: int = 8
    depth_weights: Sequence[float] | None = None
    mean_by_depth: bool = False

    def __post_init__(self) -> None:
        weights = self.depth_weights
        if self.num_depths < 1 or (weights is not None and len(weights) != self.num_depths):
            raise UsageError(f"expected one weight for each of {self.num_depths} depths, found {weights}")
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and weights[0] > 0):
            raise UsageError(f"expected finite depth weights from 0, the first above it, found {list(weights)}")

    @property
    def num_steps(self) -> int:
        return self.num_depths

    @property
    def weighs_by_overlap(self) -> bool:
        return False

    def no_weights(self) -> StepWeights:
        """Return weights of 0, for sums alone."""
        return StepWeights(torch.zeros(self.num_depths, dtype=torch.float64), kl_divergence=True)

    def loss(self, sums: StepSums) -> Tensor:
        """Return the loss of sums over elements; 0 where there are none."""
        shares = self._shares(sums.counts).to(sums.losses.dtype)
        return (shares * sums.losses).sum()

    def weights(self, counts: Tensor, overlaps: Tensor | None = None) -> StepWeights:
        """Return what an element of each depth adds to `loss`, in float64.

        Args:
            counts: int64 ``[D]``, elements of everything that the means are over.
            overlaps: not asked for.
        """
        return StepWeights(self._shares(counts), kl_divergence=True)

    def _shares(self, counts: Tensor) -> Tensor:
        """Return float64 ``[D]``: the weight of one element of each depth."""
        chosen = self.depth_weights or (1.0,) * self.num_depths
        weights = torch.tensor(chosen, dtype=torch.float64, device=counts.device) / max(chosen)
        present = (counts > 0).double()
        shares = weights * present / counts.clamp_min(1) if self.mean_by_depth else weights
        total = (weights * present).sum() if self.mean_by_depth else (weights * counts).sum()
        # Without elements there is nothing to weigh, and no loss.
        return torch.where(total > 0, shares / total.clamp_min(torch.finfo(torch.float64).tiny), shares * 0)

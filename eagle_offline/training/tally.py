"""Counts of unrolls, kept where the draft is, so that a step never waits for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eagle_offline.objectives.acceptance import expected_accept_length, simulated_accept_length
from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.training.logbook import MetricsRow
from eagle_offline.training.objective import Loss
from eagle_offline.training.ranks import Ranks


class StepTotals(NamedTuple):
    """Sums over unrolls, float64 ``[K]`` each, in which counts are exact; see `UnrollSums`."""

    losses: Tensor
    counts: Tensor
    overlaps: Tensor
    log_overlaps: Tensor
    hits: Tensor
    prefix_asked: Tensor
    prefix_hits: Tensor
    prefix_valid: Tensor
    chain_overlaps: Tensor


class Tally:
    """Adds up unrolls, and makes metrics of them.

    Args:
        num_steps: ``K``, unroll steps or depths.
        device: where the unrolls are.

    Attributes:
        walked_tokens, walked_rounds: of walked decoding, when it was asked for.
    """

    def __init__(self, num_steps: int, device: torch.device | str = "cpu"):
        self._sums = torch.zeros(len(StepTotals._fields), num_steps, dtype=torch.float64, device=device)
        self.walked_tokens = 0
        self.walked_rounds = 0

    @property
    def totals(self) -> StepTotals:
        return StepTotals(*self._sums)

    def is_finite(self) -> bool:
        """Return whether every sum is; on CUDA this waits for them."""
        return bool(self._sums.isfinite().all())

    def state(self) -> dict[str, list[float]]:
        """Return the sums as JSON values, exactly."""
        return dict(zip(StepTotals._fields, self._sums.tolist(), strict=True))

    def restore(self, state: dict[str, list[float]]) -> None:
        """Take over what `state` returned."""
        self._sums.copy_(torch.tensor([state[name] for name in StepTotals._fields], dtype=torch.float64))

    def add(self, sums: UnrollSums) -> None:
        """Add one unroll."""
        parts = StepTotals(
            losses=sums.losses.detach(),
            counts=sums.counts,
            overlaps=sums.overlaps.detach(),
            log_overlaps=sums.log_overlaps.detach(),
            hits=sums.hits,
            prefix_asked=sums.prefix_asked(),
            prefix_hits=sums.prefix_hits(),
            prefix_valid=sums.prefix_valid(),
            chain_overlaps=sums.chain_overlaps(),
        )
        self._sums += torch.stack([part.double() for part in parts])

    def take(self, other: Tally, keep: Tensor | None = None) -> None:
        """Add another's counts; with ``keep``, a bool scalar, only where it holds."""
        sums = other._sums if keep is None else torch.where(keep, other._sums, torch.zeros_like(other._sums))
        self._sums += sums
        self.walked_tokens += other.walked_tokens
        self.walked_rounds += other.walked_rounds

    def over_all(self, ranks: Ranks) -> Tally:
        """Return the counts of all ranks added up."""
        total = Tally(self._sums.shape[1])
        walked = torch.tensor([self.walked_tokens, self.walked_rounds], dtype=torch.float64)
        vector = torch.cat([self._sums.cpu().flatten(), walked])
        ranks.add_up(vector)
        total._sums = vector[:-2].view_as(total._sums)
        total.walked_tokens, total.walked_rounds = (int(count) for count in vector[-2:].tolist())
        return total

    def row(self, kind: str, loss: Loss, step: int, epoch: float, **measured: float | int | None) -> MetricsRow:
        """Return the counts as a metrics row, ``measured`` added."""
        totals = self.totals
        counts, measured_any = totals.counts.clamp_min(1), bool(totals.counts.any())
        # Steps behind the last that anything counts at have no loss and nothing to survive.
        reached = int(totals.counts.count_nonzero())
        walked = self.walked_tokens / self.walked_rounds if self.walked_rounds else None
        return MetricsRow(
            kind=kind,
            step=step,
            epoch=epoch,
            loss=float(loss.loss(totals)) if measured_any else None,
            accuracy=float(totals.hits.sum() / totals.counts.sum()) if measured_any else None,
            top1=(totals.hits / counts).tolist(),
            conditional_top1=(totals.prefix_hits / totals.prefix_asked.clamp_min(1)).tolist(),
            step_loss=(totals.losses / counts).tolist()[:reached],
            survival=(totals.prefix_hits / totals.prefix_valid.clamp_min(1)).tolist()[:reached],
            simulated_accept_length=float(simulated_accept_length(totals.prefix_hits, totals.prefix_valid)),
            expected_accept_length=float(expected_accept_length(totals.chain_overlaps, totals.prefix_valid)),
            walked_accept_length=walked,
            **measured,
        )

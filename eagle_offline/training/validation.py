"""How a draft does on held-out documents: loss, hits by depth, simulated and walked accept length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.objectives.acceptance import PackedAnswers, simulated_accept_length, walk_answers
from eagle_offline.objectives.ttt import UnrollSums, decayed_mean
from eagle_offline.supervision import Head
from eagle_offline.training.logbook import MetricsRow
from eagle_offline.training.packs import TrainingPack, run_pack
from eagle_offline.training.ranks import Ranks

_SUMS = ("losses", "counts", "hits", "prefix_hits", "prefix_valid")


@dataclass
class Tally:
    """Counts of unrolls, added up on the CPU.

    Attributes:
        losses, counts, hits, prefix_hits, prefix_valid: one entry a step of the unroll.
        walked_tokens, walked_rounds: of walked decoding, when it was asked for.
    """

    ttt_steps: int
    losses: torch.Tensor = field(init=False)
    counts: torch.Tensor = field(init=False)
    hits: torch.Tensor = field(init=False)
    prefix_hits: torch.Tensor = field(init=False)
    prefix_valid: torch.Tensor = field(init=False)
    walked_tokens: int = 0
    walked_rounds: int = 0

    def __post_init__(self) -> None:
        self.losses = torch.zeros(self.ttt_steps, dtype=torch.float64)
        for name in ("counts", "hits", "prefix_hits", "prefix_valid"):
            setattr(self, name, torch.zeros(self.ttt_steps, dtype=torch.int64))

    def state(self) -> dict[str, list[float]]:
        """Return the sums as JSON values, exactly."""
        return {name: getattr(self, name).tolist() for name in _SUMS}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Take over what `state` returned."""
        for name in _SUMS:
            setattr(self, name, torch.tensor(state[name], dtype=getattr(self, name).dtype))

    def add(self, sums: UnrollSums) -> None:
        """Add one unroll."""
        self.losses += sums.losses.detach().double().cpu()
        self.counts += sums.counts.cpu()
        self.hits += sums.step_hits.sum(dim=(1, 2)).cpu()
        self.prefix_hits += sums.prefix_hits().cpu()
        self.prefix_valid += sums.prefix_valid().cpu()

    def add_up(self, ranks: Ranks, device: torch.device) -> None:
        """Replace every count by its sum over all ranks."""
        if ranks.size == 1:
            return
        # Counts are exact in float64, so that one vector carries everything.
        parts = [getattr(self, name).double() for name in _SUMS]
        vector = torch.cat([*parts, torch.tensor([self.walked_tokens, self.walked_rounds], dtype=torch.float64)])
        vector = vector.to(device)
        ranks.add_up(vector)
        *sums, walked = vector.cpu().split([*(len(part) for part in parts), 2])
        self.restore({name: values.tolist() for name, values in zip(_SUMS, sums, strict=True)})
        self.walked_tokens, self.walked_rounds = (int(count) for count in walked.tolist())

    def take(self, other: Tally) -> None:
        """Add another's counts."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.walked_tokens += other.walked_tokens
        self.walked_rounds += other.walked_rounds

    def walk(self, sums: UnrollSums, batch: PackedAnswers) -> None:
        """Add one unroll's walked decoding, row by row."""
        tokens, rounds = walk_answers(sums.step_hits, batch)
        self.walked_tokens += tokens
        self.walked_rounds += rounds

    def row(self, kind: str, step: int, epoch: float, **measured: float | int | None) -> MetricsRow:
        """Return the counts as a metrics row, ``measured`` added."""
        counts = self.counts.clamp_min(1)
        before = torch.cat([self.prefix_valid[:1], self.prefix_hits[:-1]]).clamp_min(1)
        walked = self.walked_tokens / self.walked_rounds if self.walked_rounds else None
        return MetricsRow(
            kind=kind,
            step=step,
            epoch=epoch,
            loss=float(decayed_mean(self.losses / counts)),
            accuracy=float(self.hits.sum() / self.counts.sum().clamp_min(1)),
            top1=(self.hits / counts).tolist(),
            conditional_top1=(self.prefix_hits / before).tolist(),
            simulated_accept_length=float(simulated_accept_length(self.prefix_hits, self.prefix_valid)),
            walked_accept_length=walked,
            **measured,
        )


@torch.no_grad()
def validate(
    draft_model: Eagle3DraftModel,
    packs: Iterable[TrainingPack],
    selected_head: Head | None,
    ttt_steps: int,
    step: int,
    epoch: float,
    ranks: Ranks,
) -> MetricsRow:
    """Return the metrics of a draft over held-out packs on its device, this rank's and all others'; see `run_pack`."""
    tally = Tally(ttt_steps)
    weights = torch.ones(ttt_steps, device=draft_model.device)
    for pack in packs:
        _, sums = run_pack(draft_model, pack, selected_head, weights)
        tally.add(sums)
        tally.walk(sums, pack)
    tally.add_up(ranks, draft_model.device)
    return tally.row("heldout", step, epoch)

"""How a draft does on held-out documents: loss, hits by depth, simulated, expected and walked accept length."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.objectives.acceptance import walk_answers
from eagle_offline.objectives.ttt_loss import StepWeights, TTTLoss
from eagle_offline.supervision import Head
from eagle_offline.training.packs import TrainingPack, run_pack
from eagle_offline.training.ranks import Ranks
from eagle_offline.training.tally import Tally


@torch.no_grad()
def validate(
    draft_model: Eagle3DraftModel,
    packs: Iterable[TrainingPack],
    selected_head: Head | None,
    ttt_loss: TTTLoss,
    ranks: Ranks,
) -> Tally:
    """Return the counts of a draft over held-out packs on its device, this rank's and all others'; see `run_pack`."""
    tally = Tally(ttt_loss.ttt_steps, draft_model.device)
    weights = StepWeights(torch.ones(ttt_loss.ttt_steps, device=draft_model.device))
    for pack in packs:
        _, sums = run_pack(draft_model, pack, selected_head, weights)
        tally.add(sums)
        tokens, rounds = walk_answers(sums.step_hits, pack)
        tally.walked_tokens += tokens
        tally.walked_rounds += rounds
    return tally.over_all(ranks)

"""How a draft does on held-out documents: loss, hits by depth, simulated, expected and walked accept length."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.objectives.acceptance import walk_answers
from eagle_offline.objectives.plan import moved
from eagle_offline.supervision import Head
from eagle_offline.training.objective import Objective
from eagle_offline.training.packs import TrainingPack, pack_parts
from eagle_offline.training.ranks import Ranks
from eagle_offline.training.tally import Tally


@torch.no_grad()
def validate(
    draft_model: Eagle3DraftModel,
    packs: Iterable[TrainingPack],
    selected_head: Head | None,
    objective: Objective,
    ranks: Ranks,
) -> Tally:
    """Return the counts of a draft over held-out packs on its device, this rank's and all others'; see `pack_parts`."""
    num_steps, device = objective.loss.num_steps, draft_model.device
    tally = Tally(num_steps, device)
    weights = moved(objective.loss.no_weights(), device)
    for pack in packs:
        found = [part()[1] for part in pack_parts(draft_model, pack, objective, selected_head, weights)]
        step_hits = torch.zeros(num_steps, 1, pack.num_tokens, dtype=torch.bool, device=device)
        for sums in (sums for sums in found if sums is not None):
            tally.add(sums)
            step_hits |= sums.step_hits
        tokens, rounds = walk_answers(step_hits, pack)
        tally.walked_tokens += tokens
        tally.walked_rounds += rounds
    return tally.over_all(ranks)

"""The drafter that a draft was trained for."""

from __future__ import annotations

from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.serving.chain import ChainDrafter
from eagle_offline.serving.parallel import ParallelDrafter


def drafter_of(
    draft_model: Eagle3DraftModel, selected_token_ids: Tensor, num_draft_tokens: int, name: str = "draft"
) -> ChainDrafter | ParallelDrafter:
    """Return what drafts ``num_draft_tokens`` a round with a draft: a chain, or with P-EAGLE all in one forward."""
    kind = ParallelDrafter if draft_model.config.parallel_drafting else ChainDrafter
    return kind(draft_model, selected_token_ids, num_draft_tokens, name)

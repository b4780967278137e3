"""EAGLE-3 drafting: a chain, each step over the state and the token of the step before."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.serving.cached_draft import CachedDraft
from eagle_offline.serving.drafting import ChainProposal, Settled
from eagle_offline.serving.sampling import Sampling


class ChainDrafter:
    """Drafts ``K`` tokens, one draft forward each.

    The first forward of a round runs over the slots that were settled, with the target's states; the following
    ones over one slot each, with the state that the draft fed back.

    Args:
        draft_model: the draft, its embeddings in place.
        selected_token_ids: int64 ``[Vd]``, target ids of the draft's vocabulary.
        num_draft_tokens: ``K``.
        name: what reports call it.
    """

    def __init__(
        self,
        draft_model: Eagle3DraftModel,
        selected_token_ids: Tensor,
        num_draft_tokens: int,
        name: str = "draft",
    ):
        self.name = name
        self.num_draft_tokens = num_draft_tokens
        self.draft = CachedDraft(draft_model, selected_token_ids)

    def start(self, num_rows: int) -> None:
        self.draft.start(num_rows)

    def select_rows(self, rows: Tensor) -> None:
        self.draft.select_rows(rows)

    @torch.inference_mode()
    def propose(self, settled: Settled, sampling: Sampling, generator: torch.Generator) -> ChainProposal:
        draft = self.draft
        draft.num_rounds += 1
        hidden = draft.extend(
            settled.input_ids,
            draft.model.project_hidden_states(settled.aux_hidden_states),
            settled.position_ids,
            settled.num_columns,
        )
        last = (settled.num_slots - 1).unsqueeze(1)
        hidden = hidden.gather(1, last.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        position_ids = settled.position_ids.gather(1, last)
        tokens: list[Tensor] = []
        distributions: list[Tensor] = []
        for step in range(self.num_draft_tokens):
            if step > 0:
                position_ids = position_ids + 1
                num_columns = settled.num_columns + step
                hidden = draft.extend(tokens[-1].unsqueeze(1), hidden, position_ids, num_columns)
            chosen, probs = draft.choose(hidden[:, 0], sampling, generator)
            tokens.append(chosen)
            if probs is not None:
                distributions.append(probs)
        return ChainProposal(torch.stack(tokens, dim=1), torch.stack(distributions, dim=1) if distributions else None)

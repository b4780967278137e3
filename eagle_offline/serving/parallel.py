"""P-EAGLE drafting: all tokens of a round from one forward of the draft."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.serving.cached_draft import CachedDraft
from eagle_offline.serving.drafting import ChainProposal, Settled
from eagle_offline.serving.sampling import Sampling


class ParallelDrafter:
    """Drafts ``K`` tokens in one draft forward.

    The forward runs over the slots that were settled, with the target's states, and right behind each row's last one
    over ``K - 1`` slots that hold the mask token and the mask's state. The outputs of the last settled slot and of
    those give the drafts. A mask slot reads every settled slot and the mask slots before it; what it leaves in the
    cache is written again before a later round reads that column.

    A draft does not depend on the drafts before it, which are not known when it is made. So each one's distribution is
    what it was drawn from, and acceptance by `ChainProposal` stays lossless.

    Args:
        draft_model: the draft, its embeddings in place.
        selected_token_ids: int64 ``[Vd]``, target ids of the draft's vocabulary.
        num_draft_tokens: ``K``.
        name: what reports call it.

    Source: P-EAGLE, arXiv 2602.01469.
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
        assert draft_model.config.mask_token_id is not None
        self._mask_token_id = draft_model.config.mask_token_id

    def start(self, num_rows: int) -> None:
        self.draft.start(num_rows)

    def select_rows(self, rows: Tensor) -> None:
        self.draft.select_rows(rows)

    @torch.inference_mode()
    def propose(self, settled: Settled, sampling: Sampling, generator: torch.Generator) -> ChainProposal:
        draft, model = self.draft, self.draft.model
        draft.num_rounds += 1
        num_masks = self.num_draft_tokens - 1
        num_rows, width = settled.input_ids.shape
        slots = torch.arange(width + num_masks, device=settled.input_ids.device)
        # Everything behind a row's settled slots is masked: the first of it drafts, padding is read by no slot of use.
        masked = slots >= settled.num_slots.unsqueeze(1)
        input_ids = torch.nn.functional.pad(settled.input_ids, (0, num_masks))
        hidden = torch.nn.functional.pad(model.project_hidden_states(settled.aux_hidden_states), (0, 0, 0, num_masks))
        hidden = draft.extend(
            input_ids.masked_fill(masked, self._mask_token_id),
            torch.where(masked.unsqueeze(-1), model.project_mask_hidden(), hidden),
            settled.position_ids[:, :1] + slots,
            settled.num_columns + num_masks,
        )
        drafting = (settled.num_slots - 1).unsqueeze(1) + torch.arange(self.num_draft_tokens, device=slots.device)
        hidden = hidden.gather(1, drafting.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        tokens, probs = draft.choose(hidden.flatten(0, 1), sampling, generator)
        by_row = (num_rows, self.num_draft_tokens)
        return ChainProposal(tokens.unflatten(0, by_row), None if probs is None else probs.unflatten(0, by_row))

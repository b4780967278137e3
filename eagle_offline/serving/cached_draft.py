"""A draft as drafters run it: its cache of keys and values, its tokens in the target's vocabulary, its work counted."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_offline.draft.cache import DraftCache
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.serving.sampling import Sampling


class CachedDraft:
    """A draft that decodes a batch of rows.

    Args:
        model: the draft, its embeddings in place.
        selected_token_ids: int64 ``[Vd]``, target ids of the draft's vocabulary.

    Attributes:
        num_forwards: forwards of the draft, of a whole batch each, since this was made.
        num_rounds: rounds that drafted, of a whole batch each, since this was made.
    """

    def __init__(self, model: Eagle3DraftModel, selected_token_ids: Tensor):
        self.model = model
        self._ids = selected_token_ids.to(model.device)
        self._cache = DraftCache(model, 0)
        self.num_forwards = 0
        self.num_rounds = 0

    def start(self, num_rows: int) -> None:
        """Forget everything and expect ``num_rows`` rows."""
        self._cache = DraftCache(self.model, num_rows)

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows given (int64 ``[B']``), in that order."""
        self._cache.select_rows(rows)

    def extend(self, input_ids: Tensor, hidden: Tensor, position_ids: Tensor, num_columns: int) -> Tensor:
        """Run the draft over new slots once, see `DraftCache.extend`."""
        self.num_forwards += 1
        return self._cache.extend(input_ids, hidden, position_ids, num_columns)

    def choose(self, hidden: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return draft tokens for states ``[B, H]`` that the draft gave, and what they were drawn from.

        Returns:
            int64 ``[B]``, ids of the target's vocabulary; float32 ``[B, V]``, zero outside the draft vocabulary, None
            for greedy drafts.
        """
        chosen, probs = sampling.choose(self.model.compute_logits(hidden), generator)
        if probs is not None:
            full = probs.new_zeros(len(probs), self.model.config.vocab_size)
            probs = full.index_copy(1, self._ids, probs)
        return self._ids[chosen], probs

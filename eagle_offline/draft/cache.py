"""The draft with a key-value cache: what runs when it serves, equal to the unroll that it was trained by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.layers import DraftLayer

# Columns that a cache grows by at least, so that growing stays rare.
_GROWTH_COLUMNS = 256


class DraftCache:
    """Keys and values of rows that decode, one column a position.

    Column ``t`` holds what was last written at rotary position ``t``, and a query at position ``p`` reads the
    columns ``0 … p``. So nothing has to be taken back: a column that a rejected token wrote is written again
    before anything reads it. Step ``k`` of a chain that starts at slot ``t`` stands at position ``t + k`` and
    reads slots ``0 … t`` and its own earlier steps, which is the unroll's attention.

    Args:
        draft_model: the draft.
        num_rows: ``B``.
    """

    def __init__(self, draft_model: Eagle3DraftModel, num_rows: int):
        self._draft = draft_model
        self._num_rows = num_rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def extend(self, input_ids: Tensor, hidden: Tensor, position_ids: Tensor, num_columns: int) -> Tensor:
        """Run the draft over new slots and return what it feeds back, ``[B, N, H]``.

        Args:
            input_ids: int64 ``[B, N]``.
            hidden: ``[B, N, H]``, projected aux states or what a former call returned.
            position_ids: int64 ``[B, N]``, rotary position and column of each slot.
            num_columns: more than the largest position.
        """
        draft = self._draft
        self._reserve(num_columns, hidden)
        rows = torch.arange(self._num_rows, device=hidden.device).unsqueeze(1)
        cos, sin = draft.rotary(position_ids, hidden.dtype)
        embedding = draft.embed_tokens(input_ids).to(hidden.dtype)
        columns = torch.arange(num_columns, device=hidden.device)
        visible = (columns <= position_ids.unsqueeze(-1)).unsqueeze(1)
        for index, layer in enumerate(cast(Iterable[DraftLayer], draft.layers)):
            attention = layer.self_attn
            queries, keys, values = attention.project(layer.attention_input(hidden, embedding), cos, sin)
            self._keys[index][rows, position_ids] = keys.transpose(1, 2)
            self._values[index][rows, position_ids] = values.transpose(1, 2)
            attended = scaled_dot_product_attention(
                queries,
                self._keys[index][:, :num_columns].transpose(1, 2),
                self._values[index][:, :num_columns].transpose(1, 2),
                attn_mask=visible,
                enable_gqa=True,
            )
            hidden = layer.after_attention(hidden, attention.o_proj(attended.transpose(1, 2).flatten(2)))
        return draft.norm(hidden) if draft.config.norm_output else hidden

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows given (int64 ``[B']``), in that order."""
        self._num_rows = len(rows)
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]

    def _reserve(self, num_columns: int, like: Tensor) -> None:
        """Have at least ``num_columns`` columns in every layer."""
        present = self._keys[0].shape[1] if self._keys else 0
        if num_columns <= present:
            return
        added = max(num_columns - present, _GROWTH_COLUMNS)
        attentions = [layer.self_attn for layer in cast(Iterable[DraftLayer], self._draft.layers)]

        def grown(buffers: list[Tensor]) -> list[Tensor]:
            fresh = [
                like.new_zeros(self._num_rows, added, attention.num_key_value_heads, attention.head_dim)
                for attention in attentions
            ]
            return [torch.cat(pair, dim=1) for pair in zip(buffers, fresh, strict=True)] if buffers else fresh

        self._keys, self._values = grown(self._keys), grown(self._values)

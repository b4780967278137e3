"""A P-EAGLE draft over documents that stand end to end: depth 0 once, then chains of masked elements, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.merged_attention import merged_attention
from eagle_offline.draft.packed import FirstPlan, Made, PackedDraft, cast_once, keys_and_values, rotated_queries
from eagle_offline.draft.padded_attention import PaddedCall
from eagle_offline.element_attention import ElementAttention


class Segment(Protocol):
    """Chains that run together; see `eagle_offline.objectives.parallel_plan.ChainSegment`."""

    @property
    def anchors(self) -> Tensor: ...
    @property
    def depths(self) -> Tensor: ...
    @property
    def calls(self) -> Sequence[PaddedCall]: ...


class Plan(FirstPlan, Protocol):
    """A parallel forward; see `eagle_offline.objectives.parallel_plan.ParallelPlan`."""

    @property
    def lengths(self) -> Tensor: ...
    @property
    def num_slots(self) -> int: ...


class PackedParallel(PackedDraft):
    """A parallel forward over ``N`` flat slots.

    Args:
        draft_model: the draft.
        plan: which slots run at depth 0, and who reads whom.
        input_ids: int64 ``[N]``, slot frame.
        position_ids: int64 ``[N]``, inside documents.
        recompute: see `PackedDraft`.
    """

    def __init__(
        self,
        draft_model: Eagle3DraftModel,
        plan: Plan,
        input_ids: Tensor,
        position_ids: Tensor,
        recompute: bool = False,
    ):
        super().__init__(draft_model, input_ids, position_ids, recompute)
        self._plan = plan

    def context(self, aux_hidden_states: Tensor) -> Made:
        """Run depth 0 from the aux states ``[N, A·H]``.

        Returns:
            Its output at the slots that count ``[n, H]``, then keys and values of every layer at all key slots.
        """
        return self._first_step(self._plan, aux_hidden_states)

    def chains(self, segment: Segment, keys_and_values_of_context: Sequence[Tensor]) -> Tensor:
        """Run a segment's elements, ``R`` of them; return their output ``[R, H]``.

        Args:
            segment: which.
            keys_and_values_of_context: of every layer, as `context` returns them.
        """
        draft = self._draft
        positions = self._positions[segment.anchors] + segment.depths
        # Every element enters with the same vectors: layer 0 projects them once, for one row, and turns copies of it.
        hidden = draft.project_mask_hidden().view(1, -1)
        assert draft.config.mask_token_id is not None
        mask_token = torch.full((1,), draft.config.mask_token_id, device=hidden.device)
        embedding = draft.embed_tokens(mask_token).to(hidden.dtype)
        attend = _ChainAttention(self._plan, segment)
        for index in range(len(self._layers)):
            context = keys_and_values_of_context[2 * index : 2 * index + 2]
            (hidden,) = self._run(partial(self._chain_layer, attend, index, positions), hidden, embedding, *context)
        return self._fed_back(hidden)

    def _chain_layer(
        self,
        attend: _ChainAttention,
        index: int,
        position_ids: Tensor,
        hidden: Tensor,
        embedding: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Made:
        """Return the layer's output ``[R, H]`` from its input, ``[R, H]`` or one row for all."""
        layer, num_rows = self._layers[index], len(position_ids)
        cos, sin = self._angles(position_ids, hidden)
        states = cast_once(layer.attention_input(hidden, embedding))
        own_keys, own_values = keys_and_values(layer, states, cos, sin)
        own = own_keys, own_values.expand(num_rows, -1, -1)
        attended = attend(rotated_queries(layer, states, cos, sin), (keys, values), own)
        return (layer.after_attention(hidden, layer.self_attn.o_proj(attended.flatten(1))),)


class _ChainAttention:
    """Attention of a segment's elements: depth 0 up to their anchors, and their own chain up to themselves.

    In padded calls where the plan has them, else among elements: on CUDA, in blocks.
    """

    def __init__(self, plan: Plan, segment: Segment):
        self._plan, self._segment = plan, segment

    def __call__(self, queries: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention output ``[R, heads, head_dim]``.

        Args:
            queries: ``[R, heads, head_dim]``.
            context, own: keys and values ``[…, kv_heads, head_dim]``, of the key slots and of the elements.
        """
        keys, values = (torch.cat(pair) for pair in zip(context, own, strict=True))
        if self._segment.calls or not len(queries):
            return merged_attention(queries, keys, values, [], self._segment.calls)
        batch = (states.transpose(0, 1).unsqueeze(0) for states in (queries, keys, values))
        return self._among_elements(*batch)[0].transpose(0, 1)

    @cached_property
    def _among_elements(self) -> ElementAttention:
        plan, segment = self._plan, self._segment
        return ElementAttention(
            torch.cat([plan.key_slots, segment.anchors]),
            torch.cat([torch.zeros_like(plan.key_slots), segment.depths]),
            plan.lengths,
            plan.num_slots,
            first_query=len(plan.key_slots),
        )

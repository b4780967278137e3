"""The draft over documents that stand end to end, each step at the slots that still matter and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.layers import DraftLayer, rotate
from eagle_offline.draft.merged_attention import Call, merged_attention

# What a step returns: what it feeds back, then keys and values of each layer; or these alone.
Made = tuple[Tensor, ...]


class Step(Protocol):
    """One step; see `eagle_offline.objectives.plan.StepPlan`."""

    @property
    def slots(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def calls(self) -> Sequence[Call]: ...


class FirstPlan(Protocol):
    """A first step; see `eagle_offline.objectives.plan.UnrollPlan`."""

    @property
    def key_slots(self) -> Tensor: ...
    @property
    def key_calls(self) -> Sequence[Call]: ...
    @property
    def first(self) -> Step: ...


class Plan(FirstPlan, Protocol):
    """A whole unroll; see `eagle_offline.objectives.plan.UnrollPlan`."""

    @property
    def steps(self) -> Sequence[Step]: ...


class PackedDraft:
    """A draft over ``N`` flat slots, its first step: causal, inside documents, over the target's states.

    Args:
        draft_model: the draft.
        input_ids: int64 ``[N]``, slot frame, of the first step.
        position_ids: int64 ``[N]``, of the first step.
        recompute: keep what goes from one step or layer to the next and keys and values, and compute the rest once
            more in the backward pass. Same numbers; about a third more to compute.
    """

    def __init__(self, draft_model: Eagle3DraftModel, input_ids: Tensor, position_ids: Tensor, recompute: bool = False):
        self._draft, self._ids, self._positions = draft_model, input_ids, position_ids
        self._recompute = recompute
        self._layers = list(cast(Iterable[DraftLayer], draft_model.layers))

    def _first_step(self, plan: FirstPlan, aux_hidden_states: Tensor) -> Made:
        """Return what is fed back at the slots that matter, and keys and values of every layer at all key slots."""
        hidden = self._run(lambda aux: (self._draft.project_hidden_states(aux[plan.key_slots]),), aux_hidden_states)[0]
        made: list[Tensor] = []
        for index in range(len(self._layers)):
            hidden, *of_layer = self._run(partial(self._first_layer, plan, index), hidden)
            made += of_layer
        return (self._fed_back(hidden), *made)

    def _first_layer(self, plan: FirstPlan, index: int, hidden: Tensor) -> Made:
        """Return the layer's output, its keys and its values."""
        layer, calls = self._layers[index], plan.key_calls
        embedding = self._draft.embed_tokens(self._ids[plan.key_slots]).to(hidden.dtype)
        cos, sin = self._angles(self._positions[plan.key_slots], hidden)
        states = cast_once(layer.attention_input(hidden, embedding))
        keys, values = keys_and_values(layer, states, cos, sin)
        if index == len(self._layers) - 1:
            # Nothing reads the last layer's output but the slots that matter.
            rows, calls = plan.first.rows, plan.first.calls
            states, hidden, cos, sin = (tensor.index_select(0, rows) for tensor in (states, hidden, cos, sin))
        attended = merged_attention(rotated_queries(layer, states, cos, sin), keys, values, [], calls)
        return layer.after_attention(hidden, layer.self_attn.o_proj(attended.flatten(1))), keys, values

    def _run(self, function: Callable[..., Made], *tensors: Tensor) -> Made:
        """Return what a pure function of tensors and of the weights returns."""
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
        return function(*tensors)

    def _angles(self, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._draft.rotary(position_ids.unsqueeze(0), hidden.dtype)
        return cos[0].transpose(0, 1), sin[0].transpose(0, 1)

    def _fed_back(self, hidden: Tensor) -> Tensor:
        return self._draft.norm(hidden) if self._draft.config.norm_output else hidden


class PackedUnroll(PackedDraft):
    """One unroll over ``N`` flat slots: the keys and values of its steps, and the state that goes from one to the next.

    Args:
        draft_model, input_ids, position_ids, recompute: see `PackedDraft`.
        plan: which slots each step computes, and who reads whom.
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
        # Keys and values of each step so far, layer by layer: at step 0 of the key slots, later of the step's own.
        self._made: list[Made] = []
        # For each step after step 0 so far, the row that a slot of the step at hand has there.
        self._rows: list[Tensor] = []

    def first(self, aux_hidden_states: Tensor) -> Tensor:
        """Run step 0 from the aux states ``[N, A·H]``; return what is fed to step 1, ``[R_0, H]``."""
        hidden, *made = self._first_step(self._plan, aux_hidden_states)
        self._made.append(tuple(made))
        return hidden

    def next(self, step: int, hidden: Tensor) -> Tensor:
        """Run step ``step`` ≥ 1 from what the step before returned; return ``[R_step, H]``."""
        rows = self._plan.steps[step].rows
        self._rows = [earlier.index_select(0, rows) for earlier in self._rows]
        before = [tensor for made in self._made for tensor in made]
        hidden, *made = self._run(partial(self._next, step, tuple(self._rows)), hidden, *before)
        self._made.append(tuple(made))
        self._rows.append(torch.arange(len(rows), device=rows.device))
        return hidden

    def _next(self, step: int, rows: Sequence[Tensor], hidden: Tensor, *before: Tensor) -> Made:
        """Return what is fed back, and the step's keys and values of every layer.

        Args:
            step: which one, 1 or more.
            rows: of every step from 1 to the one before, the row there of each slot of this step.
            hidden: what the step before returned.
            before: keys and values of every step before, layer by layer.
        """
        draft, planned, num_made = self._draft, self._plan.steps[step], 2 * len(self._layers)
        hidden = hidden.index_select(0, planned.rows)
        embedding = draft.embed_tokens(self._ids[planned.slots + step]).to(hidden.dtype)
        cos, sin = self._angles(self._positions[planned.slots] + step, hidden)
        made: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            all_keys, all_values = before[2 * index :: num_made], before[2 * index + 1 :: num_made]
            own = [
                (keys.index_select(0, place), values.index_select(0, place))
                for keys, values, place in zip(all_keys[1:], all_values[1:], rows, strict=True)
            ]
            states = cast_once(layer.attention_input(hidden, embedding))
            own.append(keys_and_values(layer, states, cos, sin))
            made += own[-1]
            queries = rotated_queries(layer, states, cos, sin)
            attended = merged_attention(queries, all_keys[0], all_values[0], own, planned.calls)
            hidden = layer.after_attention(hidden, layer.self_attn.o_proj(attended.flatten(1)))
        return (self._fed_back(hidden), *made)


def cast_once(states: Tensor) -> Tensor:
    """Return states in the dtype that autocast multiplies in, so that three projections share one cast of them."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def rotated_queries(layer: DraftLayer, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rotated queries ``[R, heads, head_dim]``."""
    queries = layer.self_attn.queries(states)
    return rotate(queries, cos, sin).to(queries.dtype)


def keys_and_values(layer: DraftLayer, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated keys, and values, ``[R, kv_heads, head_dim]``."""
    keys = layer.self_attn.keys(states)
    return rotate(keys, cos, sin).to(keys.dtype), layer.self_attn.values(states)

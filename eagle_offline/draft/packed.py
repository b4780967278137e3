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


class Plan(Protocol):
    """A whole unroll; see `eagle_offline.objectives.plan.UnrollPlan`."""

    @property
    def key_slots(self) -> Tensor: ...
    @property
    def key_calls(self) -> Sequence[Call]: ...
    @property
    def steps(self) -> Sequence[Step]: ...


class PackedUnroll:
    """One unroll over ``N`` flat slots: the keys and values of its steps, and the state that goes from one to the next.

    Args:
        draft_model: the draft.
        plan: which slots each step computes, and who reads whom.
        input_ids: int64 ``[N]``, slot frame, of step 0.
        position_ids: int64 ``[N]``, of step 0.
        recompute: keep of each step what it feeds back and its keys and values, and compute the rest of it once more
            in the backward pass. Same numbers; about a third more to compute.
    """

    def __init__(
        self,
        draft_model: Eagle3DraftModel,
        plan: Plan,
        input_ids: Tensor,
        position_ids: Tensor,
        recompute: bool = False,
    ):
        self._draft, self._plan = draft_model, plan
        self._ids, self._positions = input_ids, position_ids
        self._recompute = recompute
        self._layers = list(cast(Iterable[DraftLayer], draft_model.layers))
        # Keys and values of each step so far, layer by layer: at step 0 of the key slots, later of the step's own.
        self._made: list[Made] = []
        # For each step after step 0 so far, the row that a slot of the step at hand has there.
        self._rows: list[Tensor] = []

    def first(self, aux_hidden_states: Tensor) -> Tensor:
        """Run step 0 from the aux states ``[N, A·H]``; return what is fed to step 1, ``[R_0, H]``."""
        hidden, *made = self._run(self._first, aux_hidden_states)
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

    def _run(self, function: Callable[..., Made], *tensors: Tensor) -> Made:
        """Return what a pure function of tensors and of the weights returns."""
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
        return function(*tensors)

    def _first(self, aux_hidden_states: Tensor) -> Made:
        """Return what is fed back, and keys and values of every layer."""
        draft, plan = self._draft, self._plan
        hidden = draft.project_hidden_states(aux_hidden_states.index_select(0, plan.key_slots))
        embedding = draft.embed_tokens(self._ids[plan.key_slots]).to(hidden.dtype)
        cos, sin = self._angles(self._positions[plan.key_slots], hidden)
        made: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            states, calls = _cast_once(layer.attention_input(hidden, embedding)), plan.key_calls
            keys, values = _keys_and_values(layer, states, cos, sin)
            made += [keys, values]
            if index == len(self._layers) - 1:
                # Nothing reads the last layer's output but the slots that matter.
                rows, calls = plan.steps[0].rows, plan.steps[0].calls
                states, hidden, cos, sin = (tensor.index_select(0, rows) for tensor in (states, hidden, cos, sin))
            attended = merged_attention(_queries(layer, states, cos, sin), keys, values, [], calls)
            hidden = layer.after_attention(hidden, layer.self_attn.o_proj(attended.flatten(1)))
        return (self._fed_back(hidden), *made)

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
            states = _cast_once(layer.attention_input(hidden, embedding))
            own.append(_keys_and_values(layer, states, cos, sin))
            made += own[-1]
            queries = _queries(layer, states, cos, sin)
            attended = merged_attention(queries, all_keys[0], all_values[0], own, planned.calls)
            hidden = layer.after_attention(hidden, layer.self_attn.o_proj(attended.flatten(1)))
        return (self._fed_back(hidden), *made)

    def _angles(self, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._draft.rotary(position_ids.unsqueeze(0), hidden.dtype)
        return cos[0].transpose(0, 1), sin[0].transpose(0, 1)

    def _fed_back(self, hidden: Tensor) -> Tensor:
        return self._draft.norm(hidden) if self._draft.config.norm_output else hidden


def _cast_once(states: Tensor) -> Tensor:
    """Return states in the dtype that autocast multiplies in, so that three projections share one cast of them."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def _queries(layer: DraftLayer, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rotated queries ``[R, heads, head_dim]``."""
    queries = layer.self_attn.queries(states)
    return rotate(queries, cos, sin).to(queries.dtype)


def _keys_and_values(layer: DraftLayer, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated keys, and values, ``[R, kv_heads, head_dim]``."""
    keys = layer.self_attn.keys(states)
    return rotate(keys, cos, sin).to(keys.dtype), layer.self_attn.values(states)

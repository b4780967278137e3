"""The draft over documents that stand end to end, each step at the slots that still matter and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

from torch import Tensor

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.layers import DraftLayer, rotate
from eagle_offline.draft.merged_attention import Call, merged_attention


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
    """

    def __init__(self, draft_model: Eagle3DraftModel, plan: Plan, input_ids: Tensor, position_ids: Tensor):
        self._draft, self._plan = draft_model, plan
        self._ids, self._positions = input_ids, position_ids
        self._layers = list(cast(Iterable[DraftLayer], draft_model.layers))
        self._base: list[tuple[Tensor, Tensor]] = []
        # The own slots' keys and values of every later step, one list a layer, rows those of the step at hand.
        self._own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._layers]

    def first(self, aux_hidden_states: Tensor) -> Tensor:
        """Run step 0 from the aux states ``[N, A·H]``; return what is fed to step 1, ``[R_0, H]``."""
        draft, plan = self._draft, self._plan
        hidden = draft.project_hidden_states(aux_hidden_states[plan.key_slots])
        embedding = draft.embed_tokens(self._ids[plan.key_slots]).to(hidden.dtype)
        cos, sin = self._angles(self._positions[plan.key_slots], hidden)
        for index, layer in enumerate(self._layers):
            states = layer.attention_input(hidden, embedding)
            keys, values = _keys_and_values(layer, states, cos, sin)
            self._base.append((keys, values))
            calls = plan.key_calls
            if index == len(self._layers) - 1:
                # Nothing reads the last layer's output but the slots that matter.
                rows = plan.steps[0].rows
                states, hidden, cos, sin, calls = states[rows], hidden[rows], cos[rows], sin[rows], plan.steps[0].calls
            attended = merged_attention(_queries(layer, states, cos, sin), keys, values, [], calls)
            hidden = layer.after_attention(hidden, layer.self_attn.o_proj(attended.flatten(1)))
        return self._fed_back(hidden)

    def next(self, step: int, hidden: Tensor) -> Tensor:
        """Run step ``step`` ≥ 1 from what the step before returned; return ``[R_step, H]``."""
        draft, planned = self._draft, self._plan.steps[step]
        hidden = hidden[planned.rows]
        embedding = draft.embed_tokens(self._ids[planned.slots + step]).to(hidden.dtype)
        cos, sin = self._angles(self._positions[planned.slots] + step, hidden)
        for layer, base, own in zip(self._layers, self._base, self._own, strict=True):
            own[:] = [(keys[planned.rows], values[planned.rows]) for keys, values in own]
            states = layer.attention_input(hidden, embedding)
            own.append(_keys_and_values(layer, states, cos, sin))
            attended = merged_attention(_queries(layer, states, cos, sin), *base, own, planned.calls)
            hidden = layer.after_attention(hidden, layer.self_attn.o_proj(attended.flatten(1)))
        return self._fed_back(hidden)

    def _angles(self, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._draft.rotary(position_ids.unsqueeze(0), hidden.dtype)
        return cos[0].transpose(0, 1), sin[0].transpose(0, 1)

    def _fed_back(self, hidden: Tensor) -> Tensor:
        return self._draft.norm(hidden) if self._draft.config.norm_output else hidden


def _queries(layer: DraftLayer, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rotated queries ``[R, heads, head_dim]``."""
    attention = layer.self_attn
    queries = attention.q_proj(states)
    return rotate(queries.unflatten(-1, (attention.num_heads, attention.head_dim)), cos, sin).to(queries.dtype)


def _keys_and_values(layer: DraftLayer, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated keys, and values, ``[R, kv_heads, head_dim]``."""
    attention = layer.self_attn
    shape = (attention.num_key_value_heads, attention.head_dim)
    keys, values = attention.k_proj(states).unflatten(-1, shape), attention.v_proj(states).unflatten(-1, shape)
    return rotate(keys, cos, sin).to(keys.dtype), values

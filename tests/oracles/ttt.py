"""The EAGLE-3 unroll as it is defined: row by row, slot by slot, keys collected into explicit lists, float64.

Works on a dictionary of named parameters and a configuration; nothing here calls the code it judges. Everything is
differentiable in the parameters. Slots of padding get an attention output of zero: no one reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tests.oracles.acceptance import prefix_counts
from tests.oracles.distribution import first_argmax, overlaps, soft_cross_entropy_sum

DECAY = 0.8

# (step, slot, documents, padding) -> the (step, slot) pairs whose keys and values the query reads
Visible = Callable[[int, int, list[int], list[bool]], list[tuple[int, int]]]


def base_and_diagonal(step: int, slot: int, documents: list[int], padding: list[bool]) -> list[tuple[int, int]]:
    """Step-0 keys of the slot's past in its document, and the slot's own keys of steps 1 to `step`."""
    past = [(0, s) for s in range(slot + 1) if documents[s] == documents[slot] and not padding[s]]
    return past + [(i, slot) for i in range(1, step + 1)]


@dataclass(frozen=True)
class Draft:
    """Named float64 parameters of a draft model and the numbers that shape it."""

    parameters: Mapping[str, torch.Tensor]
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    num_aux: int
    eps: float
    rope_theta: float
    fc_norm: bool = False
    norm_output: bool = False

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.parameters[f"{name}.weight"].T

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = 1 / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.eps)
        return x * scale * self.parameters[f"{name}.weight"]

    def project(self, aux: torch.Tensor) -> torch.Tensor:
        """`g_0` of aux states [T, A * Ht]."""
        if self.fc_norm:
            size = aux.shape[-1] // self.num_aux
            chunks = [aux[:, i * size : (i + 1) * size] for i in range(self.num_aux)]
            aux = torch.cat([self.norm(f"fc_norm.{i}", chunk) for i, chunk in enumerate(chunks)], dim=-1)
        return self.linear("fc", aux)

    def logits(self, fed_back: torch.Tensor) -> torch.Tensor:
        """Draft logits of what a step feeds back; the final norm is applied exactly once on the way."""
        return self.linear("lm_head", fed_back if self.norm_output else self.norm("norm", fed_back))


def read_draft(parameters: Mapping[str, torch.Tensor], config: object) -> Draft:
    """A `Draft` of float64 leaves that collect gradients, from parameters and a Llama-like configuration."""
    rope = getattr(config, "rope_parameters", None) or {}
    num_heads = config.num_attention_heads  # type: ignore[attr-defined]
    return Draft(
        parameters={name: value.detach().double().clone().requires_grad_() for name, value in parameters.items()},
        num_layers=config.num_hidden_layers,  # type: ignore[attr-defined]
        num_heads=num_heads,
        num_key_value_heads=config.num_key_value_heads,  # type: ignore[attr-defined]
        head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,  # type: ignore[attr-defined]
        num_aux=getattr(config, "num_aux_hidden_states", 0),
        eps=config.rms_norm_eps,  # type: ignore[attr-defined]
        rope_theta=rope.get("rope_theta", 10000.0),
        fc_norm=getattr(config, "fc_norm", False),
        norm_output=getattr(config, "norm_output", False),
    )


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Llama rotary embedding of [heads, head_size] vectors: component i pairs with component i + head_size / 2."""
    half = x.shape[-1] // 2
    angles = [position * theta ** (-2 * i / x.shape[-1]) for i in range(half)]
    cos = torch.tensor([math.cos(a) for a in angles], dtype=x.dtype)
    sin = torch.tensor([math.sin(a) for a in angles], dtype=x.dtype)
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class Row:
    """One row of a batch: who belongs to which document, what is padding, where each slot sits, and past keys."""

    documents: list[int]
    padding: list[bool]
    positions: list[int]
    visible: Visible = base_and_diagonal
    rope_advances: bool = True
    keys: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    values: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)


def attend(draft: Draft, row: Row, layer: int, step: int, x: torch.Tensor) -> torch.Tensor:
    """Attention output [T, H] of a layer's normed input, and its keys and values recorded in the row."""
    name, num_slots, size = f"layers.{layer}.self_attn", len(x), draft.head_size
    offset = step if row.rope_advances else 0
    queries = draft.linear(f"{name}.q_proj", x).reshape(num_slots, draft.num_heads, size)
    keys = draft.linear(f"{name}.k_proj", x).reshape(num_slots, draft.num_key_value_heads, size)
    values = draft.linear(f"{name}.v_proj", x).reshape(num_slots, draft.num_key_value_heads, size)
    group = draft.num_heads // draft.num_key_value_heads
    row.keys[layer, step] = [
        rotate(keys[t], row.positions[t] + offset, draft.rope_theta).repeat_interleave(group, dim=0)
        for t in range(num_slots)
    ]
    row.values[layer, step] = [values[t].repeat_interleave(group, dim=0) for t in range(num_slots)]
    outputs = []
    for t in range(num_slots):
        pairs = row.visible(step, t, row.documents, row.padding) if not row.padding[t] else []
        if not pairs:
            outputs.append(x.new_zeros(draft.num_heads * size))
            continue
        query = rotate(queries[t], row.positions[t] + offset, draft.rope_theta)
        read_keys = torch.stack([row.keys[layer, i][s] for i, s in pairs])
        read_values = torch.stack([row.values[layer, i][s] for i, s in pairs])
        scores = (read_keys * query).sum(dim=-1) / math.sqrt(size)
        weights = torch.exp(scores - torch.logsumexp(scores, dim=0))
        outputs.append((weights[:, :, None] * read_values).sum(dim=0).reshape(-1))
    return draft.linear(f"{name}.o_proj", torch.stack(outputs))


def feed_forward(draft: Draft, layer: int, x: torch.Tensor) -> torch.Tensor:
    gate = draft.linear(f"layers.{layer}.mlp.gate_proj", x)
    return draft.linear(f"layers.{layer}.mlp.down_proj", F.silu(gate) * draft.linear(f"layers.{layer}.mlp.up_proj", x))


def plain_layer(draft: Draft, row: Row, layer: int, step: int, x: torch.Tensor) -> torch.Tensor:
    """An ordinary Llama decoder layer."""
    x = x + attend(draft, row, layer, step, draft.norm(f"layers.{layer}.input_layernorm", x))
    return x + feed_forward(draft, layer, draft.norm(f"layers.{layer}.post_attention_layernorm", x))


def draft_step(draft: Draft, row: Row, step: int, input_ids: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """What step `step` feeds back, [T, H], from token ids [T] and the state `g` that the step before fed back."""
    tokens = draft.norm("layers.0.input_layernorm", draft.parameters["embed_tokens.weight"][input_ids])
    x = torch.cat([tokens, draft.norm("layers.0.hidden_norm", g)], dim=-1)
    g = g + attend(draft, row, 0, step, x)
    g = g + feed_forward(draft, 0, draft.norm("layers.0.post_attention_layernorm", g))
    for layer in range(1, draft.num_layers):
        g = plain_layer(draft, row, layer, step, g)
    return draft.norm("norm", g) if draft.norm_output else g


def shifted(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """[B, T, ...] with slot t holding what slot t + by held, zero where there is none."""
    out = torch.zeros_like(tensor)
    for t in range(tensor.shape[1] - by):
        out[:, t] = tensor[:, t + by]
    return out


def row_documents(lengths: list[int], num_slots: int) -> list[int]:
    """The document each slot of one row belongs to, -1 after the last."""
    documents = [d for d, length in enumerate(lengths) for _ in range(length)]
    return documents + [-1] * (num_slots - len(documents))


@dataclass(frozen=True)
class Unroll:
    """Everything an unroll of K steps yields, per step where there is one value a step."""

    loss: torch.Tensor
    accuracy: float
    prefix_hits: list[int]
    valid: list[int]
    supervised_pairs: int
    step_losses: list[torch.Tensor]
    step_counts: list[int]
    step_logits: list[torch.Tensor]
    right: torch.Tensor
    first_step_valid: torch.Tensor


def step_loss(
    logits: torch.Tensor, probs: torch.Tensor, mask: torch.Tensor, kind: str | None, scale: float, decay: float
) -> tuple[torch.Tensor, int]:
    """One step's loss over the masked rows of [N, Vd], and their number."""
    total, count = soft_cross_entropy_sum(logits, probs, mask)
    if count == 0:
        return total * 0, 0
    if kind is None:
        return total / count, count
    alphas = overlaps(logits, probs, mask)
    if kind == "alpha":
        logs = [torch.log(alpha) if alpha > 0 else torch.zeros_like(alpha) for alpha in alphas]
        return -sum(logs) / count, count  # type: ignore[return-value]
    if kind == "lambda":
        mean_alpha = torch.stack(alphas).sum() / count
        weight = scale * math.exp(-decay * float(mean_alpha.detach()))
        return weight * total / count + (1 - weight) * (1 - mean_alpha), count
    raise AssertionError(f"no such loss: {kind}")


def unroll(
    draft: Draft,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    loss_mask: torch.Tensor,
    aux_hidden_states: torch.Tensor,
    target_probs: torch.Tensor,
    position_mask: torch.Tensor,
    ttt_steps: int,
    position_ids: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    doc_remaining: torch.Tensor | None = None,
    lk_loss_type: str | None = None,
    lk_kl_scale: float = 1.0,
    lk_kl_decay: float = 3.0,
    step_decay: float = DECAY,
    visible: Visible = base_and_diagonal,
    rope_advances: bool = True,
) -> Unroll:
    """Run `ttt_steps` steps on slot-frame tensors (already shifted once); `position_mask` is [B, T, 1] or [B, T]."""
    batch_size, num_slots = input_ids.shape
    rows = []
    for b in range(batch_size):
        documents = [0] * num_slots if seq_lens is None else row_documents(seq_lens[b].tolist(), num_slots)
        padding = [documents[t] < 0 or not bool(attention_mask[b, t]) for t in range(num_slots)]
        positions = list(range(num_slots)) if position_ids is None else position_ids[b].tolist()
        rows.append(Row(documents, padding, positions, visible, rope_advances))
    states = [draft.project(aux_hidden_states[b].double()) for b in range(batch_size)]
    masks = position_mask.reshape(batch_size, num_slots).bool()

    losses, counts, all_logits, right, valid = [], [], [], [], []
    for k in range(ttt_steps):
        ids_k, probs_k = shifted(input_ids, k), shifted(target_probs.double(), k)
        mask_k, valid_k = shifted(masks, k), shifted(loss_mask.bool(), k)
        if doc_remaining is not None:
            inside = k < doc_remaining
            mask_k, valid_k = mask_k & inside, valid_k & inside
        states = [draft_step(draft, rows[b], k, ids_k[b], states[b]) for b in range(batch_size)]
        logits = torch.stack([draft.logits(state) for state in states])
        loss, count = step_loss(
            logits.flatten(0, 1), probs_k.flatten(0, 1), mask_k.flatten(), lk_loss_type, lk_kl_scale, lk_kl_decay
        )
        agree = [
            bool(c) and first_argmax(q) == first_argmax(p)
            for q, p, c in zip(logits.flatten(0, 1), probs_k.flatten(0, 1), mask_k.flatten(), strict=True)
        ]
        losses.append(loss)
        counts.append(count)
        all_logits.append(logits)
        right.append(agree)
        valid.append(valid_k.flatten().tolist())

    prefix_hits, prefix_valid = prefix_counts(right, valid)
    weights = [step_decay**k for k in range(ttt_steps)]
    total_loss = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    pairs = sum(counts)
    return Unroll(
        loss=total_loss,  # type: ignore[arg-type]
        accuracy=sum(map(sum, right)) / pairs if pairs else 0.0,
        prefix_hits=prefix_hits,
        valid=prefix_valid,
        supervised_pairs=pairs,
        step_losses=losses,
        step_counts=counts,
        step_logits=all_logits,
        right=torch.tensor(right).reshape(ttt_steps, batch_size, num_slots),
        first_step_valid=torch.tensor(valid[0]).reshape(batch_size, num_slots),
    )


def gradients(draft: Draft, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The derivative of `loss` by every parameter, zero for those it does not depend on."""
    names = list(draft.parameters)
    leaves = [draft.parameters[name] for name in names]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for name, leaf, grad in zip(names, leaves, found, strict=True)
    }


def causal_forward(draft: Draft, input_ids: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """An ordinary causal forward of one unpadded sequence in matrix form: no steps, no key lists.

    Token ids [T] and states [T, H] give the last layer's output [T, H], before the final norm.
    """
    num_slots, size = len(input_ids), draft.head_size
    group = draft.num_heads // draft.num_key_value_heads
    angles = torch.arange(num_slots, dtype=torch.float64)[:, None] * draft.rope_theta ** (
        -torch.arange(0, size, 2, dtype=torch.float64) / size
    )
    turn = torch.polar(torch.ones_like(angles), angles)
    future = torch.ones(num_slots, num_slots, dtype=torch.bool).triu(1)

    def heads(name: str, x: torch.Tensor, num_heads: int) -> torch.Tensor:
        return draft.linear(name, x).reshape(num_slots, num_heads, size).transpose(0, 1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        as_complex = torch.complex(x[..., : size // 2].contiguous(), x[..., size // 2 :].contiguous()) * turn
        return torch.cat([as_complex.real, as_complex.imag], dim=-1)

    residual = g
    for layer in range(draft.num_layers):
        prefix = f"layers.{layer}"
        if layer == 0:
            tokens = draft.norm("layers.0.input_layernorm", draft.parameters["embed_tokens.weight"][input_ids])
            x = torch.cat([tokens, draft.norm("layers.0.hidden_norm", residual)], dim=-1)
        else:
            x = draft.norm(f"{prefix}.input_layernorm", residual)
        query = turned(heads(f"{prefix}.self_attn.q_proj", x, draft.num_heads))
        key = turned(heads(f"{prefix}.self_attn.k_proj", x, draft.num_key_value_heads)).repeat_interleave(group, 0)
        value = heads(f"{prefix}.self_attn.v_proj", x, draft.num_key_value_heads).repeat_interleave(group, 0)
        scores = (query @ key.transpose(1, 2) / math.sqrt(size)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(dim=-1) @ value).transpose(0, 1).reshape(num_slots, -1)
        residual = residual + draft.linear(f"{prefix}.self_attn.o_proj", mixed)
        residual = residual + feed_forward(draft, layer, draft.norm(f"{prefix}.post_attention_layernorm", residual))
    return residual

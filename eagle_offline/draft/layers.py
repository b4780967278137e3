"""The parts of a draft: rotary positions, attention over an unroll's keys, feed-forward, decoder layer.

Layers are Llama's or Qwen3's; the two differ in the norms of queries and keys, which stand in `UnrollAttention` alone.

Attention here is the plain dense form of the test-time-training unroll; it defines what a faster form must equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from eagle_offline.draft.eagle3 import Eagle3DraftConfig

LayerStyle = Literal["llama", "qwen3"]
LAYER_STYLES: Final[tuple[LayerStyle, ...]] = ("llama", "qwen3")


def head_dim(config: LlamaConfig) -> int:
    """Return the width of one attention head."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


class RotaryEmbedding:
    """Rotary position angles of a config, computed when asked for and never stored in a checkpoint.

    Not a module: a buffer would follow ``.to(bfloat16)`` and lose the frequencies' precision.
    """

    def __init__(self, config: LlamaConfig):
        self._config = config
        self._frequencies: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._scaling = 1.0

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin ``[B, 1, T, head_dim]`` in ``dtype`` for int64 positions ``[B, T]``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        place = (position_ids.device, wide)
        # Kept where they are used: bringing them to a GPU would make every step wait for it.
        if place not in self._frequencies:
            frequencies, self._scaling = self._inverse_frequencies()
            self._frequencies[place] = frequencies.to(*place)
        angles = position_ids[:, None, :, None].to(wide) * self._frequencies[place]
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self._scaling).to(dtype), (angles.sin() * self._scaling).to(dtype)

    def _inverse_frequencies(self) -> tuple[Tensor, float]:
        parameters: dict[str, Any] = dict(self._config.rope_parameters or {})
        rope_type = parameters.get("rope_type", "default")
        if rope_type != "default":
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](self._config, torch.device("cpu"))
            return frequencies.double(), scaling
        width = head_dim(self._config)
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        return float(parameters["rope_theta"]) ** -exponents, 1.0


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``[B, heads, T, head_dim]`` states turned by their positions' angles (halves, as Llama pairs them)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


class UnrollAttention(nn.Module):
    """Grouped-query attention of one unroll step: causal over step 0's keys, plus the own slot's later keys.

    Qwen3's attention normalises every query and key, head by head, before they are rotated; values are left alone.
    """

    def __init__(self, config: Eagle3DraftConfig, input_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        self.head_dim = head_dim(config)
        self.q_proj = nn.Linear(input_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        normed = config.layer_style == "qwen3"
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if normed else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if normed else None

    def queries(self, states: Tensor) -> Tensor:
        """Return the queries ``[…, heads, head_dim]`` of states ``[…, input_size]``, not rotated yet."""
        return _normed(self.q_proj(states).unflatten(-1, (self.num_heads, self.head_dim)), self.q_norm)

    def keys(self, states: Tensor) -> Tensor:
        """Return the keys ``[…, kv_heads, head_dim]`` of states ``[…, input_size]``, not rotated yet."""
        return _normed(self.k_proj(states).unflatten(-1, (self.num_key_value_heads, self.head_dim)), self.k_norm)

    def values(self, states: Tensor) -> Tensor:
        """Return the values ``[…, kv_heads, head_dim]`` of states ``[…, input_size]``."""
        return self.v_proj(states).unflatten(-1, (self.num_key_value_heads, self.head_dim))

    def project(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries ``[B, heads, T, head_dim]``, and rotated keys and values with ``kv_heads``."""
        queries, keys = self.queries(states).transpose(1, 2), self.keys(states).transpose(1, 2)
        return rotate(queries, cos, sin), rotate(keys, cos, sin), self.values(states).transpose(1, 2)

    def attend(self, queries: Tensor, keys: list[Tensor], values: list[Tensor], visible: Tensor) -> Tensor:
        """Return the attention output ``[B, T, H]``.

        Args:
            queries: ``[B, heads, T, head_dim]`` of the step at hand.
            keys, values: one ``[B, kv_heads, T, head_dim]`` a step, step 0 first, this step last.
            visible: bool ``[B, 1, T, T]`` over step 0's keys.
        """
        groups = self.num_heads // self.num_key_value_heads
        keys = [key.repeat_interleave(groups, dim=1) for key in keys]
        values = [value.repeat_interleave(groups, dim=1) for value in values]
        scale = self.head_dim**-0.5
        scores = (queries @ keys[0].transpose(-1, -2)).masked_fill(~visible, -torch.inf)
        own = [(queries * key).sum(-1, keepdim=True) for key in keys[1:]]
        scores = torch.cat([scores, *own], dim=-1) * scale
        wide = scores if scores.dtype == torch.float64 else scores.float()
        weights = wide.softmax(dim=-1).to(queries.dtype)
        num_slots = queries.shape[2]
        output = weights[..., :num_slots] @ values[0]
        for step, value in enumerate(values[1:]):
            output = output + weights[..., num_slots + step, None] * value
        return self.output(output)

    def output(self, heads: Tensor) -> Tensor:
        """Return what the layer adds to its residual stream, ``[B, T, H]``, for heads ``[B, heads, T, head_dim]``."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def _normed(heads: Tensor, norm: nn.Module | None) -> Tensor:
    """Return heads normed where there is a norm, in their own dtype: autocast on CUDA norms in float32."""
    return heads if norm is None else norm(heads).to(heads.dtype)


class FeedForward(nn.Module):
    """The gated feed-forward of Llama."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_proj(states), self.up_proj(states)
        if not torch.is_grad_enabled():
            return self._down(gate, up)
        # Of four tensors of the intermediate size two are kept; the others take no product to make again, since what
        # is computed again ends before the last one.
        return checkpoint(self._down, gate, up, use_reentrant=False, preserve_rng_state=False)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self.activation(gate) * up)


class DraftLayer(nn.Module):
    """A decoder layer of the draft.

    The first layer reads ``[input_layernorm(embedding) ; hidden_norm(hidden)]``, embedding half first, and its
    residual stream is ``hidden`` before the norm. Further layers are plain layers of the config's style.
    """

    def __init__(self, config: Eagle3DraftConfig, reads_embedding: bool):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = UnrollAttention(config, 2 * size if reads_embedding else size)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(size, eps=eps)
        self.hidden_norm = nn.RMSNorm(size, eps=eps) if reads_embedding else None
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)

    def attention_input(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Return what the projections read: ``[B, T, 2H]`` in the first layer, ``[B, T, H]`` in others."""
        if self.hidden_norm is None:
            return self.input_layernorm(hidden)
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], dim=-1)

    def after_attention(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output ``[B, T, H]`` from its residual stream and its attention output."""
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

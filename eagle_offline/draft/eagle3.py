"""The EAGLE-3 draft model: a few decoder layers over the target's token embeddings and projected states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from eagle_offline.alignment import causal_visibility
from eagle_offline.draft.layers import LAYER_STYLES, DraftLayer, LayerStyle, RotaryEmbedding

# One entry a step: the step's keys (or values) of one layer, or a tuple of them with several layers.
CacheHidden = list[list[Any]]

# Queries ``[B, heads, M, head_dim]``, keys and values with ``kv_heads`` -> attention output like the queries.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Eagle3DraftConfig(LlamaConfig):
    """Llama's fields plus those of a draft.

    Attributes:
        draft_vocab_size: ``Vd``; None means the full vocabulary.
        target_hidden_size: width ``H`` of the target's states; None means ``hidden_size``.
        num_aux_hidden_states: ``A``, how many target layers are read.
        layer_style: ``llama``, or ``qwen3`` for layers that normalise queries and keys head by head.
        fc_norm: normalise each aux state before the projection (EAGLE-3.1).
        norm_output: feed the normed state back to the next step (EAGLE-3.1).
        parallel_drafting: the draft predicts all depths in one forward (P-EAGLE).
        mask_token_id: the token that stands for one not yet known; P-EAGLE needs one.
        num_hidden_layers: draft layers (1).
    """

    model_type = "eagle3_draft"

    def __init__(
        self,
        draft_vocab_size: int | None = None,
        target_hidden_size: int | None = None,
        num_aux_hidden_states: int = 3,
        fc_norm: bool = False,
        norm_output: bool = False,
        parallel_drafting: bool = False,
        mask_token_id: int | None = None,
        num_hidden_layers: int = 1,
        layer_style: LayerStyle = "llama",
        **kwargs: Any,
    ):
        if layer_style not in LAYER_STYLES:
            raise ValueError(f"layer_style: expected one of {', '.join(LAYER_STYLES)}, found {layer_style!r}")
        if parallel_drafting and mask_token_id is None:
            raise ValueError("mask_token_id: parallel drafting needs one")
        super().__init__(num_hidden_layers=num_hidden_layers, **kwargs)
        self.draft_vocab_size = self.vocab_size if draft_vocab_size is None else draft_vocab_size
        self.target_hidden_size = self.hidden_size if target_hidden_size is None else target_hidden_size
        self.num_aux_hidden_states = num_aux_hidden_states
        self.layer_style = layer_style
        self.fc_norm = fc_norm
        self.norm_output = norm_output
        self.parallel_drafting = parallel_drafting
        self.mask_token_id = mask_token_id


class Eagle3DraftModel(PreTrainedModel):
    """An EAGLE-3 or P-EAGLE draft.

    Parameter names are those that serving engines read, with ``layers.0`` for the layer some call ``midlayer``.

    Attributes:
        mask_hidden: ``[1, 1, A·H_target]``, what stands for the aux states of a position that the target has not seen
            yet; None unless the config says ``parallel_drafting``.

    Source: EAGLE-3, arXiv 2503.01840; P-EAGLE, arXiv 2602.01469; parameter names of the published checkpoints.
    """

    config_class = Eagle3DraftConfig
    config: Eagle3DraftConfig
    base_model_prefix = ""

    def __init__(self, config: Eagle3DraftConfig):
        super().__init__(config)
        num_aux, aux_size = config.num_aux_hidden_states, config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(num_aux * aux_size, config.hidden_size, bias=False)
        self.fc_norm = (
            nn.ModuleList([nn.RMSNorm(aux_size, eps=config.rms_norm_eps) for _ in range(num_aux)])
            if config.fc_norm
            else None
        )
        self.layers = nn.ModuleList(
            [DraftLayer(config, reads_embedding=index == 0) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, num_aux * aux_size)) if config.parallel_drafting else None
        self.rotary = RotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def project_hidden_states(self, aux: Tensor) -> Tensor:
        """Return ``g_0`` ``[B, T, H]`` from the concatenated aux states ``[B, T, A·H_target]``, low layer first.

        States come in the dtype they are stored in and are widened to the weights' here.
        """
        aux = aux.to(self.fc.weight.dtype)
        if self.fc_norm is not None:
            chunks = aux.chunk(len(self.fc_norm), dim=-1)
            aux = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return self.fc(aux)

    def project_mask_hidden(self) -> Tensor:
        """Return what stands for ``g_0`` at depths ≥ 1 of a P-EAGLE draft, ``[1, 1, H]``."""
        assert self.mask_hidden is not None, "not a P-EAGLE draft"
        return self.project_hidden_states(self.mask_hidden)

    def forward(
        self,
        input_ids: Tensor,
        projected_hidden_states: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        cache_hidden: CacheHidden | None = None,
        seq_lens: Tensor | None = None,
    ) -> Tensor:
        """Run one unroll step and return the state ``[B, T, H]`` that is fed to the next.

        Args:
            input_ids: int64 ``[B, T]``, slot frame, rolled to the step at hand.
            projected_hidden_states: ``[B, T, H]``, ``g_k``.
            attention_mask: ``[B, T]``, 1 on real slots; the same at every step.
            position_ids: int64 ``[B, T]`` of step 0 (rotary positions grow by one a step); None counts slots.
            cache_hidden: ``[K_list, V_list]`` of the steps so far, extended in place by this one; ``[[], []]``
                starts an unroll, None runs a step of its own.
            seq_lens: int64 ``[B, max_docs]`` for packed rows.
        """
        cache_hidden = [[], []] if cache_hidden is None else cache_hidden
        key_steps, value_steps = cache_hidden
        step = len(key_steps)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        visible = causal_visibility(attention_mask, seq_lens)
        hidden = projected_hidden_states
        cos, sin = self.rotary(position_ids + step, hidden.dtype)
        embedding = self.embed_tokens(input_ids).to(hidden.dtype)

        step_keys, step_values = [], []
        for index, layer in enumerate(cast(Iterable[DraftLayer], self.layers)):
            queries, keys, values = layer.self_attn.project(layer.attention_input(hidden, embedding), cos, sin)
            step_keys.append(keys)
            step_values.append(values)
            attended = layer.self_attn.attend(
                queries,
                [*(self._of_layer(entry, index) for entry in key_steps), keys],
                [*(self._of_layer(entry, index) for entry in value_steps), values],
                visible,
            )
            hidden = layer.after_attention(hidden, attended)
        key_steps.append(step_keys[0] if len(self.layers) == 1 else tuple(step_keys))
        value_steps.append(step_values[0] if len(self.layers) == 1 else tuple(step_values))
        return self.norm(hidden) if self.config.norm_output else hidden

    def forward_parallel(
        self, input_ids: Tensor, projected_hidden_states: Tensor, position_ids: Tensor, attend: Attend
    ) -> Tensor:
        """Run all elements of flat sequences through all layers at once; return what `compute_logits` takes.

        Args:
            input_ids: int64 ``[B, M]``, ``mask_token_id`` where the token is not known yet.
            projected_hidden_states: ``[B, M, H]``, `project_mask_hidden` where the state is not known yet.
            position_ids: int64 ``[B, M]``.
            attend: who reads whom; the same for all layers.
        """
        hidden = projected_hidden_states
        cos, sin = self.rotary(position_ids, hidden.dtype)
        embedding = self.embed_tokens(input_ids).to(hidden.dtype)
        for layer in cast(Iterable[DraftLayer], self.layers):
            attention = layer.self_attn
            heads = attend(*attention.project(layer.attention_input(hidden, embedding), cos, sin))
            hidden = layer.after_attention(hidden, attention.output(heads))
        return self.norm(hidden) if self.config.norm_output else hidden

    def before_head(self, hidden: Tensor) -> Tensor:
        """Return what the head reads, ``[…, H]``, for what `forward` returned: normed once."""
        return hidden if self.config.norm_output else self.norm(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[…, Vd]`` over the draft vocabulary for what `forward` returned."""
        return self.lm_head(self.before_head(hidden))

    @staticmethod
    def _of_layer(entry: Any, index: int) -> Tensor:
        return entry[index] if isinstance(entry, tuple) else entry

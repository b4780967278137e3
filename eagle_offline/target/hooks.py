"""The frozen target as a source of supervision: states of chosen decoder layers, logits, and the reference batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from eagle_offline.alignment import causal_visibility, shift_left_with_zero
from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.target.layout import (
    default_aux_layer_ids,
    find_decoder,
    input_embeddings,
    validate_aux_layer_ids,
)
from eagle_offline.target.positions import position_limits


@dataclass
class Eagle3TargetBatch:
    """Target supervision of one draft-training batch, slot frame; exactly one of two encodings.

    Attributes:
        aux_hidden_states: ``[B, T, A·H]``, not shifted.
        input_ids, attention_mask, loss_mask: ``[B, T]``; ids and loss mask shifted by one.
        logits: ``[B, T, V]`` shifted by one, or None.
        target_probs, position_mask: ``[B, T, Vd]`` and ``[B, T, 1]`` shifted by one, or None.
        position_ids, seq_lens, doc_remaining: packing, never shifted; None for one document a row.

    Raises:
        UsageError: none or both encodings, or probabilities without their mask.
    """

    aux_hidden_states: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    logits: Tensor | None = None
    target_probs: Tensor | None = None
    position_mask: Tensor | None = None
    position_ids: Tensor | None = None
    seq_lens: Tensor | None = None
    doc_remaining: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.logits is None) == (self.target_probs is None):
            raise UsageError("a target batch carries exactly one supervision: logits, or target_probs")
        if (self.target_probs is None) != (self.position_mask is None):
            raise UsageError("target_probs and position_mask belong together: pass both or neither")

    def to_trainer_inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of `Eagle3TrainerModule.forward` for the encoding at hand."""
        named = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "loss_mask": self.loss_mask,
            "aux_hidden_states": self.aux_hidden_states,
            "target_logits": self.logits,
            "target_probs": self.target_probs,
            "position_mask": self.position_mask,
            "position_ids": self.position_ids,
            "seq_lens": self.seq_lens,
            "doc_remaining": self.doc_remaining,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class HFEagle3TargetModel:
    """A causal LM whose aux states are captured by forward hooks on its decoder layers.

    Own hooks, because what ``output_hidden_states`` returns has changed between transformers releases.

    Args:
        model: a transformers causal LM, or a module laid out like one.
        aux_layer_ids: 0-based decoder layers whose outputs are captured; None for the default three.
        cp_mesh: context parallelism is for online training; must be None.

    Raises:
        UsageError: layer ids out of range or not strictly increasing, or ``cp_mesh`` given.
        MismatchError: no decoder layers found.
    """

    def __init__(self, model: nn.Module, aux_layer_ids: Sequence[int] | None = None, cp_mesh: object | None = None):
        if cp_mesh is not None:
            raise UsageError("cp_mesh is not supported: capture runs whole sequences on one device")
        self.model = model.eval()
        self.decoder, self._layers = find_decoder(model)
        if aux_layer_ids is None:
            aux_layer_ids = self._default_aux_layer_ids()
        self.aux_layer_ids = self._validate_aux_layer_ids(aux_layer_ids)
        self.position_limits = position_limits(model)

    def _get_transformer_layers(self) -> list[nn.Module]:
        return self._layers

    def _default_aux_layer_ids(self) -> list[int]:
        return default_aux_layer_ids(len(self._layers))

    def _validate_aux_layer_ids(self, aux_layer_ids: Sequence[int]) -> list[int]:
        return validate_aux_layer_ids(aux_layer_ids, len(self._layers))

    def _check_captured(self, captured: dict[int, Tensor]) -> None:
        missing = [layer_id for layer_id in self.aux_layer_ids if layer_id not in captured]
        if missing:
            raise MismatchError(
                f"{type(self.model).__name__} did not run its decoder layers {missing}: states cannot be captured"
            )
        wrong = [layer_id for layer_id in self.aux_layer_ids if captured[layer_id].dim() != 3]
        if wrong:
            shape = list(captured[wrong[0]].shape)
            raise MismatchError(
                f"{type(self.model).__name__}: decoder layer {wrong[0]} gives states of shape {shape}, expected one "
                "vector a token; architectures with several streams between layers cannot be captured"
            )

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the target's input embeddings."""
        return input_embeddings(self.model)

    @contextmanager
    def capturing(self, *, enabled: bool = True) -> Iterator[dict[int, Tensor]]:
        """Yield a dict that forwards of the model fill with its aux states ``[B, T, H]``, by layer id."""
        captured: dict[int, Tensor] = {}
        if not enabled:
            yield captured
            return

        def keep(layer_id: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                captured[layer_id] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self._layers[layer_id].register_forward_hook(keep(layer_id)) for layer_id in self.aux_layer_ids]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def capture(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> tuple[list[Tensor], Tensor]:
        """Run the decoder without its head over rows of one document each, padded on the right.

        No mask is passed: attention is causal, so what stands right of a row's end cannot reach it, and the
        plain causal kernels are the fastest.

        Args:
            input_ids: int64 ``[B, T]``.
            lengths: tokens of each row; None for ``T``. Of use where rotary frequencies depend on the longest row of a
                forward: rows on either side of that switch then go through the target apart.

        Returns:
            The aux states, one ``[B, T, H]`` a layer in ``aux_layer_ids`` order, and the final state ``[B, T, H]``
            after the final norm, all in the compute dtype.
        """
        switch = self.position_limits.frequency_switch
        short = [] if switch is None else [row for row, length in enumerate(lengths or ()) if length <= switch]
        if not short or input_ids.shape[1] <= cast(int, switch):
            return self._run(input_ids)
        long = [row for row in range(len(input_ids)) if row not in short]
        parts = [(short, self._run(input_ids[short, :switch]))]
        parts += [(long, self._run(input_ids[long]))] if long else []
        rows = [row for part, _ in parts for row in part]

        def joined(states: Sequence[Tensor]) -> Tensor:
            """Return rows in their order again, the short ones with zeros on their right."""
            padded = [nn.functional.pad(state, (0, 0, 0, input_ids.shape[1] - state.shape[1])) for state in states]
            return torch.cat(padded)[[rows.index(row) for row in range(len(rows))]]

        layers = [joined(states) for states in zip(*(layers for _, (layers, _) in parts), strict=True)]
        return layers, joined([last for _, (_, last) in parts])

    def _run(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        with torch.inference_mode(), self.capturing() as captured:
            output = self.decoder(input_ids.to(self.get_input_embeddings().weight.device), use_cache=False)
        self._check_captured(captured)
        last = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        return [captured[layer_id] for layer_id in self.aux_layer_ids], last

    def generate_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        position_ids: Tensor | None = None,
        seq_lens: Tensor | None = None,
        doc_remaining: Tensor | None = None,
    ) -> Eagle3TargetBatch:
        """Run the whole target and return its states and shifted logits.

        Args:
            input_ids, attention_mask, loss_mask: ``[B, T]``, not shifted.
            position_ids, doc_remaining: int64 ``[B, T]``; seq_lens: int64 ``[B, max_docs]``. With ``seq_lens`` the
                target runs under a block-causal mask, so that documents of a row do not see each other.
        """
        mask = attention_mask
        if seq_lens is not None:
            visible = causal_visibility(attention_mask, seq_lens)
            dtype = self.get_input_embeddings().weight.dtype
            # An additive mask is what every attention implementation of transformers accepts.
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask.masked_fill_(~visible, torch.finfo(dtype).min)
        with torch.no_grad(), self.capturing() as captured:
            output = self.model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        self._check_captured(captured)
        return Eagle3TargetBatch(
            aux_hidden_states=torch.cat([captured[layer_id] for layer_id in self.aux_layer_ids], dim=-1),
            input_ids=shift_left_with_zero(input_ids),
            attention_mask=attention_mask,
            loss_mask=shift_left_with_zero(loss_mask),
            logits=shift_left_with_zero(output.logits),
            position_ids=position_ids,
            seq_lens=seq_lens,
            doc_remaining=doc_remaining,
        )

"""The target with a key-value cache whose rows advance by unlike numbers of tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from eagle_offline.errors import DataError, MismatchError
from eagle_offline.target.hooks import HFEagle3TargetModel

# Kinds of layers, by transformers' names, whose past is keys and values alone.
_ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class TargetStep:
    """What one forward of the target gave.

    Attributes:
        logits: ``[B, N, V]``; of a prompt, its last token only.
        aux_hidden_states: ``[B, N, A·H]``, low layer first, or None when they were not asked for.
    """

    logits: Tensor
    aux_hidden_states: Tensor | None


class CachedTarget:
    """A target that decodes a batch of rows.

    Rows stand right-aligned: a row's tokens occupy its last columns, padding stands to their left, and nothing
    stands between. So any attention of any architecture, sliding windows included, sees each row as it would alone.
    (Rotary frequencies that follow the longest position of a forward, ``dynamic`` and ``longrope``, do so only up to
    the length that they are made for.)

    Args:
        target: the target.
        capture: whether aux states are wanted.

    Raises:
        MismatchError: a target whose cache is not made of keys and values alone.
    """

    def __init__(self, target: HFEagle3TargetModel, *, capture: bool):
        self._target = target
        self._capture = capture
        config = cast(Any, target.model).config.get_text_config()
        self._layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        recurrent = sorted(self._layer_types - _ATTENTION_TYPES)
        if recurrent:
            raise self._cannot_go_back(f"layers of {', '.join(recurrent)}")
        self._windowed = getattr(config, "sliding_window", None) is not None or self._layer_types != {"full_attention"}
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(target.model.forward).parameters
        self._cache = DynamicCache()
        self.device = target.get_input_embeddings().weight.device
        self._valid = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        # Tokens of each row, known without asking the device; and how many columns the last forward added.
        self._lengths: list[int] = []
        self._num_new = 0

    @property
    def model(self) -> torch.nn.Module:
        """Return the causal LM."""
        return self._target.model

    @torch.inference_mode()
    def start(self, prompts: list[list[int]]) -> TargetStep:
        """Run the prompts; the aux states are those of the prompts, padded on the left as the prompts are.

        Raises:
            MismatchError: see the class. DataError: logits that are not finite.
        """
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        valid = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            valid[row, longest - len(prompt) :] = 1
        self._cache, self._lengths = DynamicCache(), [len(prompt) for prompt in prompts]
        self._valid = valid.to(self.device)
        positions = (self._valid.cumsum(dim=1) - 1).clamp_min(0)
        step = self._forward(ids.to(self.device), positions, self._valid, num_logits=1)
        for layer in self._cache.layers:
            if getattr(layer, "is_sliding", False) or not isinstance(getattr(layer, "keys", None), Tensor):
                raise self._cannot_go_back(f"a {type(layer).__name__}")
        if not bool(step.logits.isfinite().all()):
            raise DataError(f"{type(self.model).__name__}: its logits are not finite; try another --compute-dtype")
        return step

    @torch.inference_mode()
    def extend(self, token_ids: Tensor, depths: Tensor | None = None, visible: Tensor | None = None) -> TargetStep:
        """Run new tokens after those kept; `keep` says afterwards which of them stay.

        Args:
            token_ids: int64 ``[B, N]``.
            depths: int64 ``[N]``, position of each after the last kept token's next; None counts up.
            visible: bool ``[N, N]``, which of the new tokens each reads; None for all before it.

        Raises:
            MismatchError: ``visible`` for a target with a sliding window, whose masks differ from layer to layer.
        """
        count = token_ids.shape[1]
        depths = torch.arange(count, device=self.device) if depths is None else depths
        starts = torch.tensor(self._lengths, device=self.device).unsqueeze(1)
        valid = torch.cat([self._valid, self._valid.new_ones(len(token_ids), count)], dim=1)
        mask = valid if visible is None else self._tree_mask(valid, visible)
        step = self._forward(token_ids, starts + depths, mask, num_logits=count)
        self._valid = valid
        return step

    def keep(self, counts: list[int], columns: Tensor | None = None) -> None:
        """Keep some of the tokens that the last `extend` ran, and forget the others.

        Args:
            counts: how many of each row.
            columns: int64 ``[B, D]``, which of them, in order, padded on the right; None for the first ones.
        """
        before = self._valid.shape[1] - self._num_new
        lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        width = max(lengths)
        old = torch.tensor(self._lengths, device=self.device).unsqueeze(1)
        # Which of its row's tokens a column holds; negative on padding.
        token = torch.arange(width, device=self.device) - (width - torch.tensor(lengths, device=self.device)[:, None])
        self._lengths, self._valid = lengths, (token >= 0).long()
        if columns is None and len(set(counts)) == 1 and width == before + counts[0]:
            for layer in self._layers():  # every column stays where it is
                layer.keys, layer.values = layer.keys[:, :, :width], layer.values[:, :, :width]
            return
        fresh = token - old
        if columns is not None:
            fresh = columns.gather(1, fresh.clamp(0, columns.shape[1] - 1))
        source = torch.where(token < old, before - old + token, before + fresh).clamp_min(0)[:, None, :, None]
        for layer in self._layers():
            for name in ("keys", "values"):
                states = getattr(layer, name)
                index = source.expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, index))

    def select_rows(self, rows: Tensor) -> None:
        """Go on with the rows given (int64 ``[B']``), in that order."""
        self._lengths = [self._lengths[row] for row in rows.tolist()]
        self._valid = self._valid[rows]
        for layer in self._layers():
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def _cannot_go_back(self, what: str) -> MismatchError:
        return MismatchError(
            f"{type(self.model).__name__} has {what}, which rejected tokens cannot be taken out of: it cannot be "
            "decoded speculatively here"
        )

    def _layers(self) -> list[Any]:
        return cast(list[Any], self._cache.layers)

    def _forward(self, token_ids: Tensor, position_ids: Tensor, mask: Tensor, num_logits: int) -> TargetStep:
        arguments: dict[str, Any] = {"logits_to_keep": num_logits} if self._takes_logits_to_keep else {}
        model = cast(Any, self.model)
        with self._target.capturing(enabled=self._capture) as captured:
            output = model(
                input_ids=token_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=self._cache,
                use_cache=True,
                **arguments,
            )
        self._num_new = token_ids.shape[1]
        aux = torch.cat([captured[layer] for layer in self._target.aux_layer_ids], dim=-1) if self._capture else None
        return TargetStep(output.logits[:, -num_logits:], aux)

    def _tree_mask(self, valid: Tensor, visible: Tensor) -> Tensor:
        """Return the additive mask ``[B, 1, N, S]`` of new tokens that do not all follow one another."""
        if self._windowed:
            raise MismatchError(
                f"{type(self.model).__name__} has sliding or chunked attention: trees of drafts cannot be verified, "
                "chains can"
            )
        count = visible.shape[0]
        seen = valid.bool()[:, None, None, :].repeat(1, 1, count, 1)
        seen[..., -count:] = visible.to(self.device)
        dtype = self._target.get_input_embeddings().weight.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, torch.finfo(dtype).min)

"""What is kept of final states at supervised positions, whoever made them."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_offline.supervision import Head


class Supervise:
    """From final states as stored to what supervises a draft.

    Args:
        head: of the target, in the stored dtype.
        selected_token_ids: int64 ``[Vd]``, the draft vocabulary.
        with_probs: probabilities over it are to be stored.
    """

    def __init__(self, head: Head, selected_token_ids: Tensor, *, with_probs: bool):
        device = head.weight.device
        # On a CPU products are float32: widening the rows once instead of for every batch changes no value.
        self._head = head.to("cpu", torch.float32) if device.type == "cpu" else head
        self._selected_head = self._head.select(selected_token_ids) if with_probs else None
        selected_token_mask = torch.zeros(head.vocab_size, dtype=torch.bool)
        selected_token_mask[selected_token_ids] = True
        self._selected_token_mask = selected_token_mask.to(device)

    def __call__(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return, for final states ``[N, H]`` on the head's device, what is stored at their positions, by name.

        ``hidden`` itself; ``argmax`` int32, ``log_normalizer`` and ``mass`` (inside the draft vocabulary) float32,
        ``in_vocab`` and ``finite`` bool, all ``[N]``; ``probs`` float32 ``[N, Vd]`` if they are to be stored.
        """
        with torch.inference_mode():
            argmax, log_normalizer, mass = self._head.statistics(hidden, self._selected_token_mask)
            made = {
                "hidden": hidden,
                "argmax": argmax,
                "log_normalizer": log_normalizer,
                "mass": mass,
                "in_vocab": self._selected_token_mask[argmax.long()],
                "finite": hidden.isfinite().all(dim=-1) & log_normalizer.isfinite(),
            }
            if self._selected_head is not None:
                made["probs"] = self._selected_head.logits(hidden).softmax(dim=-1)
        return made

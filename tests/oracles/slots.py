"""The slot frame of stored samples, slot by slot from unshifted masks, for the oracle of the unroll."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.oracles.distribution import first_argmax


def counts_by_gate(loss_mask: Sequence[bool], gate: str) -> list[bool]:
    """For every position of one document: does the target's distribution there supervise, as far as authors go.

    The distribution at position t predicts token t + 1. `input`: the assistant wrote token t; `predicted`: token
    t + 1, which has to be in the document; `both`: both of them.
    """
    found = []
    for t, wrote in enumerate(loss_mask):
        follows = t + 1 < len(loss_mask) and bool(loss_mask[t + 1])
        found.append({"input": bool(wrote), "predicted": follows, "both": bool(wrote) and follows}[gate])
    return found


def rows_of_samples(
    samples: Sequence[Any],
    head_weight: torch.Tensor,
    selected_token_ids: torch.Tensor,
    gate: str,
    ttt_steps: int,
) -> dict[str, torch.Tensor]:
    """A batch for `tests.oracles.ttt.unroll` with one unshifted sample a row, float64.

    Everything comes from the stored states and the head: argmax and probabilities are computed here.
    """
    num_slots = max(len(sample.input_ids) for sample in samples)
    count, chosen = len(samples), set(selected_token_ids.tolist())
    batch = {
        "input_ids": torch.zeros(count, num_slots, dtype=torch.int64),
        "attention_mask": torch.zeros(count, num_slots, dtype=torch.int64),
        "loss_mask": torch.zeros(count, num_slots, dtype=torch.bool),
        "position_mask": torch.zeros(count, num_slots, dtype=torch.bool),
        "aux_hidden_states": torch.zeros(count, num_slots, samples[0].aux_hidden_states.shape[1], dtype=torch.float64),
        "target_probs": torch.zeros(count, num_slots, len(selected_token_ids), dtype=torch.float64),
        "doc_remaining": torch.zeros(count, num_slots, dtype=torch.int64),
    }
    for b, sample in enumerate(samples):
        length, mask = len(sample.input_ids), sample.loss_mask.tolist()
        states = dict(
            zip(sample.supervision.positions.tolist(), sample.supervision.last_hidden_state.double(), strict=True)
        )
        gated = counts_by_gate(mask, gate)
        for slot in range(length):
            batch["attention_mask"][b, slot] = 1
            batch["aux_hidden_states"][b, slot] = sample.aux_hidden_states[slot].double()
            batch["doc_remaining"][b, slot] = length - 1 - slot
            t = slot + 1  # slot t of the frame holds what stands at t + 1
            if t == length:
                continue
            batch["input_ids"][b, slot] = sample.input_ids[t]
            batch["loss_mask"][b, slot] = gated[t]
            if gated[t]:
                logits = head_weight.double() @ states[t]
                batch["position_mask"][b, slot] = first_argmax(logits) in chosen
                batch["target_probs"][b, slot] = logits[selected_token_ids].softmax(dim=0)
    return batch

"""What decoding should yield on given answers, from the draft's hits along them: simulated and walked accept length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids, shift_left_with_zero
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.objectives.acceptance import simulated_accept_length, walk_answers
from eagle_offline.objectives.ttt import unroll
from eagle_offline.supervision import Head
from eagle_offline.target.hooks import HFEagle3TargetModel


@dataclass
class Predicted:
    """Counts over answers, one entry a step of the unroll where there are several.

    Attributes:
        prefix_hits, prefix_valid: int64 ``[K]``, see `UnrollSums`.
        walked_tokens, walked_rounds: of the walk along the answers.
    """

    num_steps: int
    prefix_hits: Tensor = field(init=False)
    prefix_valid: Tensor = field(init=False)
    walked_tokens: int = 0
    walked_rounds: int = 0

    def __post_init__(self) -> None:
        self.prefix_hits = torch.zeros(self.num_steps, dtype=torch.long)
        self.prefix_valid = torch.zeros(self.num_steps, dtype=torch.long)

    def add(self, other: Predicted) -> None:
        """Add another's counts."""
        self.prefix_hits = self.prefix_hits + other.prefix_hits
        self.prefix_valid = self.prefix_valid + other.prefix_valid
        self.walked_tokens += other.walked_tokens
        self.walked_rounds += other.walked_rounds

    @property
    def simulated(self) -> float:
        """Return the mean yield of a round over all positions."""
        return float(simulated_accept_length(self.prefix_hits, self.prefix_valid))

    @property
    def walked(self) -> float | None:
        """Return the mean yield of a round along the walk; None when no answer is long enough for one."""
        return self.walked_tokens / self.walked_rounds if self.walked_rounds else None


class Predictor:
    """Runs a draft along known answers.

    Args:
        target: the target.
        head: the target's.
        selected_token_ids: int64 ``[Vd]``.
        num_steps: the chain's length.
    """

    def __init__(self, target: HFEagle3TargetModel, head: Head, selected_token_ids: Tensor, num_steps: int):
        self._target, self._head, self._num_steps = target, head, num_steps
        self._device = head.weight.device
        ids = selected_token_ids.to(self._device)
        self._selected_head = head.select(ids)
        self._selected_mask = torch.zeros(head.vocab_size, dtype=torch.bool, device=self._device)
        self._selected_mask[ids] = True

    def slots(self, prompt: list[int], answer: list[int]) -> SlotBatch:
        """Return a prompt and its answer in the slot frame, the answer supervised."""
        ids = torch.tensor([prompt + answer], device=self._device)
        length = ids.shape[1]
        aux, last = self._target.capture(ids)
        answered = torch.arange(length, device=self._device) >= len(prompt)
        hidden = last[0, answered]
        probs = torch.zeros(1, length, self._selected_head.vocab_size, device=self._device)
        probs[0, answered] = self._selected_head.logits(hidden).float().softmax(dim=-1)
        argmax, _ = self._head.argmax_and_log_normalizer(hidden)
        mask = torch.zeros(1, length, dtype=torch.bool, device=self._device)
        mask[0, answered] = self._selected_mask[argmax.long()]
        seq_lens = torch.tensor([[length]], device=self._device)
        return SlotBatch(
            input_ids=shift_left_with_zero(ids),
            attention_mask=torch.ones_like(ids),
            loss_mask=shift_left_with_zero(answered.unsqueeze(0)),
            aux_hidden_states=torch.cat(aux, dim=-1),
            target_probs=shift_left_with_zero(probs),
            position_mask=shift_left_with_zero(mask),
            position_ids=position_ids(seq_lens, length),
            seq_lens=seq_lens,
            doc_remaining=doc_remaining(seq_lens, length),
        )

    @torch.inference_mode()
    def predict(self, drafts: Iterable[Eagle3DraftModel], prompt: list[int], answer: list[int]) -> list[Predicted]:
        """Return what each draft's hits along one answer predict."""
        batch = self.slots(prompt, answer)
        found = []
        for draft in drafts:
            sums = unroll(draft, batch, self._num_steps)
            predicted = Predicted(self._num_steps)
            predicted.prefix_hits, predicted.prefix_valid = sums.prefix_hits().cpu(), sums.prefix_valid().cpu()
            predicted.walked_tokens, predicted.walked_rounds = walk_answers(sums.step_hits, batch)
            found.append(predicted)
        return found

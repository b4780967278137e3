"""What decoding should yield on given answers, from the draft's hits along them: simulated and walked accept length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids, shift_left_with_zero
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.parallel import PackedParallel
from eagle_offline.objectives.acceptance import simulated_accept_length, walk_answers
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_parallel import PackedParallelLoss
from eagle_offline.objectives.parallel_plan import every_element, plan_parallel
from eagle_offline.objectives.plan import moved
from eagle_offline.objectives.ttt import unroll
from eagle_offline.objectives.ttt_loss import StepWeights
from eagle_offline.serving.pairing import Pair

# Of a parallel forward: chains' elements that run together, and rows of logits that are whole at once.
_ELEMENTS = 8192
_LOGIT_ROWS = 512


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


@dataclass(frozen=True)
class Hits:
    """A draft's hits along one answer; both bool ``[K, B, T]``.

    Attributes:
        step_hits: top-1 right at each step, or depth, of each slot.
        step_valid: valid by loss mask and document.
    """

    step_hits: Tensor
    step_valid: Tensor


class Predictor:
    """Runs drafts along known answers.

    Args:
        pairs: each draft with the target, by name; the target is run once for all that share its `Pair.target`.
        num_steps: how many tokens a round drafts.
    """

    def __init__(self, pairs: Mapping[str, Pair], num_steps: int):
        self._pairs, self._num_steps = pairs, num_steps

    @torch.inference_mode()
    def predict(self, prompt: list[int], answer: list[int]) -> dict[str, Predicted]:
        """Return what each draft's hits along one answer predict."""
        batches: dict[int, SlotBatch] = {}
        found = {}
        for name, pair in self._pairs.items():
            shared = id(pair.target)
            if shared not in batches:
                batches[shared] = slots(pair, prompt, answer)
            found[name] = self._predicted(pair.draft, batches[shared])
        return found

    def _predicted(self, draft: Eagle3DraftModel, batch: SlotBatch) -> Predicted:
        if draft.config.parallel_drafting:
            hits = parallel_hits(draft, batch, self._num_steps)
        else:
            sums = unroll(draft, batch, self._num_steps)
            hits = Hits(sums.step_hits, sums.step_valid)
        predicted = Predicted(self._num_steps)
        predicted.prefix_hits = hits.step_hits.long().cumprod(dim=0).sum(dim=(1, 2)).cpu()
        predicted.prefix_valid = hits.step_valid.long().cumprod(dim=0).sum(dim=(1, 2)).cpu()
        predicted.walked_tokens, predicted.walked_rounds = walk_answers(hits.step_hits, batch)
        return predicted


def slots(pair: Pair, prompt: list[int], answer: list[int]) -> SlotBatch:
    """Return a prompt and its answer in the slot frame of a draft and its target, the answer supervised."""
    device = pair.head.weight.device
    selected_ids = pair.selected_token_ids.to(device)
    selected_head = pair.head.select(selected_ids)
    selected_mask = torch.zeros(pair.head.vocab_size, dtype=torch.bool, device=device)
    selected_mask[selected_ids] = True
    ids = torch.tensor([prompt + answer], device=device)
    length = ids.shape[1]
    aux, last = pair.target.capture(ids)
    answered = torch.arange(length, device=device) >= len(prompt)
    hidden = last[0, answered]
    probs = torch.zeros(1, length, selected_head.vocab_size, device=device)
    probs[0, answered] = selected_head.logits(hidden).float().softmax(dim=-1)
    argmax, _ = pair.head.argmax_and_log_normalizer(hidden)
    mask = torch.zeros(1, length, dtype=torch.bool, device=device)
    mask[0, answered] = selected_mask[argmax.long()]
    seq_lens = torch.tensor([[length]], device=device)
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


def parallel_hits(draft: Eagle3DraftModel, batch: SlotBatch, num_depths: int) -> Hits:
    """Return the hits of a P-EAGLE draft at every depth of every anchor of one unpadded row, nothing sampled.

    Anchors run in segments over the keys of depth 0, so that memory grows with the row's length and not its square.
    """
    length, device = batch.input_ids.shape[1], batch.input_ids.device
    supervised = batch.counting_slots(batch.loss_mask, 0)[0].cpu().numpy()
    elements = every_element(supervised, num_depths)
    plan = plan_parallel(
        [length],
        supervised,
        batch.position_mask[0].cpu().numpy(),
        np.arange(length),
        elements,
        num_depths,
        _LOGIT_ROWS,
        num_segments=len(elements.anchors) // _ELEMENTS + 1,
        ragged=device.type != "cpu",
    )
    plan = moved(plan, device)
    assert batch.position_ids is not None
    loss = PackedParallelLoss(
        PackedParallel(draft, plan, batch.input_ids[0], batch.position_ids[0]),
        draft.before_head,
        draft.lm_head.weight,
        plan,
        lambda: batch.aux_hidden_states[0],
        TargetRows.of(batch.target_probs[0], None),
        StepWeights(torch.zeros(num_depths, device=device)),
    )
    empty = torch.zeros(num_depths, 1, length, dtype=torch.bool, device=device)
    step_hits, step_valid = empty, empty
    for part in loss.parts():
        _, sums = part()
        assert sums is not None, "parts without sums send gradients back, and there are none"
        step_hits, step_valid = step_hits | sums.step_hits, step_valid | sums.step_valid
    return Hits(step_hits, step_valid)

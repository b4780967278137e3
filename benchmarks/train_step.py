"""What does a training step cost, and how much of it do logits at supervised slots only save?

The reference step of this project beside the same step with logits and probabilities at every slot, both over the
same packed rows of chat-like lengths, half of the tokens supervised.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Figures
from benchmarks.states import chat_lengths, hidden_states
from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids, shift_left_with_zero
from eagle_offline.data.collate import lay_rows
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.objectives.losses import masked_sum, soft_cross_entropy
from eagle_offline.objectives.ttt import decayed_mean, unroll

NAME = "train_step"
QUESTION = __doc__

_SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return a small shape on a CPU, and the 8B shape on a GPU."""
    if device == "cpu":
        return {"hidden256": lambda: measure(device, _SMALL, draft_vocab_size=4096, num_samples=8, longest=256)}
    return {"8b": lambda: measure(device, _8B, draft_vocab_size=32000, num_samples=8, longest=512)}


def measure(
    device: str, shape: dict[str, int], *, draft_vocab_size: int, num_samples: int, longest: int, ttt_steps: int = 7
) -> Figures:
    """Return real tokens a second of a forward and backward, and the ratio to logits at every slot."""
    torch.manual_seed(0)
    config = Eagle3DraftConfig(vocab_size=draft_vocab_size, draft_vocab_size=draft_vocab_size, **shape)
    model = Eagle3DraftModel(config).to(device)
    batch, tokens = _batch(shape["hidden_size"], draft_vocab_size, num_samples, longest, device)

    def ours() -> None:
        sums = unroll(model, batch, ttt_steps)
        decayed_mean(sums.losses / sums.counts.clamp_min(1)).backward()

    def everywhere() -> None:
        decayed_mean(_losses_at_every_slot(model, batch, ttt_steps)).backward()

    times: dict[str, list[float]] = {"ours": [], "everywhere": []}
    for repeat in range(4):
        for name, function in (("ours", ours), ("everywhere", everywhere)):
            model.zero_grad(set_to_none=True)
            _synchronize(device)
            started = time.perf_counter()
            function()
            _synchronize(device)
            if repeat > 0:
                times[name].append(time.perf_counter() - started)
    best = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return {
        "speed_over_every_slot": best["everywhere"] / best["ours"],
        "tokens_per_second": tokens / best["ours"],
        "tokens": tokens,
        "supervised_slots": int(batch.position_mask.sum()),
    }


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _losses_at_every_slot(model: Eagle3DraftModel, batch: SlotBatch, ttt_steps: int) -> Tensor:
    hidden = model.project_hidden_states(batch.aux_hidden_states)
    cache_hidden: list[list] = [[], []]
    ids, probs, mask, losses = batch.input_ids, batch.target_probs, batch.position_mask, []
    for step in range(ttt_steps):
        if step > 0:
            ids, probs, mask = (shift_left_with_zero(rows) for rows in (ids, probs, mask))
        hidden = model(ids, hidden, batch.attention_mask, batch.position_ids, cache_hidden, batch.seq_lens)
        supervised = batch.counting_slots(mask, step)
        loss = masked_sum(soft_cross_entropy(model.compute_logits(hidden), probs), supervised)
        losses.append(loss / supervised.sum().clamp_min(1))
    return torch.stack(losses)


def _batch(hidden_size: int, vocab_size: int, num_samples: int, longest: int, device: str) -> tuple[SlotBatch, int]:
    lengths = chat_lengths(num_samples, seed=2, longest=longest).tolist()
    rows = lay_rows(lengths, longest)
    seq_lens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    loss_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, members in enumerate(rows):
        start = 0
        for place, index in enumerate(members):
            seq_lens[row, place] = lengths[index]
            loss_mask[row, start + lengths[index] // 2 : start + lengths[index]] = True
            start += lengths[index]
    aux = torch.cat([hidden_states(len(rows) * longest, seed, hidden_size) for seed in range(3)], dim=-1)
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(len(rows), longest, vocab_size, generator=generator).mul_(3).softmax(dim=-1)
    slots_in_use = torch.arange(longest) < seq_lens.sum(dim=1, keepdim=True)
    mask = shift_left_with_zero(loss_mask)
    batch = SlotBatch(
        input_ids=torch.randint(0, vocab_size, (len(rows), longest), generator=generator).to(device),
        attention_mask=slots_in_use.to(device),
        loss_mask=mask.to(device),
        aux_hidden_states=aux.view(len(rows), longest, -1).to(device),
        target_probs=probs.to(device),
        position_mask=mask.to(device),
        position_ids=position_ids(seq_lens, longest).to(device),
        seq_lens=seq_lens.to(device),
        doc_remaining=doc_remaining(seq_lens, longest).to(device),
    )
    return batch, sum(lengths)

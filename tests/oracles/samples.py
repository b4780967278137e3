"""Random documents with a target's states and logits, and the slot-frame batches that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.oracles.distribution import target_distribution
from tests.oracles.ttt import shifted

VOCAB_SIZE = 23
DRAFT_VOCAB_SIZE = 15
TARGET_HIDDEN_SIZE = 6
NUM_AUX = 3


@dataclass(frozen=True)
class Document:
    """One unshifted sample: ids [L], loss mask [L], aux states [L, A * Ht], target logits [L, V]."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux: torch.Tensor
    logits: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


def draw_selection(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A draft vocabulary: its ids, strictly increasing, and their indicator over the full vocabulary."""
    ids = torch.randperm(VOCAB_SIZE, generator=generator)[:DRAFT_VOCAB_SIZE].sort().values
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[ids] = True
    return ids, mask


def draw_document(generator: torch.Generator, length: int, supervised_share: float = 0.75) -> Document:
    """A document whose loss mask has holes and whose target often prefers a token outside the draft vocabulary."""
    return Document(
        input_ids=torch.randint(0, VOCAB_SIZE, (length,), generator=generator),
        loss_mask=(torch.rand(length, generator=generator) < supervised_share).long(),
        aux=torch.randn(length, NUM_AUX * TARGET_HIDDEN_SIZE, generator=generator, dtype=torch.float64),
        logits=3 * torch.randn(length, VOCAB_SIZE, generator=generator),
    )


def concatenated(documents: Sequence[Document]) -> Document:
    return Document(
        *(torch.cat([getattr(d, name) for d in documents]) for name in ("input_ids", "loss_mask", "aux", "logits"))
    )


def batch_of_rows(
    rows: Sequence[Sequence[Document]],
    num_slots: int,
    selection: tuple[torch.Tensor, torch.Tensor],
    *,
    packed: bool,
    padding_seed: int = 0,
    fold_padding: bool = False,
) -> dict[str, torch.Tensor]:
    """Slot-frame inputs of a trainer call that hold `rows`, each laid end to end and padded on the right.

    Padding holds random tokens, states and logits, and a loss mask of 0. `packed` adds `position_ids`, `seq_lens`
    and `doc_remaining`; `fold_padding` counts a row's padding into its last document. Both supervision encodings are
    there: `target_logits`, and `target_probs` with `position_mask`; pick one with `with_probs` or `with_logits`.
    """
    noise = torch.Generator().manual_seed(1000 + padding_seed)
    lines, real, lengths = [], [], []
    for row in rows:
        size = sum(map(len, row))
        filler = draw_document(noise, num_slots - size, supervised_share=0.0)
        lines.append(concatenated([*row, filler]))
        real.append([1] * size + [0] * (num_slots - size))
        sizes = [len(document) for document in row]
        if fold_padding and sizes:
            sizes[-1] += num_slots - size
        lengths.append(sizes)
    loss_mask = torch.stack([line.loss_mask for line in lines])
    logits = torch.stack([line.logits for line in lines])
    probs, positions = target_distribution(logits, *selection, loss_mask)
    batch = {
        "input_ids": shifted(torch.stack([line.input_ids for line in lines]), 1),
        "attention_mask": torch.tensor(real),
        "loss_mask": shifted(loss_mask, 1),
        "aux_hidden_states": torch.stack([line.aux for line in lines]),
        "target_logits": shifted(logits, 1),
        "target_probs": shifted(probs.float(), 1),
        "position_mask": shifted(positions[:, :, None], 1),
    }
    if packed:
        most = max(1, *(len(sizes) for sizes in lengths))
        batch["seq_lens"] = torch.tensor([sizes + [0] * (most - len(sizes)) for sizes in lengths])
        place = [[t for size in sizes for t in range(size)] for sizes in lengths]
        left = [[size - 1 - t for size in sizes for t in range(size)] for sizes in lengths]
        batch["position_ids"] = torch.tensor([p + [0] * (num_slots - len(p)) for p in place])
        batch["doc_remaining"] = torch.tensor([r + [0] * (num_slots - len(r)) for r in left])
    return batch


def with_probs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "target_logits"}


def with_logits(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name not in ("target_probs", "position_mask")}

"""The draft vocabulary: which of the target's tokens a draft can propose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from eagle_offline.errors import UsageError
from eagle_offline.provenance import digest_bytes

DEFAULT_DRAFT_VOCAB_SIZE = 32000


@dataclass(frozen=True)
class DraftVocab:
    """The selected token ids and how much of the corpus they cover.

    Attributes:
        selected_token_ids: int64 ``[Vd]``, strictly increasing.
        vocab_size: ``V`` of the target.
        coverage: share of supervised tokens that are selected.
    """

    selected_token_ids: np.ndarray
    vocab_size: int
    coverage: float

    @property
    def size(self) -> int:
        return len(self.selected_token_ids)

    @property
    def digest(self) -> str:
        """Return the digest of the ids as little-endian int64."""
        return digest_ids(self.selected_token_ids)

    @property
    def selected_token_mask(self) -> np.ndarray:
        """Return bool ``[V]``, true on the selected ids."""
        mask = np.zeros(self.vocab_size, bool)
        mask[self.selected_token_ids] = True
        return mask


def digest_ids(selected_token_ids: np.ndarray) -> str:
    """Return the digest of token ids as little-endian int64."""
    return digest_bytes(np.ascontiguousarray(selected_token_ids, "<i8").tobytes())


def resolve_size(requested: int | None, vocab_size: int) -> int:
    """Return ``Vd``: as requested, else 32000 or the full vocabulary if that is smaller.

    Raises:
        UsageError: more than the target has, or not positive.
    """
    if requested is None:
        return min(DEFAULT_DRAFT_VOCAB_SIZE, vocab_size)
    if not 1 <= requested <= vocab_size:
        raise UsageError(
            f"--draft-vocab-size {requested}: expected 1 to {vocab_size}, the target's vocabulary; "
            "leave it out for the default"
        )
    return requested


def choose_draft_vocab(
    supervised_counts: np.ndarray, required_ids: Iterable[int], size: int, vocab_size: int
) -> DraftVocab:
    """Choose the most frequent supervised tokens, ties to the lower id, required ids always in.

    Too few distinct tokens in the corpus are filled up with the lowest unused ids.

    Args:
        supervised_counts: int64 ``[≤ V]``, occurrences of each token id at supervised positions.
        required_ids: special tokens; those outside the vocabulary are left out.
        size: ``Vd``.
        vocab_size: ``V``.

    Raises:
        UsageError: more required ids than ``size``.

    Example:
        >>> choose_draft_vocab(np.array([0, 5, 0, 9, 5]), [2], 3, 6).selected_token_ids.tolist()
        [1, 2, 3]
    """
    counts = np.zeros(vocab_size, np.int64)
    counts[: len(supervised_counts)] = supervised_counts
    required = sorted({int(token) for token in required_ids if 0 <= int(token) < vocab_size})
    if len(required) > size:
        raise UsageError(
            f"--draft-vocab-size {size}: the tokenizer's special tokens alone are {len(required)}; ask for more"
        )
    rank = counts.copy()
    rank[required] = np.iinfo(np.int64).max
    # Stable sort of descending counts: equal counts, unused ids among them, keep ascending ids.
    selected = np.sort(np.argsort(-rank, kind="stable")[:size])
    total = int(counts.sum())
    coverage = float(counts[selected].sum() / total) if total else 1.0
    return DraftVocab(selected.astype(np.int64), vocab_size, coverage)

"""The draft vocabulary: which of the target's tokens a draft can propose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eagle_offline.errors import DataError, UsageError, one_line
from eagle_offline.provenance import digest_bytes

DEFAULT_DRAFT_VOCAB_SIZE = 32000

# A draft vocabulary that covers less of what the assistant says deserves a word.
LOW_COVERAGE = 0.9
SIZE_FLAG, FILE_FLAG = "--draft-vocab-size", "--draft-vocab"


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
    return DraftVocab(selected.astype(np.int64), vocab_size, _coverage(counts, selected))


def given_draft_vocab(ids: np.ndarray, supervised_counts: np.ndarray, vocab_size: int) -> DraftVocab:
    """Return a choice that somebody else has made, with its coverage of a corpus.

    Args:
        ids: int64 ``[Vd]``, strictly increasing.
        supervised_counts: int64 ``[≤ V]``, as for `choose_draft_vocab`.
        vocab_size: ``V``.
    """
    counts = np.zeros(vocab_size, np.int64)
    counts[: len(supervised_counts)] = supervised_counts
    return DraftVocab(ids, vocab_size, _coverage(counts, ids))


def _coverage(counts: np.ndarray, ids: np.ndarray) -> float:
    total = int(counts.sum())
    return float(counts[ids].sum() / total) if total else 1.0


def read_token_ids(path: Path, vocab_size: int) -> np.ndarray:
    """Read token ids from a file, one a line or as a JSON list; return them int64, strictly increasing.

    Raises:
        UsageError: no such file. DataError: not a list of token ids; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected token ids, one a line or as a JSON list, found no text") from error
    except OSError as error:
        raise UsageError(f"{FILE_FLAG} {path}: {error.strerror or one_line(error)}") from error
    found: dict[int, str] = {}
    for place, value in _entries(path, text):
        if not 0 <= value < vocab_size:
            raise DataError(f"{path}: {place}: id {value}, expected 0 to {vocab_size - 1}")
        if value in found:
            raise DataError(f"{path}: {place}: id {value} is there already, in {found[value]}")
        found[value] = place
    if not found:
        raise DataError(f"{path}: no token ids; expected one a line, or a JSON list")
    return np.array(sorted(found), np.int64)


def _entries(path: Path, text: str) -> Iterator[tuple[str, int]]:
    """Yield the ids of a file with the place of each."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a JSON list: {one_line(error)}") from error
        for number, value in enumerate(values, 1):
            if type(value) is not int:
                raise DataError(f"{path}: entry {number}: expected a token id, found {one_line(json.dumps(value), 40)}")
            yield f"entry {number}", value
        return
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if word and not (word.isascii() and word.isdigit() and len(word) < 19):
            raise DataError(f"{path}: line {number}: expected a token id, found {one_line(word, 40)!r}")
        if word:
            yield f"line {number}", int(word)

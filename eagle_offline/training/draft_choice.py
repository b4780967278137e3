"""What a run's draft reads and proposes: which of the captured layers, which of the target's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from eagle_offline.cache.given_vocab import read_given_vocab
from eagle_offline.cache.reader import Cache
from eagle_offline.errors import UsageError
from eagle_offline.training.target_tokens import special_token_ids
from eagle_offline.training.token_counts import supervised_counts
from eagle_offline.vocab import FILE_FLAG, SIZE_FLAG, DraftVocab, choose_draft_vocab, given_draft_vocab, resolve_size


def choose_aux_layers(requested: Sequence[int] | None, captured: Sequence[int]) -> list[int]:
    """Return the places, among the captured layers, of those that the draft reads, low first.

    Args:
        requested: 0-based layer ids; None for all that were captured.
        captured: 0-based layer ids, strictly increasing.

    Raises:
        UsageError: layers that were not captured, or not in increasing order.

    Example:
        >>> choose_aux_layers([1, 28], [1, 15, 28])
        [0, 2]
    """
    if requested is None:
        return list(range(len(captured)))
    flag, held = f"--aux-layer-ids {_listed(requested)}", f"the cache holds {_listed(captured)}"
    missing = [layer_id for layer_id in requested if layer_id not in captured]
    if missing:
        raise UsageError(
            f"{flag}: {_listed(missing)} {'was' if len(missing) == 1 else 'were'} not captured; {held}: choose among "
            "these, or precompute a cache with others"
        )
    if not requested or any(low >= high for low, high in pairwise(requested)):
        raise UsageError(f"{flag}: expected ids that increase, each once; {held}")
    return [list(captured).index(layer_id) for layer_id in requested]


def choose_vocabulary(caches: Sequence[Cache], draft_vocab_size: int | None, draft_vocab: Path | None) -> DraftVocab:
    """Return the draft vocabulary of a run; coverage is of the supervised tokens of all its caches.

    Args:
        caches: what is trained on, of one target.
        draft_vocab_size: choose so many tokens anew, by their count in the caches.
        draft_vocab: file of token ids, one a line or a JSON list, or a cache whose choice is taken over. Neither: the
            choice that the caches were made with.

    Raises:
        UsageError: both, a choice that the caches cannot follow, or caches that were made with several.
        DataError: a file that is no list of token ids. MismatchError: the other cache has another tokenizer.
    """
    if draft_vocab_size is not None and draft_vocab is not None:
        raise UsageError(f"{SIZE_FLAG} and {FILE_FLAG} exclude each other: give one of them")
    if draft_vocab_size is None and draft_vocab is None:
        return _recorded(caches)
    flag = f"{SIZE_FLAG} {draft_vocab_size}" if draft_vocab is None else f"{FILE_FLAG} {draft_vocab}"
    for cache in caches:
        encoding = cache.manifest.identity.capture.target_encoding
        if encoding != "factored":
            raise UsageError(
                f"{flag}: {cache.path} holds probabilities over the draft vocabulary it was made with "
                f"(--target-encoding {encoding}); leave the flag out, or precompute with --target-encoding factored"
            )
    vocab_size = caches[0].manifest.identity.target.vocab_size
    if draft_vocab is None:
        size = resolve_size(draft_vocab_size, vocab_size)
        return choose_draft_vocab(supervised_counts(caches), special_token_ids(caches[0].path), size, vocab_size)
    digest = caches[0].manifest.identity.text.tokenizer_digest
    ids = read_given_vocab(draft_vocab, vocab_size, digest, str(caches[0].path))
    return given_draft_vocab(ids, supervised_counts(caches), vocab_size)


def _recorded(caches: Sequence[Cache]) -> DraftVocab:
    """Return the choice that the caches were made with."""
    first = caches[0]
    choice = first.manifest.defaults.draft_vocabulary
    for other in caches[1:]:
        if other.manifest.defaults.draft_vocabulary.digest != choice.digest:
            raise UsageError(
                f"{first.path} and {other.path} were made with unlike draft vocabularies: give {FILE_FLAG} "
                f"{first.path} to take one over, or {SIZE_FLAG} {choice.size} to choose anew by the counts in all"
            )
    ids = first.selected_token_ids.numpy()
    return DraftVocab(ids, first.manifest.identity.target.vocab_size, choice.coverage)


def _listed(ids: Sequence[int]) -> str:
    return ",".join(str(layer_id) for layer_id in ids)

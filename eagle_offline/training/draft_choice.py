"""What a run's draft reads and proposes: which of the captured layers, which of the target's tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eagle_offline.cache.given_vocab import read_given_vocab
from eagle_offline.cache.layout import TARGET_DIRECTORY
from eagle_offline.cache.reader import Cache
from eagle_offline.errors import DataError, UsageError, one_line
from eagle_offline.vocab import FILE_FLAG, SIZE_FLAG, DraftVocab, choose_draft_vocab, given_draft_vocab, resolve_size

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


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


def supervised_counts(caches: Sequence[Cache]) -> np.ndarray:
    """Return int64 ``[V]``: how often each id is a supervised token.

    Only token ids and masks are read; their samples' digests are checked later, when they are trained on.

    Raises:
        DataError: ids outside the target's vocabulary.
    """
    vocab_size = caches[0].manifest.identity.target.vocab_size
    counts = np.zeros(vocab_size, np.int64)
    for cache in caches:
        # Digests cover the states: checking them here would read the whole cache.
        unchecked = cache.unchecked()
        for index in range(len(unchecked)):
            stored = unchecked.read_stored(index)
            ids = stored.input_ids[stored.loss_mask.astype(bool)]
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise DataError(
                    f"{cache.path}: sample {stored.sample_id} has token ids outside a vocabulary of {vocab_size}: "
                    "check it with inspect-manifest --verify"
                )
            counts += np.bincount(ids, minlength=vocab_size)
    return counts


def special_token_ids(cache: Path) -> list[int]:
    """Return the ids that every draft vocabulary holds: bos, eos, pad, unk and all that end a generation.

    Read from the tokenizer files that a cache keeps of its target, without a tokenizer. Where these do not say which
    token it is, the model's config is believed.

    Raises:
        DataError: files that are no JSON objects.
    """
    directory = cache / TARGET_DIRECTORY
    tokenizer, named, config, generation = (
        _read_object(directory / name)
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    )
    named = {**_read_object(directory / "special_tokens_map.json"), **named}
    config = {**config, **_object(config.get("text_config"))}
    known = _ids_by_token(tokenizer, named)
    found: list[Any] = []
    for name in _SPECIAL_TOKENS:
        token = named.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in known:
            found.append(known[token])
        elif name not in named or token is not None:
            found += _several(config.get(f"{name}_id"))
    found += _several(generation.get("eos_token_id"))
    return sorted({token_id for token_id in found if type(token_id) is int})


def _ids_by_token(tokenizer: dict[str, Any], named: dict[str, Any]) -> dict[Any, int]:
    """Return the id of every token that the tokenizer's files spell out, added ones over those of its model."""
    vocab = _object(tokenizer.get("model")).get("vocab")
    known: dict[Any, int] = dict(vocab) if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):  # of a unigram model: pairs of token and score
        known = {entry[0]: index for index, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    for token_id, token in _object(named.get("added_tokens_decoder")).items():
        if token_id.isdigit() and isinstance(token, dict):
            known[token.get("content")] = int(token_id)
    for token in _several(tokenizer.get("added_tokens")):
        if isinstance(token, dict) and type(token.get("id")) is int:
            known[token.get("content")] = token["id"]
    return known


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


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is no file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}; run precompute --resume to restore it") from error
    return _object(content)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(ids: Sequence[int]) -> str:
    return ",".join(str(layer_id) for layer_id in ids)

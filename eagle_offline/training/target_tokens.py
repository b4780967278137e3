"""What the tokenizer files that a cache keeps of its target say of the target's tokens, read without a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_offline.cache.layout import TARGET_DIRECTORY
from eagle_offline.errors import DataError, one_line

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token")  # beside that which pads

# Of a token id in a key; Python refuses to read much longer ones.
_MAX_DIGITS = 10


@dataclass(frozen=True)
class TargetTokens:
    """The tokens of a target, as far as its files spell them out.

    Attributes:
        ids: of each token by its name, added ones over those of the tokenizer's model.
        added: ids of tokens that were added to the tokenizer's model.
        special: ids of bos, eos, pad, unk and all that end a generation, ascending.
        pad: the token that pads and does nothing else; mask: the token that masks; None without one.
        size: the last id and one; None where the files do not hold the tokenizer's model.
    """

    ids: dict[str, int]
    added: frozenset[int]
    special: tuple[int, ...]
    pad: int | None
    mask: int | None
    size: int | None


def read_target_tokens(cache: Path) -> TargetTokens:
    """Read what a cache keeps of its target's tokens; where the tokenizer's files are silent, the config is believed.

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
    model, added = _model_ids(tokenizer), _added_ids(tokenizer, named)
    ids = {**model, **added}
    roles = {name: _ids_of(name, named, config, ids) for name in (*_SPECIAL_TOKENS, "pad_token", "mask_token")}
    ends = [token_id for token_id in _several(generation.get("eos_token_id")) if type(token_id) is int]
    others = {*ends, *(token_id for name in _SPECIAL_TOKENS for token_id in roles[name])}
    return TargetTokens(
        ids=ids,
        added=frozenset(added.values()),
        special=tuple(sorted(others | {*roles["pad_token"]})),
        pad=next((token_id for token_id in roles["pad_token"] if token_id not in others), None),
        mask=next(iter(roles["mask_token"]), None),
        size=max(ids.values()) + 1 if model else None,
    )


def special_token_ids(cache: Path) -> list[int]:
    """Return the ids that every draft vocabulary holds: bos, eos, pad, unk and all that end a generation.

    Raises:
        DataError: files that are no JSON objects.
    """
    return list(read_target_tokens(cache).special)


def _ids_of(name: str, named: dict[str, Any], config: dict[str, Any], ids: dict[str, int]) -> list[int]:
    """Return the ids of a token with a role, such as ``eos_token``; a config may have several."""
    token = named.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and token in ids:
        return [ids[token]]
    if name in named and token is None:
        return []
    return [token_id for token_id in _several(config.get(f"{name}_id")) if type(token_id) is int]


def _model_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the tokens of a tokenizer's model."""
    vocab = _object(tokenizer.get("model")).get("vocab")
    if isinstance(vocab, list):  # of a unigram model: pairs of token and score
        vocab = {str(entry[0]): index for index, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    return {token: token_id for token, token_id in _object(vocab).items() if type(token_id) is int}


def _added_ids(tokenizer: dict[str, Any], named: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the tokens that were added to a tokenizer's model."""
    added = {
        token.get("content"): int(token_id)
        for token_id, token in _object(named.get("added_tokens_decoder")).items()
        if token_id.isdecimal() and len(token_id) < _MAX_DIGITS and isinstance(token, dict)
    }
    for token in _several(tokenizer.get("added_tokens")):
        if isinstance(token, dict) and type(token.get("id")) is int:
            added[token.get("content")] = token["id"]
    return {token: token_id for token, token_id in added.items() if isinstance(token, str)}


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

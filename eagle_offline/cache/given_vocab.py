"""A draft vocabulary that somebody has chosen: a file of token ids, or the choice that another cache was made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eagle_offline.cache.companions import read_vocab
from eagle_offline.cache.layout import MANIFEST_FILE
from eagle_offline.cache.manifest import read_manifest
from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.vocab import FILE_FLAG, read_token_ids


def read_given_vocab(path: Path, vocab_size: int, tokenizer_digest: str | None, whose: str) -> np.ndarray:
    """Return the token ids of a file or of a cache, int64, strictly increasing.

    Args:
        path: file of token ids, one a line or a JSON list, or a cache of the same tokenizer, whatever its target.
        vocab_size: ``V`` of the target; tokenizer_digest: of its tokenizer, None while it is not known.
        whose: what these two are of, for a message.

    Raises:
        UsageError: neither a file nor a cache. DataError: a file that is no list of token ids.
        MismatchError: the cache has another tokenizer or vocabulary.
    """
    if not path.is_dir():
        return read_token_ids(path, vocab_size)
    if not (path / MANIFEST_FILE).is_file():
        raise UsageError(f"{FILE_FLAG} {path}: neither a file of token ids nor a cache")
    manifest = read_manifest(path)
    identity = manifest.identity
    for what, expected, found in (
        ("vocabulary size", vocab_size, identity.target.vocab_size),
        ("tokenizer", tokenizer_digest, identity.text.tokenizer_digest),
    ):
        if expected not in (found, None):
            raise MismatchError(f"{FILE_FLAG} {path}: its {what} is {found}, that of {whose} {expected}")
    choice = manifest.defaults.draft_vocabulary
    return read_vocab(path, choice.digest, vocab_size).numpy()

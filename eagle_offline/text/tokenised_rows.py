"""Reads a row that is tokens already: `input_ids` and `loss_mask`.

Knows neither conversations nor templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eagle_offline.text.conversations import RowProblem, kind_of
from eagle_offline.text.templates import Encoded

INPUT_IDS, LOSS_MASK = "input_ids", "loss_mask"


def is_tokenised(value: Mapping[str, Any]) -> bool:
    """Say whether a row brings token ids; they win over a conversation beside them."""
    return value.get(INPUT_IDS) is not None


def parse_tokens(value: Mapping[str, Any], vocab_size: int) -> Encoded:
    """Return the tokens of a row.

    Args:
        value: `input_ids`, ids of the target's tokenizer; `loss_mask`, as long, 1 or true where the assistant
            produced the token.
        vocab_size: Ids are below it.

    Raises:
        RowProblem: `bad-tokens`.

    Example:
        >>> parse_tokens({"input_ids": [5, 7], "loss_mask": [False, True]}, 8).loss_mask.tolist()
        [0, 1]
    """
    ids, mask = _numbers(value, INPUT_IDS, "iu"), _numbers(value, LOSS_MASK, "iub")
    if len(ids) != len(mask):
        raise RowProblem("bad-tokens", f"{len(ids)} `input_ids` and a `loss_mask` of {len(mask)}; expected as many")
    if len(ids) < 2:
        raise RowProblem("bad-tokens", f"{len(ids)} tokens; expected at least two, one to predict the other from")
    if (outside := ids[(ids < 0) | (ids >= vocab_size)]).size:
        raise RowProblem("bad-tokens", f"token id {outside[0]}; the tokenizer has ids from 0 to {vocab_size - 1}")
    if (other := mask[(mask != 0) & (mask != 1)]).size:
        raise RowProblem("bad-tokens", f"`loss_mask` holds {other[0]}; expected 0 or 1")
    return Encoded(ids.astype(np.int32), mask.astype(np.uint8))


def _numbers(value: Mapping[str, Any], key: str, kinds: str) -> np.ndarray:
    """Return a list of whole numbers as an array whose dtype is one of `kinds`."""
    found = value.get(key)
    if not isinstance(found, list):
        raise RowProblem("bad-tokens", f"`{key}` is {kind_of(found)}; expected a list of whole numbers")
    if not found:
        raise RowProblem("bad-tokens", f"`{key}` is empty; expected tokens")
    try:
        array = np.asarray(found)
    except ValueError:  # lists of unlike lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in kinds:
        odd = next((item for item in found if type(item) is not int), found[0])
        raise RowProblem("bad-tokens", f"`{key}` holds {str(odd)[:40]!r}; expected whole numbers")
    return array

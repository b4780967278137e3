"""Reads a row that is tokens already: `input_ids` with `loss_mask`, or with `labels`, and maybe an `attention_mask`.

Knows neither conversations nor templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eagle_offline.text.conversations import RowProblem, kind_of
from eagle_offline.text.templates import Encoded

INPUT_IDS, LOSS_MASK, LABELS, ATTENTION_MASK = "input_ids", "loss_mask", "labels", "attention_mask"
NOT_SUPERVISED = -100  # in `labels`, as transformers and its loss have it


def is_tokenised(value: Mapping[str, Any]) -> bool:
    """Say whether a row brings token ids; they win over a conversation beside them."""
    return value.get(INPUT_IDS) is not None


def parse_tokens(value: Mapping[str, Any], vocab_size: int) -> Encoded:
    """Return the tokens of a row.

    Args:
        value: `input_ids`, ids of the target's tokenizer; `loss_mask`, as long, 1 or true where the assistant
            produced the token, or `labels`, the token's own id there and -100 elsewhere; `attention_mask`, 0 for the
            padding at either end, which is cut off.
        vocab_size: Ids are below it.

    Raises:
        RowProblem: `bad-tokens`.

    Example:
        >>> parse_tokens({"input_ids": [5, 7], "loss_mask": [False, True]}, 8).loss_mask.tolist()
        [0, 1]
    """
    ids = _numbers(value, INPUT_IDS, "iu")
    by_labels = value.get(LOSS_MASK) is None and value.get(LABELS) is not None
    mask = _numbers(value, LABELS, "iu") if by_labels else _numbers(value, LOSS_MASK, "iub")
    if len(ids) != len(mask):
        named = f"`{LABELS}`" if by_labels else f"a `{LOSS_MASK}`"
        raise RowProblem("bad-tokens", f"{len(ids)} `input_ids` and {named} of {len(mask)}; expected as many")
    real = _without_padding(value, len(ids))
    ids, mask = ids[real], mask[real]
    if by_labels:
        mask = _mask_of_labels(ids, mask)
    if len(ids) < 2:
        raise RowProblem("bad-tokens", f"{len(ids)} tokens; expected at least two, one to predict the other from")
    if (outside := ids[(ids < 0) | (ids >= vocab_size)]).size:
        raise RowProblem("bad-tokens", f"token id {outside[0]}; the tokenizer has ids from 0 to {vocab_size - 1}")
    if (other := mask[(mask != 0) & (mask != 1)]).size:
        raise RowProblem("bad-tokens", f"`loss_mask` holds {other[0]}; expected 0 or 1")
    return Encoded(ids.astype(np.int32), mask.astype(np.uint8))


def _without_padding(value: Mapping[str, Any], length: int) -> slice:
    """Return which tokens are no padding."""
    if value.get(ATTENTION_MASK) is None:
        return slice(length)
    attended = _numbers(value, ATTENTION_MASK, "iub")
    if len(attended) != length:
        detail = f"{length} `input_ids` and an `{ATTENTION_MASK}` of {len(attended)}; expected as many"
        raise RowProblem("bad-tokens", detail)
    if (other := attended[(attended != 0) & (attended != 1)]).size:
        raise RowProblem("bad-tokens", f"`{ATTENTION_MASK}` holds {other[0]}; expected 0 or 1")
    places = np.flatnonzero(attended)
    if not len(places):
        return slice(0)
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != len(places):
        middle = first + int(np.argmin(attended[first : last + 1]))
        detail = f"`{ATTENTION_MASK}` is 0 at position {middle} with 1 on both sides; expected padding at the ends only"
        raise RowProblem("bad-tokens", detail)
    return slice(first, last + 1)


def _mask_of_labels(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    mask = labels != NOT_SUPERVISED
    if (wrong := np.flatnonzero(mask & (labels != ids))).size:
        place = int(wrong[0])
        detail = f"`{LABELS}` holds {labels[place]} where the token is {ids[place]}; expected the same id, or -100"
        raise RowProblem("bad-tokens", detail)
    return mask


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

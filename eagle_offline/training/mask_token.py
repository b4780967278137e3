"""The token that stands, in a P-EAGLE draft's input, for tokens that are not known yet: one that no text holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eagle_offline.cache.reader import Cache
from eagle_offline.errors import UsageError
from eagle_offline.training.target_tokens import TargetTokens, read_target_tokens
from eagle_offline.training.token_counts import distinct, first_sample, token_counts

FLAG = "--mask-token-id"

# Tokenizers set names of such tokens in brackets of many kinds; an ordinary word "reserved" has none.
_BRACKETED = re.compile(r"[<\[{(|>｜]+([^<>\[\]{}()|｜]+)[>\]})|<｜]+")
_MASK = re.compile(r"(?:mdm_)?mask(?:_token)?", re.IGNORECASE)
# What is reserved or unused says so. The others have uses, too (`<|image_placeholder|>`), but not as one of many.
_SPARE = re.compile(r".*(?:reserved|unused).*|(?:extra|dummy|place▁?holder|special|control)[a-z_▁]*\d+", re.IGNORECASE)

_SHOWN_TOKENS = 5


@dataclass(frozen=True)
class MaskToken:
    """A mask token and, for the log, in a few words why it is this one."""

    token_id: int
    reason: str


def choose_mask_token(caches: Sequence[Cache], requested: int | None, extra: Sequence[Cache] = ()) -> MaskToken:
    """Return the mask token of a P-EAGLE draft: the requested one if no text holds it, else the first of these.

    1. A mask token of the tokenizer's, by its role or name; then one that is called reserved or unused.
    2. A row of the target's embeddings beyond the tokenizer's last token.
    3. The token that pads.
    4. The last token that the data does not hold, of those that the tokenizer did not add for a purpose.

    None of them occurs in the data, supervised or not, has a role in the tokenizer (bos, eos, pad but for 3, unk) or
    ends a generation. Rows of the embeddings that are not finite are passed over; rows of zeros, which the draft's
    norm leaves as they are, come after the others of their kind.

    Args:
        caches: what is trained on, of one target.
        requested: by the user.
        extra: caches whose tokens count, too: those of held-out documents.

    Raises:
        UsageError: the requested token is none of the target's, occurs in the data, or has no finite embedding; or
            none is free. DataError: see `token_counts` and `read_target_tokens`.
    """
    first = caches[0]
    vocab_size = first.manifest.identity.target.vocab_size
    if requested is not None and not 0 <= requested < vocab_size:
        raise UsageError(f"{FLAG} {requested}: expected 0 to {vocab_size - 1}, a token of the target's")
    everything = distinct([*caches, *extra])
    counts = token_counts(everything)
    proposed = _proposed(first, read_target_tokens(first.path), counts)
    if requested is None:
        if proposed is None:
            raise _none_free(counts)
        return proposed
    problem = None
    if counts[requested]:
        problem = f"occurs {_times(int(counts[requested]))} in the data, first in {_first_place(everything, requested)}"
    elif not first.embeddings[requested].isfinite().all():
        problem = "has an embedding that is not finite"
    if problem is not None:
        way_out = "none is free" if proposed is None else f"such as {FLAG} {proposed.token_id} ({proposed.reason})"
        raise UsageError(f"{FLAG} {requested}: it {problem}; P-EAGLE needs a token that no text holds: {way_out}")
    return MaskToken(requested, "as given")


def _none_free(counts: np.ndarray) -> UsageError:
    absent = np.flatnonzero(counts == 0)[:_SHOWN_TOKENS].tolist()
    if not absent:
        return UsageError(
            f"the data holds every one of the target's {len(counts):,} tokens, and P-EAGLE needs one as its mask that "
            "no text holds: train on less data, or with --objective eagle3"
        )
    return UsageError(
        f"P-EAGLE needs a token as its mask that no text holds, and those that the data does not hold have a purpose "
        f"of their own: give {FLAG} one that your use of the target can do without, such as "
        f"{', '.join(map(str, absent))}"
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _first_place(caches: Sequence[Cache], token_id: int) -> str:
    """Return the first sample of several caches that holds a token which one of them does."""
    found = ((cache.name, first_sample(cache, token_id)) for cache in caches)
    return next(f"sample {sample_id} of {name}" for name, sample_id in found if sample_id is not None)


def _proposed(cache: Cache, tokens: TargetTokens, counts: np.ndarray) -> MaskToken | None:
    """Return the best token that does not occur, None when there is none."""
    for kind, describe in _kinds(tokens, counts):
        zeros = None
        for token_id in kind:
            if not 0 <= token_id < len(counts) or counts[token_id]:
                continue
            row = cache.embeddings[token_id]
            if row.any() and row.isfinite().all():
                return MaskToken(token_id, describe(token_id))
            if zeros is None and not row.any():
                zeros = MaskToken(token_id, describe(token_id))
        if zeros is not None:
            return zeros
    return None


def _kinds(tokens: TargetTokens, counts: np.ndarray) -> Iterator[tuple[list[int], Callable[[int], str]]]:
    """Yield ids, the best first, and what is said of one of them; the best kind first."""
    names = {token_id: name for name, token_id in tokens.ids.items()}
    bare = {token_id: match[1] for token_id, name in names.items() if (match := _BRACKETED.fullmatch(name))}
    allowed = sorted(bare.keys() - set(tokens.special))
    masks = [token_id for token_id in allowed if _MASK.fullmatch(bare[token_id])]
    if tokens.mask is not None and tokens.mask not in tokens.special:
        masks.insert(0, tokens.mask)
    yield masks, lambda token_id: f"{names.get(token_id, token_id)}, the tokenizer's mask token"
    spare = [token_id for token_id in allowed if _SPARE.fullmatch(bare[token_id])]
    yield spare, lambda token_id: f"{names[token_id]}, a reserved token"
    if tokens.size is not None:
        beyond = sorted(set(range(tokens.size, len(counts))) - set(tokens.special))
        yield beyond, lambda _: f"beyond the tokenizer's {tokens.size:,} tokens"
    if tokens.pad is not None:
        yield [tokens.pad], lambda token_id: f"{names.get(token_id, token_id)}, which pads"
    used = set(tokens.special) | tokens.added
    others = [token_id for token_id in np.flatnonzero(counts == 0)[::-1].tolist() if token_id not in used]
    yield others, lambda _: "it occurs nowhere in the data"

"""Which samples go through the target together: a function of their lengths and of how much fits at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A batch takes no sample that would make its padding more than this share of its tokens, …
_MAX_PADDING = 1 / 64

# … unless it has no more tokens than this, on a device that then waits for weights and launches, not for arithmetic.
SMALL_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Batching:
    """How much goes through the target at once: so many samples, or so many tokens, padding included.

    Attributes:
        batch_size: samples; None where tokens are counted.
        max_batch_tokens: tokens; a sample that is longer goes by itself. None where samples are counted.
        small_batch_tokens: batches of up to so many tokens may be padded however much.
    """

    batch_size: int | None = None
    max_batch_tokens: int | None = None
    small_batch_tokens: int = 0

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return positions grouped into batches: the longest samples first, ties in order, little padding.

        Example:
            >>> Batching(batch_size=2).batches([5, 2, 9, 2])
            [[2, 0], [1, 3]]
            >>> Batching(max_batch_tokens=1000).batches([300, 990, 304, 250])
            [[1], [2, 0], [3]]
        """
        order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
        if self.batch_size is not None:
            return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        assert self.max_batch_tokens is not None
        batches: list[list[int]] = []
        num_tokens = 0
        for position in order:
            length = lengths[position]
            if batches:
                longest, count = lengths[batches[-1][0]], len(batches[-1]) + 1
                slots, num_real = longest * count, num_tokens + length
                padded_little = slots - num_real <= _MAX_PADDING * slots or slots <= self.small_batch_tokens
                if slots <= self.max_batch_tokens and padded_little:
                    batches[-1].append(position)
                    num_tokens = num_real
                    continue
            batches.append([position])
            num_tokens = length
        return batches

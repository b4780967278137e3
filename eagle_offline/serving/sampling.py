"""Which tokens are chosen and which drafts accepted: greedy, or sampled without changing the target's distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_offline.errors import UsageError

# Below this a distribution is all on its most likely token, and logits divided by it leave float32's range.
_COLDEST = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0, or less than 1e-5, for the most likely token.
        top_p: share of the probability mass, most likely tokens first, that tokens are drawn from.

    Raises:
        UsageError: out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        # Written so that NaN, which compares false with everything, is out of range too.
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise UsageError(
                f"expected a finite --temperature >= 0 and --top-p in (0, 1], found {self.temperature} and {self.top_p}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST

    def probs(self, logits: Tensor) -> Tensor:
        """Return the float32 ``[…, V]`` distribution that tokens are drawn from (not for greedy decoding)."""
        probs = (logits.float() / self.temperature).softmax(dim=-1)
        if self.top_p == 1:
            return probs
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is short of top_p; so the first always does.
        ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked >= self.top_p, 0)
        kept = torch.zeros_like(probs).scatter(-1, order, ranked)
        return kept / kept.sum(dim=-1, keepdim=True)

    def choose(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return int64 ``[B]`` tokens for logits ``[B, V]``, and what they were drawn from (None when greedy)."""
        if self.greedy:
            return logits.argmax(dim=-1), None
        probs = self.probs(logits)
        return draw(probs, generator), probs


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Return int64 ``[B]``, one draw from each row of ``[B, V]``; rows need not sum to one."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def accept_greedily(drafted: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Accept drafts while they are what the target would say itself.

    Args:
        drafted: int64 ``[B, K]``.
        target_logits: ``[B, K + 1, V]``; those at ``k`` follow ``k`` drafts.

    Returns:
        int64 ``[B]`` drafts accepted, and int64 ``[B]`` the target's own token after them.
    """
    chosen = target_logits.argmax(dim=-1)
    accepted = (chosen[:, :-1] == drafted).long().cumprod(dim=1).sum(dim=1)
    return accepted, chosen.gather(1, accepted.unsqueeze(1)).squeeze(1)


def accept_losslessly(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Accept drafts so that what comes out has the target's distribution exactly.

    The draft ``x`` is accepted with probability ``min(1, p(x) / q(x))``. At the first that is not, the token is
    drawn from ``max(0, p - q)`` instead, normalised; after ``K`` accepted drafts from ``p``.

    Args:
        drafted: int64 ``[B, K]``, each drawn from its row of ``draft_probs``.
        draft_probs: float32 ``[B, K, V]``, zero outside the draft vocabulary.
        target_probs: float32 ``[B, K + 1, V]``.
        generator: of the uniform draws.

    Returns:
        int64 ``[B]`` drafts accepted, and int64 ``[B]`` the token after them.

    Source: speculative sampling, arXiv 2211.17192 and 2302.01318.
    """
    index = drafted.unsqueeze(-1)
    p = target_probs[:, :-1].gather(-1, index).squeeze(-1)
    q = draft_probs.gather(-1, index).squeeze(-1)
    uniform = torch.rand(drafted.shape, generator=generator, device=drafted.device)
    accepted = (uniform * q < p).long().cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(drafted), device=drafted.device)
    # After the last draft nothing was proposed, so nothing is taken off the target's distribution.
    proposed = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)[rows, accepted]
    reached = target_probs[rows, accepted]
    residual = (reached - proposed).clamp_min(0)
    # Equal distributions leave nothing; a rejection there is a rounding error, and the target's own will do.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, reached)
    return accepted, draw(residual, generator)

"""The one interface between drafting and verifying: what a drafter is told, and what it proposes.

A drafter is told which slots the last verification settled and answers with a proposal; the proposal says which
tokens the target has to be run over, how they hang together, and which of them its logits accept. Chains, trees and
parallel drafts differ in their proposals only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eagle_offline.serving.sampling import Sampling, accept_greedily, accept_losslessly


@dataclass(frozen=True)
class Settled:
    """Slots that the last verification settled, rows padded on the right.

    Slot ``t`` has the target's states at ``t`` and the token ``x_{t+1}``, which is known by now.

    Attributes:
        input_ids: int64 ``[B, N]``, ``x_{t+1}`` of each slot.
        aux_hidden_states: ``[B, N, A·H]``, ``a_t``, low layer first.
        position_ids: int64 ``[B, N]``, ``t``; padding goes on counting.
        num_slots: int64 ``[B]``, slots of each row that are not padding, at least one.
        num_columns: more than the largest position of a slot that counts.
    """

    input_ids: Tensor
    aux_hidden_states: Tensor
    position_ids: Tensor
    num_slots: Tensor
    num_columns: int


@dataclass(frozen=True)
class Acceptance:
    """What a verification keeps of a proposal.

    Attributes:
        num_accepted: int64 ``[B]``, drafts accepted.
        next_ids: int64 ``[B]``, the target's token after them.
        columns: int64 ``[B, D]``, the verified columns that stay, in order, column 0 (the token before the
            proposal) first, rows padded on the right; None for the first ``num_accepted + 1``, as in a chain.
    """

    num_accepted: Tensor
    next_ids: Tensor
    columns: Tensor | None = None


class Proposal(Protocol):
    """Draft tokens and how they are verified.

    Attributes:
        token_ids: int64 ``[B, M]``.
        depths: int64 ``[M]``, how many tokens after the last known one each stands; None for a chain.
        visible: bool ``[M + 1, M + 1]``, which columns each column reads, the last known token being column 0;
            None for a chain, in which each reads all before it.
    """

    @property
    def token_ids(self) -> Tensor: ...

    @property
    def depths(self) -> Tensor | None: ...

    @property
    def visible(self) -> Tensor | None: ...

    def accept(self, target_logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Acceptance:
        """Decide by the target's logits ``[B, M + 1, V]``."""
        ...


class Drafter(Protocol):
    """Proposes tokens for a batch of rows.

    Attributes:
        name: what reports call it.
        num_draft_tokens: the longest run of drafts that a round can accept.
    """

    name: str
    num_draft_tokens: int

    def start(self, num_rows: int) -> None:
        """Forget everything and expect ``num_rows`` rows."""
        ...

    def propose(self, settled: Settled, sampling: Sampling, generator: torch.Generator) -> Proposal:
        """Return a proposal for the tokens after those settled."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Go on with the rows given (int64 ``[B']``), in that order."""
        ...


@dataclass(frozen=True)
class ChainProposal:
    """One token after the other.

    Attributes:
        token_ids: int64 ``[B, K]``.
        draft_probs: float32 ``[B, K, V]`` that they were drawn from; None for greedy drafts.
    """

    token_ids: Tensor
    draft_probs: Tensor | None = None

    @property
    def depths(self) -> None:
        return None

    @property
    def visible(self) -> None:
        return None

    def accept(self, target_logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Acceptance:
        if sampling.greedy:
            accepted, next_ids = accept_greedily(self.token_ids, target_logits)
        else:
            assert self.draft_probs is not None, "drafts that are sampled against need the distribution they came from"
            target_probs = sampling.probs(target_logits)
            accepted, next_ids = accept_losslessly(self.token_ids, self.draft_probs, target_probs, generator)
        return Acceptance(accepted, next_ids)


class NoDrafter:
    """Proposes nothing: plain decoding, one token a round."""

    name = "plain"
    num_draft_tokens = 0

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def start(self, num_rows: int) -> None:
        pass

    def propose(self, settled: Settled, sampling: Sampling, generator: torch.Generator) -> ChainProposal:
        nothing = settled.input_ids[:, :0]
        probs = torch.zeros(*nothing.shape, self._vocab_size, device=nothing.device)
        return ChainProposal(nothing, None if sampling.greedy else probs)

    def select_rows(self, rows: Tensor) -> None:
        pass

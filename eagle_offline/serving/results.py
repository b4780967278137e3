"""The figures of an evaluation, as they stand in ``evaluation.json``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskResult(_Figures):
    """One kind of prompt; see `DrafterResult`."""

    num_answers: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    num_rounds: int = Field(ge=0)
    accept_length: float
    walked_accept_length: float | None
    simulated_accept_length: float


class PlainResult(_Figures):
    """Decoding one token a forward.

    Attributes:
        num_tokens: tokens of all answers.
        prefill_seconds: the forwards over the prompts, which also give each answer's first token.
        draft_seconds, verify_seconds: drafting, and the target's forwards with the choice of tokens.
        tokens_per_second: tokens after each answer's first, over drafting and verifying.
    """

    num_tokens: int = Field(ge=0)
    prefill_seconds: float = Field(ge=0)
    draft_seconds: float = Field(ge=0)
    verify_seconds: float = Field(ge=0)
    tokens_per_second: float = Field(ge=0)


class DrafterResult(PlainResult):
    """Decoding with drafts.

    Attributes:
        num_rounds: verifications.
        draft_forwards: forwards of the draft, each over all rows of a batch that are not finished.
        draft_forwards_per_round: the same over the rounds of those batches: one a token for a chain, one for P-EAGLE.
        accept_length: ``1 +`` drafts accepted a round, those that the answer still holds.
        accept_rate: ``[K]``, share of the rounds that accepted a draft at each depth.
        conditional_accept_rate: ``[K]``, the same among rounds that accepted all before it.
        walked_accept_length, simulated_accept_length: what the draft's top-1 hits along the answers of plain
            decoding predict for greedy decoding.
        speedup: tokens a second over those of plain decoding in the same run.
        tasks: the same by kind of prompt.
    """

    num_rounds: int = Field(ge=0)
    draft_forwards: int = Field(ge=0)
    draft_forwards_per_round: float = Field(ge=0)
    accept_length: float
    accept_rate: list[float]
    conditional_accept_rate: list[float]
    walked_accept_length: float | None
    simulated_accept_length: float
    speedup: float | None
    tasks: dict[str, TaskResult]


class Evaluation(_Figures):
    """One evaluation.

    Attributes:
        draft, target, prompts: what was given.
        compared: further drafts as they were given, by their name among `drafters`.
        num_draft_tokens: ``K``.
        num_answers: prompts answered; num_left_out: prompts too long for the target; num_unasked: turns after an
            answer that reached the limit.
        num_identical: answers that every draft gave as they are without any, token for token; None when sampled.
        plain: without drafts.
        drafters: with each draft, the one in question first.
        environment: where it was measured.
    """

    format: Literal["eagle-offline-evaluation"] = "eagle-offline-evaluation"
    version: Literal[2] = 2
    draft: str = ""
    compared: dict[str, str] = {}
    target: str = ""
    prompts: str = ""
    num_draft_tokens: int = Field(gt=0)
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_new_tokens: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    seed: int
    num_answers: int = Field(ge=0)
    num_left_out: int = Field(ge=0)
    num_unasked: int = Field(ge=0)
    num_identical: int | None
    plain: PlainResult
    drafters: dict[str, DrafterResult]
    environment: dict[str, Any] = {}

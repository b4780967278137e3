"""What a draft is worth: prompts answered with it and without it, counted and timed in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from eagle_offline.errors import DataError, StoppedEarly
from eagle_offline.serving.cached_target import CachedTarget
from eagle_offline.serving.decoding import Answer, Limits, Seconds, decode
from eagle_offline.serving.drafters import drafter_of
from eagle_offline.serving.drafting import NoDrafter
from eagle_offline.serving.pairing import Pair
from eagle_offline.serving.prediction import Predicted, Predictor
from eagle_offline.serving.prompts import Conversation
from eagle_offline.serving.results import DrafterResult, Evaluation, PlainResult, TaskResult
from eagle_offline.serving.sampling import Sampling
from eagle_offline.text.conversations import Message, RowProblem
from eagle_offline.text.templates import ChatTemplate

PLAIN = "plain"
# Tokens that each drafter decodes before anything is counted.
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class EvaluationPlan:
    """How prompts are answered.

    Attributes:
        num_draft_tokens: tokens drafted a round.
        limits: when an answer ends.
        sampling: how tokens are chosen.
        batch_size: prompts answered together.
        seed: of sampled decoding.
        max_tokens: longest prompt and answer together; longer prompts are left out.
    """

    num_draft_tokens: int
    limits: Limits
    sampling: Sampling
    batch_size: int
    seed: int
    max_tokens: int


@dataclass
class _Counts:
    """What one drafter did on some answers."""

    answers: list[Answer] = field(default_factory=list)
    predicted: Predicted | None = None

    def add(self, answer: Answer, predicted: Predicted | None) -> None:
        self.answers.append(answer)
        if predicted is not None:
            if self.predicted is None:
                self.predicted = Predicted(predicted.num_steps)
            self.predicted.add(predicted)

    @property
    def accepted(self) -> list[int]:
        return [count for answer in self.answers for count in answer.accepted]

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def accept_length(self) -> float:
        """Return the mean yield of a round: drafts accepted and the target's own token."""
        return 1 + sum(self.accepted) / max(len(self.accepted), 1)


class Evaluator:
    """Answers conversations with each drafter and without any.

    Args:
        pairs: the drafts to compare, each with the target as it reads it, by name, the one in question first.
        template: of the target's tokenizer.
        plan: how prompts are answered.
    """

    def __init__(self, pairs: Mapping[str, Pair], template: ChatTemplate, plan: EvaluationPlan):
        self._pairs, self._template, self._plan = pairs, template, plan
        first = next(iter(pairs.values()))
        self._model_drafters = {
            name: drafter_of(pair.draft, pair.selected_token_ids, plan.num_draft_tokens, name)
            for name, pair in pairs.items()
        }
        self._drafters = {PLAIN: NoDrafter(first.head.vocab_size), **self._model_drafters}
        # What plain decoding runs: the same model, nothing captured.
        self._targets = {PLAIN: first.target, **{name: pair.target for name, pair in pairs.items()}}
        self._predictor = Predictor(pairs, plan.num_draft_tokens)
        self._seconds = {name: Seconds() for name in self._drafters}
        self._counts: dict[str, dict[str, _Counts]] = {name: {} for name in self._drafters}
        self._num_left_out = 0
        self._num_unasked = 0
        self._longest_prompt = 0
        self._num_identical = 0

    def run(
        self, conversations: Sequence[Conversation], report: Callable[[int], None], stop: Callable[[], bool]
    ) -> Evaluation:
        """Answer every turn of every conversation and return the figures.

        Turns are asked one after the other, with the answers of plain decoding between them; a conversation ends
        with its last turn or with an answer that reached the limit.

        Args:
            conversations: what is asked.
            report: called with the number of turns done so far, those that will not be asked included.
            stop: asked before every batch.

        Raises:
            DataError: no prompt that could be answered. StoppedEarly: asked to stop.
        """
        histories: list[list[Message]] = [[] for _ in conversations]
        going = list(range(len(conversations)))
        turn = num_turns = 0
        while going := [index for index in going if turn < len(conversations[index].turns)]:
            for index in going:
                histories[index].extend(conversations[index].turns[turn])
            prompts = {index: self._encode(conversations[index], histories[index]) for index in going}
            fitting = [index for index in going if prompts[index]]
            self._num_left_out += len(going) - len(fitting)
            order = sorted(fitting, key=lambda index: len(prompts[index]))
            asked, going = going, []
            for start in range(0, len(order), self._plan.batch_size):
                if stop():
                    raise StoppedEarly(
                        f"stopped by a signal after {num_turns} answers; nothing was written: run it again"
                    )
                batch = order[start : start + self._plan.batch_size]
                tasks = [conversations[index].task for index in batch]
                answers = self._answer([prompts[index] for index in batch], tasks, num_turns)
                num_turns += len(batch)
                report(num_turns)
                for index, answer in zip(batch, answers, strict=True):
                    if answer.stopped:
                        text = self._template.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                        histories[index].append(Message("assistant", str(text)))
                        going.append(index)
            turn += 1
            # A conversation that broke off leaves its further turns unasked.
            ended = set(asked) - set(going)
            self._num_unasked += sum(len(conversations[index].turns) - turn for index in ended)
            report(num_turns + self._num_left_out + self._num_unasked)
        if not num_turns:
            raise DataError(
                f"no prompt could be answered: the longest of {self._num_left_out} has {self._longest_prompt} tokens, "
                f"and the target takes {self._plan.max_tokens} with answer and drafts: lower --max-new-tokens"
            )
        return self._evaluation(num_turns)

    def _encode(self, conversation: Conversation, history: list[Message]) -> list[int]:
        """Return a prompt's tokens; nothing when there is no room for an answer."""
        try:
            ids = self._template.encode_prompt(history, conversation.tools)
        except RowProblem as problem:
            raise DataError(f"a prompt of task {conversation.task}: {problem.detail}") from problem
        limit = self._plan.max_tokens - self._plan.limits.max_new_tokens - self._plan.num_draft_tokens
        self._longest_prompt = max(self._longest_prompt, len(ids))
        return ids if 0 < len(ids) <= limit else []

    def _answer(self, prompts: list[list[int]], tasks: list[str], number: int) -> list[Answer]:
        """Answer a batch with every drafter; return the answers of plain decoding."""
        if number == 0:
            warm_up = Limits(min(_WARM_UP_TOKENS, self._plan.limits.max_new_tokens), ())
            for name in self._drafters:
                self._decode(name, prompts, warm_up, number)
            for drafter in self._model_drafters.values():
                drafter.draft.num_forwards = drafter.draft.num_rounds = 0
        answered = {name: self._decode(name, prompts, self._plan.limits, number) for name in self._drafters}
        plain = answered[PLAIN][0]
        for name, (_, seconds) in answered.items():
            self._seconds[name].add(seconds)
        for row, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
            self._num_identical += all(
                answers[row].token_ids == plain[row].token_ids for answers, _ in answered.values()
            )
            predicted = self._predictor.predict(prompt, plain[row].token_ids)
            for name, (answers, _) in answered.items():
                self._counts[name].setdefault(task, _Counts()).add(answers[row], predicted.get(name))
        return plain

    def _decode(self, name: str, prompts: list[list[int]], limits: Limits, number: int) -> tuple[list[Answer], Seconds]:
        target = CachedTarget(self._targets[name], capture=name != PLAIN)
        generator = torch.Generator(target.device).manual_seed(self._plan.seed * 1_000_003 + number)
        return decode(target, self._drafters[name], prompts, limits, self._plan.sampling, generator)

    def _evaluation(self, num_turns: int) -> Evaluation:
        plain = PlainResult(**self._timing(PLAIN))
        drafters = {name: self._result(name, plain) for name in self._pairs}
        plan = self._plan
        return Evaluation(
            num_draft_tokens=plan.num_draft_tokens,
            temperature=plan.sampling.temperature,
            top_p=plan.sampling.top_p,
            max_new_tokens=plan.limits.max_new_tokens,
            batch_size=plan.batch_size,
            seed=plan.seed,
            num_answers=num_turns,
            num_left_out=self._num_left_out,
            num_unasked=self._num_unasked,
            num_identical=self._num_identical if plan.sampling.greedy else None,
            plain=plain,
            drafters=drafters,
        )

    def _timing(self, name: str) -> dict[str, float]:
        """Return tokens and seconds; a rate is over the tokens after each answer's first, which the prompt gives."""
        seconds, counts = self._seconds[name], self._counts[name].values()
        num_tokens = sum(count.num_tokens for count in counts)
        num_answers = sum(len(count.answers) for count in counts)
        spent = seconds.draft + seconds.verify
        return {
            "num_tokens": num_tokens,
            "prefill_seconds": seconds.prefill,
            "draft_seconds": seconds.draft,
            "verify_seconds": seconds.verify,
            "tokens_per_second": (num_tokens - num_answers) / spent if spent else 0.0,
        }

    def _result(self, name: str, plain: PlainResult) -> DrafterResult:
        by_task = self._counts[name]
        overall = _Counts()
        for counts in by_task.values():
            overall.answers += counts.answers
            if counts.predicted is not None:
                overall.predicted = overall.predicted or Predicted(counts.predicted.num_steps)
                overall.predicted.add(counts.predicted)
        assert overall.predicted is not None
        accepted = torch.tensor(overall.accepted, dtype=torch.long)
        reached = [int((accepted >= depth).sum()) for depth in range(self._plan.num_draft_tokens + 1)]
        timing = self._timing(name)
        draft = self._model_drafters[name].draft
        return DrafterResult(
            **timing,
            num_rounds=len(accepted),
            draft_forwards=draft.num_forwards,
            draft_forwards_per_round=draft.num_forwards / max(draft.num_rounds, 1),
            accept_length=overall.accept_length,
            accept_rate=[count / max(reached[0], 1) for count in reached[1:]],
            conditional_accept_rate=[after / before if before else 0.0 for before, after in pairwise(reached)],
            walked_accept_length=overall.predicted.walked,
            simulated_accept_length=overall.predicted.simulated,
            speedup=timing["tokens_per_second"] / plain.tokens_per_second if plain.tokens_per_second else None,
            tasks={task: _task_result(counts) for task, counts in sorted(by_task.items())},
        )


def _task_result(counts: _Counts) -> TaskResult:
    assert counts.predicted is not None
    return TaskResult(
        num_answers=len(counts.answers),
        num_tokens=counts.num_tokens,
        num_rounds=len(counts.accepted),
        accept_length=counts.accept_length,
        walked_accept_length=counts.predicted.walked,
        simulated_accept_length=counts.predicted.simulated,
    )

"""Speculative decoding says what plain decoding says: any target, any draft, any batch, any ending."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain

import pytest
import torch

from eagle_offline import HFEagle3TargetModel
from eagle_offline.serving.cached_target import CachedTarget
from eagle_offline.serving.chain import ChainDrafter
from eagle_offline.serving.decoding import Answer, Limits, decode
from eagle_offline.serving.drafters import drafter_of
from eagle_offline.serving.drafting import Drafter, NoDrafter
from eagle_offline.serving.parallel import ParallelDrafter
from eagle_offline.serving.sampling import Sampling
from tests.oracles import decoding as oracle

GREEDY = Sampling()
LENGTHS = [7, 1, 40, 18]
LENGTH = 16  # the prompt's token and three full rounds of five


def answers_of(
    model: torch.nn.Module,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = LENGTH,
    stop_token_ids: Collection[int] = (),
) -> list[Answer]:
    target = CachedTarget(HFEagle3TargetModel(model, oracle.AUX_LAYER_IDS), capture=True)
    limits = Limits(max_new_tokens, stop_token_ids)
    rows = [list(prompt) for prompt in prompts]
    answers, _ = decode(target, drafter, rows, limits, GREEDY, torch.Generator().manual_seed(0))
    return answers


def token_ids(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def true_answers(kind: str, prompts: list[list[int]], max_new_tokens: int = LENGTH) -> list[list[int]]:
    longest = max(max_new_tokens, LENGTH)
    return [list(oracle.long_greedy_answer(kind, tuple(prompt), longest)[:max_new_tokens]) for prompt in prompts]


def replay(
    kind: str, prompts: list[list[int]], num_draft_tokens: int, error_rate: float, max_new_tokens: int = LENGTH
) -> oracle.Replay:
    texts = [
        prompt + answer for prompt, answer in zip(prompts, true_answers(kind, prompts, max_new_tokens), strict=True)
    ]
    return oracle.Replay(texts, num_draft_tokens, error_rate)


def replayed_rounds(drafter: oracle.Replay, prompts: list[list[int]], answers: list[Answer]) -> list[list[int]]:
    """Drafts that should have been accepted in each round, prompt by prompt."""

    def drafts(text_id: int, known: int) -> list[int]:
        place = len(prompts[text_id]) + known
        return [drafter.guess(text_id, place + k) for k in range(drafter.num_draft_tokens)]

    return [
        oracle.replayed_rounds(answer.token_ids, partial(drafts, text_id)) for text_id, answer in enumerate(answers)
    ]


def eagle(
    model: torch.nn.Module, num_draft_tokens: int, draft_vocab_size: int = 15, **options: object
) -> ChainDrafter | ParallelDrafter:
    draft = oracle.make_draft(model, draft_vocab_size, **options)
    draft.to(next(model.parameters()).dtype)
    return drafter_of(draft, oracle.selected_ids(draft_vocab_size, model.config.vocab_size), num_draft_tokens)


PARALLEL = {"mask_token_id": 3}


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_plain_decoding_is_a_full_forward_a_token(kind: str) -> None:
    prompts = oracle.prompts(LENGTHS)
    answers = answers_of(oracle.target(kind), NoDrafter(oracle.VOCAB_SIZE), prompts)
    assert token_ids(answers) == true_answers(kind, prompts)
    assert all(answer.accepted == [0] * (LENGTH - 1) for answer in answers)


@pytest.mark.parametrize(
    ("kind", "error_rate"), [*((kind, 0.3) for kind in oracle.KINDS), ("Llama", 0.0), ("Gemma3, window of 8", 0.0)]
)
def test_a_skilled_drafter_changes_no_token(kind: str, error_rate: float) -> None:
    prompts = oracle.prompts(LENGTHS)
    drafter = replay(kind, prompts, 4, error_rate)
    answers = answers_of(oracle.target(kind), drafter, prompts)
    assert token_ids(answers) == true_answers(kind, prompts)
    assert [answer.accepted for answer in answers] == replayed_rounds(drafter, prompts, answers)
    if error_rate == 0:
        assert all(answer.accepted == [4, 4, 4] for answer in answers)
    else:
        assert len({run for answer in answers for run in answer.accepted}) >= 4, "too easy"


@pytest.mark.parametrize("options", [{}, PARALLEL], ids=["chain", "parallel"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2, window of 8", "Cohere", "Phi3"])
def test_an_eagle_draft_changes_no_token(kind: str, options: dict[str, object]) -> None:
    prompts = oracle.prompts(LENGTHS)
    model = oracle.target(kind)
    drafter = eagle(model, 3, **options)
    assert isinstance(drafter, ParallelDrafter if options else ChainDrafter)
    assert token_ids(answers_of(model, drafter, prompts)) == true_answers(kind, prompts)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2, window of 8", "Gemma3, window of 8", "Mistral, window of 8"])
def test_single_precision_changes_no_token(kind: str) -> None:
    """Random logits leave gaps far above what rounding moves: the smallest of these is checked."""
    prompts = oracle.prompts(LENGTHS)
    texts = [prompt + answer for prompt, answer in zip(prompts, true_answers(kind, prompts), strict=True)]
    tops = [oracle.logits_of(oracle.target(kind), [text])[0, :].topk(2).values for text in texts]
    gap = min(float((top[n - 1 :, 0] - top[n - 1 :, 1]).min()) for top, n in zip(tops, LENGTHS, strict=True))
    assert gap > 1e-4
    model = oracle.target(kind, torch.float32)
    drafts = (eagle(model, 2), eagle(model, 2, **PARALLEL))
    for drafter in (NoDrafter(oracle.VOCAB_SIZE), replay(kind, prompts, 4, 0.3), *drafts):
        assert token_ids(answers_of(model, drafter, prompts)) == true_answers(kind, prompts)


@pytest.mark.parametrize("num_draft_tokens", range(1, 7))
def test_the_number_of_drafts_changes_no_token(num_draft_tokens: int) -> None:
    prompts = oracle.prompts(LENGTHS)
    model = oracle.target("Llama")
    skilled = replay("Llama", prompts, num_draft_tokens, 0.2)
    drafts = [
        eagle(model, num_draft_tokens, oracle.VOCAB_SIZE, num_layers=num_layers, layer_style=style, **options)
        for num_layers, style in ((1, "llama"), (3, "qwen3"))
        for options in ({}, PARALLEL)
    ]
    for drafter in (skilled, *drafts):
        answers = answers_of(model, drafter, prompts)
        assert token_ids(answers) == true_answers("Llama", prompts)
        assert all(run <= num_draft_tokens for answer in answers for run in answer.accepted)


DRAFTS: dict[str, dict[str, object]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "all of them": {"num_layers": 2, "fc_norm": True, "norm_output": True},
    "parallel": PARALLEL,
    "parallel, three layers": {"num_layers": 3, **PARALLEL},
    "parallel, three qwen3 layers, fc_norm": {"num_layers": 3, "layer_style": "qwen3", "fc_norm": True, **PARALLEL},
    "parallel, norm_output": {"norm_output": True, **PARALLEL},
}


@pytest.mark.parametrize("draft_vocab_size", [15, oracle.VOCAB_SIZE])
@pytest.mark.parametrize("options", DRAFTS)
def test_the_form_of_the_draft_changes_no_token(options: str, draft_vocab_size: int) -> None:
    prompts = oracle.prompts(LENGTHS)
    model = oracle.target("Qwen3")
    answers = answers_of(model, eagle(model, 3, draft_vocab_size, **DRAFTS[options]), prompts)
    assert token_ids(answers) == true_answers("Qwen3", prompts)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 6, 7])
def test_an_answer_is_never_longer_than_asked(max_new_tokens: int) -> None:
    prompts = oracle.prompts(LENGTHS)
    for error_rate in (0.0, 0.3):
        drafter = replay("Llama", prompts, 4, error_rate)
        answers = answers_of(oracle.target("Llama"), drafter, prompts, max_new_tokens)
        assert token_ids(answers) == true_answers("Llama", prompts, max_new_tokens)
        for answer in answers:
            assert not answer.stopped
            assert len(answer.accepted) - 1 <= max_new_tokens - 1 - sum(answer.accepted) <= len(answer.accepted)


def test_a_limit_of_one_takes_no_round() -> None:
    prompts = oracle.prompts(LENGTHS)
    drafter = oracle.Recorder(replay("Llama", prompts, 3, 0.0))
    answers = answers_of(oracle.target("Llama"), drafter, prompts, 1)
    assert [answer.accepted for answer in answers] == [[]] * len(prompts)
    assert drafter.rounds == 0


@pytest.mark.parametrize("place", range(6))
def test_a_stop_token_ends_an_answer_wherever_in_a_round_it_stands(place: int) -> None:
    """With four right drafts a round, token 0 is the prompt's, 1 to 4 are drafts, 5 is the target's after them."""
    kind, prompts = "Mistral, window of 8", oracle.prompts([9, 3, 17])
    stop = true_answers(kind, prompts)[1][place]
    expected = [oracle.ended(answer, LENGTH, [stop]) for answer in true_answers(kind, prompts)]
    for num_draft_tokens, error_rate in [(4, 0.0), (4, 0.3), (0, 0.0)]:
        drafter = replay(kind, prompts, num_draft_tokens, error_rate) if num_draft_tokens else NoDrafter(24)
        answers = answers_of(oracle.target(kind), drafter, prompts, LENGTH, [stop])
        assert token_ids(answers) == expected
        assert [answer.stopped for answer in answers] == [stop in answer for answer in expected]
        if isinstance(drafter, oracle.Replay):
            assert [answer.accepted for answer in answers] == replayed_rounds(drafter, prompts, answers)


def test_a_stop_token_that_is_the_last_one_allowed_is_a_stop() -> None:
    prompts = oracle.prompts([5])
    answer = true_answers("Llama", prompts)[0]
    place = next(place for place in range(3, LENGTH) if answer[place] not in answer[:place])
    for drafter in (NoDrafter(oracle.VOCAB_SIZE), replay("Llama", prompts, 3, 0.0)):
        found = answers_of(oracle.target("Llama"), drafter, prompts, place + 1, [answer[place]])[0]
        assert (found.token_ids, found.stopped) == (answer[: place + 1], True)


def test_a_stop_token_in_a_draft_that_is_not_accepted_stops_nothing() -> None:
    prompts = oracle.prompts(LENGTHS)
    true = true_answers("Llama", prompts)
    unsaid = next(token for token in range(oracle.VOCAB_SIZE) if token not in set(chain(*true)))
    drafter = oracle.Replay([prompt + [unsaid] * 60 for prompt in prompts], 3, 0.0)
    answers = answers_of(oracle.target("Llama"), drafter, prompts, LENGTH, [unsaid])
    assert token_ids(answers) == true
    assert all(answer.accepted == [0] * (LENGTH - 1) and not answer.stopped for answer in answers)


@pytest.mark.parametrize("options", [{}, PARALLEL], ids=["chain", "parallel"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3, window of 8"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(kind: str, options: dict[str, object]) -> None:
    """Tokens and rounds: rows that end early, and rows that get ahead of others, leave the others alone."""
    model = oracle.target(kind)
    prompts = oracle.prompts([12, 1, 33, 4, 4, 19])
    true = true_answers(kind, prompts)
    stops = [true[0][2], true[3][7]]
    options = {"num_layers": 2, **options}
    together = answers_of(model, eagle(model, 3, 24, **options), prompts, LENGTH, stops)
    alone = [answers_of(model, eagle(model, 3, 24, **options), [prompt], LENGTH, stops)[0] for prompt in prompts]
    assert together == alone
    assert len({len(answer.token_ids) for answer in together}) > 1
    backwards = answers_of(model, eagle(model, 3, 24, **options), prompts[::-1], LENGTH, stops)
    assert backwards[::-1] == alone


def test_a_prompt_given_twice_gets_the_same_answer_twice() -> None:
    prompts = oracle.prompts([6, 11])
    model = oracle.target("Qwen2")
    answers = answers_of(model, eagle(model, 3), [prompts[0], prompts[1], prompts[0]])
    assert answers[0] == answers[2]


@pytest.mark.parametrize("options", [{}, PARALLEL], ids=["chain", "parallel"])
def test_a_drafter_and_a_target_can_be_used_again(options: dict[str, object]) -> None:
    model = oracle.target("Llama")
    target = CachedTarget(HFEagle3TargetModel(model, oracle.AUX_LAYER_IDS), capture=True)
    drafter = eagle(model, 3, **options)
    for seed, lengths in enumerate([[5, 30], [2], [9, 9, 1]]):
        prompts = oracle.prompts(lengths, seed=seed)
        answers, _ = decode(target, drafter, prompts, Limits(8, ()), GREEDY, torch.Generator())
        assert token_ids(answers) == true_answers("Llama", prompts, 8)


def test_aux_layers_other_than_the_first_ones_are_read_where_they_are_asked_for() -> None:
    """The state that a round's first draft reads is the output of the layers named, at the slots settled."""
    model, prompts = oracle.target("Llama"), oracle.prompts([8, 3])
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    class Watching(oracle.Replay):
        def propose(self, settled, sampling, generator):  # type: ignore[no-untyped-def]
            for index, text_id in enumerate(self.rows):
                seen[text_id].append(settled.aux_hidden_states[index, : int(settled.num_slots[index])].clone())
            return super().propose(settled, sampling, generator)

    texts = [prompt + answer for prompt, answer in zip(prompts, true_answers("Llama", prompts), strict=True)]
    for layer_ids in ([0, 1, 2], [1, 2, 3]):
        seen.update({0: [], 1: []})
        target = CachedTarget(HFEagle3TargetModel(model, layer_ids), capture=True)
        answers, _ = decode(target, Watching(texts, 4, 0.3), prompts, Limits(LENGTH, ()), GREEDY, torch.Generator())
        for text_id, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            found = torch.cat(seen[text_id])
            expected = oracle.states_of(model, prompt + answer.token_ids, layer_ids)[: len(found)]
            assert torch.allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, PARALLEL], ids=["chain", "parallel"])
def test_in_every_round_the_target_runs_once_and_the_draft_once_a_token_or_once(options: dict[str, object]) -> None:
    model, prompts = oracle.target("Llama"), oracle.prompts(LENGTHS)
    for num_draft_tokens in (1, 3, 5):
        drafter = eagle(model, num_draft_tokens, **options)
        recorder = oracle.Recorder(drafter)
        calls = {"target": 0, "draft": 0, "draft head": 0}

        def count(name: str, calls: dict[str, int] = calls) -> object:
            def hook(*_: object) -> None:
                calls[name] += 1

            return hook

        draft = drafter.draft.model
        handles = [
            model.model.layers[0].register_forward_hook(count("target")),
            draft.layers[0].self_attn.q_proj.register_forward_hook(count("draft")),
            draft.lm_head.register_forward_hook(count("draft head")),
        ]
        try:
            answers = answers_of(model, recorder, prompts)
        finally:
            for handle in handles:
                handle.remove()
        rounds = max(len(answer.accepted) for answer in answers)
        assert recorder.rounds == rounds
        runs = rounds if options else num_draft_tokens * rounds
        assert calls == {"target": 1 + rounds, "draft": runs, "draft head": runs}
        assert (drafter.draft.num_rounds, drafter.draft.num_forwards) == (rounds, runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_every_target_with_every_length_and_skill(kind: str) -> None:
    model = oracle.target(kind)
    for seed in range(2):
        prompts = oracle.prompts([1, 2, 5, 8, 9, 16, 27, 40], seed=10 + seed)
        true = true_answers(kind, prompts, 40)
        for num_draft_tokens in (1, 2, 4, 6):
            for error_rate in (0.0, 0.1, 0.4):
                found = answers_of(model, replay(kind, prompts, num_draft_tokens, error_rate, 40), prompts, 40)
                assert token_ids(found) == true
            for options in (DRAFTS["one layer"], DRAFTS["all of them"], DRAFTS["parallel, three layers"]):
                for draft_vocab_size in (9, oracle.VOCAB_SIZE):
                    drafter = eagle(model, num_draft_tokens, draft_vocab_size, seed=seed, **options)
                    assert token_ids(answers_of(model, drafter, prompts, 40)) == true

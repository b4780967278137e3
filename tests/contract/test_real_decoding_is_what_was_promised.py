"""What training and validation say about a draft is what decoding does: the drafts, the rounds, the lengths.

Drafts here are trained for a moment on the target's own answers, so that rounds accept from none to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from eagle_offline import HFEagle3TargetModel
from eagle_offline.alignment import SlotBatch
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.objectives.acceptance import walk_answers
from eagle_offline.objectives.peagle import PEagleTrainerModule
from eagle_offline.objectives.ttt import unroll
from eagle_offline.objectives.ttt_loss import TTTLoss
from eagle_offline.serving.cached_target import CachedTarget
from eagle_offline.serving.decoding import Answer, Limits, decode
from eagle_offline.serving.drafters import drafter_of
from eagle_offline.serving.drafting import NoDrafter
from eagle_offline.serving.prediction import parallel_hits
from eagle_offline.serving.sampling import Sampling
from tests.oracles import decoding as oracle

LENGTH = 30
LENGTHS = [5, 1, 17, 9]
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A target and the form of a draft for it."""

    kind: str = "Llama"
    draft_vocab_size: int = oracle.VOCAB_SIZE
    num_layers: int = 1
    fc_norm: bool = False
    norm_output: bool = False
    layer_style: str = "llama"
    mask_token_id: int | None = None
    updates: int = 25


CASES = {
    "plain": Case(),
    "small vocabulary": Case(draft_vocab_size=17, updates=40),
    "two layers, 3.1": Case("Qwen3", num_layers=2, fc_norm=True, norm_output=True),
    "window": Case("Gemma3, window of 8", num_layers=1, norm_output=True, updates=12),
    "untrained": Case("Cohere", updates=0),
    "parallel": Case(mask_token_id=3, updates=30),
    "parallel, three layers": Case(num_layers=3, draft_vocab_size=17, mask_token_id=0, updates=60),
    "parallel, qwen3 layers": Case(layer_style="qwen3", num_layers=3, fc_norm=True, mask_token_id=23, updates=40),
    "parallel, window": Case("Gemma3, window of 8", mask_token_id=7, updates=60),
    "parallel, untrained": Case("Cohere", num_layers=3, layer_style="qwen3", mask_token_id=1, updates=0),
}
CHAINS = [name for name, case in CASES.items() if case.mask_token_id is None]
PARALLEL = [name for name in CASES if name not in CHAINS]


def prompts_of(case: Case) -> list[list[int]]:
    return oracle.prompts(LENGTHS, seed=4)


def true_answers(case: Case) -> list[list[int]]:
    return [list(oracle.long_greedy_answer(case.kind, tuple(prompt), LENGTH)) for prompt in prompts_of(case)]


def selected(case: Case) -> torch.Tensor:
    return oracle.selected_ids(case.draft_vocab_size)


def padded(rows: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Rows [T, ...] of unlike length, stacked with zeros on the right."""
    out = torch.zeros(len(rows), width, *rows[0].shape[1:], dtype=rows[0].dtype)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return out


def slot_batch(
    model: torch.nn.Module, ids: torch.Tensor, prompts: list[list[int]], answers: list[list[int]]
) -> SlotBatch:
    """Prompts with their answers, a row each, from full forwards without a cache; answers alone are supervised."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, texts)) + 2
    logits = [oracle.logits_of(model, [text])[0].double() for text in texts]
    produced = [
        torch.tensor([False] * len(prompt) + [True] * len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    chosen = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    chosen[ids] = True
    # Slot t holds what belongs to position t + 1; a row's last slot holds nothing.
    return SlotBatch(
        input_ids=padded([torch.tensor(text[1:]) for text in texts], width),
        attention_mask=padded([torch.ones(len(text), dtype=torch.int64) for text in texts], width),
        loss_mask=padded([mask[1:] for mask in produced], width),
        aux_hidden_states=padded([oracle.states_of(model, text).double() for text in texts], width),
        target_probs=padded([row[1:, ids].softmax(-1) for row in logits], width),
        position_mask=padded(
            [mask[1:] & chosen[row[1:].argmax(-1)] for mask, row in zip(produced, logits, strict=True)], width
        ),
        position_ids=torch.arange(width).expand(len(texts), -1),
        seq_lens=torch.tensor([[len(text)] for text in texts]),
        doc_remaining=padded([torch.arange(len(text)).flip(0) for text in texts], width),
    )


def loss_of(draft: Eagle3DraftModel, batch: SlotBatch, ids: torch.Tensor, update: int) -> torch.Tensor:
    """The loss that a draft of either kind is trained by; P-EAGLE's with nothing left out."""
    if draft.config.mask_token_id is None:
        sums = unroll(draft, batch, STEPS)
        return TTTLoss(len(sums.losses)).loss(sums)
    members = torch.zeros(draft.config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    module = PEagleTrainerModule(draft, ids, members, STEPS, draft.config.mask_token_id, 1.0, 1.0)
    metrics = module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        loss_mask=batch.loss_mask,
        aux_hidden_states=batch.aux_hidden_states,
        target_probs=batch.target_probs,
        position_mask=batch.position_mask.unsqueeze(-1),
        generator=torch.Generator().manual_seed(update),
    )
    return metrics.loss


@cache
def skilled_draft(name: str) -> Eagle3DraftModel:
    """A draft after a few updates on the target's own answers."""
    case = CASES[name]
    model = oracle.target(case.kind)
    draft = oracle.make_draft(
        model,
        case.draft_vocab_size,
        num_layers=case.num_layers,
        fc_norm=case.fc_norm,
        norm_output=case.norm_output,
        layer_style=case.layer_style,
        mask_token_id=case.mask_token_id,
        scale=1.0,
    )
    batch = slot_batch(model, selected(case), prompts_of(case), true_answers(case))
    optimizer = torch.optim.Adam(draft.parameters(), lr=0.02)
    for update in range(case.updates):
        optimizer.zero_grad()
        loss_of(draft, batch, selected(case), update).backward()
        optimizer.step()
    return draft.requires_grad_(False)


def hits_of(draft: Eagle3DraftModel, batch: SlotBatch, num_draft_tokens: int) -> torch.Tensor:
    """Top-1 hits [K, B, T] along known text, as a draft of either kind is judged by them."""
    if draft.config.parallel_drafting:
        return parallel_hits(draft, batch, num_draft_tokens).step_hits
    return unroll(draft, batch, num_draft_tokens).step_hits


def decoded(
    case: Case, draft: Eagle3DraftModel, prompts: list[list[int]], num_draft_tokens: int, stops: Sequence[int] = ()
) -> tuple[list[Answer], dict[int, list[list[int]]]]:
    """Answers, and the drafts of every round, prompt by prompt."""
    target = CachedTarget(HFEagle3TargetModel(oracle.target(case.kind), oracle.AUX_LAYER_IDS), capture=True)
    recorder = oracle.Recorder(drafter_of(draft, selected(case), num_draft_tokens))
    answers, _ = decode(target, recorder, prompts, Limits(LENGTH, stops), Sampling(), torch.Generator())
    return answers, recorder.drafted


@pytest.mark.parametrize("name", CASES)
def test_every_round_drafts_what_the_definition_drafts_and_accepts_as_many(name: str) -> None:
    case, num_draft_tokens = CASES[name], 4
    draft, prompts = skilled_draft(name), prompts_of(case)
    stops = [true_answers(case)[0][11]]
    answers, drafted = decoded(case, draft, prompts, num_draft_tokens, stops)
    for row, (prompt, whole) in enumerate(zip(prompts, true_answers(case), strict=True)):
        true = oracle.ended(whole, LENGTH, stops)
        rounds = oracle.speculative_rounds(
            oracle.target(case.kind), draft, selected(case), prompt, true, num_draft_tokens
        )
        assert answers[row].token_ids == true
        assert drafted[row] == [one.drafted for one in rounds]
        assert answers[row].accepted == [one.accepted for one in rounds]
    if case.updates:
        lengths = {run for answer in answers for run in answer.accepted}
        assert {0, num_draft_tokens} <= lengths, "the draft is too good or too bad to tell"
        assert len(lengths) >= 4


@pytest.mark.parametrize("num_draft_tokens", [2, STEPS])
@pytest.mark.parametrize("name", CASES)
def test_the_walk_takes_the_rounds_that_decoding_takes(name: str, num_draft_tokens: int) -> None:
    """Teacher-forced through the unroll that trains it, a draft accepts what it accepts when it serves."""
    case = CASES[name]
    draft, prompts = skilled_draft(name), prompts_of(case)
    stops = [true_answers(case)[2][17]]
    answers, _ = decoded(case, draft, prompts, num_draft_tokens, stops)
    tokens = rounds = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        batch = slot_batch(oracle.target(case.kind), selected(case), [prompt], [answer.token_ids])
        with torch.no_grad():
            walked = walk_answers(hits_of(draft, batch, num_draft_tokens), batch)
        assert walked == (sum(answer.accepted) + len(answer.accepted), len(answer.accepted))
        tokens, rounds = tokens + walked[0], rounds + walked[1]
    if case.mask_token_id is None:
        batch = slot_batch(oracle.target(case.kind), selected(case), prompts, [answer.token_ids for answer in answers])
        with torch.no_grad():
            assert walk_answers(hits_of(draft, batch, num_draft_tokens), batch) == (tokens, rounds)


@pytest.mark.parametrize("name", PARALLEL)
def test_hits_along_an_answer_are_those_of_the_definition_at_every_anchor(name: str) -> None:
    """On the target's own answer a draft is right where it is the answer's token; beyond the answer nothing counts."""
    case, num_depths = CASES[name], 4
    draft, model, ids = skilled_draft(name), oracle.target(case.kind), selected(case)
    prompt, answer = prompts_of(case)[3], true_answers(case)[3]
    batch = slot_batch(model, ids, [prompt], [answer])
    length, aux = batch.input_ids.shape[1], oracle.states_of(model, [*prompt, *answer])
    right, valid = torch.zeros(2, num_depths, 1, length, dtype=torch.bool)
    for known in range(len(answer) - 1):
        slot = len(prompt) + known - 1
        guesses = oracle.drafted(draft, ids, aux, [*prompt, *answer[: known + 1]], num_depths).token_ids
        for depth, true in enumerate(answer[known + 1 :][:num_depths]):
            valid[depth, 0, slot] = True
            right[depth, 0, slot] = guesses[depth] == true
    with torch.no_grad():
        found = parallel_hits(draft, batch, num_depths)
    # A chain counts while its last slot reads a token of the answer; what follows the last one is not known here.
    assert torch.equal(found.step_valid & valid, valid)
    assert torch.equal(found.step_hits & valid, right)
    assert not (found.step_hits & ~found.step_valid).any()
    expected = [len(answer) - depth for depth in range(num_depths)]
    assert found.step_valid.sum(dim=(1, 2)).tolist() == expected
    assert right.any() or not case.updates


def test_more_drafts_a_round_never_take_more_rounds() -> None:
    case, draft = CASES["plain"], skilled_draft("plain")
    taken = []
    for num_draft_tokens in range(1, 7):
        answers, _ = decoded(case, draft, prompts_of(case), num_draft_tokens)
        assert [answer.token_ids for answer in answers] == true_answers(case)
        taken.append(sum(len(answer.accepted) for answer in answers))
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] < taken[0]


@pytest.mark.parametrize("name", ["plain", "window", "parallel", "parallel, window"])
def test_speculative_plain_and_naive_decoding_are_one(name: str) -> None:
    case = CASES[name]
    target = CachedTarget(HFEagle3TargetModel(oracle.target(case.kind), oracle.AUX_LAYER_IDS), capture=False)
    prompts, limits = prompts_of(case), Limits(LENGTH, ())
    plain, _ = decode(target, NoDrafter(oracle.VOCAB_SIZE), prompts, limits, Sampling(), torch.Generator())
    real, _ = decoded(case, skilled_draft(name), prompts, 4)
    naive = true_answers(case)
    assert [answer.token_ids for answer in plain] == [answer.token_ids for answer in real] == naive


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_other_prompts_draft_as_defined_and_are_walked_as_decoded(name: str, seed: int) -> None:
    case, draft = CASES[name], skilled_draft(name)
    prompts = oracle.prompts([2, 8, 25, 40, 1, 13], seed=50 + seed)
    for num_draft_tokens in (2, 4, 6):
        answers, drafted = decoded(case, draft, prompts, num_draft_tokens)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            assert answer.token_ids == oracle.greedy_answer(oracle.target(case.kind), prompt, LENGTH)
            rounds = oracle.speculative_rounds(
                oracle.target(case.kind), draft, selected(case), prompt, answer.token_ids, num_draft_tokens
            )
            assert drafted[row] == [one.drafted for one in rounds]
            assert answer.accepted == [one.accepted for one in rounds]
        for prompt, answer in zip(prompts, answers, strict=True):
            batch = slot_batch(oracle.target(case.kind), selected(case), [prompt], [answer.token_ids])
            with torch.no_grad():
                walked = walk_answers(hits_of(draft, batch, num_draft_tokens), batch)
            rounds = len(answer.accepted)
            assert walked == (sum(answer.accepted) + rounds, rounds)

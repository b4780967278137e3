"""Sampled decoding has the target's distribution, and a wrong rule would show."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eagle_offline import HFEagle3TargetModel
from eagle_offline.errors import UsageError
from eagle_offline.serving import drafting
from eagle_offline.serving.cached_target import CachedTarget
from eagle_offline.serving.chain import ChainDrafter
from eagle_offline.serving.decoding import Limits, decode
from eagle_offline.serving.drafters import drafter_of
from eagle_offline.serving.drafting import ChainProposal, Drafter, NoDrafter
from eagle_offline.serving.parallel import ParallelDrafter
from eagle_offline.serving.sampling import Sampling, accept_greedily, accept_losslessly, draw
from tests.oracles import decoding as oracle

VOCAB_SIZE, DRAFT_VOCAB_SIZE = 10, 6
PROMPT = [3, 1, 4, 1, 5]
NUM_DRAWS = 2500
RIGHT, WRONG = 1e-3, 1e-6  # p-values that a right rule reaches and a wrong one does not


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def small_target() -> torch.nn.Module:
    """Ten tokens, probabilities that no token has nearly all of."""
    model = copy.deepcopy(oracle.target("Llama", vocab_size=VOCAB_SIZE, num_layers=3))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.6)
    return model


# How a draft is made that drafts one token after the other, or all at once.
WAYS: dict[str, dict[str, int]] = {"chain": {}, "parallel": {"mask_token_id": 4, "num_layers": 2}}


def small_drafter(num_draft_tokens: int, way: str = "chain") -> ChainDrafter | ParallelDrafter:
    draft = oracle.make_draft(small_target(), DRAFT_VOCAB_SIZE, scale=1.2, **WAYS[way])
    return drafter_of(draft, oracle.selected_ids(DRAFT_VOCAB_SIZE, VOCAB_SIZE), num_draft_tokens)


@cache
def truth(num_tokens: int, temperature: float, top_p: float) -> dict[tuple[int, ...], float]:
    return oracle.joint_distribution(small_target(), PROMPT, num_tokens, temperature, top_p)


def p_value(drafter: Drafter, sampling: Sampling, num_draws: int, num_tokens: int = 3, seed: int = 0) -> float:
    """Of the first tokens of many answers to one prompt; the very first is drawn before any draft."""
    target = CachedTarget(HFEagle3TargetModel(small_target(), oracle.AUX_LAYER_IDS), capture=True)
    answers, _ = decode(target, drafter, [PROMPT] * num_draws, Limits(num_tokens, ()), sampling, generator(seed))
    counts = Counter(tuple(answer.token_ids) for answer in answers)
    return oracle.chi_square_p_value(counts, truth(num_tokens, sampling.temperature, sampling.top_p))


CASES = [(1, 1.0, 1.0), (2, 0.7, 1.0), (3, 1.0, 1.0), (2, 1.0, 0.8), (3, 0.7, 0.8)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("num_draft_tokens", "temperature", "top_p"), CASES)
def test_what_is_sampled_has_the_targets_joint_distribution(
    num_draft_tokens: int, temperature: float, top_p: float, way: str
) -> None:
    drafter, sampling = small_drafter(num_draft_tokens, way), Sampling(temperature, top_p)
    assert p_value(drafter, sampling, NUM_DRAWS, max(3, num_draft_tokens + 1)) > RIGHT


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 3, 4])
def test_what_is_sampled_has_the_targets_joint_distribution_over_many_draws(
    num_draft_tokens: int, temperature: float, top_p: float, way: str
) -> None:
    drafter = small_drafter(num_draft_tokens, way) if num_draft_tokens else NoDrafter(VOCAB_SIZE)
    assert p_value(drafter, Sampling(temperature, top_p), 40000, 4, seed=1) > RIGHT


def test_plain_sampling_has_the_targets_joint_distribution() -> None:
    assert p_value(NoDrafter(VOCAB_SIZE), Sampling(1.0, 0.8), NUM_DRAWS) > RIGHT


# --- Rules that are wrong ---

Rule = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def rule(accept: Callable[[Tensor, Tensor], Tensor], replacement: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Acceptance token by token: `accept(p, q)` of the drafted token, `replacement(p, q)` of whole rows."""

    def apply(drafted: Tensor, q: Tensor, p: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
        num_rows, num_drafts = drafted.shape
        accepted = torch.zeros(num_rows, dtype=torch.int64)
        going = torch.ones(num_rows, dtype=torch.bool)
        next_probs = p[:, num_drafts].clone()
        for k in range(num_drafts):
            chance = accept(*(probs[:, k].gather(1, drafted[:, k : k + 1])[:, 0] for probs in (p, q)))
            taken = torch.rand(num_rows, generator=source) < chance
            ended = going & ~taken
            next_probs[ended] = replacement(p[:, k], q[:, k])[ended]
            going &= taken
            accepted += going
        return accepted, torch.multinomial(next_probs, 1, generator=source)[:, 0]

    return apply


def ratio(p: Tensor, q: Tensor) -> Tensor:
    return p / q


def positive_part(p: Tensor, q: Tensor) -> Tensor:
    rest = (p - q).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


WRONG_RULES: dict[str, Rule] = {
    "accepts always": rule(lambda p, q: torch.ones_like(p), positive_part),
    "accepts when u is below p": rule(lambda p, _: p, positive_part),
    "accepts never but draws the rest": rule(lambda p, q: torch.zeros_like(p), positive_part),
    "draws from p after a rejection": rule(ratio, lambda p, q: p),
    "draws from the distance": rule(ratio, lambda p, q: (p - q).abs()),
    "draws from q minus p": rule(ratio, lambda p, q: positive_part(q, p)),
    "takes the inverse ratio": rule(lambda p, q: q / p.clamp_min(1e-9), positive_part),
}


def test_the_right_rule_written_anew_passes_where_wrong_ones_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "accept_losslessly", rule(ratio, positive_part))
    assert p_value(small_drafter(2), Sampling(1.0, 1.0), NUM_DRAWS) > RIGHT


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "accept_losslessly", WRONG_RULES[name])
    assert p_value(small_drafter(2), Sampling(1.0, 1.0), NUM_DRAWS) < WRONG


class Lying:
    """A drafter that says its drafts were drawn otherwise than they were."""

    def __init__(self, drafter: Drafter, lie: Callable[[ChainProposal], ChainProposal]):
        self.drafter, self.lie = drafter, lie
        self.name, self.num_draft_tokens = drafter.name, drafter.num_draft_tokens
        self.start, self.select_rows = drafter.start, drafter.select_rows

    def propose(self, settled, sampling, source):  # type: ignore[no-untyped-def]
        return self.lie(self.drafter.propose(settled, sampling, source))


def probs_of(proposal: ChainProposal) -> Tensor:
    assert proposal.draft_probs is not None
    return proposal.draft_probs


def colder(proposal: ChainProposal) -> ChainProposal:
    sharp = probs_of(proposal) ** 2
    return ChainProposal(proposal.token_ids, sharp / sharp.sum(-1, keepdim=True))


def greedy(proposal: ChainProposal) -> ChainProposal:
    return ChainProposal(probs_of(proposal).argmax(-1), probs_of(proposal))


def even(proposal: ChainProposal) -> ChainProposal:
    return ChainProposal(proposal.token_ids, (probs_of(proposal) > 0).float() / DRAFT_VOCAB_SIZE)


def of_another_depth(proposal: ChainProposal) -> ChainProposal:
    """What one forward might mix up: the distribution of the first draft for the second, and the other way round."""
    return ChainProposal(proposal.token_ids, probs_of(proposal).flip(1))


LIES = [*((lie, way) for lie in (colder, greedy, even) for way in WAYS), (of_another_depth, "parallel")]


@pytest.mark.parametrize(("lie", "way"), LIES)
def test_drafts_that_were_not_drawn_from_what_they_say_show(
    lie: Callable[[ChainProposal], ChainProposal], way: str
) -> None:
    assert p_value(Lying(small_drafter(2, way), lie), Sampling(1.0, 1.0), NUM_DRAWS) < WRONG


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_a_parallel_draft_is_drawn_from_its_own_slot_s_distribution(num_draft_tokens: int) -> None:
    """Of each row: what the definition gives at every depth, from what is settled alone."""
    drafter, sampling = small_drafter(num_draft_tokens, "parallel"), Sampling(0.8, 0.9)
    target = CachedTarget(HFEagle3TargetModel(small_target(), oracle.AUX_LAYER_IDS), capture=True)
    recorded: list[ChainProposal] = []

    def kept(proposal: ChainProposal) -> ChainProposal:
        recorded.append(proposal)
        return proposal

    prompts = [PROMPT, [7], [2, 0, 9]]
    decode(target, Lying(drafter, kept), prompts, Limits(2, ()), sampling, generator(5))
    # One round, drafted after each prompt and the token drawn after it.
    answers, _ = decode(target, Lying(drafter, kept), prompts, Limits(2, ()), sampling, generator(5))
    ids = oracle.selected_ids(DRAFT_VOCAB_SIZE, VOCAB_SIZE)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = [*prompt, answer.token_ids[0]]
        aux = oracle.states_of(small_target(), tokens)
        found = oracle.drafted(drafter.draft.model, ids, aux, tokens, num_draft_tokens)
        for depth, logits in enumerate(found.logits):
            expected = torch.zeros(VOCAB_SIZE)
            expected[ids] = torch.tensor(oracle.warped(logits, 0.8, 0.9))
            assert torch.allclose(probs_of(recorded[0])[row, depth], expected, rtol=0, atol=1e-6)
    assert torch.equal(probs_of(recorded[0]), probs_of(recorded[1]))


def test_greedy_drafts_that_say_so_keep_the_distribution() -> None:
    """A draft that is certain is one drawn from a distribution that holds one token."""

    def certain(proposal: ChainProposal) -> ChainProposal:
        chosen = probs_of(proposal).argmax(-1)
        return ChainProposal(chosen, torch.nn.functional.one_hot(chosen, VOCAB_SIZE).float())

    assert p_value(Lying(small_drafter(2), certain), Sampling(1.0, 1.0), NUM_DRAWS) > RIGHT


def test_the_same_seed_gives_the_same_answers_and_another_seed_others() -> None:
    target = CachedTarget(HFEagle3TargetModel(small_target(), oracle.AUX_LAYER_IDS), capture=True)

    def sampled(seed: int) -> list[list[int]]:
        sampling = Sampling(1.0, 0.9)
        answers, _ = decode(target, small_drafter(2), [PROMPT] * 20, Limits(5, ()), sampling, generator(seed))
        return [answer.token_ids for answer in answers]

    assert sampled(0) == sampled(0) != sampled(1)


# --- What tokens are drawn from ---


def probs(values: list[float], top_p: float, temperature: float = 1.0) -> list[float]:
    found = Sampling(temperature, top_p).probs(torch.tensor(values, dtype=torch.float64).log())
    assert found.dtype == torch.float32
    return found.tolist()


def test_nucleus_keeps_the_fewest_most_likely_tokens_that_hold_the_mass() -> None:
    assert probs([0.125, 0.5, 0.25, 0.125], 0.6) == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert probs([0.125, 0.5, 0.25, 0.125], 0.8) == pytest.approx([1 / 7, 4 / 7, 2 / 7, 0]) or probs(
        [0.125, 0.5, 0.25, 0.125], 0.8
    ) == pytest.approx([0, 4 / 7, 2 / 7, 1 / 7])


def test_nucleus_of_all_mass_keeps_every_token() -> None:
    assert probs([0.7, 0.2, 0.1 - 1e-7, 1e-7], 1.0) == pytest.approx([0.7, 0.2, 0.1, 1e-7], rel=1e-5)
    assert all(value > 0 for value in probs([0.25] * 4, 1.0))


def test_a_token_above_the_mass_stands_alone() -> None:
    assert probs([0.9, 0.06, 0.04], 0.5) == [1, 0, 0]
    assert probs([0.05, 0.9, 0.05], 1e-9) == [0, 1, 0]


def test_a_mass_reached_exactly_takes_no_further_token() -> None:
    """Halves and quarters are exact in binary."""
    assert probs([0.5, 0.25, 0.25], 0.5) == [1, 0, 0]
    assert probs([0.25, 0.5, 0.125, 0.125], 0.75) == pytest.approx([1 / 3, 2 / 3, 0, 0])


def test_ties_at_the_edge_keep_as_many_as_are_needed_and_not_all() -> None:
    for top_p, kept in [(0.2, 1), (0.25, 1), (0.4, 2), (0.5, 2), (0.7, 3), (0.76, 4)]:
        found = probs([0.25] * 4, top_p)
        assert sorted(found) == pytest.approx([0] * (4 - kept) + [1 / kept] * kept)


def test_temperature_divides_the_logits_before_the_nucleus_is_cut() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    assert torch.allclose(Sampling(0.5).probs(logits), (logits / 0.5).softmax(-1))
    # At 0.5 the first token holds 0.867 of the mass, at 1 only 0.665.
    assert Sampling(0.5, 0.8).probs(logits).tolist() == [1, 0, 0]
    assert Sampling(1.0, 0.8).probs(logits)[1] > 0


@given(
    st.lists(st.floats(-6, 6), min_size=2, max_size=9, unique_by=lambda x: round(x, 3)),
    st.floats(0.3, 3.0),
    st.floats(0.05, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_probs_equal_their_definition(values: list[float], temperature: float, top_p: float) -> None:
    logits = torch.tensor(values)
    sums = sorted(oracle.warped(logits, temperature, 1.0), reverse=True)
    edge = min(abs(sum(sums[:n]) - top_p) for n in range(1, len(sums) + 1))
    if top_p < 1 and edge < 1e-5:
        return  # rounding decides
    found = Sampling(temperature, top_p).probs(logits[None])[0]
    assert found.tolist() == pytest.approx(oracle.warped(logits, temperature, top_p), abs=1e-5)


def test_rows_of_any_leading_shape_are_warped_one_by_one() -> None:
    logits = torch.randn(2, 3, 7, generator=generator())
    found = Sampling(0.8, 0.7).probs(logits)
    for i in range(2):
        for j in range(3):
            assert found[i, j].tolist() == pytest.approx(oracle.warped(logits[i, j], 0.8, 0.7), abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(-0.1, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, math.nan)]
)
def test_sampling_out_of_range_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(UsageError):
        Sampling(temperature, top_p)


def test_greedy_takes_the_most_likely_and_among_equals_the_lowest_id() -> None:
    tokens, drawn_from = Sampling().choose(torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]]), generator())
    assert tokens.tolist() == [1, 0]
    assert drawn_from is None


def test_choose_draws_from_what_it_says_it_drew_from() -> None:
    logits = torch.randn(1, 5, generator=generator(3)).expand(20000, 5)
    tokens, drawn_from = Sampling(0.9, 0.9).choose(logits, generator())
    assert drawn_from is not None
    expected = oracle.warped(logits[0], 0.9, 0.9)
    assert drawn_from[0].tolist() == pytest.approx(expected, abs=1e-6)
    counts = Counter(tokens.tolist())
    assert oracle.chi_square_p_value(counts, {t: p for t, p in enumerate(expected) if p > 0}) > RIGHT


def test_draws_from_rows_that_do_not_sum_to_one_follow_their_shares() -> None:
    weights = torch.tensor([[0.02, 0.0, 0.06, 0.12]]).expand(20000, 4)
    counts = Counter(draw(weights, generator()).tolist())
    assert oracle.chi_square_p_value(counts, {0: 0.1, 2: 0.3, 3: 0.6}) > RIGHT


# --- What is accepted ---


def random_probs(num_rows: int, num_steps: int, seed: int, size: int = 8) -> Tensor:
    return (1.5 * torch.randn(num_rows, num_steps, size, generator=generator(seed))).softmax(-1)


def test_a_draft_is_accepted_as_often_as_the_distributions_overlap() -> None:
    num_draws = 40000
    p, q = random_probs(1, 2, 1), random_probs(1, 1, 2)
    overlap = float(torch.minimum(p[0, 0], q[0, 0]).sum())
    drafted = torch.multinomial(q[0], num_draws, replacement=True, generator=generator(3)).T
    accepted, _ = accept_losslessly(drafted, q.expand(num_draws, 1, 8), p.expand(num_draws, 2, 8), generator(4))
    spread = math.sqrt(overlap * (1 - overlap) / num_draws)
    assert 0.2 < overlap < 0.9
    assert abs(float(accepted.double().mean()) - overlap) < 4 * spread


def test_accepted_and_replaced_tokens_together_have_the_targets_distribution() -> None:
    num_draws = 40000
    p, q = random_probs(1, 3, 5), random_probs(1, 2, 6)
    drafted = torch.stack(
        [torch.multinomial(q[0, k], num_draws, replacement=True, generator=generator(7 + k)) for k in range(2)], dim=1
    )
    accepted, after = accept_losslessly(drafted, q.expand(num_draws, 2, 8), p.expand(num_draws, 3, 8), generator(9))
    first = torch.where(accepted >= 1, drafted[:, 0], after)
    expected = dict(enumerate(p[0, 0].double().tolist()))
    assert oracle.chi_square_p_value(Counter(first.tolist()), expected) > RIGHT
    second = torch.where(accepted >= 2, drafted[:, 1], after)[accepted >= 1]
    expected = dict(enumerate(p[0, 1].double().tolist()))
    assert oracle.chi_square_p_value(Counter(second.tolist()), expected) > RIGHT
    third = after[accepted == 2]
    expected = dict(enumerate(p[0, 2].double().tolist()))
    assert oracle.chi_square_p_value(Counter(third.tolist()), expected) > RIGHT


def test_equal_distributions_accept_everything_although_nothing_is_left_to_draw_from() -> None:
    p = random_probs(500, 4, 11)
    drafted = torch.multinomial(p[:, :3].reshape(-1, 8), 1, generator=generator(1)).reshape(500, 3)
    accepted, after = accept_losslessly(drafted, p[:, :3], p, generator(2))
    assert accepted.tolist() == [3] * 500
    assert ((after >= 0) & (after < 8)).all()


def test_a_token_the_target_never_says_is_never_accepted() -> None:
    p = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]]).expand(200, 2, 3)
    q = torch.tensor([[[1.0, 0.0, 0.0]]]).expand(200, 1, 3)
    accepted, after = accept_losslessly(torch.zeros(200, 1, dtype=torch.int64), q, p, generator())
    assert accepted.tolist() == [0] * 200
    assert after.tolist() == [1] * 200


def test_a_certain_target_accepts_its_token_however_rarely_it_is_drafted() -> None:
    p = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]).expand(200, 2, 2)
    q = torch.tensor([[[0.999, 0.001]]]).expand(200, 1, 2)
    accepted, after = accept_losslessly(torch.ones(200, 1, dtype=torch.int64), q, p, generator())
    assert accepted.tolist() == [1] * 200
    assert after.tolist() == [1] * 200


def test_nothing_drafted_leaves_a_draw_of_the_target() -> None:
    p = torch.tensor([[[0.2, 0.3, 0.5]]]).expand(20000, 1, 3)
    nothing = torch.zeros(20000, 0, dtype=torch.int64)
    accepted, after = accept_losslessly(nothing, torch.zeros(20000, 0, 3), p, generator())
    assert not accepted.any()
    assert oracle.chi_square_p_value(Counter(after.tolist()), {0: 0.2, 1: 0.3, 2: 0.5}) > RIGHT


def test_greedy_acceptance_is_the_run_that_the_target_would_say() -> None:
    said = torch.tensor([[4, 1, 3], [4, 1, 3], [4, 1, 3], [4, 1, 3]])
    logits = torch.nn.functional.one_hot(said, 5).float()
    drafted = torch.tensor([[4, 1], [4, 0], [0, 1], [1, 4]])
    accepted, after = accept_greedily(drafted, logits)
    assert accepted.tolist() == [2, 1, 0, 0]
    assert after.tolist() == [3, 1, 4, 4]


def test_greedy_acceptance_of_nothing_is_the_targets_token() -> None:
    accepted, after = accept_greedily(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]))
    assert accepted.tolist() == [0, 0]
    assert after.tolist() == [1, 0]


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_greedy_acceptance_equals_a_walk(seed: int) -> None:
    source = generator(seed)
    logits = torch.randint(0, 3, (3, 5, 3), generator=source).float()  # with ties
    drafted = torch.randint(0, 3, (3, 4), generator=source)
    accepted, after = accept_greedily(drafted, logits)
    for row in range(3):
        said = [values.index(max(values)) for values in logits[row].tolist()]
        run = next((k for k in range(4) if int(drafted[row, k]) != said[k]), 4)
        assert (int(accepted[row]), int(after[row])) == (run, said[run])

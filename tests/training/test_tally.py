"""Counts of unrolls and what is made of them, against counting slot by slot."""

from __future__ import annotations

import json
import random

import pytest
import torch

from eagle_offline.objectives.ttt import UnrollSums
from eagle_offline.objectives.ttt_loss import TTTLoss
from eagle_offline.training.ranks import Ranks
from eagle_offline.training.tally import StepTotals, Tally
from tests.oracles import acceptance as oracle

K, NUM_SLOTS = 4, 30


def draw(seed: int) -> UnrollSums:
    """One unroll over a row: slots valid by loss mask, some of them supervised, some of those right."""
    rng = random.Random(seed)
    valid = [[rng.random() < 0.7 for _ in range(NUM_SLOTS)] for _ in range(K)]
    supervised = [[v and rng.random() < 0.8 for v in step] for step in valid]
    hits = [[s and rng.random() < 0.6 for s in step] for step in supervised]
    overlaps = [[rng.random() if s else 0.0 for s in step] for step in supervised]
    return UnrollSums(
        losses=torch.tensor([sum(step) * rng.random() for step in supervised], requires_grad=True),
        counts=torch.tensor([sum(step) for step in supervised]),
        hits=torch.tensor([sum(step) for step in hits]),
        overlaps=torch.tensor([sum(step) for step in overlaps], requires_grad=True),
        log_overlaps=torch.tensor([-rng.random() for _ in range(K)], requires_grad=True),
        step_hits=torch.tensor(hits)[:, None],
        step_overlaps=torch.tensor(overlaps, dtype=torch.float64)[:, None],
        step_valid=torch.tensor(valid)[:, None],
    )


def row_of(*drawn: UnrollSums) -> dict:
    tally = Tally(K)
    for sums in drawn:
        tally.add(sums)
    return tally.row("train", TTTLoss(K), 7, 0.5, grad_norm=2.0).model_dump(exclude_none=True)


def test_a_row_is_what_counting_slot_by_slot_says():
    drawn = [draw(seed) for seed in range(3)]
    row = row_of(*drawn)
    slots = range(NUM_SLOTS)
    hits = [[bool(d.step_hits[k, 0, t]) for d in drawn for t in slots] for k in range(K)]
    valid = [[bool(d.step_valid[k, 0, t]) for d in drawn for t in slots] for k in range(K)]
    overlaps = [[float(d.step_overlaps[k, 0, t]) for d in drawn for t in slots] for k in range(K)]
    counts = [sum(int(d.counts[k]) for d in drawn) for k in range(K)]
    prefix_hits, prefix_valid = oracle.prefix_counts(hits, valid)
    assert row["top1"] == pytest.approx([sum(hits[k]) / counts[k] for k in range(K)])
    assert row["accuracy"] == pytest.approx(sum(map(sum, hits)) / sum(counts))
    survival = [h / v if v else 0 for h, v in zip(prefix_hits, prefix_valid, strict=True)]
    assert row["survival"] == pytest.approx(survival)
    asked = [
        sum(all(valid[j][s] for j in range(k + 1)) and all(hits[j][s] for j in range(k)) for s in range(len(valid[0])))
        for k in range(K)
    ]
    assert asked != [prefix_valid[0], *prefix_hits[:-1]]
    assert row["conditional_top1"] == pytest.approx(
        [h / a if a else 0 for h, a in zip(prefix_hits, asked, strict=True)]
    )
    assert row["simulated_accept_length"] == pytest.approx(oracle.simulated_accept_length(prefix_hits, prefix_valid))
    assert row["expected_accept_length"] == pytest.approx(oracle.expected_accept_length(overlaps, valid))
    means = [sum(float(d.losses[k]) for d in drawn) / counts[k] for k in range(K)]
    assert row["step_loss"] == pytest.approx(means)
    weights = [0.8**k for k in range(K)]
    assert row["loss"] == pytest.approx(sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights))
    assert (row["step"], row["epoch"], row["kind"], row["grad_norm"]) == (7, 0.5, "train", 2.0)
    assert "walked_accept_length" not in row


def test_the_order_and_the_grouping_of_unrolls_change_nothing():
    drawn = [draw(seed) for seed in range(4)]
    one, two, whole = Tally(K), Tally(K), Tally(K)
    for sums in drawn[:2]:
        one.add(sums)
    for sums in drawn[2:]:
        two.add(sums)
    for sums in drawn:
        whole.add(sums)
    one.take(two)
    for name, total in whole.totals._asdict().items():
        torch.testing.assert_close(getattr(one.totals, name), total, rtol=1e-12, atol=0)
    forwards, backwards = row_of(*drawn), row_of(*reversed(drawn))
    assert forwards.keys() == backwards.keys()
    for name, value in forwards.items():
        assert value == pytest.approx(backwards[name]), name


def test_state_is_json_and_comes_back_bit_for_bit():
    tally = Tally(K)
    for seed in range(3):
        tally.add(draw(seed))
    state = json.loads(json.dumps(tally.state(), allow_nan=False))
    other = Tally(K)
    other.restore(state)
    for name in StepTotals._fields:
        assert torch.equal(getattr(other.totals, name), getattr(tally.totals, name))


def test_nothing_was_counted():
    row = Tally(K).row("heldout", TTTLoss(K), 0, 0.0).model_dump(exclude_none=True)
    assert row["simulated_accept_length"] == row["expected_accept_length"] == 1
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_not_kept_leaves_no_trace_not_even_a_nan(keep):
    """A NaN times zero is a NaN: what is left out has to be left out."""
    tally, spoiled = Tally(K), Tally(K)
    tally.add(draw(1))
    before = tally.state()
    spoiled.add(draw(2))
    spoiled._sums[0, 0] = float("nan")
    tally.take(spoiled, keep=torch.tensor(keep))
    assert (tally.state() == before) is not keep
    assert torch.stack(list(tally.totals)).isfinite().all().item() is not keep


def test_counts_above_float32_are_exact():
    tally = Tally(1)
    big = 2**25 + 1
    hits = torch.ones(1, 1, 1, dtype=torch.bool)
    one = torch.ones(1)
    sums = UnrollSums(one, torch.tensor([big]), one, one, one, hits, torch.ones(1, 1, 1), hits)
    tally.add(sums)
    assert int(tally.totals.counts[0]) == big


def test_walked_counts_are_added_over_ranks_with_the_others():
    tally = Tally(K)
    tally.add(draw(1))
    tally.walked_tokens, tally.walked_rounds = 17, 5
    total = tally.over_all(Ranks())
    assert (total.walked_tokens, total.walked_rounds) == (17, 5)
    assert torch.equal(torch.stack(list(total.totals)), torch.stack(list(tally.totals)))
    row = total.row("heldout", TTTLoss(K), 1, 0.0)
    assert row.walked_accept_length == 17 / 5

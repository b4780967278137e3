"""The order of training is one list, a pure function of seed, epoch and cache."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.data import sampler
from eagle_offline.data.sampler import SHUFFLE_WINDOW_SHARDS, heldout_mask, plan_epoch, plan_packs, weighted_samples


def corpus(num_shards: int = 40, shard_size: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each cache index's shard and length."""
    generator = np.random.default_rng(seed)
    shards = np.repeat(np.arange(num_shards), shard_size)
    return shards, generator.integers(3, 200, len(shards))


def plan(seed: int = 3, epoch: int = 0, budget: int = 512, samples: np.ndarray | None = None) -> list[list[int]]:
    shards, lengths = corpus()
    chosen = np.arange(len(shards)) if samples is None else samples
    return [pack.tolist() for pack in plan_epoch(chosen, shards, lengths, seed, epoch, budget)]


def flat(packs: list[list[int]]) -> list[int]:
    return [sample for pack in packs for sample in pack]


def test_an_epoch_visits_every_sample_exactly_once():
    chosen = np.arange(0, 280, 3)
    packs = plan(samples=chosen)
    assert sorted(flat(packs)) == chosen.tolist()
    assert all(packs)


def test_the_plan_depends_on_nothing_but_seed_epoch_and_cache():
    before = plan()
    np.random.seed(7)
    np.random.random(100)
    plan(epoch=5)
    assert plan() == before


def test_the_plan_is_the_same_in_another_process():
    code = "from tests.data.test_sampler import plan; print(plan(seed=11, epoch=2))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(plan(seed=11, epoch=2))


def test_another_epoch_or_seed_is_another_order():
    orders = {tuple(flat(plan(seed=seed, epoch=epoch))) for seed in range(3) for epoch in range(4)}
    assert len(orders) == 12
    # Numbers that could be mixed up by adding or swapping them.
    assert flat(plan(seed=1, epoch=2)) != flat(plan(seed=2, epoch=1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400))
def test_packs_keep_order_and_budget_unless_one_sample_is_longer(lengths, budget):
    samples = np.arange(len(lengths))[::-1]
    packs = [pack.tolist() for pack in plan_packs(samples, np.array(lengths, np.int64), budget)]
    assert flat(packs) == samples.tolist()
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[sample] for sample in pack) <= budget
    for pack, following in pairwise(packs):
        assert sum(lengths[sample] for sample in pack) + lengths[following[0]] > budget, "room was left"


def test_samples_are_shuffled_inside_windows_of_whole_shards():
    shards, _ = corpus()
    order = shards[flat(plan())]
    window_samples = 7 * SHUFFLE_WINDOW_SHARDS
    windows = [order[start : start + window_samples] for start in range(0, len(order), window_samples)]
    held = [set(window.tolist()) for window in windows]
    assert [len(each) for each in held] == [16, 16, 8]
    assert len(set.union(*held)) == 40, "a shard was read in two windows"
    assert held[0] != set(range(16)), "shards were not shuffled"
    assert np.diff(windows[0]).astype(bool).mean() > 0.5, "samples inside a window were not shuffled"


def test_shuffling_reaches_every_sample_of_a_small_cache(monkeypatch):
    monkeypatch.setattr(sampler, "SHUFFLE_WINDOW_SHARDS", 1)
    shards, lengths = corpus(num_shards=3, shard_size=4)
    places = np.array(
        [np.argsort(flat(plan_epoch(np.arange(12), shards, lengths, 0, epoch, 10_000))) for epoch in range(60)]
    )
    assert all(len(set(column)) > 6 for column in places.T)


def test_an_empty_selection_has_no_pack():
    shards, lengths = corpus()
    assert plan_epoch(np.array([], np.int64), shards, lengths, 0, 0, 512) == []


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_held_out_share_is_about_right(share):
    held = heldout_mask(np.arange(20_000), share, seed=1)
    spread = (share * (1 - share) / 20_000) ** 0.5
    assert abs(held.mean() - share) < 5 * spread


def test_a_sample_is_held_out_by_its_id_and_the_seed_alone():
    everything = heldout_mask(np.arange(500), 0.2, seed=4)
    some = np.array([499, 3, 77, 250, 4])
    np.testing.assert_array_equal(heldout_mask(some, 0.2, seed=4), everything[some])
    assert (heldout_mask(np.arange(500), 0.2, seed=5) != everything).any()


def test_a_larger_share_only_adds_samples():
    small, large = (heldout_mask(np.arange(2000), share, seed=0) for share in (0.05, 0.2))
    assert large[small].all()
    assert large.sum() > small.sum()


def test_nothing_is_held_out_of_a_share_of_zero():
    assert not heldout_mask(np.arange(1000), 0.0, seed=0).any()
    assert heldout_mask(np.array([], np.int64), 0.5, seed=0).shape == (0,)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.floats(0.01, 3.5), st.integers(0, 3), st.integers(0, 5), st.integers(1, 6))
def test_weighted_epochs_in_a_row_go_round_and_round(count, weight, seed, first, epochs):
    """Whatever epoch one begins at, no sample is two visits ahead of another, and no epoch is off by more than one."""
    samples = np.arange(count) * 3 + 1
    drawn = [weighted_samples(samples, weight, seed, 2, epoch) for epoch in range(first, first + epochs)]
    assert all(set(each.tolist()) <= set(samples.tolist()) for each in drawn)
    assert all(abs(len(each) - weight * count) <= 1 for each in drawn)
    visits = np.array([(np.concatenate(drawn) == sample).sum() for sample in samples])
    assert visits.size == 0 or visits.max() - visits.min() <= 1


def test_a_half_is_another_half_in_the_next_epoch_and_the_same_one_in_another_process():
    samples = np.arange(100, 131)
    halves = [weighted_samples(samples, 0.5, seed=4, number=1, epoch=epoch) for epoch in range(4)]
    for one, two in pairwise(halves):
        assert len(set(one.tolist()) ^ set(two.tolist())) >= 30
    assert sorted(np.concatenate(halves[:2]).tolist()) == samples.tolist()
    np.testing.assert_array_equal(halves[2], weighted_samples(samples, 0.5, seed=4, number=1, epoch=2))
    assert set(halves[0].tolist()) != set(weighted_samples(samples, 0.5, seed=5, number=1, epoch=0).tolist())
    assert set(halves[0].tolist()) != set(weighted_samples(samples, 0.5, seed=4, number=0, epoch=0).tolist())


def test_whole_weights_are_whole_passes():
    samples = np.array([7, 3, 9])
    for weight in (1, 2.0, 3):
        assert sorted(weighted_samples(samples, weight, 0, 0, 5).tolist()) == sorted([7, 3, 9] * int(weight))


def test_a_sample_that_is_visited_twice_stands_twice_in_the_order():
    shards, lengths = corpus()
    chosen = np.concatenate([np.arange(20), np.arange(20)])
    packs = plan_epoch(chosen, shards, lengths, 1, 0, 300)
    assert sorted(np.concatenate(packs).tolist()) == sorted(chosen.tolist())

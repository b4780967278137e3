"""What the training benchmark counts as necessary, by hand and against what the step really multiplies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step, unroll_ways
from benchmarks.unroll_ways import RECOMPUTED, Setting, Work, necessary_flops
from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.objectives.plan import UnrollPlan, plan_unroll

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = Setting(tuple(SHAPE.items()), draft_vocab_size=64, num_samples=3, seq_length=128, ttt_steps=3)
# fc 2 x 2, keys and values 4 x 4, queries 4 x 2, output 2 x 2, feed-forward 3 of 2 x 3, head 2 x 5.
CONFIG = Eagle3DraftConfig(
    vocab_size=5, hidden_size=2, intermediate_size=3, num_attention_heads=1, num_key_value_heads=1,
    num_aux_hidden_states=1,
)  # fmt: skip


def plan_of(mask: list[int], ttt_steps: int) -> UnrollPlan:
    supervised = np.array(mask, bool)
    return plan_unroll([len(mask)], supervised, supervised, np.arange(len(mask)), ttt_steps, 7)


def test_one_step_counted_by_hand():
    # Slot 2 alone is active and reads slots 0, 1 and 2.
    fc = 2 * (2 * 3 * 4)
    keys_and_values, rest_of_the_layer = 3 * (2 * 3 * 16), 3 * (2 * 1 * (8 + 4 + 18))
    attention, head = 3 * (2 * 2 * 3 * 2), 3 * (2 * 1 * 10)
    expected = fc + keys_and_values + rest_of_the_layer + attention + head
    assert necessary_flops(CONFIG, plan_of([0, 0, 1, 0], 1), torch.arange(4)) == expected


def test_two_steps_counted_by_hand():
    # Slot 1 counts at step 0, slot 0 at step 1, both against one target row; slot 0 reads itself twice then.
    step_0 = 3 * 2 * (2 * 16 + 2 * 30) + 3 * 2 * 2 * (1 + 2) * 2
    step_1 = 3 * 2 * (16 + 30) + 3 * 2 * 2 * 2 * 2
    expected = 2 * (2 * 2 * 4) + step_0 + step_1 + 3 * 2 * 2 * 10
    plan = plan_of([0, 1, 0, 0], 2)
    assert necessary_flops(CONFIG, plan, torch.arange(4)) == expected
    assert necessary_flops(CONFIG, plan, torch.arange(4), target_head_size=3) == expected + 2 * 1 * 3 * 5


def test_nothing_supervised_needs_nothing():
    assert necessary_flops(CONFIG, plan_of([0, 0, 0], 2), torch.arange(3)) == 0


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 2}, {"fc_norm": True}])
def test_our_step_multiplies_what_is_necessary_and_nothing_else(changes):
    work = Work("cpu", replace(TINY, shape=tuple({**SHAPE, **changes}.items())))
    columns = torch.cat([torch.arange(length) for length in work.lengths])
    with FlopCounterMode(display=False) as counter:
        work.run("ours")
    # Products of weights are plain matrix products; attention runs in a kernel of its own.
    multiplied = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 0
    for index in range(work.config.num_hidden_layers):
        for step, planned in enumerate(work.plan.steps):
            below = step == 0 and index < work.config.num_hidden_layers - 1
            read = columns[work.plan.key_slots if below else planned.slots] + 1 + step
            attention += 3 * 2 * 2 * int(read.sum()) * SHAPE["hidden_size"]
    assert multiplied + attention == necessary_flops(work.config, work.plan, columns)


def test_recomputing_takes_the_same_step():
    work = Work("cpu", TINY)
    assert work.run(RECOMPUTED) == work.run("ours")


def test_factored_supervision_takes_a_step():
    work = Work("cpu", replace(TINY, factored=True, sample_length=40))
    assert work.run("ours") > 0
    assert work.lengths == [40] * 3


def test_rows_of_the_training_benchmark_say_what_they_measured():
    tiny = replace(TINY, num_samples=1)
    figures = train_step.measure_lengths("cpu", tiny, lengths=(16, 64), num_tokens=64, repeats=1)
    assert set(figures) == {"time_at_64", "tokens", "tokens_per_second_at_16"}
    figures = train_step.measure_recomputing("cpu", tiny, repeats=1)
    assert figures["time_of_keeping_all"] > 0
    assert figures["necessary_gigaflops_per_token"] > 0
    for device, names in {"cpu": "hidden256", "cuda": "8b"}.items():
        assert all(case.startswith(names) for case in train_step.cases(device))
    assert unroll_ways.WAYS[0] == "ours"

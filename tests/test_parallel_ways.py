"""The P-EAGLE step benchmark: every way takes the same step, and its rows count what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import parallel_step, parallel_ways
from benchmarks.parallel_step import OTHERS, OURS
from benchmarks.parallel_ways import Setting, Way, Work
from benchmarks.training_steps import peak_bytes
from tests.oracles import peagle as oracle

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = Setting(tuple(SHAPE.items()), draft_vocab_size=64, num_samples=3, seq_length=128, num_depths=4)


def taken(work: Work, way: Way) -> tuple[float, dict[str, torch.Tensor]]:
    loss = work.run(way)
    return loss, {name: p.grad.clone() for name, p in work.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"num_layers": 3}, {"factored": True, "sample_length": 70}])
def test_every_way_takes_the_same_step(changes):
    work = Work("cpu", replace(TINY, **changes))
    work.model.double()
    loss, gradients = taken(work, Way("plain"))
    assert {"mask_hidden", "fc.weight", "lm_head.weight"} < set(gradients)
    assert "embed_tokens.weight" not in gradients
    for way in (*OURS, *OTHERS[1:], Way("ours", 3, recompute=True), Way("plain_by_row", 3)):
        found = taken(work, way)
        assert found[0] == pytest.approx(loss, rel=1e-9), way
        assert set(found[1]) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_the_step_is_the_loss_of_elements_drawn_one_by_one():
    work = Work("cpu", TINY)
    permutation = oracle.permutations_of(torch.Generator().manual_seed(0))
    charged = own = plain = 0
    for length in work.lengths:
        mask = [slot + 1 >= length // 2 and slot + 1 < length for slot in range(length)]
        drawn = oracle.cod_elements(mask, 4, 0.7, 0.2, permutation)
        charged += sum(mask[anchor + depth] for anchor, depth in drawn)
        # What no supervised slot reads, behind the last of them, is left out; padding is not.
        own += len(drawn) - 1
        plain += len(drawn) + 128 - length
    assert charged > work.num_supervised > 0
    assert parallel_step._counts(work) == {
        "tokens": sum(work.lengths),
        "elements": own,
        "plain_elements": plain,
        "charged_elements": charged,
    }


def test_segments_of_the_plain_way_run_what_is_on_their_left_again():
    work = Work("cpu", replace(TINY, num_samples=1, sample_length=128))
    (whole,), forwards = work._plain_forwards(1), work._plain_forwards(4)
    assert sum(int(elements.charged.sum()) for elements in forwards) == int(whole.charged.sum()) == work.num_charged
    assert [int((elements.depths == 0).sum()) for elements in forwards] == [32, 64, 96, 128]
    deeper = sum(int((elements.depths > 0).sum()) for elements in forwards)
    assert deeper == int((whole.depths > 0).sum()) > 0


def test_memory_is_that_of_a_step_alone():
    work = Work("cpu", replace(TINY, num_samples=1))
    assert peak_bytes(work, Way("ours", 2)) >= 0


@pytest.fixture
def tiny_peaks(monkeypatch):
    """Peaks that cost no process: of ours 1, recomputed a half, of the others 4, shared by the segments."""

    def peak(_work, way):
        return (4 - 3 * (way.name == "ours")) * 1e6 / way.num_segments / (1 + way.recompute)

    monkeypatch.setattr(parallel_step, "peak_bytes", peak)


def shrunk(setting: Setting) -> Setting:
    length = None if setting.sample_length is None else 40
    shape = {"shape": TINY.shape, "draft_vocab_size": 64}
    return replace(setting, **shape, num_samples=min(setting.num_samples, 2), seq_length=40, sample_length=length)


@pytest.mark.parametrize(("device", "shape"), [("cpu", "hidden256"), ("cuda", "8b")])
def test_every_case_runs(device, shape, tiny_peaks):
    cases = parallel_step.cases(device)
    assert all(name.startswith(f"{shape}-layers") for name in cases)
    for name, case in cases.items():
        assert case.args[0] == device
        tokens = sum(case.args[1].lengths)
        if name.endswith("k"):
            assert tokens == int(name.split("-")[-1][:-1]) * 1024
        fast = {"repeats": 1} if case.func is parallel_step.measure else {"segments": (1, 3)}
        figures = case.func("cpu", shrunk(case.args[1]), **fast)
        assert figures["tokens"] <= 80 < tokens
        assert figures["elements"] <= figures["plain_elements"]
        assert all(value > 0 for value in figures.values())


def test_rows_say_ratios_to_ours_in_as_many_segments(tiny_peaks):
    figures = parallel_step.measure("cpu", replace(TINY, num_samples=1), repeats=1)
    others = {f"{name}{at}" for name in ("plain", "reference") for at in ("", "_at_8_segments")} | {"plain_by_row"}
    assert {name for name in figures if name.startswith("memory_of")} == {f"memory_of_{name}" for name in others}
    assert {f"speed_over_{name}" for name in others} < set(figures)
    assert figures["memory_of_plain"] == figures["memory_of_plain_at_8_segments"] == 0.25
    assert (figures["memory_at_4_segments"], figures["memory_at_8_segments"]) == (0.25, 0.125)
    assert figures["extra_memory_mb"] == 1
    memory = parallel_step.measure_memory("cpu", TINY, segments=(1, 2))
    assert [memory[f"memory_at_{name}"] for name in ("2_segments", "1_segments_recomputed")] == [0.5, 0.5]
    assert "memory_at_1_segments" not in memory


def test_another_way_that_does_not_fit_is_said_and_left_out(tiny_peaks, monkeypatch):
    run = Work.run

    def short_of(name):
        def limited(work, way):
            if way.name == name and way.num_segments == 1:
                raise torch.OutOfMemoryError
            return run(work, way)

        monkeypatch.setattr(parallel_ways.Work, "run", limited)

    short_of("plain")
    figures = parallel_step.measure("cpu", replace(TINY, num_samples=1), repeats=1)
    assert figures["plain_out_of_memory"] == 1
    assert "speed_over_plain" not in figures
    assert figures["speed_over_plain_at_8_segments"] > 0
    short_of("ours")
    with pytest.raises(torch.OutOfMemoryError):
        parallel_step.measure("cpu", replace(TINY, num_samples=1), repeats=1)


def test_a_way_that_takes_another_step_is_no_row(tiny_peaks, monkeypatch):
    run = Work.run
    monkeypatch.setattr(Work, "run", lambda work, way: run(work, way) * (1.1 if way.name == "reference" else 1))
    with pytest.raises(AssertionError, match="not the same step"):
        parallel_step.measure("cpu", replace(TINY, num_samples=1), repeats=1)

"""A sample that is not finite: named, left out or the end of the run, and never part of a checkpoint."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eagle_offline.errors import EagleOfflineError
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import read_rows
from eagle_offline.training.state import Position
from eagle_offline.training.tally import Tally
from eagle_offline.training.trainer import Trainer
from tests.builders import SCRATCH, run_cli
from tests.oracles.children import command, run_children
from tests.oracles.spoiled import spoil
from tests.training.caches import checkpoint_tensors, latest, settings, shared_cache, train, trainer_of


def clean(run: Path, **changes: Any) -> TrainSettings:
    """A run on states that can be spoiled in place."""
    values = {"cache": (shared_cache(dtype="fp32"),), "heldout_share": 0, "verify": False, "num_epochs": 1}
    return settings(run, **{**values, **changes})


@cache
def step_samples(global_batch: int = 1, budget: int = 200) -> list[list[list[int]]]:
    """The sample ids of each pack of each step."""
    trainer = trainer_of(clean(Path("unused"), global_batch=global_batch, tokens_per_batch=budget))
    ids = trainer.corpus.samples.sample_ids
    return [[[int(ids[index]) for index in pack] for pack in packs] for _, packs in trainer.remaining_steps()]


@cache
def spoiled(sample_ids: tuple[int, ...], value: float) -> Path:
    name = f"spoiled-{'-'.join(map(str, sample_ids))}-{value}"
    return spoil(shared_cache(dtype="fp32"), SCRATCH / name, sample_ids, value)


def culprit(step: int, global_batch: int = 1, pack: int = 0) -> int:
    """A sample of a step (from 1) that is not alone there."""
    members = step_samples(global_batch)[step - 1]
    assert sum(map(len, members)) > 1
    return members[pack][-1]


def strict_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines as the standard has them: no NaN, no Infinity."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{path} holds {name}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def all_finite(run: Path) -> bool:
    files = sorted((run / "checkpoints").glob("*/*.safetensors"))
    return all(bool(t.isfinite().all()) for file in files for t in load_file(file).values() if t.is_floating_point())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("global_batch", [1, 3])
def test_stop_names_the_culprit_alone_and_changes_nothing(value, global_batch, tmp_path):
    bad = culprit(3, global_batch, -1)
    chosen = clean(tmp_path / "run", cache=(spoiled((bad,), value),), global_batch=global_batch, checkpoint_every=1)
    with pytest.raises(EagleOfflineError, match=f"step 3: loss or gradient is not finite on samples {bad};") as raised:
        train(chosen)
    assert "\n" not in str(raised.value)
    assert latest(tmp_path / "run").name == "step-00000002"
    train(clean(tmp_path / "good", global_batch=global_batch, max_steps=2, checkpoint_every=1))
    weights = [load_file(latest(tmp_path / name) / "model.safetensors") for name in ("run", "good")]
    # The rate's schedule is of another length under max_steps: only the shape of the promise is checked here.
    assert weights[0].keys() == weights[1].keys()
    assert all_finite(tmp_path / "run")
    assert strict_rows(tmp_path / "run" / "metrics.jsonl")
    assert not (tmp_path / "run" / "skipped.jsonl").exists() or not read_rows(tmp_path / "run" / "skipped.jsonl")


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    moments = {
        f"{names[parameter]}/{key}": value.clone()
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
    }
    return {**{name: value.detach().clone() for name, value in names_of(trainer).items()}, **moments}


def names_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.model.named_parameters())


@pytest.mark.parametrize("kind", [None, "alpha", "lambda"])
def test_a_step_that_is_not_finite_touches_neither_weights_nor_optimizer(kind, tmp_path):
    bad = culprit(3, 2)
    trainer = trainer_of(clean(tmp_path, cache=(spoiled((bad,), float("nan")),), global_batch=2, lk_loss_type=kind))
    tally, steps = Tally(3), trainer.remaining_steps()
    for _ in range(2):
        assert bool(trainer.step(trainer.stream.load(next(steps)), tally).is_finite)
    before, counted = state_of(trainer), tally.state()
    outcome = trainer.step(trainer.stream.load(next(steps)), tally)
    assert not bool(outcome.is_finite)
    assert trainer.culprits(outcome.samples) == [bad]
    after = state_of(trainer)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert tally.state() == counted
    assert trainer.position.step == 3


def left_out(chosen: TrainSettings, steps: set[int]) -> dict[str, torch.Tensor]:
    """Weights and moments of a run by hand that goes over some of its steps without doing them."""
    trainer = trainer_of(chosen)
    tally = Tally(chosen.ttt_steps)
    for step in trainer.remaining_steps():
        if step[0].step in steps:
            trainer.standing = type(trainer.standing)(Position(step[0].step, step[0].epoch, step[0].next_pack))
        else:
            assert bool(trainer.step(trainer.stream.load(step), tally).is_finite)
    return state_of(trainer)


def by_file(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{'optimizer' if '/' in name else 'model'}.safetensors:{name}": value for name, value in state.items()}


@pytest.mark.parametrize(("value", "global_batch"), [(float("nan"), 1), (float("inf"), 2)])
def test_skip_equals_the_same_run_without_that_step_bit_for_bit(value, global_batch, tmp_path):
    """Step 1 is skipped too: before it, the optimizer has no state at all."""
    bad = (culprit(1, global_batch), culprit(3, global_batch))
    run = tmp_path / "run"
    chosen = clean(run, cache=(spoiled(bad, value),), global_batch=global_batch, on_nonfinite="skip", log_every=2)
    train(chosen)
    assert read_rows(run / "skipped.jsonl") == [
        {"step": 1, "sample_ids": [bad[0]]},
        {"step": 3, "sample_ids": [bad[1]]},
    ]
    expected = by_file(left_out(clean(run, global_batch=global_batch), {1, 3}))
    found = {name: t for name, t in checkpoint_tensors(run).items() if not name.startswith("draft_vocab")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    rows = strict_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows][-1] == len(step_samples(global_batch))
    assert all_finite(run)


def test_a_line_of_skipped_steps_alone_tells_no_loss(tmp_path):
    """Nothing was measured: a loss of 0 would look like the best step of the run."""
    run, bad = tmp_path / "run", culprit(3)
    train(clean(run, cache=(spoiled((bad,), float("nan")),), on_nonfinite="skip", log_every=1))
    rows = [row for row in strict_rows(run / "metrics.jsonl") if row["step"] == 3 and row["kind"] == "train"]
    assert all(row.get("loss") != 0.0 for row in rows)


def test_ten_steps_in_a_row_end_the_run_and_nine_do_not(tmp_path):
    steps = step_samples(budget=100)
    assert len(steps) > 13
    ten, nine = ([pack[0] for step in steps[2 : 2 + count] for pack in step] for count in (10, 9))
    run = tmp_path / "ten"
    chosen = clean(run, cache=(spoiled(tuple(ten), float("nan")),), on_nonfinite="skip", tokens_per_batch=100)
    with pytest.raises(EagleOfflineError, match=r"step 12: .* the 10th step in a row: the draft itself is not finite"):
        train(chosen)
    assert all_finite(run)
    assert [row["step"] for row in read_rows(run / "skipped.jsonl")] == list(range(3, 12))
    # Nine bad steps, a good one, and the count begins anew.
    more = tuple(nine) + tuple(steps[12][0][:1])
    run = tmp_path / "nine"
    train(clean(run, cache=(spoiled(more, float("nan")),), on_nonfinite="skip", tokens_per_batch=100))
    assert [row["step"] for row in read_rows(run / "skipped.jsonl")] == [*range(3, 12), 13]


def test_one_process_line_and_status_name_the_sample(tmp_path):
    bad, run = culprit(2), tmp_path / "run"
    ended = run_cli(*command(clean(run, cache=(spoiled((bad,), float("nan")),))))
    assert ended.code == 1
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"on samples {bad};" in errors[0]
    assert "Traceback" not in ended.err
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert f"on samples {bad};" in status["why"]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_stop_with_the_sample_that_only_one_of_them_has(rank, tmp_path):
    bad, run = culprit(3, 2, rank), tmp_path / "run"
    chosen = clean(run, cache=(spoiled((bad,), float("nan")),), global_batch=2, checkpoint_every=1)
    ended = run_children(command(chosen), tmp_path, 2)
    for one in ended:
        assert one.code == 1, one.err
        assert f"step 3: loss or gradient is not finite on samples {bad};" in one.err
        assert "Traceback" not in one.err
        assert len(one.errors) == 1
    assert latest(run).name == "step-00000002"
    assert all_finite(run)


def test_a_loss_that_is_not_finite_on_one_process_alone_is_left_out_by_both(tmp_path):
    """Its gradients are finite, so the other one learns of it only when told."""
    run = tmp_path / "run"

    def prepare(rank: int) -> None:
        original, count = Tally.add, 0

        def add(tally: Tally, sums: Any) -> None:
            nonlocal count
            original(tally, sums)
            count += 1
            if rank == 1 and count == 2:
                tally._sums[0, 0] = float("inf")

        Tally.add = add  # type: ignore[method-assign]

    chosen = clean(run, global_batch=2, on_nonfinite="skip")
    ended = run_children(command(chosen), tmp_path, 2, prepare=prepare, timeout=30)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    (skipped,) = read_rows(run / "skipped.jsonl")
    assert skipped == {"step": 2, "sample_ids": sorted(i for pack in step_samples(2)[1] for i in pack)}


def test_two_processes_leave_out_what_one_would(tmp_path):
    """The same steps, the same samples recorded, the same weights but for the order of sums."""
    bad, runs = culprit(3, 2, 1), [tmp_path / "one", tmp_path / "two"]
    for size, run in enumerate(runs, start=1):
        chosen = clean(run, cache=(spoiled((bad,), float("nan")),), global_batch=2, on_nonfinite="skip")
        ended = run_children(command(chosen), tmp_path, size)
        assert [one.code for one in ended] == [0] * size, [one.err for one in ended]
        assert read_rows(run / "skipped.jsonl") == [{"step": 3, "sample_ids": [bad]}]
    ours, theirs = checkpoint_tensors(runs[1]), checkpoint_tensors(runs[0])
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    assert all_finite(runs[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_held_out_sample_that_is_not_finite_leaves_metrics_that_are_json(value, tmp_path):
    """Either the run ends with its id, or what it writes is JSON; a NaN is neither a loss nor an accept length."""
    run = tmp_path / "run"
    trainer = trainer_of(clean(run, heldout_share=0.2))
    bad = int(trainer.corpus.samples.sample_ids[trainer.corpus.heldout_samples[0]])
    chosen = clean(run, heldout_share=0.2, cache=(spoiled((bad,), value),), max_steps=3)
    try:
        train(chosen)
    except EagleOfflineError as error:
        assert str(bad) in str(error)  # noqa: PT017
    assert not (run / "metrics.jsonl").exists() or strict_rows(run / "metrics.jsonl")


def test_two_processes_end_with_the_held_out_sample_that_one_of_them_has(tmp_path):
    run = tmp_path / "run"
    chosen = clean(run, heldout_share=0.3, tokens_per_batch=80, global_batch=2)
    trainer = trainer_of(chosen)
    packs = list(trainer.corpus.heldout_packs(chosen))
    assert len(packs) > 1
    bad = int(trainer.corpus.samples.sample_ids[packs[1][0]])
    chosen = chosen.model_copy(update={"cache": (spoiled((bad,), float("nan")),)})
    for one in run_children(command(chosen), tmp_path, 2, timeout=30):
        assert one.code == 1, one.err
        assert len(one.errors) == 1
        assert "Traceback" not in one.err
        assert str(bad) in one.errors[0].split("samples")[1].split(";")[0]
    assert not (run / "checkpoints").exists()


def test_weights_that_overflow_in_the_update_are_never_a_checkpoint(tmp_path):
    """Gradients are finite, what they are multiplied with is not."""
    run = tmp_path / "run"
    ended = run_cli(*command(clean(run, learning_rate=1e38, checkpoint_every=1, warmup_ratio=0)))
    assert ended.code != 0
    assert "Traceback" not in ended.err
    assert not (run / "checkpoints").exists() or all_finite(run)


def test_a_sample_without_any_supervision_is_trained_on_like_nothing(tmp_path):
    """A pack in which no slot counts adds nothing, and stands in nobody's way."""
    chosen = clean(tmp_path, tokens_per_batch=1, supervision_gate="both", ttt_steps=3)
    trainer = trainer_of(chosen)
    lengths = np.array([trainer.corpus.samples[i].loss_mask.sum() for i in range(len(trainer.corpus.samples))])
    assert lengths.min() >= 1
    index = int(lengths.argmin())
    sample = trainer.corpus.samples[index]
    assert sample.loss_mask.any()
    tally = Tally(3)
    for step in trainer.remaining_steps():
        assert bool(trainer.step(trainer.stream.load(step), tally).is_finite)

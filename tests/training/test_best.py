"""Which checkpoint is the best, when a run ends early, and when a checkpoint is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.train_settings import TrainSettings
from eagle_offline.training import loop, state
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.tally import Tally
from eagle_offline.training.trainer import StepOutcome, Trainer
from tests.builders import run_cli
from tests.oracles.children import command, kill_at_call, run_children
from tests.training.caches import assert_same_run, latest, metrics, settings, train, train_until, trainer_of

# Walked accept lengths by step: the best at step 4, equalled at 6 and 10, never passed.
LENGTHS = {0: 1.0, 2: 1.5, 4: 2.5, 6: 2.5, 8: 2.0, 10: 2.5, 12: 2.25}


def run_settings(run: Path, **changes: Any) -> TrainSettings:
    values = {"eval_every": 2, "max_steps": 12, "checkpoint_every": 3, "keep_checkpoints": 1, "ttt_steps": 1}
    return settings(run, **{**values, **changes})


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[int, float | None]:
    """Validations that yield the lengths of a script, which the test may change."""
    script = dict(LENGTHS)

    def validate(trainer: Trainer) -> Tally:
        tally = Tally(trainer.settings.ttt_steps)
        length = script[trainer.position.step]  # None: nothing to walk
        tally.walked_tokens, tally.walked_rounds = (0, 0) if length is None else (round(length * 1000), 1000)
        return tally

    monkeypatch.setattr(Trainer, "validate", validate)
    return script


def best(run: Path) -> str:
    return (run / "best").read_text().strip()


def standing(run: Path) -> dict[str, Any]:
    return json.loads((latest(run) / "training_state.json").read_text())["standing"]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def validations(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run) if row["kind"] == "heldout"]


def test_best_names_the_first_of_the_longest_and_outlives_the_others(scripted, tmp_path):
    result = train(run_settings(tmp_path / "run"))
    assert best(tmp_path / "run") == "step-00000004"
    assert checkpoints(tmp_path / "run") == [4, 12]
    assert Path(result["best_checkpoint"]).name == "step-00000004"
    assert result["best_walked_accept_length"] == 2.5
    found = standing(tmp_path / "run")
    assert (found["best_step"], found["best_length"], found["num_without_gain"]) == (4, 2.5, 4)


def test_a_best_that_no_regular_checkpoint_falls_on_is_written_too(scripted, tmp_path):
    scripted[10] = 3.0
    train(run_settings(tmp_path / "run", checkpoint_every=500))
    assert best(tmp_path / "run") == "step-00000010"
    assert checkpoints(tmp_path / "run") == [10, 12]


@pytest.mark.slow
def test_best_is_the_argmax_of_what_real_validations_say(tmp_path):
    run = tmp_path / "run"
    train(run_settings(run, eval_every=3))
    lengths = {row["step"]: row["walked_accept_length"] for row in read_metrics(run) if row["kind"] == "heldout"}
    del lengths[0]  # the untrained draft is no checkpoint
    longest = max(lengths, key=lambda step: lengths[step])
    assert best(run) == f"step-{longest:08d}"
    assert (run / "checkpoints" / best(run) / "model.safetensors").is_file()


def test_an_untrained_draft_that_is_never_passed_leaves_no_best(scripted, tmp_path):
    scripted[0] = 9.0
    train(run_settings(tmp_path / "run"))
    assert not (tmp_path / "run" / "best").exists()
    assert checkpoints(tmp_path / "run") == [12]
    assert state.best_checkpoint(tmp_path / "run") == latest(tmp_path / "run")


@pytest.mark.parametrize(("patience", "last"), [(1, 6), (2, 8), pytest.param(4, 12, marks=pytest.mark.slow)])
def test_early_stopping_ends_after_so_many_validations_without_gain(patience, last, scripted, tmp_path):
    run = tmp_path / "run"
    chosen = run_settings(run, early_stopping=patience, checkpoint_every=500)
    ended = run_cli(*command(chosen))
    assert ended.code == 0, ended.err
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert json.loads(ended.out)["steps"] == last
    assert validations(run) == list(range(0, last + 1, 2))
    assert latest(run).name == f"step-{last:08d}"
    assert best(run) == "step-00000004"
    # Run again, it is over.
    before = read_metrics(run)
    again = run_cli(*command(chosen.model_copy(update={"resume": True})))
    assert again.code == 0, again.err
    assert json.loads(again.out)["steps"] == last
    assert read_metrics(run) == before


def test_a_run_that_ends_early_writes_the_line_of_its_last_steps(scripted, tmp_path):
    train(run_settings(tmp_path / "run", early_stopping=1, log_every=5))
    lines = [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert lines == [5, 6]


def test_raising_the_patience_on_resume_goes_on_as_if_it_had_been_so(scripted, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    train(run_settings(run, early_stopping=2))
    assert latest(run).name == "step-00000008"
    train(run_settings(run, early_stopping=3, resume=True))
    assert latest(run).name == "step-00000010"
    train(run_settings(other, early_stopping=3))
    assert_same_run(run, other)
    train(run_settings(run, resume=True))
    train(run_settings(tmp_path / "whole"))
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (2, 3, 6, 7)), 4, 8])
def test_a_stop_at_any_step_changes_neither_best_nor_end(step, scripted, tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    chosen = run_settings(run, early_stopping=2)
    train_until(chosen, step, monkeypatch)
    train(chosen.model_copy(update={"resume": True}))
    train(run_settings(other, early_stopping=2))
    assert validations(run) == validations(other)
    assert standing(run) == standing(other)
    assert best(run) == best(other) == "step-00000004"
    assert_same_run(run, other)


def test_a_stop_where_a_validation_is_due_leaves_it_to_the_resumed_run(scripted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train_until(run_settings(run), 4, monkeypatch)
    assert validations(run) == [0, 2]
    assert standing(run)["validation_due"]
    train(run_settings(run, resume=True))
    assert validations(run) == list(range(0, 13, 2))
    assert best(run) == "step-00000004"
    assert 4 in checkpoints(run)


def test_a_validation_that_was_put_off_is_written_once_whatever_comes_after(scripted, tmp_path, monkeypatch):
    """Stopped where one is due, then killed after it and before the next checkpoint, twice."""
    run = tmp_path / "run"
    train_until(run_settings(run, checkpoint_every=500), 6, monkeypatch)
    for _ in range(2):
        chosen = run_settings(run, resume=True, checkpoint_every=500)
        (killed,) = run_children(command(chosen), tmp_path, prepare=kill_at_call(Trainer, "step", 2))
        assert killed.code == -9, killed.err
    train(run_settings(run, resume=True, checkpoint_every=500))
    assert validations(run) == list(range(0, 13, 2))
    train(run_settings(tmp_path / "other", checkpoint_every=500))
    assert_same_run(run, tmp_path / "other")


def test_a_stop_at_the_validation_that_would_end_the_run(scripted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    chosen = run_settings(run, early_stopping=1)
    train_until(chosen, 6, monkeypatch)
    for _ in range(3):
        train(chosen.model_copy(update={"resume": True}))
    assert latest(run).name == "step-00000006"
    assert validations(run) == [0, 2, 4, 6]
    train(run_settings(tmp_path / "other", early_stopping=1))
    assert_same_run(run, tmp_path / "other")


@pytest.mark.parametrize("moment", ["latest", pytest.param("best", marks=pytest.mark.slow)])
def test_killed_between_the_pointers_and_once_more_while_the_step_is_written_again(moment, scripted, tmp_path):
    """`best` may be ahead of `latest` then; what it names may be gone for a moment; the run goes on."""
    run = tmp_path / "run"
    chosen = run_settings(run, resume=True, checkpoint_every=500)
    number = {"best": 1, "latest": 2}[moment]

    def at_step_four(_rank: int) -> None:
        import os
        import signal

        original, count = state.write_bytes, 0

        def watched(path: Path, content: bytes) -> None:
            nonlocal count
            count += content == b"step-00000004\n"
            if content == b"step-00000004\n" and count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, content)

        state.write_bytes = watched

    (killed,) = run_children(command(chosen), tmp_path, prepare=at_step_four)
    assert killed.code == -9, killed.err
    # The same step again: its directory is put aside; die then.
    (killed,) = run_children(command(chosen), tmp_path, prepare=kill_at_call(state.shutil, "rmtree", 1, after=True))
    assert killed.code == -9, killed.err
    train(run_settings(run, resume=True, checkpoint_every=1))
    train(run_settings(tmp_path / "other", checkpoint_every=500))
    assert_same_run(run, tmp_path / "other")
    assert best(run) == best(tmp_path / "other")
    assert checkpoints(run) == checkpoints(tmp_path / "other")


@pytest.mark.parametrize(("name", "after"), [("rmtree", True), pytest.param("rename", False, marks=pytest.mark.slow)])
def test_killed_while_the_checkpoint_that_latest_names_is_written_again(name, after, scripted, tmp_path, monkeypatch):
    """A validation that was put off may make its step the best: until that is written, the old one has to be there."""
    run = tmp_path / "run"
    train_until(run_settings(run), 4, monkeypatch)
    chosen = run_settings(run, resume=True)
    owner = {"rmtree": state.shutil, "rename": state.os}[name]
    (killed,) = run_children(command(chosen), tmp_path, prepare=kill_at_call(owner, name, 1, after=after))
    assert killed.code == -9, killed.err
    assert latest(run).is_dir(), "`latest` names nothing"
    train(chosen)
    train(run_settings(tmp_path / "other"))
    assert_same_run(run, tmp_path / "other")
    assert best(run) == best(tmp_path / "other")


def test_going_back_to_an_earlier_checkpoint_goes_back_to_its_best(scripted, tmp_path):
    """What a run that was given up had reached is not this run's best."""
    run = tmp_path / "run"
    train(run_settings(run, keep_checkpoints=50))
    (run / "latest").write_text("step-00000003\n")
    scripted.update({4: 1.0, 6: 1.0, 8: 1.0})
    train(run_settings(run, resume=True, max_steps=8, accept_drift=("max_steps", "learning_rate"), learning_rate=1e-4))
    assert standing(run)["best_step"] == 2
    assert best(run) == "step-00000002"


# Other moments of writing.


def saved_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    saved: list[int] = []
    original = Trainer.save

    def watched(trainer: Trainer, unlogged: Tally) -> None:
        saved.append(trainer.position.step)
        original(trainer, unlogged)

    monkeypatch.setattr(Trainer, "save", watched)
    return saved


class Clock:
    """Time that passes as steps are done: half a minute each."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_checkpoints_by_minutes_count_from_the_last_one(tmp_path, monkeypatch):
    clock, saved, original = Clock(), saved_steps(monkeypatch), Trainer.step

    def step(trainer: Trainer, *arguments: Any) -> StepOutcome:
        clock.now += 30
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(loop, "time", clock)
    train(
        run_settings(
            tmp_path / "run", heldout_share=0, checkpoint_every=7, checkpoint_minutes=2, max_steps=16, num_epochs=4
        )
    )
    # More than two minutes are five steps: 5, then 7 by count, then 12 (150 s after), 14 by count, 16 the end.
    assert saved == [5, 7, 12, 14, 16]


def test_checkpoints_at_the_ends_of_epochs(tmp_path, monkeypatch):
    saved = saved_steps(monkeypatch)
    chosen = run_settings(
        tmp_path / "run", heldout_share=0, checkpoint_every=500, checkpoint_epochs=True, max_steps=None, num_epochs=3
    )
    ends = [position.step for position, _ in trainer_of(chosen).remaining_steps() if position.next_pack == 0]
    train(chosen)
    assert saved == ends
    assert len(ends) == 3


def test_a_signal_writes_a_checkpoint_at_its_step(tmp_path, monkeypatch):
    saved = saved_steps(monkeypatch)
    train_until(run_settings(tmp_path / "run", checkpoint_every=500, eval_every=500), 5, monkeypatch)
    assert saved == [5]
    assert latest(tmp_path / "run").name == "step-00000005"


def test_early_stopping_without_held_out_documents_is_refused(tmp_path):
    """It could never stop; `--heldout-share` or `--heldout-cache` is what is missing."""
    words = command(run_settings(tmp_path / "run", eval_every=None, heldout_share=0))
    ended = run_cli(*words, "--early-stopping", 2)
    assert ended.code == 2
    errors = [line for line in ended.errors if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--early-stopping" in errors[0]
    assert "--heldout" in errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5, 8))])
def test_killed_after_a_validation_and_resumed_ends_at_the_same_step(step, scripted, tmp_path):
    run, chosen = tmp_path / "run", run_settings(tmp_path / "run", early_stopping=2, resume=True)
    prepare = kill_at_call(Trainer, "step", step)
    (killed,) = run_children(command(chosen), tmp_path, prepare=prepare)
    assert killed.code == -9, killed.err
    train(chosen)
    train(run_settings(tmp_path / "other", early_stopping=2))
    assert latest(run).name == "step-00000008"
    assert_same_run(run, tmp_path / "other")
    assert metrics(run) == metrics(tmp_path / "other")


def test_a_run_that_stopped_early_says_so_in_its_result(scripted, tmp_path, capsys):
    result = train(run_settings(tmp_path / "run", early_stopping=1))
    assert result["stopped_early"].startswith("after step 6 of 12: ")
    assert "than 2.5 at step 4" in result["stopped_early"]
    assert f"train: stopped early {result['stopped_early']}" in capsys.readouterr().err


def test_early_stopping_where_no_answer_can_be_walked_ends_in_words(scripted, tmp_path):
    scripted.update(dict.fromkeys(range(0, 13, 2)))
    result = train(run_settings(tmp_path / "run", early_stopping=2))
    assert "no held-out answer to walk" in result["stopped_early"]
    assert "best_checkpoint" not in result

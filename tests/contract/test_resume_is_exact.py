"""Training that was stopped or killed and gone on with ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.errors import StoppedEarly
from eagle_offline.training import loop
from eagle_offline.training.logbook import read_metrics
from tests.training.caches import Stop, assert_same_run, latest, metrics, settings, shared_cache, train, trainer_of
from tests.training.forked import WarmProcess

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"global_batch": 3, "num_epochs": 3},
    "rare lines": {"log_every": 5},
    "frequent validation": {"eval_every": 3, "checkpoint_every": 2},
    "3.1": {"fc_norm": True, "norm_output": True, "num_draft_layers": 2, "weight_decay": 0.1},
    "trained embeddings": {"train_embeddings": True, "max_steps": 11},
}


def train_until(chosen: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process and ask to stop while the optimizer step that ends at `step` is done."""
    stop, original = Stop(), loop.Trainer.step

    def watched(trainer: loop.Trainer, *arguments: Any, **named: Any) -> float:
        stop.requested = trainer.position.step + 1 >= step
        return original(trainer, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "step", watched)
        with pytest.raises(StoppedEarly, match=f"after step {step} of "):
            train(chosen, stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Path]:
    runs = {}
    for name, changes in VARIANTS.items():
        runs[name] = tmp_path_factory.mktemp("uninterrupted") / "run"
        train(settings(runs[name], **changes))
    return runs


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_equals_uninterrupted(variant, uninterrupted, tmp_path, monkeypatch):
    """Stopped twice, once early and once in the middle of the second epoch."""
    run, changes = tmp_path / "run", VARIANTS[variant]
    trainer = trainer_of(settings(run, **changes))
    for number, step in enumerate((1, trainer.steps_per_epoch[0] + 2)):
        train_until(settings(run, resume=number > 0, **changes), step, monkeypatch)
        state = json.loads((latest(run) / "training_state.json").read_text())
        assert state["position"]["step"] == step < trainer.total_steps
        assert state["position"]["next_pack"] == (number + 1) * trainer.settings.global_batch, "not inside an epoch"
    train(settings(run, resume=True, **changes))
    assert_same_run(run, uninterrupted[variant])


def test_two_uninterrupted_runs_are_the_same(uninterrupted, tmp_path):
    train(settings(tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted["plain"])


def test_stopping_at_every_step_changes_nothing(uninterrupted, tmp_path, monkeypatch):
    changes = VARIANTS["accumulated"]
    run = tmp_path / "run"
    steps = max(row["step"] for row in metrics(uninterrupted["accumulated"]))
    for step in range(1, steps):
        train_until(settings(run, resume=True, **changes), step, monkeypatch)
    train(settings(run, resume=True, **changes))
    assert_same_run(run, uninterrupted["accumulated"])


def test_where_and_how_often_something_is_written_may_change_on_resume(uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train_until(settings(run, checkpoint_every=1, keep_checkpoints=5), 3, monkeypatch)
    train(settings(run, resume=True, checkpoint_every=7, keep_checkpoints=1, verify=False))
    assert_same_run(run, uninterrupted["plain"])


def test_resume_of_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    run = tmp_path / "run"
    train(settings(run))
    before = {path: path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}
    rows = read_metrics(run)
    train(settings(run, resume=True))
    assert {path: path.read_bytes() for path in sorted(run.rglob("*.safetensors"))} == before
    assert read_metrics(run) == rows


def test_resume_is_safe_on_an_empty_directory(uninterrupted, tmp_path):
    train(settings(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", uninterrupted["plain"])


# Signals to real processes.

KILLED = {"num_epochs": 2, "checkpoint_every": 2, "keep_checkpoints": 2, "log_every": 3}


def command(run: Path, *more: str, **changes: Any) -> list[str]:
    """The command line of `settings(run, **changes)`."""
    chosen = settings(run, **changes).model_dump(mode="json", exclude_unset=True)
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()), *more]


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Iterator[WarmProcess]:
    shared_cache()
    process = WarmProcess(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def expected(warm, tmp_path_factory) -> tuple[Path, int, float]:
    """An uninterrupted run in a child, the number of its steps of writing, and its seconds."""
    run = tmp_path_factory.mktemp("expected") / "run"
    started = time.monotonic()
    ended = warm.run(command(run, **KILLED))
    assert ended.code == 0, ended.err
    return run, len(ended.events), time.monotonic() - started


def finish(warm: WarmProcess, run: Path) -> None:
    ended = warm.run(command(run, "--resume", **KILLED))
    assert ended.code == 0, ended.err
    assert not list(run.rglob(".*")), "half-written files stayed"


def kill_and_resume(warm: WarmProcess, expected: Path, run: Path, event: int) -> None:
    killed = warm.run(command(run, **KILLED), kill_at_event=event)
    assert killed.code == -signal.SIGKILL, killed.err
    step = f"event {event}, {killed.events[-1]}"
    try:
        finish(warm, run)
        assert_same_run(run, expected)
    except AssertionError as error:
        raise AssertionError(f"killed before {step}: {error}") from error


@pytest.mark.parametrize("share", [0.02, 0.31, 0.66, 0.9])
def test_killed_at_a_step_of_writing_and_resumed_equals_uninterrupted(share, warm, expected, tmp_path):
    run, num_events, _ = expected
    # Near the share: every kind of step comes up over the shares, and always the same ones.
    event = 1 + random.Random(int(share * 100)).randrange(int(share * num_events), int((share + 0.1) * num_events) + 1)
    kill_and_resume(warm, run, tmp_path / "run", min(event, num_events - 1))


@pytest.mark.slow
def test_killed_at_every_third_step_of_writing_and_resumed_equals_uninterrupted(warm, expected, tmp_path):
    run, num_events, _ = expected
    for event in range(1, num_events + 1, 3):
        kill_and_resume(warm, run, tmp_path / str(event), event)


def test_killed_inside_every_step_of_one_checkpoint_and_resumed(warm, expected, tmp_path):
    """The second checkpoint, when there is one to fall back to: from its directory to the removal of the oldest."""
    run, _, _ = expected
    events = warm.run(command(tmp_path / "counted", **KILLED)).events
    writes = [number for number, event in enumerate(events, start=1) if event == "save_file"]
    first = writes[3]  # three files a checkpoint
    renames = [number for number, event in enumerate(events, start=1) if event == "rename" and number > first]
    replaced = [number for number, event in enumerate(events, start=1) if event == "replace" and number > renames[0]]
    chosen = [first, first + 2, renames[0], renames[0] + 1, replaced[0] + 1]
    for event in chosen:
        kill_and_resume(warm, run, tmp_path / str(event), event)


def test_killed_at_random_moments_again_and_again_equals_uninterrupted(warm, expected, tmp_path):
    """Each life is a little longer than the last, so that the run gets somewhere."""
    run, _, seconds = expected
    draw, lived = random.Random(20), 0
    for life in range(6):
        killed = warm.run(
            command(tmp_path / "run", "--resume", **KILLED),
            kill_after_seconds=draw.uniform(0.1, 0.9) * seconds * (life + 1) / 6,
        )
        assert killed.code in (-signal.SIGKILL, 0), killed.err
        lived += killed.code != 0
    assert lived > 0
    finish(warm, tmp_path / "run")
    assert_same_run(tmp_path / "run", run)


def test_a_signal_stops_after_the_step_in_hand_and_resume_goes_on(warm, tmp_path):
    run = tmp_path / "run"
    long = {"num_epochs": 20, "tokens_per_batch": 100, "max_steps": 60, "log_every": 1}

    def terminate(child: int) -> None:
        deadline = time.monotonic() + 60
        while len(read_metrics(run)) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, signal.SIGTERM)

    ended = warm.run(command(run, **long), while_running=terminate)
    assert ended.code == 5, ended.err
    assert [line for line in ended.err.splitlines() if line.startswith("error: stopped by a signal after step ")]
    assert "Traceback" not in ended.err
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "resumable"
    assert status["exit_code"] == 5
    stopped_at = json.loads((latest(run) / "training_state.json").read_text())["position"]["step"]
    assert 10 < stopped_at < 60
    assert read_metrics(run)[-1]["step"] == stopped_at

    ended = warm.run(command(run, "--resume", **long))
    assert ended.code == 0, ended.err
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    uninterrupted = warm.run(command(tmp_path / "other", **long))
    assert uninterrupted.code == 0, uninterrupted.err
    assert_same_run(run, tmp_path / "other")

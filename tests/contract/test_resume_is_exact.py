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

from eagle_offline.training import records, state
from eagle_offline.training import trainer as trainer_module
from eagle_offline.training.logbook import Logbook, read_metrics, read_rows
from eagle_offline.training.stream import PackStream
from eagle_offline.training.trainer import Trainer
from tests.builders import SCRATCH
from tests.oracles.children import command as command_of
from tests.oracles.children import kill_at_call, run_children
from tests.oracles.spoiled import spoil
from tests.training.caches import (
    assert_same_run,
    flags,
    latest,
    metrics,
    settings,
    shared_cache,
    train,
    train_until,
    trainer_of,
)
from tests.training.forked import WarmProcess

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"global_batch": 3, "num_epochs": 3},
    "rare lines": {"log_every": 5},
    "frequent validation": {"eval_every": 3, "checkpoint_every": 2},
    "3.1": {"fc_norm": True, "norm_output": True, "num_draft_layers": 2, "weight_decay": 0.1},
    "trained embeddings": {"train_embeddings": True, "max_steps": 11},
    "P-EAGLE": {"objective": "peagle", "num_draft_layers": 2, "num_depths": 4},
    "P-EAGLE in parts": {"objective": "peagle", "num_draft_layers": 1, "sequence_partitions": 3, "global_batch": 2},
}


def steps_of_epoch(trainer: Trainer, epoch: int) -> int:
    return -(-len(trainer.stream.packs(epoch)) // trainer.settings.global_batch)


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
    for number, step in enumerate((1, steps_of_epoch(trainer, 0) + 2)):
        train_until(settings(run, resume=number > 0, **changes), step, monkeypatch)
        state = json.loads((latest(run) / "training_state.json").read_text())
        position = state["standing"]["position"]
        assert position["step"] == step < trainer.total_steps
        assert position["next_pack"] == (number + 1) * trainer.settings.global_batch, "not inside an epoch"
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
    return ["train", *flags(settings(run, **changes)), *more]


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
    stopped_at = json.loads((latest(run) / "training_state.json").read_text())["standing"]["position"]["step"]
    assert 10 < stopped_at < 60
    assert read_metrics(run)[-1]["step"] == stopped_at

    ended = warm.run(command(run, "--resume", **long))
    assert ended.code == 0, ended.err
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    uninterrupted = warm.run(command(tmp_path / "other", **long))
    assert uninterrupted.code == 0, uninterrupted.err
    assert_same_run(run, tmp_path / "other")


# One run, killed in many ways at once: whatever a run can be asked for is on.


def everything(run: Path, **changes: Any) -> Any:
    """Accumulation, a mixture with weights, LK lambda, a spoiled sample to skip, validation and early stopping."""
    source = shared_cache(dtype="fp32")
    values = {
        "cache": (spoil(source, SCRATCH / "spoiled-in-a-mixture", [5], float("nan")), _second_cache()),
        "cache_weights": (1.0, 0.5),
        "verify": False,
        "heldout_share": 0.2,
        "on_nonfinite": "skip",
        "lk_loss_type": "lambda",
        "global_batch": 2,
        "num_epochs": 6,
        "eval_every": 3,
        "early_stopping": 2,
        "checkpoint_every": 2,
        "checkpoint_epochs": True,
        "log_every": 2,
        "keep_checkpoints": 1,
        "max_steps": 24,
    }
    return settings(run, **{**values, **changes})


def _second_cache() -> Path:
    return shared_cache(dtype="fp32", count=10, seed=1)


@pytest.fixture(scope="module")
def all_at_once(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("all")
    (ended,) = run_children(command_of(everything(directory / "run")), directory)
    assert ended.code == 0, ended.err
    assert read_rows(directory / "run" / "skipped.jsonl"), "the spoiled sample was never met"
    assert read_metrics(directory / "run")[-1]["step"] < 24, "it never stopped early"
    return directory / "run"


LONG = {"max_steps": 80, "num_epochs": 20, "early_stopping": 20}


@pytest.fixture(scope="module")
def all_for_long(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("long")
    (ended,) = run_children(command_of(everything(directory / "run", **LONG)), directory)
    assert ended.code == 0, ended.err
    return directory / "run"


# Where a life may end: what is called, and about how often a life calls it.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "forward of a pack": (trainer_module, "pack_parts", 9),
    "step": (Trainer, "step", 3),
    "validation": (Trainer, "validate", 2),
    "checkpoint": (Trainer, "save", 2),
    "files of a checkpoint": (state, "save_file", 4),
    "pointers": (state, "write_bytes", 3),
    "removal": (state, "remove_old_checkpoints", 2),
    "line": (Logbook, "write", 3),
    "search for a culprit": (Trainer, "culprits", 1),
    "settings": (records, "write_bytes", 1),
    "restored": (Trainer, "restore", 1),
    "optimizer": (trainer_module, "learning_rate", 3),
}


def lives(run: Path, seed: int, number: int, directory: Path, **changes: Any) -> int:
    """Begin the run and kill it, by a draw, until that has happened so often or the run is over; return how often."""
    draw, killed, over = random.Random(seed), 0, False
    while killed < number and not over:
        owner, name, most = MOMENTS[draw.choice(sorted(MOMENTS))]
        drawn = kill_at_call(owner, name, draw.randint(1, most), after=draw.random() < 0.4)
        at_latest = kill_at_call(PackStream, "load", 7)  # some moments do not come in a life
        (ended,) = run_children(
            command_of(everything(run, resume=True, **changes)),
            directory,
            prepare=lambda rank, drawn=drawn, at_latest=at_latest: (drawn(rank), at_latest(rank)),
        )
        assert ended.code in (0, -signal.SIGKILL), ended.err
        killed += ended.code != 0
        over = ended.code == 0
    return killed


def assert_everything_same(run: Path, expected: Path) -> None:
    assert_same_run(run, expected)
    assert read_rows(run / "skipped.jsonl") == read_rows(expected / "skipped.jsonl")
    assert (run / "best").read_text() == (expected / "best").read_text()
    names = [sorted(path.name for path in (each / "checkpoints").iterdir()) for each in (run, expected)]
    assert names[0] == names[1]
    assert not list(run.rglob(".*")), "half-written files stayed"


@pytest.mark.parametrize("seed", [1])
def test_killed_a_few_times_with_everything_on_equals_uninterrupted(seed, all_at_once, tmp_path):
    assert lives(tmp_path / "run", seed, 4, tmp_path) == 4
    (ended,) = run_children(command_of(everything(tmp_path / "run", resume=True)), tmp_path)
    assert ended.code == 0, ended.err
    assert_everything_same(tmp_path / "run", all_at_once)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 7))
def test_killed_twenty_times_with_everything_on_equals_uninterrupted(seed, all_for_long, tmp_path):
    assert lives(tmp_path / "run", seed, 20, tmp_path, **LONG) == 20
    (ended,) = run_children(command_of(everything(tmp_path / "run", resume=True, **LONG)), tmp_path)
    assert ended.code == 0, ended.err
    assert_everything_same(tmp_path / "run", all_for_long)


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_an_accumulation_equals_uninterrupted(after, all_at_once, tmp_path):
    """The second pack of a step: gradients of the first are there, and go with the process."""
    run = tmp_path / "run"
    # With lambda each step runs its packs twice, the first time for their overlaps: calls 4, 8, … are second packs.
    for call in (4, 16):
        prepare = kill_at_call(trainer_module, "pack_parts", call, after=after)
        (ended,) = run_children(command_of(everything(run, resume=True, eval_every=500)), tmp_path, prepare=prepare)
        assert ended.code == -signal.SIGKILL, ended.err
    (ended,) = run_children(command_of(everything(run, resume=True, eval_every=500)), tmp_path)
    assert ended.code == 0, ended.err
    (ended,) = run_children(command_of(everything(tmp_path / "other", eval_every=500)), tmp_path)
    assert ended.code == 0, ended.err
    assert_everything_same(run, tmp_path / "other")


@pytest.mark.slow
def test_two_processes_killed_again_and_again_equal_two_that_were_not(tmp_path):
    """Both ranks at drawn moments; the same number of processes adds in the same order."""
    changes = {"on_nonfinite": "stop", "cache": (shared_cache(dtype="fp32"), _second_cache()), "verify": True}
    run, draw = tmp_path / "run", random.Random(5)
    for _ in range(6):
        victim, (owner, name, most) = draw.randrange(2), MOMENTS[draw.choice(("forward of a pack", "step"))]
        kill = kill_at_call(owner, name, draw.randint(1, 2 * most))
        prepare = lambda rank, victim=victim, kill=kill: kill(rank) if rank == victim else None  # noqa: E731
        run_children(command_of(everything(run, resume=True, **changes)), tmp_path, 2, prepare=prepare, timeout=60)
    for each in (run, tmp_path / "other"):
        ended = run_children(command_of(everything(each, resume=True, **changes)), tmp_path, 2)
        assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert_same_run(run, tmp_path / "other")

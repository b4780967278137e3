"""One of several processes dies, fails or is told to stop: all end, soon, and say why; the run goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.trainer import Trainer
from tests.oracles.children import Gone, command, free_port, kill_at_call, run_children, wait_until
from tests.training.caches import assert_same_run, copied_cache, latest, settings, shared_cache, trainer_of

BOUND = 30.0  # seconds in which all have to be gone; a collective of gloo notices a closed connection at once


def chosen_for(run: Path, **changes: Any) -> TrainSettings:
    values = {"global_batch": 2, "tokens_per_batch": 100, "checkpoint_every": 2, "max_steps": 10, "eval_every": 5}
    return settings(run, **{**values, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """Two processes that nobody disturbed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    ended = run_children(command(chosen_for(directory / "run")), directory, 2)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    return directory / "run"


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def resume(run: Path, directory: Path, size: int = 2, **changes: Any) -> None:
    ended = run_children(command(chosen_for(run, resume=True, **changes)), directory, size)
    assert [one.code for one in ended] == [0] * size, [one.err for one in ended]


def on_rank(rank: int, prepare: Callable[[int], None]) -> Callable[[int], None]:
    """What only one rank is prepared with."""
    return lambda own: prepare(own) if own == rank else None


def said_in_one_line(ended: Gone) -> str:
    assert "Traceback" not in ended.err, ended.err
    assert len(ended.errors) == 1, ended.err
    return ended.errors[0]


def test_two_undisturbed_runs_of_two_processes_are_the_same_bit_for_bit(uninterrupted, tmp_path):
    ended = run_children(command(chosen_for(tmp_path / "run")), tmp_path, 2)
    assert [one.code for one in ended] == [0, 0]
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(("step", 6), id="between steps"),
        pytest.param(("validate", 2), id="before a validation", marks=pytest.mark.slow),
        pytest.param(("save", 2), id="before a checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_ends_the_others_and_resume_is_exact(rank, moment, uninterrupted, tmp_path):
    run, name, number = tmp_path / "run", *moment
    began = time.monotonic()
    prepare = on_rank(rank, kill_at_call(Trainer, name, number))
    ended = run_children(command(chosen_for(run)), tmp_path, 2, prepare=prepare, timeout=BOUND)
    assert time.monotonic() - began < BOUND
    assert ended[rank].code == -signal.SIGKILL
    survivor = ended[1 - rank]
    assert survivor.code == 1, survivor.err
    assert "another process of this run ended" in said_in_one_line(survivor)
    assert "--resume" in survivor.err
    if rank == 1:
        assert status(run)["state"] in ("failed", "resumable")
        assert "another process of this run ended" in status(run)["why"]
    resume(run, tmp_path)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("call", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_between_its_forward_and_its_backward_pass(call, uninterrupted, tmp_path):
    """The other one has its sums of gradients under way."""
    from eagle_offline.training import trainer as module

    run = tmp_path / "run"
    prepare = on_rank(1, kill_at_call(module, "pack_parts", call))
    ended = run_children(command(chosen_for(run)), tmp_path, 2, prepare=prepare, timeout=BOUND)
    assert ended[0].code == 1, ended[0].err
    said_in_one_line(ended[0])
    resume(run, tmp_path)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_sample_of_one_process_ends_all_and_its_message_is_seen(rank, tmp_path):
    plan = [packs for _, packs in trainer_of(chosen_for(tmp_path / "unused", global_batch=4)).remaining_steps()]
    trainer = trainer_of(chosen_for(tmp_path / "unused", global_batch=4))
    sample = int(plan[3][rank][0])
    where, local = trainer.corpus.samples.locate(sample)
    cache = copied_cache(tmp_path / "cache")
    shard = cache / where.shard_file(int(where.shards[local]))
    content = bytearray(shard.read_bytes())
    states = where[local].input_ids.numpy().astype("<i4").tobytes()
    place = bytes(content).find(states)
    assert place >= 0
    content[place] ^= 1
    shard.write_bytes(content)
    run = tmp_path / "run"
    chosen = chosen_for(run, cache=(cache,), global_batch=4, checkpoint_every=1)
    ended = run_children(command(chosen), tmp_path, 2, timeout=BOUND)
    assert ended[rank].code == 4, ended[rank].err
    assert shard.name in said_in_one_line(ended[rank])
    assert ended[1 - rank].code != 0
    said_in_one_line(ended[1 - rank])
    assert status(run)["state"] == "failed"


@pytest.mark.parametrize("told", [pytest.param((0,), marks=pytest.mark.slow), (1,), (0, 1)])
def test_a_signal_to_any_of_them_stops_all_after_the_step_in_hand(told, uninterrupted, tmp_path):
    run = tmp_path / "run"

    def terminate(children: list[int]) -> None:
        wait_until(lambda: len(read_metrics(run)) >= 4)
        for rank in told:
            os.kill(children[rank], signal.SIGTERM)

    slow = slowed_down if told != (0, 1) else None
    ended = run_children(command(chosen_for(run)), tmp_path, 2, prepare=slow, while_running=terminate, timeout=BOUND)
    assert [one.code for one in ended] == [5, 5], [one.err for one in ended]
    for one in ended:
        assert "stopped by a signal after step " in said_in_one_line(one)
    assert status(run)["state"] == "resumable"
    assert (
        latest(run).name
        == f"step-{json.loads((latest(run) / 'training_state.json').read_text())['standing']['position']['step']:08d}"
    )
    resume(run, tmp_path)
    assert_same_run(run, uninterrupted)


def slowed_down(_rank: int) -> None:
    """Steps take long enough to be met by a signal."""
    original = Trainer.step

    def step(*arguments: Any) -> Any:
        time.sleep(0.15)
        return original(*arguments)

    Trainer.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_where_the_others_stopped(before, after, uninterrupted, tmp_path):
    """The same steps and lines; sums of gradients are added in another order."""
    run = tmp_path / "run"
    prepare = on_rank(0, kill_at_call(Trainer, "step", 6))
    run_children(command(chosen_for(run)), tmp_path, before, prepare=prepare, timeout=BOUND)
    assert (run / "latest").exists()
    resume(run, tmp_path, after)
    found, expected = read_metrics(run), read_metrics(uninterrupted)
    assert [(row["kind"], row["step"], row["epoch"]) for row in found] == [
        (row["kind"], row["step"], row["epoch"]) for row in expected
    ]
    for one, two in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.parametrize("wrong", ["run is there", "something else is there", "no cache", "global batch"])
def test_what_is_refused_is_refused_by_all_at_once(wrong, tmp_path):
    """No process waits for one that has left already."""
    run, changes = tmp_path / "run", {}
    run.mkdir()
    if wrong == "run is there":
        ended = run_children(command(chosen_for(run, max_steps=1)), tmp_path, 1)
        assert ended[0].code == 0, ended[0].err
    if wrong == "something else is there":
        (run / "thesis.tex").write_text("mine")
    if wrong == "no cache":
        changes = {"cache": (tmp_path / "nothing",)}
    if wrong == "global batch":
        changes = {"global_batch": 3}
    code = {"run is there": 2, "something else is there": 3, "no cache": 4, "global batch": 2}[wrong]
    began = time.monotonic()
    ended = run_children(command(chosen_for(run, **changes)), tmp_path, 2, timeout=15)
    assert time.monotonic() - began < 15
    assert ended[0].code == code, ended[0].err
    assert ended[1].code != 0
    for one in ended:
        said_in_one_line(one)


# What torchrun adds: it watches, and passes signals on.


class Launched:
    """`torchrun` with two processes."""

    def __init__(self, chosen: TrainSettings, directory: Path):
        words = [
            "python", "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
            "-m", "eagle_offline", *command(chosen),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.log = directory / "torchrun.log"
        self.process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=self.log.open("w"))

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("told", ["torchrun", "all", "rank 0", "rank 1"])
def test_a_signal_under_torchrun_stops_after_the_step_in_hand(told, tmp_path):
    """`all`: what a scheduler does that signals every process of a job, after which torchrun passes it on again."""
    run = tmp_path / "run"
    chosen = chosen_for(run, max_steps=2000, num_epochs=400, checkpoint_every=5000, eval_every=5000)
    launched = Launched(chosen, tmp_path)
    try:
        wait_until(lambda: len(read_metrics(run)) >= 4, 90)
        workers = launched.workers()
        assert len(workers) == 2
        targets = {
            "torchrun": [launched.process.pid], "all": [*workers, launched.process.pid],
            "rank 0": workers[:1], "rank 1": workers[1:],
        }[told]  # fmt: skip
        for target in targets:
            os.kill(target, signal.SIGTERM)
        assert launched.process.wait(timeout=60) != 0
    finally:
        launched.process.kill()
    said = launched.log.read_text()
    assert status(run)["state"] == "resumable", (status(run), said[-3000:])
    assert "stopped by a signal after step" in said
    assert f"{os.sep}eagle_offline{os.sep}" not in said, "torchrun has a traceback of its own, we have none"
    stopped = int(latest(run).name.removeprefix("step-"))
    assert max(row["step"] for row in read_metrics(run)) == stopped
    resume(run, tmp_path, max_steps=stopped + 1, accept_drift=("max_steps",), num_epochs=400)


@pytest.mark.slow
def test_a_process_killed_under_torchrun_ends_the_job(tmp_path):
    run = tmp_path / "run"
    launched = Launched(chosen_for(run, max_steps=2000, num_epochs=400), tmp_path)
    try:
        wait_until(lambda: len(read_metrics(run)) >= 4, 90)
        os.kill(launched.workers()[1], signal.SIGKILL)
        assert launched.process.wait(timeout=60) not in (0, None)
    finally:
        launched.process.kill()
    said = launched.log.read_text()
    assert status(run)["state"] in ("failed", "resumable"), said[-3000:]
    ours = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1, said
    assert "another process of this run ended" in ours[0]
    assert shared_cache().is_dir()


def test_the_variables_of_a_launcher_have_to_be_whole(tmp_path):
    """A rank without an address to meet at: one line, not a traceback."""

    def forget(_rank: int) -> None:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
        os.environ.pop("MASTER_ADDR", None)
        os.environ.pop("MASTER_PORT", None)

    (ended,) = run_children(command(chosen_for(tmp_path / "run")), tmp_path, prepare=forget, timeout=15)
    assert ended.code in (1, 2)
    said_in_one_line(ended)

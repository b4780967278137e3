"""Many kills in one run, and kills at the steps of writing Zarr: resumed in the end, the same bytes as without any."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from tests import builders
from tests.faults.driver import Driver, Run
from tests.faults.work import KINDS, Work, check_nothing_wrong_is_readable, check_same, check_status

NUM_KILLS = 50
DEFAULT_SHARE = 6  # of the steps of Zarr


@pytest.mark.parametrize("num_kills", [NUM_KILLS // 10, pytest.param(NUM_KILLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_many_times_in_one_run_it_ends_with_the_bytes_of_an_uninterrupted_one(
    driver: Driver, tmp_path: Path, kind: str, num_kills: int
) -> None:
    # A sample a shard, so that there is always something left to be killed at.
    work = Work(kind, tmp_path / "cache", count=num_kills + num_kills // 2, shard_size=1, flags={})
    began = time.monotonic()
    events = work.uninterrupted(driver).events
    a_shard = len(events) / work.num_shards
    seconds = time.monotonic() - began
    rng = random.Random(num_kills)
    struck = rounds = 0
    while struck < num_kills:
        rounds += 1
        assert rounds <= 2 * num_kills, "too few of the kills struck a run at work"
        num_processes = rng.choice((1, 1, 2, 3))
        requests = work.requests(num_processes)
        for one in requests:
            if rng.random() < 0.5:
                one["kill_after_seconds"] = rng.uniform(0, seconds if num_processes == 1 else 2 * seconds) / 3
            else:
                one["accident"] = {
                    "event": rng.randint(1, max(3, round(1.2 * a_shard))),
                    "when": rng.choice(("before", "half", "after")),
                    "kind": "kill",
                }
        runs = driver.run_together(requests)
        assert {run.code for run in runs} <= {0, -9}, [run.err for run in runs]
        struck += sum(run.code == -9 for run in runs)
        check_nothing_wrong_is_readable(work.place, work.reference, work.num_shards)
        if len(builders.record_contents(work.place)) == work.num_shards and struck < num_kills:
            # All is there: take some of it away again, as an operator might.
            for name in rng.sample(sorted(builders.record_contents(work.place)), work.num_shards // 2):
                (work.place / name).unlink()
    last = driver.run_together(work.requests(rng.choice((2, 3))))
    assert {run.code for run in last} == {0}, [run.err for run in last]
    check_same(work.place, work.reference)


@pytest.fixture(scope="module", params=["zarr", "convert"])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    flags = {"state_encoding": "raw"} if request.param == "zarr" else {}
    return Work(request.param, tmp_path_factory.mktemp("steps") / "cache", count=3, flags=flags)


def moments(run: Run) -> dict[str, tuple[int, str]]:
    """One moment of every kind: what happens to which file of which array, first or last shard."""
    kinds: dict[str, tuple[int, str]] = {}
    for number, event in enumerate(run.events, start=1):
        name, _, path = event.partition(" ")
        what = re.sub(r"\.partial-.*?(?=/|$)|[0-9a-f]{32}", "", path)
        for when in ("before", "half", "after"):
            if when != "half" or name in ("chunk", "document", "write_bytes", "rmtree"):
                kinds.setdefault(f"{name} {what} {when}", (number, when))
    return kinds


def kill_and_resume(driver: Driver, work: Work, event: int, when: str) -> None:
    work.clear()
    run = work.run(driver, {"event": event, "when": when, "kind": "kill"})
    assert run.code == -9, run.err
    check_nothing_wrong_is_readable(work.place, work.reference, work.num_shards)
    # In this process, not in another child: what a process draws at random when it starts must not matter.
    again = builders.run_cli(*work.arguments(resume=True))
    assert again.code == 0, again.err
    check_same(work.place, work.reference)


def test_killed_at_a_share_of_the_steps_of_zarr_then_resumed_gives_the_same_bytes(driver: Driver, work: Work) -> None:
    found = moments(work.uninterrupted(driver))
    of_shards = [name for name in found if "shard-" in name]
    by_event: dict[str, list[str]] = {}
    for name in random.Random(7).sample(of_shards, len(of_shards)):
        by_event.setdefault(name.split()[0] + name.split()[-1], []).append(name)
    # What is written of a shard, its directories, its documents, its chunks, in the middle of each, and its name.
    chosen = ["replaceafter", "replacebefore", "chunkhalf", "documenthalf", "mkdirafter", "fsyncafter"][:DEFAULT_SHARE]
    for kind in chosen:
        kill_and_resume(driver, work, *found[by_event[kind][0]])


@pytest.mark.slow
def test_killed_at_every_kind_of_step_of_zarr_then_resumed_gives_the_same_bytes(driver: Driver, work: Work) -> None:
    found = moments(work.uninterrupted(driver))
    for name, moment in found.items():
        # After one step is before the next, but for the last.
        if name.split()[-1] != "before" or moment[0] == 1:
            kill_and_resume(driver, work, *moment)


def test_the_steps_of_zarr_are_durable_in_order(driver: Driver, work: Work) -> None:
    """Files and directories of a shard are durable before the shard has its name; the name is before its record."""
    run = work.uninterrupted(driver)
    renames = [n for n, event in enumerate(run.events) if event.startswith("replace ") and "shard-" in event]
    assert len(renames) == work.num_shards
    for number in renames:
        sibling = run.events[number].split(" ", 1)[1]
        before = [event.split(" ", 1) for event in run.events[:number] if sibling in event]
        synced = {path for name, path in before if name == "fsync"}
        written = {path for name, path in before if name in ("chunk", "document")}
        assert written
        assert {sibling, *written, *(str(Path(path).parent) for path in written)} <= synced
        for path in written:
            last = max(n for n, (name, at) in enumerate(before) if name in ("chunk", "document") and at == path)
            assert any(name == "fsync" and at == path for name, at in before[last:]), path
        assert run.events[number + 1].split(" ", 1)[0] == "fsync", "the shard's name is not durable"
        record = next(event for event in run.events[number:] if event.startswith("link "))
        assert "commit-" in record


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_leaves_the_status_of_the_last_run_that_ended_and_the_next_end_replaces_it(
    driver: Driver, tmp_path: Path, kind: str
) -> None:
    work = Work(kind, tmp_path / "cache")
    events = work.uninterrupted(driver).events
    record = max(n for n, event in enumerate(events, start=1) if "commit-" in event and event.startswith("link"))
    full = work.run(driver, {"event": record, "when": "before", "kind": "ENOSPC"})
    assert full.code == 6, full.err
    check_status(work.place, full)
    assert work.run(driver, {"event": 2, "when": "before", "kind": "kill"}).code == -9
    check_status(work.place, full)
    again = work.run(driver)
    assert again.code == 0, again.err
    check_status(work.place, again)
    check_same(work.place, work.reference)

"""Several processes on one cache, and processes that are asked to stop."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from eagle_offline import open_cache
from tests import builders
from tests.faults.driver import Driver, request


def arguments(directory: Path, **flags: object) -> list[str]:
    return builders.precompute_arguments(
        directory, None, builders.shared_chat(8), **{"shard_size": 2, "batch_size": 2, **flags}
    )


@pytest.fixture(scope="module")
def reference(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("reference") / "cache"
    run = driver.run(arguments(directory))
    assert run.code == 0, run.err
    return directory, run.events


def check_same_samples(directory: Path, reference: Path) -> None:
    assert builders.leftovers(directory) == []
    assert builders.shard_bytes(directory) == builders.shard_bytes(reference)
    assert builders.record_contents(directory) == builders.record_contents(reference)
    assert builders.run_cli("inspect-manifest", directory, "--verify").code == 0
    assert len(open_cache(directory)) == 8


def test_two_processes_of_two_make_the_bytes_of_one(
    driver: Driver, tmp_path: Path, reference: tuple[Path, list[str]]
) -> None:
    one_by_one, together = tmp_path / "one-by-one", tmp_path / "together"
    run = driver.run(arguments(one_by_one, resume=True, process_index=1, process_count=2))
    assert run.code == 0, run.err
    # The other one in this process, not in a fork of the same: nothing drawn at a process's start may matter.
    ended = builders.run_cli(*arguments(one_by_one, resume=True, process_index=0, process_count=2))
    assert ended.code == 0, ended.err
    check_same_samples(one_by_one, reference[0])
    runs = driver.run_together(
        [request(arguments(together, resume=True, process_index=index, process_count=2)) for index in (0, 1)]
    )
    assert [run.code for run in runs] == [0, 0], runs
    check_same_samples(together, reference[0])
    states = [json.loads((together / f"status-000{index}.json").read_text())["state"] for index in (0, 1)]
    assert states == ["done", "done"]


def test_two_processes_of_two_started_on_an_empty_directory_need_no_resume(driver: Driver, tmp_path: Path) -> None:
    runs = driver.run_together(
        [request(arguments(tmp_path / "cache", process_index=index, process_count=2)) for index in (0, 1)]
    )
    # The later one may find the cache begun by the earlier one and then says to resume; nothing else may happen.
    assert {run.code for run in runs} <= {0, 2}
    assert 0 in {run.code for run in runs}


def test_writers_of_the_same_shards_at_the_same_time_end_with_one_cache(
    driver: Driver, tmp_path: Path, reference: tuple[Path, list[str]]
) -> None:
    for attempt in range(2):
        directory = tmp_path / f"cache-{attempt}"
        runs = driver.run_together([request(arguments(directory, resume=True)) for _ in range(3)])
        assert [run.code for run in runs] == [0, 0, 0], [run.err for run in runs]
        check_same_samples(directory, reference[0])


def in_between(events: list[str], count: int, seed: int) -> list[int]:
    """Events after the tokens are there: those of the cache itself."""
    last_of_tokens = max(n for n, event in enumerate(events, start=1) if "/tokens" in event)
    of_status = min(n for n, event in enumerate(events, start=1) if "status" in event)
    later = range(last_of_tokens + 1, of_status)
    return sorted(random.Random(seed).sample(later, count)) if count < len(later) else list(later)


def run_with_another_in_between(driver: Driver, ours: list[str], theirs: list[str], event: int) -> tuple[int, int, str]:
    """Run ours; when it comes to `event`, theirs runs from its start to its end. Return both exit codes, our stderr."""
    other = request(theirs)
    run = driver.run(ours, {"event": event, "when": "before", "kind": "other", "other": other})
    codes = [int(line.split()[1]) for line in run.events if line.startswith("other ")]
    assert len(codes) == 1
    return run.code, codes[0], run.err


@pytest.mark.parametrize("count", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_another_writer_that_runs_between_any_two_steps_changes_nothing(
    driver: Driver, tmp_path: Path, reference: tuple[Path, list[str]], count: int
) -> None:
    for event in in_between(reference[1], count, seed=1):
        directory = tmp_path / f"cache-{event}"
        ours, theirs, err = run_with_another_in_between(
            driver, arguments(directory, resume=True), arguments(directory, resume=True), event
        )
        assert (ours, theirs) == (0, 0), f"at {reference[1][event - 1]}: {err}"
        check_same_samples(directory, reference[0])


@pytest.mark.parametrize("count", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_of_writers_with_other_settings_one_wins_and_the_other_is_refused(
    driver: Driver, tmp_path: Path, reference: tuple[Path, list[str]], count: int
) -> None:
    links = (n for n, event in enumerate(reference[1], start=1) if event.startswith("link") and "manifest" in event)
    manifest = next(links)
    for event in {manifest - 2, manifest - 1, manifest, *in_between(reference[1], count, seed=2)}:
        directory = tmp_path / f"cache-{event}"
        ours, theirs, err = run_with_another_in_between(
            driver, arguments(directory, resume=True), arguments(directory, resume=True, batch_size=1), event
        )
        assert sorted((ours, theirs)) == [0, 3], f"at {reference[1][event - 1]}: {err}"
        assert ours == (3 if event <= manifest else 0)
        assert builders.leftovers(directory) == []
        assert builders.run_cli("inspect-manifest", directory, "--verify").code == 0


def test_writers_with_other_settings_started_together_leave_one_whole_cache(driver: Driver, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    runs = driver.run_together([request(arguments(directory, resume=True, batch_size=size)) for size in (1, 2)])
    assert sorted(run.code for run in runs) == [0, 3], [run.err for run in runs]
    refused = next(run for run in runs if run.code == 3)
    assert "batch_plan.batch_size" in refused.errors[-1]
    assert builders.leftovers(directory) == []
    assert builders.run_cli("inspect-manifest", directory, "--verify").code == 0


@pytest.mark.parametrize("grace_seconds", [0, 20])
@pytest.mark.parametrize("count", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_first_signal_ends_a_run_resumable_wherever_it_comes(
    driver: Driver, tmp_path: Path, reference: tuple[Path, list[str]], count: int, grace_seconds: int
) -> None:
    events = reference[1]
    of_status = min(n for n, event in enumerate(events, start=1) if "status" in event)
    last_shard = max(n for n, event in enumerate(events, start=1) if event.startswith("write_batch"))
    every = range(1, of_status)
    for event in sorted(random.Random(3).sample(every, min(count, len(every)))):
        directory = tmp_path / f"cache-{event}"
        accident = {"event": event, "when": "before", "kind": "terminate"}
        run = driver.run(arguments(directory, grace_seconds=grace_seconds), accident)
        finished = event >= last_shard  # what was left fitted into the grace period
        assert run.code == (0 if finished else 5), f"SIGTERM at {events[event - 1]}: exit {run.code}, {run.err}"
        status = json.loads((directory / "status.json").read_text())
        assert status["state"] == ("done" if finished else "resumable")
        assert not builders.leftovers(directory)
        again = driver.run(arguments(directory, resume=True))
        assert again.code == 0, again.err
        check_same_samples(directory, reference[0])
        assert json.loads((directory / "status.json").read_text())["state"] == "done"


def test_a_signal_without_grace_drops_the_shard_in_hand(driver: Driver, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    # Samples of a megabyte each reach the disk one by one, so that the signal comes in the middle of a shard.
    flags = {"shard_size": 8, "batch_size": 1, "grace_seconds": 0}
    probe = driver.run(arguments(tmp_path / "probe", **flags))
    fsync_of_shard = next(n for n, e in enumerate(probe.events, start=1) if e.startswith("write_batch") and n > 20)
    # The last event before the shard's own is in the companions: the run stops before it begins the shard.
    run = driver.run(arguments(directory, **flags), {"event": fsync_of_shard - 1, "when": "after", "kind": "terminate"})
    assert run.code == 5, run.err
    assert len(run.errors) == 1
    assert "--resume" in run.errors[0]
    assert not builders.shard_bytes(directory)
    assert json.loads((directory / "status.json").read_text()) == {
        "state": "resumable",
        "exit_code": 5,
        "why": run.errors[0].removeprefix("error: "),
    }

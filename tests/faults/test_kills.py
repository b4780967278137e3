"""Killed at every step of writing, then resumed: the same bytes as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path

import pytest

from eagle_offline import open_cache
from eagle_offline.errors import DataError
from tests import builders
from tests.faults.driver import Driver, Run

DEFAULT_SHARE = 8  # kills in the default run; all of them are `slow`


def arguments(directory: Path, **flags: object) -> list[str]:
    return builders.precompute_arguments(
        directory, None, builders.shared_chat(6), **{"shard_size": 2, "batch_size": 2, **flags}
    )


@cache
def uninterrupted(driver: Driver, directory: Path) -> Run:
    """A whole run at `directory`, its content kept beside it under the name `reference`.

    Every run of a test uses one directory, because the manifest says where its inputs were.
    """
    run = driver.run(arguments(directory))
    assert run.code == 0, run.err
    shutil.copytree(directory, directory.with_name("reference"))
    shutil.rmtree(directory)
    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills") / "cache"


def accidents(run: Run) -> list[tuple[int, str]]:
    """Every event of a run with the moments at which something may happen."""
    moments = []
    for number, event in enumerate(run.events, start=1):
        moments += [(number, "before"), (number, "after")]
        if event.startswith("write_bytes"):
            moments.append((number, "half"))
    return moments


def check_nothing_wrong_is_readable(directory: Path, reference: Path) -> None:
    """After a kill: what is committed is whole, and what is not whole cannot be opened as if it were."""
    whole = builders.shard_bytes(reference)
    for name, record in builders.record_contents(directory).items():
        assert (directory / record["file"]).read_bytes() == whole[record["file"]], name
    committed = len(builders.record_contents(directory))
    if not (directory / "manifest.json").exists() or committed < len(whole):
        with pytest.raises(DataError):
            open_cache(directory)


def check_same_as_uninterrupted(directory: Path, reference: Path) -> None:
    assert builders.leftovers(directory) == []
    assert builders.record_contents(directory) == builders.record_contents(reference)
    ours, theirs = builders.tree(directory), builders.tree(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name][1] != theirs[name][1]] == []
    assert builders.run_cli("inspect-manifest", directory, "--verify").code == 0


def kill_and_resume(driver: Driver, place: Path, kills: list[tuple[int, str]]) -> None:
    """Kill one run after another at the given moments, each resuming the one before, then let one finish."""
    uninterrupted(driver, place)
    reference = place.with_name("reference")
    try:
        for event, when in kills:
            run = driver.run(arguments(place, resume=True), {"event": event, "when": when, "kind": "kill"})
            assert run.code in (-9, 0), run.err  # a resumed run may have fewer events than that
            check_nothing_wrong_is_readable(place, reference)
        # In this process, not in another child: what a process draws at random when it starts must not matter.
        last = builders.run_cli(*arguments(place, resume=True))
        assert last.code == 0, last.err
        check_same_as_uninterrupted(place, reference)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_killed_at_a_share_of_all_events_then_resumed_gives_the_same_bytes(driver: Driver, place: Path) -> None:
    moments = accidents(uninterrupted(driver, place))
    rng = random.Random(20)
    # One of each kind of event in each kind of file, before any others.
    kinds: dict[str, tuple[int, str]] = {}
    events = uninterrupted(driver, place).events
    for moment in rng.sample(moments, len(moments)):
        name, _, path = events[moment[0] - 1].partition(" ")
        kinds.setdefault(f"{name} {Path(path).parent.name if name != 'fsync' else ''}", moment)
    chosen = list(kinds.values())[:DEFAULT_SHARE]
    chosen += rng.sample([m for m in moments if m not in chosen], DEFAULT_SHARE - len(chosen))
    for moment in chosen:
        kill_and_resume(driver, place, [moment])


@pytest.mark.slow
def test_killed_at_every_event_then_resumed_gives_the_same_bytes(driver: Driver, place: Path) -> None:
    for moment in accidents(uninterrupted(driver, place)):
        kill_and_resume(driver, place, [moment])


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_killed_several_times_over_then_resumed_gives_the_same_bytes(driver: Driver, place: Path, seed: int) -> None:
    moments = accidents(uninterrupted(driver, place))
    kill_and_resume(driver, place, random.Random(seed).sample(moments, 3))


def test_every_file_is_durable_before_it_has_its_name_and_its_directory_after(driver: Driver, place: Path) -> None:
    events = [event.split(" ", 1) for event in uninterrupted(driver, place).events]
    for number, (name, path) in enumerate(events):
        if name in ("replace", "link") and str(place) in path:
            assert events[number - 1] == ["fsync", path], f"{path} was put in place before it was durable"
            assert events[number + 1] == ["fsync", str(Path(path).parent)], f"the name of {path} is not durable"
    records = [n for n, (name, path) in enumerate(events) if name == "link" and "commit-" in path]
    shards = [n for n, (name, path) in enumerate(events) if name == "replace" and "shard-" in path]
    assert len(records) == len(shards) == 3
    assert all(shard < record for shard, record in zip(shards, records, strict=True))
    assert min(n for n, (name, path) in enumerate(events) if "shard-" in path) > next(
        n for n, (name, path) in enumerate(events) if name == "link" and "manifest" in path
    )


def test_a_deleted_record_makes_resume_write_exactly_that_shard_again(driver: Driver, place: Path) -> None:
    uninterrupted(driver, place)
    reference = place.with_name("reference")
    for also_the_shard in (False, True):
        shutil.copytree(reference, place)
        record = builders.record_contents(place)["commit-000001.json"]
        (place / "commit-000001.json").unlink()
        if also_the_shard:
            (place / record["file"]).unlink()
        before = builders.tree(place)
        run = driver.run(arguments(place, resume=True))
        assert run.code == 0, run.err
        (commit,) = (event for event in run.events if event.startswith("link") and "commit-" in event)
        assert "commit-000001" in commit
        check_same_as_uninterrupted(place, reference)
        after = builders.tree(place)
        touched = [name for name in after if after[name] != before.get(name)]
        made = {name for name in touched if not name.startswith("index-")}  # the index is dropped and written again
        assert made <= {"commit-000001.json", record["file"]}
        shutil.rmtree(place)


def test_resuming_a_whole_cache_writes_nothing_but_its_status(driver: Driver, place: Path) -> None:
    uninterrupted(driver, place)
    shutil.copytree(place.with_name("reference"), place)
    before = builders.tree(place)
    run = driver.run(arguments(place, resume=True))
    assert run.code == 0, run.err
    assert builders.tree(place) == before
    assert all("status.json" in event or event == f"fsync {place}" or "file-digests" in event for event in run.events)
    shutil.rmtree(place)


def test_a_shard_deleted_after_its_commit_is_reported_by_everything_that_needs_it(driver: Driver, place: Path) -> None:
    uninterrupted(driver, place)
    shutil.copytree(place.with_name("reference"), place)
    try:
        gone = place / builders.record_contents(place)["commit-000001.json"]["file"]
        gone.unlink()
        inspected = builders.run_cli("inspect-manifest", place, "--verify")
        assert inspected.code == 4
        assert gone.name in inspected.out
        cache = open_cache(place)
        for index in range(len(cache)):
            if cache.shards[index] == 1:
                with pytest.raises(DataError, match=gone.name):
                    cache[index]
            else:
                cache[index]
        resumed = driver.run(arguments(place, resume=True))
        assert resumed.code == 4, "a resume that finds a committed shard without its file says so"
        assert gone.name in resumed.err
    finally:
        shutil.rmtree(place)


def test_nothing_is_left_running_or_locked_by_a_killed_tokeniser(driver: Driver, place: Path) -> None:
    """A kill while tokens are written leaves a lock whose holder is dead; the next run does not wait for it."""
    uninterrupted(driver, place)
    for event in (1, 5, 10):
        kill_and_resume(driver, place, [(event, "after")])

"""A writer that sleeps and wakes after its shard was made by another: one shard stands, and nobody fails."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path

import pytest

from eagle_offline import open_cache
from eagle_offline.durable import remove_abandoned
from tests import builders
from tests.faults import driver as drivers
from tests.faults.driver import Driver
from tests.faults.work import KINDS, Work, check_nothing_wrong_is_readable, check_same, committed_files, leftovers


@pytest.fixture(scope="module", params=KINDS)
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(request.param, tmp_path_factory.mktemp("sleepers") / "cache", count=4)


def steps_of_first_shard(events: list[str]) -> dict[str, int]:
    """Where one may fall asleep while the first shard is written: `when` is after that step."""
    numbered = list(enumerate(events, start=1))
    named = next(n for n, event in numbered if event.startswith("replace") and "shard-000000" in event)
    record = next(n for n, event in numbered if event.startswith("link") and "commit-000000" in event)
    begun = next(n for n, event in numbered if "shard-000000" in event or (event.startswith("write_batch") and n > 8))
    return {
        "begun": begun,
        "written": named - 1,
        "named": named,
        "about to be recorded": record - 1,
        "recorded": record,
    }


def sleep_and_wake(driver: Driver, work: Work, event: int, *, other_bytes: bool = False, processes: int = 1) -> None:
    """One falls asleep after an event, others do all of the work, and then it wakes."""
    work.clear()
    sleeper = drivers.request(work.arguments(resume=True), {"event": event, "when": "after", "kind": "stop"})
    others = work.requests(processes)
    for one in others:
        one["other_bytes"] = other_bytes
    runs = driver.run_together([sleeper, *others])
    assert [run.code for run in runs] == [0] * (1 + processes), [run.err for run in runs]
    assert all(not run.errors for run in runs)
    assert leftovers(work.place) == []
    ended = builders.run_cli("verify", work.place)
    assert ended.code == 0, ended.out
    assert len(open_cache(work.place)) == work.count


def test_a_sleeper_that_wakes_after_all_was_made_leaves_the_same_bytes(driver: Driver, work: Work) -> None:
    for event in steps_of_first_shard(work.uninterrupted(driver).events).values():
        sleep_and_wake(driver, work, event)
        check_same(work.place, work.reference)


def test_of_a_sleeper_and_others_whose_bytes_are_different_each_shard_is_of_one_of_them(
    driver: Driver, work: Work
) -> None:
    steps = steps_of_first_shard(work.uninterrupted(driver).events)
    ours = committed_files(work.reference)
    for step, event in steps.items():
        sleep_and_wake(driver, work, event, other_bytes=True)
        files = {record["shard"]: record["file"] for record in builders.record_contents(work.place).values()}
        is_ours = {shard: any(path.split("/")[0] == file for path in ours) for shard, file in files.items()}
        # Whoever has the first record has the shard; the others were quicker with everything after it.
        assert is_ours == {0: step == "recorded", 1: False}, step
        # Whatever stands is one environment's, whole: samples read back and none is a mixture.
        assert sorted(sample.sample_id for sample in open_cache(work.place)) == list(range(work.count))


@pytest.mark.slow
def test_a_sleeper_may_fall_asleep_anywhere(driver: Driver, work: Work) -> None:
    events = work.uninterrupted(driver).events
    first = steps_of_first_shard(events)["begun"]
    later = range(first, len(events) + 1)
    for event in sorted(random.Random(5).sample(later, min(20, len(later)))):
        sleep_and_wake(driver, work, event, processes=2)
        sleep_and_wake(driver, work, event, other_bytes=True)


def test_a_sleeper_that_is_killed_while_it_puts_its_shard_where_another_stands_takes_nothing_away(
    driver: Driver, work: Work
) -> None:
    """Two writers have made the same shard; the slower one dies at any step of putting its own in place."""
    events = work.uninterrupted(driver).events
    written = steps_of_first_shard(events)["written"]
    for step in range(1, 6):
        work.clear()
        # It goes on from the moment its shard is written: others have done all of the work meanwhile.
        other = drivers.request(work.arguments(resume=True))
        first = driver.run(
            work.arguments(resume=True),
            {
                "event": written,
                "when": "after",
                "kind": "other",
                "other": other,
                "then": {"event": step, "when": "before", "kind": "kill"},
            },
        )
        assert first.code in (0, -9), first.err
        check_nothing_wrong_is_readable(work.place, work.reference, work.num_shards)
        assert builders.run_cli("verify", work.place).code == 0
        again = work.run(driver)
        assert again.code == 0, again.err
        check_same(work.place, work.reference)


def test_readers_of_a_shard_never_miss_it_while_a_sleeper_puts_the_same_in_its_place(
    driver: Driver, work: Work
) -> None:
    events = work.uninterrupted(driver).events
    written = steps_of_first_shard(events)["written"]
    for step in range(1, 6):
        work.clear()
        other = drivers.request(work.arguments(resume=True))
        reader = drivers.request(["verify", str(work.place), "--json"])
        run = driver.run(
            work.arguments(resume=True),
            {
                "event": written,
                "when": "after",
                "kind": "other",
                "other": other,
                "then": {"event": step, "when": "before", "kind": "other", "other": reader},
            },
        )
        assert run.code == 0, run.err
        assert [line for line in run.events if line.startswith("other ")] == ["other 0"] * 2
        assert json.loads(Path(reader["stdout"]).read_text())["problems"] == []


def test_clearing_away_does_not_stumble_over_a_shard_that_gets_its_name_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One begins while another puts a Zarr shard in its place: what it was about to look into is gone."""
    sibling = tmp_path / f".shard-000000.partial-{socket.gethostname()}-{os.getpid()}-00000000"
    (sibling / "input_ids").mkdir(parents=True)
    scandir = os.scandir

    def rename_first(path: str | Path = ".") -> object:
        if Path(path) == sibling and sibling.exists():
            sibling.rename(tmp_path / "shard")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", rename_first)
    remove_abandoned(tmp_path)

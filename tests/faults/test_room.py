"""Room and rights that go away while a cache is written, in every way of writing one: a clean stop, then a resume."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import builders
from tests.faults.driver import Driver
from tests.faults.work import (
    KINDS,
    Work,
    check_nothing_wrong_is_readable,
    check_one_line,
    check_same,
    check_status,
    leftovers,
)

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights, so needs root")


def step(events: list[str], *parts: str) -> int:
    """The number of the first event that has all the parts in it."""
    return next(n for n, event in enumerate(events, start=1) if all(part in event for part in parts))


# Errors at the steps of Zarr


@pytest.fixture(scope="module", params=["zarr", "convert"])
def zarr(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Work:
    flags = {"state_encoding": "raw"} if request.param == "zarr" else {}
    return Work(request.param, tmp_path_factory.mktemp("room") / "cache", count=4, flags=flags)


@pytest.mark.parametrize("fault", ["ENOSPC", "EDQUOT", "EIO"])
@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_an_error_at_any_step_of_zarr_stops_cleanly_and_resume_ends_well(
    driver: Driver, zarr: Work, fault: str, count: int
) -> None:
    events = zarr.uninterrupted(driver).events
    first, last = step(events, "mkdir", ".partial-"), len(events) - 4
    by_name: dict[str, list[tuple[int, str]]] = {}
    for number in range(first, last):
        event = events[number - 1]
        name = event.split()[0]
        # A directory that is there already need not be made: that it cannot be is no error.
        made_again = name == "mkdir" and event in events[: number - 1]
        if made_again or "status" in event or event == f"fsync {zarr.place}":
            continue
        for when in ("before", "half") if name in ("chunk", "document", "write_bytes") else ("before",):
            by_name.setdefault(f"{name} {when}", []).append((number, when))
    rng = random.Random(fault)
    kinds = sorted(by_name)
    chosen = [rng.choice(by_name[kinds[n % len(kinds)]]) for n in rng.sample(range(max(count, len(kinds))), count)]
    for event, when in chosen:
        zarr.clear()
        run = zarr.run(driver, {"event": event, "when": when, "kind": fault})
        assert run.code == (1 if fault == "EIO" else 6), f"{when} {events[event - 1]}: {run.code} {run.err}"
        check_one_line(run, str(zarr.place))
        check_status(zarr.place, run)
        assert [name for name in leftovers(zarr.place) if not name.startswith("shard-")] == []
        check_nothing_wrong_is_readable(zarr.place, zarr.reference, zarr.num_shards)
        again = zarr.run(driver)
        assert again.code == 0, again.err
        check_status(zarr.place, again)
        check_same(zarr.place, zarr.reference)


# The disk fills up, a file may not grow


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    directory = Path(tempfile.mkdtemp(dir=builders.SCRATCH))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_others_fill_meanwhile_stops_it_before_it_is_full(driver: Driver, disk: Path, kind: str) -> None:
    work = Work(kind, disk / "cache", count=6)
    recorded = step(work.uninterrupted(driver).events, "link", "commit-000001")
    filler = disk / "filler"
    fill = f"head -c $(( ($(df --output=avail -k {disk} | tail -1) - 8) * 1024 )) /dev/zero > {filler}"
    run = work.run(driver, {"event": recorded, "when": "after", "kind": "shell", "command": fill})
    assert run.code == 6, run.err
    check_one_line(run, str(disk / "cache"), "needed", "free")
    assert shutil.disk_usage(disk).free > 0
    assert sorted(builders.record_contents(work.place)) == ["commit-000000.json", "commit-000001.json"]
    assert leftovers(work.place) == []
    check_status(work.place, run)
    still = work.run(driver)
    assert still.code == 6, still.err
    filler.unlink()
    again = work.run(driver)
    assert again.code == 0, again.err
    check_status(work.place, again)
    check_same(work.place, work.reference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_in_the_middle_of_a_shard_stops_it_and_nothing_is_in_the_way(
    driver: Driver, disk: Path, kind: str
) -> None:
    work = Work(kind, disk / "cache", count=6)
    events = work.uninterrupted(driver).events
    begun = step(events, "link", "commit-000000") + 2
    middle = begun + (step(events, "link", "commit-000001") - begun) // 2
    fill = f"cat /dev/zero > {disk / 'filler'} 2>/dev/null; true"
    run = work.run(driver, {"event": middle, "when": "after", "kind": "shell", "command": fill})
    assert run.code == 6, run.err
    check_one_line(run, str(disk / "cache"))
    # A shard that is whole and could not be committed is taken up again.
    assert [name for name in leftovers(work.place) if not name.startswith("shard-")] == []
    check_nothing_wrong_is_readable(work.place, work.reference, work.num_shards)
    (disk / "filler").unlink()
    assert work.run(driver).code == 0
    check_same(work.place, work.reference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_on_the_size_of_files_stops_it_in_one_line(driver: Driver, tmp_path: Path, kind: str) -> None:
    work = Work(kind, tmp_path / "cache", count=6, shard_size=6)
    work.uninterrupted(driver)
    (shard,) = work.reference.glob("shard-*")
    largest = max(path.stat().st_size for path in (shard, *shard.rglob("*")) if path.is_file())
    assert largest > 4000
    for limit, begun in ((1000, False), (largest - 1, True)):
        work.clear()
        if begun:  # what comes with a cache may be larger than a shard
            shutil.copytree(work.reference, work.place)
            for path in (*work.place.glob("commit-*"), *work.place.glob("index-*")):
                path.unlink()
            standing = work.place / shard.name
            shutil.rmtree(standing) if standing.is_dir() else standing.unlink()
        run = work.run(driver, limits={"FSIZE": limit})
        assert run.code == 1, run.err
        check_one_line(run, "File too large")
        assert leftovers(work.place) == []
        check_status(work.place, run)
        again = work.run(driver)
        assert again.code == 0, again.err
        check_same(work.place, work.reference)


# Rights


@as_root
@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_may_no_more_be_written_stops_it_in_one_line(driver: Driver, kind: str, count: int) -> None:
    parent = Path(tempfile.mkdtemp(dir=builders.SCRATCH))
    parent.chmod(0o777)
    work = Work(kind, parent / "cache", count=4, flags={"state_encoding": "raw"} if kind == "zarr" else {})
    events = work.uninterrupted(driver, user=NOBODY).events
    first = step(events, "manifest")
    moments = list(range(first, len(events) - 3))
    chosen = random.Random(count).sample(moments, min(count, len(moments)))
    # Between a file's making and its name: there it can neither get its name nor be taken away.
    for event in sorted(
        {*chosen, *(n for n in moments if events[n - 1].startswith("replace") and "head" in events[n - 1])}
    ):
        shut = f"chmod 555 {work.place}"
        run = work.run(driver, {"event": event, "when": "before", "kind": "shell", "command": shut}, user=NOBODY)
        said = events[event - 1]
        if run.code != 0:  # after the last file was made, nothing is left to fail
            assert run.code == 1, f"{said}: {run.err}"
            check_one_line(run, str(work.place), "Permission denied")
        work.place.chmod(0o755)
        check_nothing_wrong_is_readable(work.place, work.reference, work.num_shards)
        again = work.run(driver)
        assert again.code == 0, f"{said}: {again.err}"
        check_status(work.place, again)
        check_same(work.place, work.reference)
        work.clear()

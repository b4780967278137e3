"""Reading a cache that cannot be written, and one that is being written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eagle_offline import open_cache
from tests import builders
from tests.faults import driver as drivers
from tests.faults.driver import Driver
from tests.faults.test_limits import train
from tests.faults.test_room import NOBODY, step
from tests.faults.work import Work, check_one_line, check_same

FORMATS = ["arrow", "zarr"]


@pytest.fixture(scope="module", params=FORMATS)
def whole(driver: Driver, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = Work(request.param, tmp_path_factory.mktemp("whole") / "cache", count=12)
    work.uninterrupted(driver)
    return work.reference


@pytest.fixture(params=["mount", "rights"])
def closed(whole: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, int]]]:
    """A cache that may only be read, and who is to read it: on a read-only mount root, else one without the rights."""
    if os.geteuid() != 0:
        pytest.skip("takes another user's rights, so needs root")
    directory = Path(tempfile.mkdtemp(dir=builders.SCRATCH))
    directory.chmod(0o755)
    mounts = request.param == "mount"
    if mounts and subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        cache = Path(shutil.copytree(whole, directory / "cache"))
        if mounts:
            subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        yield cache, {} if mounts else {"user": NOBODY}
    finally:
        if mounts:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_cache_that_may_only_be_read_is_inspected_verified_converted_and_trained_from(
    driver: Driver, closed: tuple[Path, dict[str, int]]
) -> None:
    cache, user = closed
    before = builders.tree(cache, without=())
    elsewhere = Path(tempfile.mkdtemp(dir=builders.SCRATCH))
    elsewhere.chmod(0o777)
    reading = [
        ["verify", str(cache)],
        ["inspect-manifest", str(cache), "--verify"],
        ["convert", str(cache), "--output-dir", str(elsewhere / "result"), "--state-encoding", "fp8"],
        train(cache, elsewhere / "run"),
    ]
    for argv in reading:
        run = driver.run(argv, **user)
        assert run.code == 0, f"{argv[0]}: {run.err}"
    assert list((elsewhere / "run" / "checkpoints").iterdir())
    for argv in (["repair", str(cache)], train(cache, cache.parent / "run")):
        run = driver.run(argv, **user)
        assert run.code in (1, 2), run.err
        check_one_line(run, str(cache.parent))
        assert "cannot be written" in run.errors[0] or "Read-only" in run.errors[0] or "denied" in run.errors[0]
    assert builders.tree(cache, without=()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights, so needs root")
@pytest.mark.parametrize("closed", ["directory", "record", "shard"])
def test_what_may_not_even_be_read_is_one_line_that_says_so(driver: Driver, whole: Path, closed: str) -> None:
    directory = Path(tempfile.mkdtemp(dir=builders.SCRATCH))
    directory.chmod(0o755)
    cache = Path(shutil.copytree(whole, directory / "cache"))
    for index in cache.glob("index-*"):
        index.unlink()
    record = builders.record_contents(cache)["commit-000001.json"]
    {"directory": cache, "record": cache / "commit-000001.json", "shard": cache / record["file"]}[closed].chmod(0)
    out = Path(tempfile.mkdtemp(dir=builders.SCRATCH))
    out.chmod(0o777)
    for argv in (["verify", str(cache)], train(cache, out / "run"), ["inspect-manifest", str(cache)]):
        run = driver.run(argv, user=NOBODY)
        if closed == "shard" and argv[0] == "inspect-manifest" and not run.code:
            continue  # which reads no shard
        assert run.code in (1, 4), run.err
        assert "Traceback" not in run.err
        assert "ermission denied" in run.err + run.out
        assert len(run.errors) == (0 if run.out else 1), run.err


# While it is written


@pytest.mark.parametrize("format_", FORMATS)
def test_training_while_a_cache_is_written_is_on_what_was_committed_when_it_began(
    driver: Driver, tmp_path: Path, format_: str
) -> None:
    work = Work(format_, tmp_path / "cache", count=12)
    events = work.uninterrupted(driver).events
    # The writer is in the middle of its third shard, or has named it and not recorded it.
    for name, moment in (
        ("middle", step(events, "link", "commit-000001") + 4),
        ("named", step(events, "replace", "shard-000002")),
    ):
        work.clear()
        frozen = tmp_path / f"frozen-{name}"
        beside = drivers.request([*train(work.place, tmp_path / f"beside-{name}"), "--allow-partial"])
        run = work.run(
            driver,
            {"event": moment, "when": "after", "kind": "other", "other": beside,
             "then": {"event": 1, "when": "before", "kind": "shell", "command": f"cp -r {work.place} {frozen}"}},
        )  # fmt: skip
        assert run.code == 0, run.err
        assert "other 0" in run.events, [*(e for e in run.events if "other" in e), Path(beside["stderr"]).read_text()]
        check_same(work.place, work.reference)
        assert len(builders.record_contents(frozen)) == 2
        alone = driver.run([*train(frozen, tmp_path / f"alone-{name}"), "--allow-partial"])
        assert alone.code == 0, alone.err
        check_same_draft(tmp_path / f"beside-{name}", tmp_path / f"alone-{name}")


@pytest.mark.parametrize("format_", FORMATS)
def test_training_sees_nothing_of_shards_that_are_committed_while_it_runs(
    driver: Driver, tmp_path: Path, format_: str
) -> None:
    work = Work(format_, tmp_path / "cache", count=12)
    events = work.uninterrupted(driver).events
    killed = work.run(driver, {"event": step(events, "link", "commit-000002") + 2, "when": "after", "kind": "kill"})
    assert killed.code == -9
    frozen = tmp_path / "frozen"
    shutil.copytree(work.place, frozen)
    # It falls asleep once it has begun; the cache is completed, index and all; then it goes on.
    probe = driver.run([*train(frozen, tmp_path / "alone"), "--allow-partial"])
    assert probe.code == 0, probe.err
    accident = {"event": 2, "when": "after", "kind": "stop"}
    sleeper = drivers.request([*train(work.place, tmp_path / "beside"), "--allow-partial"], accident)
    runs = driver.run_together([sleeper, *work.requests(1)])
    assert [run.code for run in runs] == [0, 0], [run.err for run in runs]
    check_same(work.place, work.reference)
    assert len(open_cache(work.place)) == 12
    check_same_draft(tmp_path / "beside", tmp_path / "alone")


def check_same_draft(one: Path, other: Path) -> None:
    """The same draft, after the same steps on the same samples."""
    assert json.loads((one / "status.json").read_text())["state"] == "done"
    drafts = [sorted((run / "checkpoints").glob("*/*.safetensors")) for run in (one, other)]
    assert drafts[0]
    assert [path.relative_to(one) for path in drafts[0]] == [path.relative_to(other) for path in drafts[1]]
    for ours, theirs in zip(*drafts, strict=True):
        first, second = load_file(ours), load_file(theirs)
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)

"""Disks that are full, read-only or not ours: one line, the right exit code, and a resume that ends well."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle_offline import open_cache
from tests import builders
from tests.faults.driver import Driver

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights, so needs root")


def arguments(directory: Path, **flags: object) -> list[str]:
    return builders.precompute_arguments(
        directory, None, builders.shared_chat(6), **{"shard_size": 2, "batch_size": 2, **flags}
    )


@pytest.fixture(scope="module")
def reference(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("reference") / "cache"
    run = driver.run(arguments(directory))
    assert run.code == 0, run.err
    return directory, run.events


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 120 KiB, of which the tokens and companions take 80."""
    directory = builders.SCRATCH / "small-disk"
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def check_whole(directory: Path, reference: Path) -> None:
    assert builders.leftovers(directory) == []
    assert builders.shard_bytes(directory) == builders.shard_bytes(reference)
    assert builders.run_cli("inspect-manifest", directory, "--verify").code == 0
    assert len(open_cache(directory)) == 6


def check_one_line(run: object, *parts: str) -> None:
    errors = run.errors  # type: ignore[attr-defined]
    assert len(errors) == 1, run.err  # type: ignore[attr-defined]
    assert "Traceback" not in run.err  # type: ignore[attr-defined]
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize("fault", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("count", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_full_disk_at_any_step_exits_6_and_resume_ends_well(
    driver: Driver, tmp_path: Path, reference: tuple[Path, list[str]], fault: str, count: int
) -> None:
    events = reference[1]
    moments = [
        (number, when)
        for number, event in enumerate(events, start=1)
        for when in (("before", "half") if event.startswith("write_bytes") else ("before",))
        if "status" not in event and "file-digests" not in event and event != f"fsync {reference[0]}"
    ]
    for event, when in random.Random(4).sample(moments, min(count, len(moments))):
        directory = tmp_path / "cache"
        run = driver.run(arguments(directory), {"event": event, "when": when, "kind": fault})
        assert run.code == 6, f"{fault} {when} {events[event - 1]}: exit {run.code}, {run.err}"
        check_one_line(run, str(directory))
        left = [name for name in builders.leftovers(directory) if not name.startswith("shard-")]
        assert left == [], "what could not be written takes no room"
        again = builders.run_cli(*arguments(directory, resume=True))
        assert again.code == 0, again.err
        check_whole(directory, reference[0])
        shutil.rmtree(directory)


def test_a_status_that_cannot_be_written_hides_nothing(
    driver: Driver, tmp_path: Path, reference: tuple[Path, list[str]]
) -> None:
    event = next(n for n, event in enumerate(reference[1], start=1) if "status" in event)
    run = driver.run(arguments(tmp_path / "cache"), {"event": event, "when": "half", "kind": "ENOSPC"})
    assert run.code == 0, run.err
    check_whole(tmp_path / "cache", reference[0])


def test_a_really_full_disk_exits_6_and_keeps_what_is_committed(
    driver: Driver, small_disk: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    directory = small_disk / "cache"
    # Beside what the estimate covers stand tokens, head and embeddings: fill the disk so that the last shard fails.
    run = driver.run(arguments(directory))
    assert run.code == 6, run.err
    check_one_line(run, str(directory), "space")
    committed = builders.record_contents(directory)
    whole = builders.shard_bytes(reference[0])
    for record in committed.values():
        assert (directory / record["file"]).read_bytes() == whole[record["file"]]
    assert builders.leftovers(directory) == [], "a partial shard is in the way of whoever has to make room"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    again = driver.run(arguments(directory, resume=True))
    assert again.code == 0, again.err
    check_whole(directory, reference[0])


def test_a_disk_too_small_for_the_estimate_is_refused_before_any_shard(
    driver: Driver, small_disk: Path, tmp_path: Path
) -> None:
    directory = small_disk / "cache"
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", builders.conversations(30, seed=9))
    run = driver.run(builders.precompute_arguments(directory, None, chat))
    assert run.code == 6, run.err
    check_one_line(run, "needed", "free")
    assert not (directory / "manifest.json").exists()


@as_root
@pytest.mark.parametrize("begun", [False, True])
def test_a_directory_that_may_not_be_written_is_refused_in_one_line_and_stays_as_it_was(
    driver: Driver, reference: tuple[Path, list[str]], begun: bool
) -> None:
    directory = builders.SCRATCH / f"read-only-{begun}"
    if begun:
        shutil.copytree(reference[0], directory)
        (directory / "commit-000001.json").unlink()
    else:
        directory.mkdir()
    before = builders.tree(directory)
    run = driver.run(arguments(directory, resume=True), user=NOBODY)
    assert run.code in (1, 2), run.err
    check_one_line(run, str(directory), "Permission denied")
    assert builders.tree(directory) == before


@as_root
def test_a_parent_that_may_not_be_written_is_refused_in_one_line(driver: Driver) -> None:
    parent = builders.SCRATCH / "closed"
    parent.mkdir()
    run = driver.run(arguments(parent / "cache"), user=NOBODY)
    assert run.code in (1, 2), run.err
    check_one_line(run, str(parent / "cache"))


@as_root
def test_a_read_only_file_system_is_refused_in_one_line(driver: Driver, small_disk: Path) -> None:
    (small_disk / "cache").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = driver.run(arguments(small_disk / "cache"))
    assert run.code in (1, 2), run.err
    check_one_line(run, "Read-only")


@as_root
def test_input_that_may_not_be_read_is_named(driver: Driver, tmp_path: Path) -> None:
    chat = builders.write_jsonl(builders.SCRATCH / "secret.jsonl", builders.conversations(3))
    chat.chmod(0o600)
    place = builders.SCRATCH / "anyones"
    place.mkdir()
    place.chmod(0o777)
    run = driver.run(builders.precompute_arguments(place / "cache", None, chat), user=NOBODY)
    assert run.code in (2, 4), run.err
    check_one_line(run, str(chat))

"""Few open files: everything that writes or reads a cache works, or stops in one line that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import builders
from tests.faults.driver import Driver
from tests.faults.work import KINDS, Work, check_nothing_wrong_is_readable, check_one_line, check_same, leftovers

# Descriptors that a run may have: from hardly any beyond its own to enough.
LIMITS = {"arrow": (8, 9, 10, 12), "zarr": (9, 12, 20, 32), "convert": (9, 12, 20, 32)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_that_may_open_few_files_stops_in_one_line_and_resume_ends_well(
    driver: Driver, tmp_path: Path, kind: str
) -> None:
    work = Work(kind, tmp_path / "cache", count=4)
    work.uninterrupted(driver)
    codes = []
    for limit in LIMITS[kind]:
        run = work.run(driver, limits={"NOFILE": limit})
        codes.append(run.code)
        assert run.code in (0, 1, 4), f"{limit}: {run.err}"  # 4: it is the input that cannot be opened
        if run.code:
            check_one_line(run, "Too many open files")
        # To clear away a tree takes files, too: what is left then is cleared away by whoever resumes.
        assert [name for name in leftovers(work.place) if not name.startswith(".shard-")] == []
        check_nothing_wrong_is_readable(work.place, work.reference, work.num_shards)
        again = work.run(driver)
        assert again.code == 0, again.err
        check_same(work.place, work.reference)
        work.clear()
    assert codes[0] != 0
    assert codes[-1] == 0


@pytest.fixture(scope="module", params=["arrow", "zarr"])
def many(driver: Driver, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of more shards than files may be opened."""
    work = Work(request.param, tmp_path_factory.mktemp("many") / "cache", count=60, shard_size=1)
    work.uninterrupted(driver)
    return work.reference


def train(cache: Path, run: Path, **flags: object) -> list[str]:
    given = {"cache": cache, "output_dir": run, "ttt_steps": 2, "num_epochs": 1, "heldout_share": 0, "seed": 3}
    given |= {"tokens_per_batch": 1000, "device": "cpu", **flags}
    return ["train", *(text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value)))]


@pytest.mark.parametrize("limit", [24, 48])
def test_training_over_more_shards_than_files_may_be_open_works_or_says_so(
    driver: Driver, tmp_path: Path, many: Path, limit: int
) -> None:
    run = driver.run(train(many, tmp_path / "run"), limits={"NOFILE": limit})
    if run.code:
        check_one_line(run, "Too many open files", "ulimit -n")
        assert "repair" not in run.errors[0]
    assert run.code in (0, 1)


def test_verify_that_may_open_few_files_never_says_that_sound_files_are_damaged(driver: Driver, many: Path) -> None:
    said = []
    for event in range(4):  # how many threads have a file open at a time is not the same every time
        run = driver.run(["verify", str(many), "--json", "--num-workers", "8"], limits={"NOFILE": 8 + event // 2})
        assert run.code in (0, 1, 4), run.err
        if run.out:
            said += [problem["what"] for problem in json.loads(run.out)["problems"]]
    assert said == []


def test_repair_that_may_open_few_files_sets_nothing_aside(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os
    import shutil

    from eagle_offline.cache import shard_check

    cache = Path(shutil.copytree(many, tmp_path / "cache"))
    digest, calls = shard_check.digest_shard, []

    def fail_once(path: Path, num_bytes: int | None = None) -> tuple[str, int]:
        calls.append(path)
        if len(calls) == 3:  # as when others on this machine have all files open for a moment
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE), str(path))
        return digest(path, num_bytes)

    monkeypatch.setattr(shard_check, "digest_shard", fail_once)
    ended = builders.run_cli("repair", cache, "--json")
    assert len(builders.record_contents(cache)) == 60, ended.out
    assert ended.code == 1

"""Random damage gives the right answer or an error of ours: never another exception, a crash, a hang, wrong data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.cache import mutations

SHARE, MANY = 160, 6000  # mutations of one kind of file, by default and under `slow`
KINDS = ("manifest.json", "commit-*.json", "shard-*.arrow")
BESIDE = ("head.safetensors", "embeddings.safetensors", "vocab/*", "tokens/*", "target/*")


def files(cache: Path, patterns: str | tuple[str, ...]) -> list[str]:
    found = [
        path.relative_to(cache).as_posix()
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        for path in sorted(cache.glob(pattern))
        if path.stat().st_size
    ]
    assert found
    return found


def surveyed(
    cache: Path, work: Path, patterns: str | tuple[str, ...], count: int, seed: int, *, data: bool = True
) -> list[tuple[mutations.Mutation, dict[str, str]]]:
    expected = mutations.everything(cache)
    drawn = mutations.mutations(cache, files(cache, patterns), count, seed)

    def look(directory: Path) -> dict[str, str]:
        found = mutations.read(directory, expected)
        return {
            "read": "another head or vocabulary" if found == "WRONG DATA" and not data else found,
            "inspect": mutations.inspect(directory, verify=False),
            "verify": mutations.inspect(directory, verify=True),
        }

    return list(zip(drawn, mutations.survey(cache, work, drawn, look), strict=True))


def orderly(outcome: str) -> bool:
    return outcome in ("same", "refused", "clean", "noticed", "another head or vocabulary")


def check_orderly(results: list[tuple[mutations.Mutation, dict[str, str]]]) -> None:
    disorderly = [
        f"{how} {outcome} after {mutation.what}"
        for mutation, found in results
        for how, outcome in found.items()
        if not orderly(outcome)
    ]
    kinds = Counter(line.split(" after ")[0][:60] for line in disorderly)
    assert not disorderly, f"{len(disorderly)} of {len(results)}: {kinds.most_common(12)}; the first: {disorderly[:3]}"


COUNTS = [SHARE, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_to_cache_files_is_refused_or_harmless(
    narrow: Path, tmp_path: Path, kind: str, count: int
) -> None:
    results = surveyed(narrow, tmp_path, kind, count, seed=count)
    check_orderly(results)
    assert sum(found.get("read") == "refused" for _, found in results) > count / 2


@pytest.mark.parametrize("count", COUNTS)
def test_random_damage_to_what_comes_beside_is_orderly(narrow: Path, tmp_path: Path, count: int) -> None:
    results = surveyed(narrow, tmp_path, BESIDE, count, seed=count, data=False)
    check_orderly(results)
    unnoticed = [mutation.what for mutation, found in results if found.get("verify") != "noticed"]
    assert not unnoticed, f"{len(unnoticed)} of {count} not noticed by --verify: {unnoticed[:3]}"


@pytest.mark.parametrize("count", COUNTS)
def test_random_damage_to_larger_shards_is_refused_or_harmless(whole: Path, tmp_path: Path, count: int) -> None:
    check_orderly(surveyed(whole, tmp_path, "shard-*.arrow", count // 5, seed=count))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_that_changes_an_answer_is_noticed_by_verify(
    narrow: Path, tmp_path: Path, kind: str, count: int
) -> None:
    results = surveyed(narrow, tmp_path, kind, count, seed=count + 1)
    unnoticed = [m.what for m, found in results if found.get("verify") == "clean" and found.get("read") != "same"]
    assert not unnoticed, f"{len(unnoticed)} of {count}: {unnoticed[:3]}"

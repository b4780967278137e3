"""Going on in another environment is said in one line; values then agree within a tolerance."""

from __future__ import annotations

from eagle_offline.precompute import environment
from tests import builders
from tests.precompute.runs import alone, arguments, assert_same_bytes


def begin(cache, **flags) -> None:
    """Make every other shard."""
    ended = builders.run_cli(*arguments(cache, process_index=0, process_count=2, **flags))
    assert ended.code == 0, ended.err


def test_nothing_is_said_where_nothing_differs(tmp_path):
    begin(tmp_path / "cache")
    ended = builders.run_cli(*arguments(tmp_path / "cache", resume=True))
    assert ended.code == 0
    assert not [line for line in ended.errors if line.startswith("note:")]
    assert_same_bytes(tmp_path / "cache", alone())


def test_other_threads_and_other_libraries_are_named(tmp_path, monkeypatch):
    begin(tmp_path / "cache")
    here = environment.describe_environment("cpu")
    there = {**here, "num_threads": 7, "packages": {**here["packages"], "torch": "9.9"}}
    monkeypatch.setattr(environment, "describe_environment", lambda _: there)
    ended = builders.run_cli(*arguments(tmp_path / "cache", resume=True))
    assert ended.code == 0
    (note,) = [line for line in ended.errors if line.startswith("note:")]
    assert f"num_threads was {here['num_threads']}, is 7" in note
    assert f"torch was {here['packages']['torch']}, is 9.9" in note
    assert "numpy" not in note
    found = [record["environment"]["num_threads"] for record in builders.record_contents(tmp_path / "cache").values()]
    assert sorted(found) == [here["num_threads"]] * 4 + [7] * 4

"""A draft of a target with an adapter merged is compared with both, and says so where only one is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eagle_offline.draft.origin import read_origin
from tests.builders import make_cache, run_cli, shared_target
from tests.target.test_adapters import save_adapter


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of ``adapter``, ``other`` and ``run``, a draft of the shared target with ``adapter`` merged."""
    root = tmp_path_factory.mktemp("adapted")
    save_adapter(shared_target(), root / "adapter")
    save_adapter(shared_target(), root / "other", r=2)
    cache = make_cache(root / "cache", adapter=root / "adapter")
    arguments = ("--heldout-share", 0, "--max-steps", 2, "--ttt-steps", 2, "--device", "cpu", "--tokens-per-batch", 200)
    ended = run_cli("train", "--cache", cache, "--output-dir", root / "run", *arguments)
    assert ended.code == 0, ended.err
    return root


def test_an_export_names_the_adapter_and_compares_with_it(adapted: Path) -> None:
    export = ("export", adapted / "run", "--target", shared_target(), "--to", "flat")
    plain = run_cli(*export, "--output-dir", adapted / "plain")
    assert plain.code == 0, plain.err
    (line,) = [line for line in plain.err.splitlines() if "merged" in line]
    assert "with the adapter adapter" in line
    assert "engines have to serve the merged model" in line
    origin = read_origin(adapted / "plain" / "flat")
    assert origin is not None
    assert origin.target_adapter is not None
    card = (adapted / "plain" / "flat" / "README.md").read_text()
    assert f"with the adapter {origin.target_adapter} merged into it" in card
    assert origin.target_adapter.digest in card

    both = run_cli(*export, "--adapter", adapted / "adapter", "--output-dir", adapted / "both")
    assert both.code == 0, both.err
    assert "merged" not in both.err
    other = run_cli(*export, "--adapter", adapted / "other", "--output-dir", adapted / "wrong")
    assert other.code == 3
    assert "the draft was made for" in other.errors[-1]
    assert not (adapted / "wrong").exists()


def test_a_check_compares_with_the_merged_target(adapted: Path) -> None:
    directory = adapted / "checked"
    assert run_cli("export", adapted / "run", "--target", shared_target(), "--output-dir", directory).code == 0
    check = ("export", "--check", directory / "flat", "--target", shared_target())
    alone = run_cli(*check)
    assert "engines have to serve the merged model" in alone.out
    both = run_cli(*check, "--adapter", adapted / "adapter")
    assert "trained for" not in both.out
    assert "trained for a target of digest" in run_cli(*check, "--adapter", adapted / "other").out
    refused = run_cli("export", "--check", directory / "flat", "--adapter", adapted / "adapter")
    assert (refused.code, len(refused.errors)) == (2, 1)
    shutil.rmtree(directory)

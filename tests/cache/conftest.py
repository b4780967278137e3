"""Small finished caches that tests copy before they damage them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import builders

# Eight values a state: a shard is mostly Arrow metadata, where damage is most dangerous.
NARROW = (("hidden_size", 8), ("num_attention_heads", 2), ("num_key_value_heads", 1), ("head_dim", 4))


def without_index(cache: Path) -> Path:
    """Take a cache's index away; its records say the same."""
    for path in cache.glob("index-*"):
        path.unlink()
    return cache


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten samples in three shards, without an index, so that records are read; never to be changed."""
    return without_index(builders.make_cache(tmp_path_factory.mktemp("whole") / "cache"))


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of four tiny samples in two shards, without an index; never to be changed."""
    directory = tmp_path_factory.mktemp("narrow")
    chat = builders.write_jsonl(
        directory / "chat.jsonl",
        [
            {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "bc" * n}]}
            for n in (1, 2, 3, 1)
        ],
    )
    target = builders.shared_target("Llama", changes=NARROW)
    return without_index(builders.make_cache(directory / "cache", target, chat, shard_size=2))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a cache to where a test may change it."""

    def copied(cache: Path) -> Path:
        place = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(cache, place)
        return place

    return copied

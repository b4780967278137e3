"""Small caches made by several processes, and what they are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from eagle_offline import open_cache
from tests import builders
from tests.oracles.children import Gone, run_children

NUM_SAMPLES, SHARD_SIZE = 16, 2
NUM_SHARDS = 8


def arguments(output_dir: Path | str, **flags: object) -> list[str]:
    """A precompute of eight shards."""
    data = builders.shared_chat(NUM_SAMPLES)
    return builders.precompute_arguments(output_dir, data=data, **{"shard_size": SHARD_SIZE, "batch_size": 2, **flags})


@cache
def alone(kind: str = "Llama") -> Path:
    """What one process makes."""
    place = builders.SCRATCH / f"alone-{kind}"
    ended = builders.run_cli(*arguments(place, target_model=builders.shared_target(kind)))
    assert ended.code == 0, ended.err
    return place


def ranks(output_dir: Path, size: int, prepare: Callable[[int], None] | None = None, **flags: object) -> list[Gone]:
    """Run a precompute in so many ranks; each may be prepared with an accident."""
    return run_children(arguments(output_dir, **flags), output_dir.parent, size, prepare=prepare)


def on_rank(rank: int, prepare: Callable[[int], None]) -> Callable[[int], None]:
    """What only one rank is prepared with."""
    return lambda own: prepare(own) if own == rank else None


def assert_same_bytes(found: Path, expected: Path) -> None:
    ours, theirs = builders.shard_bytes(found), builders.shard_bytes(expected)
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    for name in ("head.safetensors", "embeddings.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    left = builders.leftovers(found)
    assert left == [], left


def assert_same_values(found: Path, expected: Path, tolerance: float = 1e-2) -> None:
    """The same tokens, masks and ids; states that sums in another order move by a last bit of bf16."""
    ours, theirs = open_cache(found), open_cache(expected)
    assert len(ours) == len(theirs) == NUM_SAMPLES
    for one, two in zip(ours, theirs, strict=True):
        assert one.sample_id == two.sample_id
        assert torch.equal(one.input_ids, two.input_ids)
        assert torch.equal(one.loss_mask, two.loss_mask)
        for state, other in (
            (one.aux_hidden_states, two.aux_hidden_states),
            (one.supervision.last_hidden_state, two.supervision.last_hidden_state),
            (one.supervision.target_log_normalizer, two.supervision.target_log_normalizer),
        ):
            torch.testing.assert_close(state.float(), other.float(), rtol=tolerance, atol=tolerance)
    for name in ("head.safetensors", "embeddings.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    left = builders.leftovers(found)
    assert left == [], left


def without_launcher() -> dict[str, str]:
    """The environment of a process that nobody launched."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in names}

"""Processes that share one copy of the target make the cache that one process makes, but for last bits of states."""

from __future__ import annotations

import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from eagle_offline.cache import filling
from eagle_offline.target import groups
from tests import builders
from tests.oracles.children import Gone, kill_at_call
from tests.precompute.runs import (
    NUM_SHARDS,
    alone,
    arguments,
    assert_same_bytes,
    assert_same_values,
    on_rank,
    ranks,
)


def said_in_one_line(ended: Gone) -> str:
    assert "Traceback" not in ended.err, ended.err
    assert len(ended.errors) == 1, ended.err
    return ended.errors[0]


def manifest(cache: Path) -> dict:
    return json.loads((cache / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("Qwen3", 2),
        ("Llama", 4),
        pytest.param("Qwen3Moe", 2, marks=pytest.mark.slow),
        pytest.param("Gemma2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_shared_target_gives_the_same_cache_within_tolerance(kind, size, tmp_path):
    """Two processes are one copy; four are two copies, each with half of the shards."""
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if kind == "Qwen3Moe" else {}
    target = builders.shared_target(kind, changes=tuple(changes.items()))
    cache, expected = tmp_path / "cache", tmp_path / "alone"
    assert builders.run_cli(*arguments(expected, target_model=target)).code == 0
    ended = ranks(cache, size, target_model=target, tensor_parallel_size=2)
    assert [one.code for one in ended] == [0] * size, [one.err for one in ended]
    assert_same_values(cache, expected)
    assert len(builders.shard_bytes(cache)) == NUM_SHARDS
    assert manifest(cache)["identity"]["batch_plan"]["tensor_parallel_size"] == 2
    groups_that_ended = sorted(path.name for path in cache.glob("status*.json"))
    assert groups_that_ended == (["status.json"] if size == 2 else ["status-0000.json", "status-0001.json"])


def test_tied_embeddings_are_stored_once(tmp_path):
    target = builders.shared_target("Llama", changes=(("tie_word_embeddings", True),))
    ended = ranks(tmp_path / "cache", 2, target_model=target, tensor_parallel_size=2)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert builders.run_cli(*arguments(tmp_path / "alone", target_model=target)).code == 0
    assert_same_values(tmp_path / "cache", tmp_path / "alone")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_its_group_and_the_run_goes_on_exactly(killed, tmp_path):
    """The bytes are those of a group that nothing happened to."""
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    ended = ranks(whole, 2, tensor_parallel_size=2)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    # The leader while it writes the fourth shard, the other in the middle of a forward.
    at = [(filling, "write_shard", 4), (groups.TensorParallelGroup, "_run", 9)][killed]
    accident = on_rank(killed, kill_at_call(*at))
    ended = ranks(cache, 2, accident, tensor_parallel_size=2)
    assert ended[killed].code == -signal.SIGKILL
    assert ended[1 - killed].code == 1
    assert "fell apart" in said_in_one_line(ended[1 - killed])
    assert len(builders.shard_bytes(cache)) < NUM_SHARDS
    ended = ranks(cache, 2, tensor_parallel_size=2, resume=True)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert_same_bytes(cache, whole)


def test_a_signal_to_all_stops_the_group_together(tmp_path):
    def stop_in_forward(rank: int) -> None:
        original, count = groups.TensorParallelGroup._run, 0

        def watched(self, forward):
            nonlocal count
            count += 1
            if count == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, forward)

        groups.TensorParallelGroup._run = watched

    cache = tmp_path / "cache"
    ended = ranks(cache, 2, stop_in_forward, tensor_parallel_size=2)
    assert [one.code for one in ended] == [5, 5], [one.err for one in ended]
    assert "stopped by a signal" in said_in_one_line(ended[0])
    assert json.loads((cache / "status.json").read_text())["state"] == "resumable"
    assert len(builders.shard_bytes(cache)) < NUM_SHARDS


def out_of_memory_at(numbers: set[int]):
    """Forwards of the decoder that find too little memory, as a device reports it."""

    def prepare(_rank: int) -> None:
        original, count = groups.TensorParallelGroup._run, 0

        def watched(self, forward):
            nonlocal count
            count += 1

            def short():
                raise torch.OutOfMemoryError("out of memory")

            return original(self, short if count in numbers else forward)

        groups.TensorParallelGroup._run = watched

    return prepare


def test_all_out_of_memory_together_is_a_smaller_batch(tmp_path):
    cache = tmp_path / "cache"
    ended = ranks(cache, 2, out_of_memory_at({5}), tensor_parallel_size=2)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert_same_values(cache, alone())
    halved = [record["environment"].get("samples_of_halved_batches") for record in records(cache)]
    assert [count for count in halved if count] == [2]


def test_one_out_of_memory_alone_ends_the_group(tmp_path):
    """The other waits in the middle of the forward, for a part that does not come."""

    def short_of_memory(rank: int) -> None:
        groups._WAIT_FOR_VOTES = timedelta(seconds=1)
        out_of_memory_at({5})(rank)

    cache = tmp_path / "cache"
    ended = ranks(cache, 2, on_rank(1, short_of_memory), tensor_parallel_size=2)
    assert [one.code for one in ended] == [1, 1]
    assert "1 of 2 processes of a tensor-parallel group ran out of memory" in said_in_one_line(ended[1])
    assert "fell apart" in said_in_one_line(ended[0])
    resumed = ranks(cache, 2, tensor_parallel_size=2, resume=True)
    assert [one.code for one in resumed] == [0, 0]
    assert_same_values(cache, alone())


def records(cache: Path) -> list[dict]:
    return list(builders.record_contents(cache).values())


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ({"tensor_parallel_size": 4}, 2, "num_key_value_heads 2"),
        ({"tensor_parallel_size": 2, "aux_layer_ids": [99]}, 2, "--aux-layer-ids 99"),
        ({"tensor_parallel_size": 2, "input_data": "/nowhere.jsonl"}, 4, "/nowhere.jsonl"),
    ],
)
def test_what_is_refused_is_refused_by_all_at_once(flags, code, said, tmp_path):
    size = flags["tensor_parallel_size"]
    ended = ranks(tmp_path / "cache", size, **flags)
    assert [one.code for one in ended] == [code] * size, [one.err for one in ended]
    assert said in said_in_one_line(ended[0])
    assert all("its own message says why" in said_in_one_line(one) or said in one.err for one in ended[1:])


def test_another_number_of_sharing_processes_is_refused_unless_it_is_accepted(tmp_path):
    cache = tmp_path / "cache"
    accident = on_rank(0, kill_at_call(filling, "write_shard", 4))
    ranks(cache, 2, accident, tensor_parallel_size=2)
    before = builders.tree(cache)
    refused = builders.run_cli(*arguments(cache, resume=True))
    assert refused.code == 3
    assert "batch_plan.tensor_parallel_size: recorded 2, now 1" in refused.errors[0]
    assert "--accept-environment" in refused.errors[0]
    assert builders.tree(cache) == before
    ended = builders.run_cli(*arguments(cache, resume=True, accept_environment=True))
    assert ended.code == 0, ended.err
    notes = [line for line in ended.errors if line.startswith("note: ")]
    assert len(notes) == 1
    assert "tensor_parallel_size was 2, is 1" in notes[0]
    assert {record["environment"]["tensor_parallel_size"] for record in records(cache)} == {1, 2}
    assert_same_values(cache, alone())

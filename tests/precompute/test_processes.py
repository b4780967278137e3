"""Several processes fill one cache: what `torchrun` says, what flags say, and what is left when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eagle_offline.cache import filling
from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.errors import UsageError
from eagle_offline.precompute import plan
from eagle_offline.precompute.engines.processes import read_share
from tests import builders
from tests.oracles.children import free_port, kill_at_call, wait_until
from tests.precompute.runs import NUM_SHARDS, alone, arguments, assert_same_bytes, on_rank, ranks, without_launcher


def launched(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, local_rank: int | None = None) -> None:
    for name, value in (
        ("RANK", rank),
        ("WORLD_SIZE", size),
        ("LOCAL_RANK", rank if local_rank is None else local_rank),
    ):
        monkeypatch.setenv(name, str(value))


def settings(**given: object) -> PrecomputeSettings:
    return PrecomputeSettings(target_model="M", input_data="D", output_dir="C", **given)


@pytest.mark.parametrize(
    ("rank", "size", "given", "expected"),
    [
        (0, 1, {}, (0, 1)),
        (3, 8, {}, (3, 8)),
        (3, 8, {"tensor_parallel_size": 2}, (1, 4)),  # ranks 2 and 3 share the second copy
        (4, 8, {"tensor_parallel_size": 4}, (1, 2)),
        (0, 1, {"process_index": 5, "process_count": 9}, (5, 9)),
        (1, 2, {"process_index": 5, "process_count": 9, "tensor_parallel_size": 2}, (5, 9)),
        (1, 2, {"process_index": 1, "process_count": 2}, (1, 2)),
    ],
)
def test_shards_go_by_flags_else_by_rank(rank, size, given, expected, monkeypatch):
    launched(monkeypatch, rank, size)
    share = read_share(settings(device="cpu", **given)).settings
    assert (share.process_index, share.process_count) == expected


@pytest.mark.parametrize(
    ("rank", "size", "given", "said"),
    [
        (1, 2, {"process_index": 0, "process_count": 2}, "--process-index 0 --process-count 2"),
        (0, 4, {"process_index": 1, "process_count": 8}, "start each process of the job array without torchrun"),
        (0, 3, {"tensor_parallel_size": 2}, "start a multiple of 2 processes, found 3"),
        (0, 1, {"tensor_parallel_size": 2}, "torchrun --nproc-per-node 2"),
    ],
)
def test_what_contradicts_the_launcher_is_refused(rank, size, given, said, monkeypatch):
    launched(monkeypatch, rank, size)
    with pytest.raises(UsageError, match=said):
        read_share(settings(device="cpu", **given))


def test_a_run_that_torchrun_starts_again_goes_on(monkeypatch):
    launched(monkeypatch, 0, 2)
    assert not read_share(settings(device="cpu")).settings.resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert read_share(settings(device="cpu")).settings.resume


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    launched(monkeypatch, 5, 8, local_rank=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert read_share(settings()).settings.device == "cuda:1"
    assert read_share(settings(device="cuda:3")).settings.device == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UsageError, match="no GPU of its own: 4 found"):
        read_share(settings())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_workers": 2}, "--num-workers: not with --engine processes"),
        ({"engine": "ray", "process_count": 2}, "--process-count: not with --engine ray"),
        ({"engine": "ray", "tensor_parallel_size": 2}, "--tensor-parallel-size: not with --engine ray"),
        ({"engine": "ray", "gpus_per_worker": 2}, "say how with --device-map"),
        ({"device_map": "auto", "tensor_parallel_size": 2}, "give one of them"),
        ({"adapter": "A", "tensor_parallel_size": 2}, "merge it into a checkpoint"),
    ],
)
def test_settings_of_another_engine_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        settings(**given)


@pytest.mark.parametrize("size", [2, 3])
def test_a_process_that_is_killed_leaves_what_it_committed(size, tmp_path):
    """Any number of processes go on, and the bytes are those of one that nothing happened to."""
    cache = tmp_path / "cache"
    accident = on_rank(1, kill_at_call(filling, "write_shard", 2))
    ended = ranks(cache, size, accident)
    assert [one.code for one in ended] == [0, -9] + [0] * (size - 2)
    committed = builders.shard_bytes(cache)
    assert 0 < len(committed) < NUM_SHARDS
    resumed = builders.run_cli(*arguments(cache, resume=True))
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["shards_committed"] == NUM_SHARDS
    assert_same_bytes(cache, alone())
    assert {name: builders.shard_bytes(cache)[name] for name in committed} == committed


def test_a_cache_that_is_there_is_refused_by_the_first_process(tmp_path):
    """The others cannot know whether it was there before; torchrun ends them with the first."""
    cache = tmp_path / "cache"
    assert builders.run_cli(*arguments(cache)).code == 0
    before = builders.tree(cache)
    ended = ranks(cache, 2)
    assert ended[0].code == 2
    assert "add --resume" in ended[0].errors[0]
    after = builders.tree(cache, without=("status.json", "status-0001.json"))
    assert after == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_comes_late_does_not_take_the_cache_for_an_old_one(rank, tmp_path):
    """The others wait for the first to say that nothing was there; what they then find is this run's."""

    def late(_rank: int) -> None:
        original = plan.check_output_directory

        def delayed(chosen: PrecomputeSettings):
            time.sleep(3)
            return original(chosen)

        plan.check_output_directory = delayed

    ended = ranks(tmp_path / "cache", 2, on_rank(rank, late))
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert_same_bytes(tmp_path / "cache", alone())


def torchrun(size: int, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={free_port()}",
        "-m", "eagle_offline", *words,
    ]  # fmt: skip
    environment = {**without_launcher(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_under_torchrun_one_process_speaks(tmp_path):
    ended = torchrun(2, arguments(tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["cache"] == str(tmp_path / "cache")
    assert ended.stderr.count("precompute:") == 1
    assert_same_bytes(tmp_path / "cache", alone())


@pytest.mark.slow
def test_one_that_is_killed_under_torchrun_ends_all_and_all_is_resumable(tmp_path):
    cache = tmp_path / "cache"
    many = {"data": builders.shared_chat(400), "seq_length": 96}
    words = ["-m", "eagle_offline", *builders.precompute_arguments(cache, shard_size=2, batch_size=2, **many)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    environment = {**without_launcher(), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *words], env=environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: len(list(cache.glob("commit-*.json"))) > 4, 120)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[1]), signal.SIGKILL)
            assert process.wait(timeout=90) not in (0, None)
        finally:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert f"{os.sep}eagle_offline{os.sep}" not in said, "torchrun has a traceback of its own, we have none"
    assert json.loads((cache / "status-0000.json").read_text())["state"] == "resumable", said[-2000:]
    committed = builders.shard_bytes(cache)
    assert 4 < len(committed) < 200
    ended = torchrun(3, builders.precompute_arguments(cache, shard_size=2, batch_size=2, resume=True, **many))
    assert ended.returncode == 0, ended.stderr
    expected = builders.make_cache(tmp_path / "alone", shard_size=2, batch_size=2, **many)
    assert_same_bytes(cache, expected)

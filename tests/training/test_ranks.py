"""Several processes train what one would: the same losses, the same weights, every sample of an epoch once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_offline.config import TrainSettings
from eagle_offline.errors import UsageError
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.ranks import Ranks, read_ranks
from tests.training.caches import checkpoint_tensors, settings, train

GLOBAL_BATCH = 4


def flags(chosen: TrainSettings) -> list[str]:
    values = chosen.model_dump(mode="json", exclude_unset=True)
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def torchrun(size: int, chosen: TrainSettings, *more: str) -> subprocess.CompletedProcess[str]:
    """Train with several processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={port}",
        "-m", "eagle_offline", "train", *flags(chosen), *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def chosen_for(run: Path, **changes: Any) -> TrainSettings:
    return settings(run, global_batch=GLOBAL_BATCH, num_epochs=2, tokens_per_batch=100, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train(chosen_for(run))
    return run


def assert_alike(run: Path, expected: Path) -> None:
    """Sums of gradients over processes are added in another order: float32, a tolerance of that size."""
    ours, theirs = checkpoint_tensors(run), checkpoint_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda said, name=name: f"{name} {said}"
        )
    for one, two in zip(read_metrics(run), read_metrics(expected), strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one.get("walked_accept_length") == two.get("walked_accept_length")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_what_one_would(size, alone, tmp_path):
    ended = torchrun(size, chosen_for(tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    assert_alike(tmp_path / "run", alone)
    assert json.loads(ended.stdout)["steps"] == len([row for row in read_metrics(alone) if row["kind"] == "train"])
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    first = chosen_for(tmp_path / "run", checkpoint_every=2, keep_checkpoints=9)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = subprocess.run(
        [sys.executable, "-m", "eagle_offline", "train", *flags(first), "--log-every", "1"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert begun.returncode == 0, begun.stderr
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    (tmp_path / "run" / "latest").write_text(steps[0] + "\n")
    ended = torchrun(2, first, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert_alike(tmp_path / "run", alone)


def test_packs_that_cannot_be_shared_evenly_are_refused(tmp_path):
    ended = torchrun(2, settings(tmp_path / "run", global_batch=3))
    assert ended.returncode != 0
    assert "--global-batch 3: packs of an optimizer step are shared by 2 processes" in ended.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_process_is_a_run_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert read_ranks() == Ranks(0, 1, 0)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="have to be numbers"):
        read_ranks()

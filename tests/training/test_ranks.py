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

from eagle_offline.errors import UsageError
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import read_metrics
from eagle_offline.training.ranks import GradientSum, Ranks, read_ranks
from tests.oracles.children import command, run_children, run_ranks
from tests.training.caches import checkpoint_tensors, flags, settings, train, trainer_of

GLOBAL_BATCH = 4


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


def test_several_processes_train_a_parallel_draft_in_parts(tmp_path):
    changes = {"objective": "peagle", "num_draft_layers": 2, "sequence_partitions": 3}
    train(chosen_for(tmp_path / "alone", **changes))
    ended = torchrun(2, chosen_for(tmp_path / "run", **changes))
    assert ended.returncode == 0, ended.stderr
    assert_alike(tmp_path / "run", tmp_path / "alone")


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


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_last_step_that_leaves_a_rank_without_packs(size, tmp_path):
    """Every epoch ends with fewer packs than there are ranks; one rank's gradients are zero there."""
    runs = [tmp_path / "one", tmp_path / "many"]
    changes = {"global_batch": 4, "tokens_per_batch": 100, "num_epochs": 2, "heldout_share": 0, "eval_every": None}
    lasts: list[int] = []
    for budget in range(60, 200, 3):
        changes["tokens_per_batch"] = budget
        trainer = trainer_of(settings(runs[0], **changes))
        lasts = [len(packs) for position, packs in trainer.remaining_steps() if position.next_pack == 0]
        if min(lasts) < size:
            break
    assert min(lasts) < size, lasts
    for run, count in zip(runs, (1, size), strict=True):
        ended = run_children(command(settings(run, **changes)), tmp_path, count)
        assert [one.code for one in ended] == [0] * count, [one.err for one in ended]
    assert_alike(runs[1], runs[0])


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2), (4,)]
    return [torch.nn.Parameter(torch.randn(*s, generator=generator, dtype=torch.float64)) for s in shapes]


def _backwards(parameters: list[torch.nn.Parameter], rank: int, passes: int, arm: Any) -> None:
    """Backward passes of one rank; the last parameter has a gradient on rank 1 alone, the third on none."""
    for number in range(passes):
        factor = 1.0 + 10 * rank + 100 * number
        loss = (factor * parameters[0] ** 2).sum() + (factor * parameters[1] * parameters[0].sum()).sum()
        if rank == 1:
            loss = loss + parameters[3].sum() * factor
        if number == passes - 1:
            arm()
        loss.backward()


@pytest.mark.parametrize("passes", [(1, 1), (3, 2), (2, 0), (0, 1), (0, 0)])
def test_sums_while_backward_runs_are_the_sums_of_single_gradients(passes, tmp_path):
    """Two steps in a row; a rank without work takes part with zeros; only the last pass of a step sends."""
    expected = _parameters()
    for rank in range(2):
        _backwards(expected, rank, passes[rank], lambda: None)
    wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in expected]

    def work(rank: int) -> None:
        parameters = _parameters()
        sums = GradientSum(Ranks(rank, 2, rank), parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = None
            _backwards(parameters, rank, passes[rank], sums.arm)
            sums.finish()
            for parameter, gradient in zip(parameters, wanted, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-14, atol=0)
            # A pass that is not of a step, such as the search for a culprit, is nobody else's business.
            if rank == 0:
                (parameters[0].sum() + parameters[1].sum()).backward()

    assert run_ranks(work, tmp_path, 2) == [0, 0], [p.read_text() for p in sorted(tmp_path.glob("stderr-*"))]


def test_what_ranks_tell_one_another(tmp_path):
    def work(rank: int) -> None:
        ranks = Ranks(rank, 3, rank)
        assert ranks.any(rank == 1, False, True, rank == 0) == [True, False, True, True]
        assert ranks.gathered([rank] * rank) == [1, 2, 2]
        total = torch.tensor([1.0, float(rank)])
        ranks.add_up(total)
        assert total.tolist() == [3.0, 3.0]
        ranks.wait()

    assert run_ranks(work, tmp_path, 3) == [0, 0, 0], [p.read_text() for p in sorted(tmp_path.glob("stderr-*"))]


def test_one_rank_alone_tells_itself():
    ranks = Ranks()
    assert ranks.any(True, False) == [True, False]
    assert ranks.gathered([3, 1]) == [3, 1]
    ranks.wait()
    parameter = torch.nn.Parameter(torch.ones(2))
    sums = GradientSum(ranks, [parameter])
    sums.arm()
    (parameter * 3).sum().backward()
    sums.finish()
    assert parameter.grad.tolist() == [3.0, 3.0]


def test_packs_that_cannot_be_shared_evenly_are_refused(tmp_path):
    for ended in run_children(command(settings(tmp_path / "run", global_batch=3)), tmp_path, 2):
        assert ended.code == 2
        assert "--global-batch 3: packs of an optimizer step are shared by 2 processes" in ended.errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_process_is_a_run_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert read_ranks() == Ranks(0, 1, 0)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="have to be numbers"):
        read_ranks()

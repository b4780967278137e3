"""The processes of one training run, as ``torchrun`` starts them; a run of one process is the same with nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from eagle_offline.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number on its machine, which is the GPU it takes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the run writes."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def add_up_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all ranks; a rank that had no work counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            torch.distributed.barrier()


def read_ranks() -> Ranks:
    """Return what ``torchrun`` says about this process; one of one without it.

    Raises:
        UsageError: its variables are no numbers.
    """
    try:
        rank, size, local = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as error:
        raise UsageError(
            f"RANK, WORLD_SIZE and LOCAL_RANK have to be numbers, as torchrun sets them: {error}"
        ) from error
    return Ranks(rank, size, local)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes of the run for as long as the block lasts.

    Args:
        device: what the run computes on: its kind decides how the processes talk.
    """
    ranks = read_ranks()
    if ranks.size == 1:
        yield ranks
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield ranks
        ranks.wait()
    finally:
        torch.distributed.destroy_process_group()

"""The processes of one training run, as ``torchrun`` starts them; a run of one process is the same with nobody else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from eagle_offline.errors import EagleOfflineError, one_line
from eagle_offline.launch import Launch, read_launch


@contextmanager
def _together() -> Iterator[None]:
    """Say what it means when the others do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise EagleOfflineError(
            f"another process of this run ended or cannot be reached ({one_line(error)[:200]}): its own message says "
            "why; checkpoints are intact, start all again with --resume"
        ) from error


@dataclass(frozen=True)
class Ranks(Launch):
    """This process among those of the run."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the run writes."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks."""
        if self.size > 1:
            with _together():
                torch.distributed.all_reduce(tensor)

    def any(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it holds on any rank."""
        if self.size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int64)
        self.add_up(counts)
        return [bool(count) for count in counts.tolist()]

    def gathered(self, values: list[int]) -> list[int]:
        """Return the values of all ranks, in rank order."""
        if self.size == 1:
            return values
        lists: list[list[int]] = [[] for _ in range(self.size)]
        with _together():
            torch.distributed.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by the first rank's."""
        if self.size > 1:
            with _together():
                for tensor in tensors:
                    torch.distributed.broadcast(tensor.data, 0)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with _together():
                torch.distributed.barrier()


class GradientSum:
    """Adds the gradients of all ranks up while the backward pass still runs.

    A parameter's sum starts as soon as its gradient is whole, in an order that all ranks share; one that a rank has
    no gradient of, for want of work, counts as zero there.

    Args:
        ranks: this process among those of the run.
        parameters: those that are trained.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[torch.nn.Parameter]):
        self._ranks = ranks
        # Gradients come to be roughly from the last parameter to the first.
        self._order = list(reversed(parameters))
        self._ready: set[int] = set()
        self._pending: list[torch.distributed.Work] = []
        self._next, self._armed = 0, False
        if ranks.size > 1:
            for parameter in self._order:
                parameter.register_post_accumulate_grad_hook(self._whole)

    def arm(self) -> None:
        """Say that the next backward pass is the step's last."""
        self._ready, self._pending, self._next, self._armed = set(), [], 0, True

    def finish(self) -> None:
        """Wait until every gradient is the sum over all ranks."""
        if self._ranks.size == 1:
            return
        if not self._armed:
            self.arm()
        for parameter in self._order:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._ready.add(id(parameter))
        with _together():
            self._start()
            for work in self._pending:
                work.wait()
        self._armed = False

    def _whole(self, parameter: Tensor) -> None:
        if self._armed:
            self._ready.add(id(parameter))
            self._start()

    def _start(self) -> None:
        while self._next < len(self._order) and id(self._order[self._next]) in self._ready:
            work = torch.distributed.all_reduce(self._order[self._next].grad, async_op=True)
            self._pending.append(work)
            self._next += 1


def read_ranks() -> Ranks:
    """Return this process's place in the run.

    Raises:
        UsageError: see `read_launch`.
    """
    launch = read_launch()
    return Ranks(**vars(launch))


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
    # Numbers that the host asks for go through the host, so that no rank waits for its GPU to answer them.
    try:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise EagleOfflineError(
            f"the {ranks.size} processes of this run do not find each other: {one_line(error)[:200]}; start them with "
            "torchrun, or check MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield ranks
        ranks.wait()
    finally:
        torch.distributed.destroy_process_group()

"""What ``torchrun`` says about this process: its number among those of the run, and on its machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from eagle_offline.errors import UsageError


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number on its machine, which is the GPU it takes.
        restarts: how often all of them were started again after one had failed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0


def read_launch() -> Launch:
    """Return what ``torchrun`` says about this process; one of one without it.

    Raises:
        UsageError: its variables are no numbers.
    """
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("TORCHELASTIC_RESTART_COUNT", 0)
    try:
        rank, size, local_rank, restarts = (int(os.environ.get(name, default)) for name, default in names)
    except ValueError as error:
        raise UsageError(
            f"RANK, WORLD_SIZE and LOCAL_RANK have to be numbers, as torchrun sets them: {error}"
        ) from error
    return Launch(rank, size, local_rank, restarts)

"""Which part of the shards is this process's: what flags say, else what ``torchrun`` says.

Shards go by stride, so processes need not talk to each other; those that share one copy of the target count as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed

from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.devices import resolve_device
from eagle_offline.errors import EagleOfflineError, UsageError, one_line
from eagle_offline.interrupts import StopRequest
from eagle_offline.launch import Launch, read_launch
from eagle_offline.precompute.fill import Loader
from eagle_offline.target.groups import tensor_parallel_group
from eagle_offline.target.load import load_model
from eagle_offline.target.spread import load_spread

_FIRST_IS_DONE = "eagle-offline-first-is-done"
_WAIT_FOR_FIRST = timedelta(minutes=30)


@dataclass(frozen=True)
class Share:
    """What this process does of a run.

    Attributes:
        settings: with its part of the shards, and its device.
        launch: as the launcher started it.
    """

    settings: PrecomputeSettings
    launch: Launch

    @contextmanager
    def target_loader(self) -> Iterator[Loader | None]:
        """Yield what loads the target for the block; None once this process has only helped another with its copy.

        Raises:
            EagleOfflineError: those that share a copy do not find each other, or the other did not come to a good end.
        """
        settings = self.settings
        if settings.tensor_parallel_size == 1:
            yield local_loader(settings)
            return
        device = resolve_device(settings.device)
        with tensor_parallel_group(self.launch, settings.tensor_parallel_size, device, load_model) as group:
            if group.leads:
                yield group.load
                return
            # The leader decides what a first signal ends.
            with StopRequest(0, passed_on=True):
                exit_code = group.follow()
        if exit_code:
            error = EagleOfflineError(
                "the first process of this tensor-parallel group ended early: its own message says why"
            )
            error.exit_code = exit_code
            raise error
        yield None


@contextmanager
def first_before_others() -> Iterator[None]:
    """Have the first of several processes do the block before the others do: whether something was there is its to say.

    Raises:
        EagleOfflineError: they do not find each other, or the first came to no good end.
    """
    launch = read_launch()
    if launch.size == 1:
        yield
        return
    try:
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=_WAIT_FOR_FIRST))
        if launch.rank > 0:
            store.wait([_FIRST_IS_DONE], _WAIT_FOR_FIRST)
    except (RuntimeError, ValueError) as error:
        raise EagleOfflineError(
            f"the first of {launch.size} processes cannot be reached ({one_line(error)}): its own message says why; "
            "or MASTER_ADDR and MASTER_PORT are not what torchrun sets"
        ) from error
    yield
    if launch.rank == 0:
        store.set(_FIRST_IS_DONE, "")


def local_loader(settings: PrecomputeSettings) -> Loader:
    """Return what loads a target into one process."""
    return load_model if settings.device_map is None else partial(load_spread, device_map=settings.device_map)


def read_share(settings: PrecomputeSettings) -> Share:
    """Return this process's part of a run.

    Raises:
        UsageError: flags and ``torchrun`` contradict each other, or the machine has fewer GPUs than processes.
    """
    launch = read_launch()
    size = settings.tensor_parallel_size
    if launch.size % size:
        raise UsageError(
            f"--tensor-parallel-size {size}: start a multiple of {size} processes, found {launch.size}: "
            f"torchrun --nproc-per-node {size} -m eagle_offline precompute …"
        )
    number, count = launch.rank // size, launch.size // size
    given = {"process_index", "process_count"} & settings.model_fields_set
    if given and count > 1 and (settings.process_index, settings.process_count) != (number, count):
        raise UsageError(
            f"--process-index {settings.process_index} --process-count {settings.process_count} in one of "
            f"{launch.size} processes of torchrun: these share the shards among themselves; leave the flags out, or "
            "start each process of the job array without torchrun"
        )
    changes: dict[str, Any] = {"device": _own_device(settings, launch)}
    if not given:
        changes |= {"process_index": number, "process_count": count}
    if launch.rank or launch.restarts:
        # Whether a cache may be there already was for the first to say; what is there now is this run's own.
        changes["resume"] = True
    return Share(settings.model_copy(update=changes), launch)


def _own_device(settings: PrecomputeSettings, launch: Launch) -> str | None:
    """Return the device of this process: one GPU each, as many as a launcher started on a machine.

    Raises:
        UsageError: there are more processes than GPUs.
    """
    on_gpu = settings.device == "cuda" or (settings.device is None and torch.cuda.is_available())
    if launch.size == 1 or not on_gpu:
        return settings.device
    found = torch.cuda.device_count()
    if launch.local_rank >= found:
        raise UsageError(
            f"process {launch.local_rank} of this machine has no GPU of its own: {found} found; start "
            f"torchrun --nproc-per-node {found}, or say --device"
        )
    return f"cuda:{launch.local_rank}"

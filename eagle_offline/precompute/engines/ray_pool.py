"""A Ray cluster makes the shards: tasks on a pool of actors, each with a copy of the target.

The driver only hands out shards and shows progress; it needs neither a GPU nor the target's weights. An actor whose
process or node is lost is Ray's to start again, and so is the shard that it had in hand.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eagle_offline.cache.publishing import Publisher
from eagle_offline.cache.writer import committed_shards
from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.durable import make_directory, remove_abandoned
from eagle_offline.errors import EagleOfflineError, StoppedEarly, UsageError, one_line
from eagle_offline.interrupts import StopRequest
from eagle_offline.launch import read_launch
from eagle_offline.precompute.engines.processes import local_loader
from eagle_offline.precompute.fill import Begun, Filler, finish, missing_shards
from eagle_offline.precompute.plan import summarize
from eagle_offline.progress import Progress
from eagle_offline.status import reported_status

# How often one shard may cost its worker's life before the shard is blamed.
_RETRIES = 3

# Shards of one task, at most: the next one is captured while the last one is written, but only within a task.
_SHARDS_AT_ONCE = 4

# Tasks a worker does in a run, at least, so that none of them is waited for long at the end.
_TASKS_OF_A_WORKER = 8

# Nothing large goes through Ray's own store.
_OBJECT_STORE_BYTES = 128 << 20

_POLL_SECONDS = 0.2
_CONNECT_SECONDS = 20.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Settles what a precompute is about: `stages.begun_precompute`.
Begin = Callable[..., AbstractContextManager[Begun]]


@dataclass(frozen=True)
class Room:
    """What a worker takes of the cluster, and how many find room.

    Attributes:
        num_workers: copies of the target.
        num_gpus, num_cpus: of each; the CPUs are the threads of its tensor work.
    """

    num_workers: int
    num_gpus: int
    num_cpus: int


class Worker:
    """One copy of the target, in a process of the cluster.

    Args:
        settings: of the run.
        begin: see `Begin`.
        number: among the workers.
    """

    def __init__(self, settings: PrecomputeSettings, begin: Begin, number: int):
        if settings.store_url is not None:
            # What one worker has made and not brought up yet is no business of another.
            settings = settings.model_copy(update={"output_dir": settings.output_dir / f"worker-{number}"})
        self._settings, self._begin = settings, begin
        self._stop = StopRequest(0)
        self._held = ExitStack()

    def check(self) -> dict[str, Any]:
        """Refuse what cannot be, and tokenise what is not tokenised; return the plan in numbers."""
        with self._begin(self._settings, self._stop, with_status=False) as begun:
            return summarize(begun.plan, begun.plan.settings.output_dir)

    def outstanding(self) -> list[tuple[int, int]]:
        """Begin the cache; return the shards that are missing, each with its tokens."""
        missing = missing_shards(self._begun)
        if missing or not self._begun.is_whole:
            _ = self._filler
        return [(shard, self._begun.plan.num_tokens(shard)) for shard in missing]

    def make(self, shards: Sequence[int]) -> None:
        """Make shards, those left out that a worker which was lost had made of them."""
        done = set(committed_shards(self._begun.plan.settings.output_dir))
        self._filler.make([shard for shard in shards if shard not in done])

    def finish(self) -> dict[str, Any]:
        """Write what a complete cache has beside its shards; return it in numbers."""
        finish(self._begun.plan, self._begun.publisher)
        return summarize(self._begun.plan, self._begun.plan.settings.output_dir)

    @cached_property
    def _begun(self) -> Begun:
        # Whether a cache may be there already is settled; a worker that is started again finds the one that it began.
        settings = self._settings.model_copy(update={"resume": True})
        return self._held.enter_context(self._begin(settings, self._stop, with_status=False))

    @cached_property
    def _filler(self) -> Filler:
        # What a worker that was lost on this machine had in hand.
        remove_abandoned(self._begun.plan.settings.output_dir)
        return Filler(self._begun, self._stop, local_loader(self._settings))


def precompute_on_ray(settings: PrecomputeSettings, begin: Begin) -> dict[str, Any]:
    """Have a Ray cluster make every missing shard; return what stands there in numbers.

    Raises:
        StoppedEarly: asked to stop; committed shards stay. EagleOfflineError: as a worker raises it, or no Ray.
    """
    if read_launch().size > 1:
        raise UsageError("--engine ray: start one process; Ray starts the others. Or leave the flag out for torchrun")
    with (
        StopRequest(settings.grace_seconds) as stop,
        _connected(settings) as ray,
        _status_told(settings),
    ):
        room = _room(ray, settings)
        if settings.device is None:
            settings = settings.model_copy(update={"device": "cuda" if room.num_gpus else "cpu"})
        kind = ray.remote(num_gpus=room.num_gpus, num_cpus=room.num_cpus, max_restarts=-1, max_task_retries=_RETRIES)
        first = kind(Worker).remote(settings, begin, 0)
        planned = _result(ray, stop, first.check.remote())
        if settings.dry_run:
            return planned
        sys.stderr.write(f"ray: {room.num_workers} workers; the first loads the target and begins the cache\n")
        missing: Sequence[tuple[int, int]] = _result(ray, stop, first.outstanding.remote())
        num_workers = min(room.num_workers, len(missing))
        workers = [first, *(kind(Worker).remote(settings, begin, number) for number in range(1, num_workers))]
        _make_all(ray, workers, missing, stop, settings.grace_seconds)
        place = settings.store_url or str(settings.output_dir)
        return {**_result(ray, stop, first.finish.remote()), "cache": place}


@contextmanager
def _status_told(settings: PrecomputeSettings) -> Iterator[None]:
    """Say in ``status.json`` how the block ended, in the directory or in the store."""
    with ExitStack() as stack:
        directory = settings.output_dir
        if settings.store_url is not None and not settings.dry_run:
            directory = directory / "driver"
            make_directory(directory)
            stack.enter_context(Publisher(settings.store_url, directory).reported_status())
        stack.enter_context(reported_status(directory))
        yield


def _make_all(
    ray: Any, workers: Sequence[Any], missing: Sequence[tuple[int, int]], stop: StopRequest, grace_seconds: float
) -> None:
    """Hand out shards until all are made.

    Raises:
        StoppedEarly: asked to stop; shards in hand that did not fit the grace period are dropped.
    """
    at_once = max(1, min(_SHARDS_AT_ONCE, len(missing) // (_TASKS_OF_A_WORKER * max(len(workers), 1))))
    waiting = deque(missing[start : start + at_once] for start in range(0, len(missing), at_once))
    idle, num_made = deque(workers), 0
    in_hand: dict[Any, tuple[Any, Sequence[tuple[int, int]]]] = {}
    with Progress("precompute", sum(count for _, count in missing), unit="tok") as progress:
        while in_hand or (waiting and not stop.requested):
            while idle and waiting and not stop.requested:
                worker, some = idle.popleft(), waiting.popleft()
                in_hand[worker.make.remote([shard for shard, _ in some])] = worker, some
            done, _ = ray.wait(list(in_hand), timeout=_POLL_SECONDS)
            for task in done:
                worker, some = in_hand.pop(task)
                _unwrapped(ray, task)
                idle.append(worker)
                num_made += len(some)
                num_tokens = sum(count for _, count in some)
                progress.advance(num_tokens, {"shards": f"{num_made} of {len(missing)}"})
            if in_hand and not stop.leaves_time_for(0):
                raise StoppedEarly("stopped by a signal, the shards in hand were dropped; go on with --resume")
    if waiting:
        raise StoppedEarly("stopped by a signal between two shards; go on with --resume")


def _result(ray: Any, stop: StopRequest, task: Any) -> Any:
    """Wait for a task, unless asked to stop."""
    while not ray.wait([task], timeout=_POLL_SECONDS)[0]:
        if stop.requested:
            raise StoppedEarly("stopped by a signal while the cache was begun; go on with --resume")
    return _unwrapped(ray, task)


def _unwrapped(ray: Any, task: Any) -> Any:
    """Return what a task has returned.

    Raises:
        EagleOfflineError: as the worker raised it; or Ray has given the task up.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EagleOfflineError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise EagleOfflineError(
            f"ray gave a worker up after {_RETRIES} retries ({one_line(error)}): its logs say why "
            "(ray logs, or /tmp/ray/session_latest/logs); committed shards stay, go on with --resume"
        ) from error


def _room(ray: Any, settings: PrecomputeSettings) -> Room:
    """Return how many workers the cluster takes: one for so many GPUs, or one a node on CPUs, unless told otherwise.

    Raises:
        UsageError: it has too few GPUs.
    """
    total, nodes = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found, wanted = int(total.get("GPU", 0)), settings.gpus_per_worker
    if settings.device == "cpu" or (settings.device is None and not found):
        nodes = [node for node in nodes if node.get("CPU")]
        count = settings.num_workers or len(nodes)
        on_a_node = -(-count // len(nodes))
        return Room(count, 0, max(1, int(min(node["CPU"] for node in nodes)) // on_a_node))
    possible = sum(int(node.get("GPU", 0)) // wanted for node in nodes)
    count = settings.num_workers or possible
    if not 0 < count <= possible:
        raise UsageError(
            f"--engine ray: the cluster has {found} GPUs, room for {possible} workers of {wanted} each, not for "
            f"{max(count, 1)}; choose fewer --num-workers or --gpus-per-worker, or --device cpu"
        )
    return Room(count, wanted, 1)


def _refuse_silence(address: str) -> None:
    """Refuse an address where nobody listens, for which Ray itself tries for minutes.

    Raises:
        UsageError: names it.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UsageError(f"--ray-address {address}: no cluster answers there: {one_line(error)}") from error


@contextmanager
def _connected(settings: PrecomputeSettings) -> Iterator[Any]:
    """Yield Ray, connected to the cluster that the settings or ``RAY_ADDRESS`` name, or to one of its own.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'eagle-offline[ray]'") from error
    address = settings.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    _refuse_silence(address)
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    if settings.num_workers is not None:
        own["num_cpus"] = max(settings.num_workers, os.cpu_count() or 1)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **(own if address == "local" else {}),
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UsageError(f"--ray-address {address}: no cluster answers there: {one_line(error)}") from error
    finally:
        # Ray puts handlers of its own in their place.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # Ray tells of lost workers on stdout, which is for results.
    with redirect_stdout(sys.stderr):
        try:
            yield ray
        finally:
            ray.shutdown()

"""Processes that share one copy of a target that is larger than a GPU: tensor parallelism under ``torchrun``.

Consecutive ranks make a group, and the first of them leads: it does what one process would do, and every forward of
its decoder is announced to the others, which run the same one and keep nothing. Groups know nothing of each other.
What the target computes is left to transformers; this module knows no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from eagle_offline.errors import EXIT_FAILURE, EagleOfflineError, UsageError, one_line
from eagle_offline.launch import Launch
from eagle_offline.target.ends import gather_ends
from eagle_offline.target.layout import find_decoder
from eagle_offline.target.load import TargetSource, load_config

Result = TypeVar("Result")

# The others of a group wait while its first one tokenises or waits for a disk; one that died is noticed at once.
_WAIT = timedelta(days=7)

# At the start and within a forward nobody is waited for so long.
_WAIT_FOR_OTHERS = timedelta(minutes=30)

# One that ran out of memory waits so long for the others to say that they did too.
_WAIT_FOR_VOTES = timedelta(seconds=60)


@dataclass(frozen=True)
class _Load:
    """Load the target, as the arguments of the loader say."""

    source: TargetSource
    compute_dtype: str | None


@dataclass(frozen=True)
class _Forward:
    """Run the decoder on these arguments; tensors among them are described here, and follow one by one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _TensorFollows:
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class _End:
    """The work is over."""

    exit_code: int


@contextmanager
def _together() -> Iterator[None]:
    """Say what it means when the others do not answer, or answer otherwise."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise EagleOfflineError(
            f"a tensor-parallel group fell apart ({one_line(error)}): if another process of it ended, its own message "
            "says why; committed shards stay, start all again with --resume"
        ) from error


class TensorParallelGroup:
    """The processes that share one copy of the target, of which this is one.

    Args:
        member: this process's number among them; the first leads.
        size: how many they are.
        device: torch device of this process.
        loader: loads a target: called with its files, the device, what it computes in, and as ``distributed_config``
            what transformers needs to know of the group.
    """

    def __init__(self, member: int, size: int, device: str, loader: Callable[..., nn.Module]):
        self.size, self.leads = size, member == 0
        self._device, self._loader = torch.device(device), loader
        # What is said goes through the host, beside what the target's parts exchange.
        self._control = torch.distributed.new_group(backend="gloo", timeout=_WAIT)
        self._in_step = True

    def load(self, source: TargetSource, _device: str, compute_dtype: str | None) -> nn.Module:
        """Load the leader's part of the target, and have the others load theirs; its forwards are theirs from then on.

        Every process has a device of its own.

        Raises:
            UsageError: it cannot be cut into so many parts. MismatchError: transformers cannot cut its architecture.
        """
        check_size(self.size, load_config(source).get_text_config())
        message = _Load(source, compute_dtype)
        self._send(message)
        model = self._load_part(message)
        decoder = cast(Any, find_decoder(model)[0])
        forward = decoder.forward

        def announced(*args: Any, **kwargs: Any) -> Any:
            self._announce(args, kwargs)
            return self._run(partial(forward, *args, **kwargs))

        decoder.forward = announced
        return model

    def follow(self) -> int:
        """Do as the leader says until it is done; return the exit code that it ends with.

        Raises:
            EagleOfflineError: the leader is gone, or this process's part of the target cannot be loaded or run.
        """
        decoder: nn.Module | None = None
        while True:
            match message := self._receive():
                case _Load():
                    decoder = find_decoder(self._load_part(message))[0]
                case _Forward(args, kwargs):
                    assert decoder is not None
                    args, kwargs = tree_map_only(_TensorFollows, self._received, (args, kwargs))
                    # Where memory did not suffice it did so for all, and the leader comes again with less.
                    with torch.inference_mode(), suppress(torch.OutOfMemoryError):
                        self._run(partial(decoder, *args, **kwargs))
                case _End(exit_code):
                    return exit_code

    def end(self, exit_code: int) -> None:
        """Tell the others that the work is over; after a forward that not all ran, they notice by themselves."""
        if self.leads and self._in_step:
            with suppress(EagleOfflineError):
                self._send(_End(exit_code))

    def _load_part(self, message: _Load) -> nn.Module:
        shared = _distributed(self.size)
        with self._out_of_step(), _together():
            model = self._loader(message.source, str(self._device), message.compute_dtype, distributed_config=shared)
            gather_ends(model, leads=self.leads)
        return model

    def _announce(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        described = tree_map_only(Tensor, lambda tensor: _TensorFollows(tensor.shape, tensor.dtype), (args, kwargs))
        self._send(_Forward(*described))
        with _together():
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    torch.distributed.broadcast(leaf.to(self._device).contiguous(), 0)

    def _received(self, described: _TensorFollows) -> Tensor:
        tensor = torch.empty(described.shape, dtype=described.dtype, device=self._device)
        with _together():
            torch.distributed.broadcast(tensor, 0)
        return tensor

    def _run(self, forward: Callable[[], Result]) -> Result:
        """Return what a forward returns, once all have run it.

        Raises:
            torch.OutOfMemoryError: memory did not suffice, anywhere. EagleOfflineError: only some ran it.
        """
        error: torch.OutOfMemoryError | None = None
        with self._out_of_step(), _together():
            try:
                result = forward()
            except torch.OutOfMemoryError as raised:
                error = raised
            num_failed = self._count(error is not None)
            if num_failed not in (0, self.size):
                raise EagleOfflineError(
                    f"{self._device}: {num_failed} of {self.size} processes of a tensor-parallel group ran out of "
                    "memory; choose a smaller --batch-size or --max-batch-tokens"
                ) from error
        if error is not None:
            raise error
        return result

    @contextmanager
    def _out_of_step(self) -> Iterator[None]:
        """Take an error inside for one that leaves the others in the midst of something."""
        self._in_step = False
        yield
        self._in_step = True

    def _count(self, failed: bool) -> int:
        """Return how many failed; of those that do not come to say so, none."""
        votes = torch.tensor([int(failed)])
        work = torch.distributed.all_reduce(votes, group=self._control, async_op=True)
        try:
            work.wait(timeout=_WAIT_FOR_VOTES if failed else _WAIT)
        except RuntimeError:
            if not failed:
                raise
            return 1
        return int(votes)

    def _send(self, message: _Load | _Forward | _End) -> None:
        with _together():
            torch.distributed.broadcast_object_list([message], 0, group=self._control)

    def _receive(self) -> _Load | _Forward | _End:
        messages: list[Any] = [None]
        with _together():
            torch.distributed.broadcast_object_list(messages, 0, group=self._control)
        return messages[0]


def check_size(size: int, config: Any) -> None:
    """Refuse a target whose attention cannot be cut into so many equal parts.

    Args:
        config: of its text model.

    Raises:
        UsageError: names the numbers of heads.
    """
    heads = {
        name: count
        for name in ("num_attention_heads", "num_key_value_heads")
        if (count := getattr(config, name, None)) and count % size
    }
    if heads:
        found = ", ".join(f"{name} {count}" for name, count in heads.items())
        raise UsageError(f"--tensor-parallel-size {size}: does not divide the target's {found}; choose one that does")


def _distributed(size: int) -> Any:
    """Return how transformers is told to share a target.

    Raises:
        UsageError: it is a release that is told otherwise.
    """
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=size)
    except (ImportError, TypeError) as error:
        raise UsageError(
            f"--tensor-parallel-size needs a newer transformers, such as 5.23 ({one_line(error)}): update it, or use "
            "--device-map auto"
        ) from error


@contextmanager
def tensor_parallel_group(
    launch: Launch, size: int, device: str, loader: Callable[..., nn.Module]
) -> Iterator[TensorParallelGroup]:
    """Join the processes that share one copy of the target for as long as the block lasts.

    The block of the leader ends the others, with the exit code of the error that it raises.

    Args:
        launch: this process among all, a multiple of ``size``.
        size: of a group.
        device: torch device of this process.
        loader: see `TensorParallelGroup`.

    Raises:
        EagleOfflineError: they do not find each other.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    number, member = divmod(launch.rank, size)
    try:
        # To transformers a group is the whole world: it has no notion of others beside it.
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=_WAIT_FOR_OTHERS))
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=torch.distributed.PrefixStore(f"tensor-parallel-{number}", store),
            rank=member,
            world_size=size,
            timeout=_WAIT_FOR_OTHERS,
        )
        group = TensorParallelGroup(member, size, device, loader)
    except (RuntimeError, ValueError) as error:
        raise EagleOfflineError(
            f"the {launch.size} processes of this run do not find each other: {one_line(error)}; start them with "
            "torchrun, or check MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield group
        group.end(0)
    except EagleOfflineError as error:
        group.end(error.exit_code)
        raise
    except Exception:
        group.end(EXIT_FAILURE)
        raise
    finally:
        torch.distributed.destroy_process_group()

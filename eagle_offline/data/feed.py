"""What a step needs brought to the device while the step before it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from queue import Queue
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
Result = TypeVar("Result")


def feed(items: Iterable[T], device: torch.device) -> Generator[T, None, None]:
    """Yield items in order with their tensors on ``device``, one of them copied ahead of need.

    On a CPU the items as they come. For a CUDA device a thread copies each from page-locked memory on a stream of its
    own, so that neither the device nor the caller waits for a copy unless it is late. An exception of ``items`` is
    raised where its item would have been; when the iteration ends, however it ends, so has the thread.

    Args:
        items: tensors in dataclasses, tuples and lists; anything else in them, NumPy arrays for one, stays as it is.
            Taken on the thread that copies.
        device: where to.
    """
    if device.type != "cuda":
        yield from items
        return
    copier = _StreamCopier(device)
    with closing(_one_ahead(items, copier.copied)) as ahead:
        for copied in ahead:
            yield copier.handed_over(copied)
            del copied


def mapped(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return dataclasses, tuples and lists with ``function`` of every tensor in place of the tensor.

    Example:
        >>> mapped((torch.ones(2), [torch.zeros(1), "x"]), lambda tensor: tensor + 1)
        (tensor([2., 2.]), [tensor([1.]), 'x'])
    """
    if isinstance(record, Tensor):
        return function(record)
    if isinstance(record, tuple | list):
        return type(record)(mapped(value, function) for value in record)
    if is_dataclass(record) and not isinstance(record, type):
        values = {field.name: mapped(getattr(record, field.name), function) for field in fields(record)}
        return replace(record, **values)
    return record


class _StreamCopier:
    """Copies to a CUDA device on a stream of its own."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copied(self, item: T) -> tuple[T, torch.cuda.Event]:
        """Return the item on the device, the copy done, and its event; called on the thread that copies.

        The host's memory is held until then, so that nothing is read from it after it was given to somebody else.
        """
        pinned = mapped(item, _pinned)
        with torch.cuda.stream(self._stream):
            moved = mapped(pinned, lambda tensor: tensor.to(self._device, non_blocking=True))
            done = torch.cuda.Event()
            done.record(self._stream)
        done.synchronize()
        return moved, done

    def handed_over(self, copied: tuple[T, torch.cuda.Event]) -> T:
        """Order the caller's stream after the copy, and keep the item's memory until that stream has used it."""
        item, done = copied
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        mapped(item, used)
        return item


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda or not tensor.numel() or tensor.is_pinned() else tensor.pin_memory()


@dataclass(frozen=True)
class _Failure:
    """An exception on its way from the thread to the caller."""

    error: BaseException


_END = object()


def _one_ahead(items: Iterable[T], function: Callable[[T], Result]) -> Generator[Result, None, None]:
    """Yield ``function(item)`` in order, items taken and results made on one thread, one beyond the caller's."""
    ready: Queue[Any] = Queue()
    iterator, wanted, stopped = iter(items), threading.Semaphore(1), threading.Event()

    def work() -> None:
        try:
            while wanted.acquire() and not stopped.is_set():
                item = next(iterator, _END)
                if item is _END:
                    break
                ready.put(function(cast(T, item)))
                del item
            last: Any = _END
        except BaseException as error:
            last = _Failure(error)
        try:
            # A generator is closed by the thread that ran it, and so its own threads end before this one does.
            if isinstance(iterator, Generator):
                iterator.close()
        finally:
            ready.put(last)

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while (result := ready.get()) is not _END:
            if isinstance(result, _Failure):
                raise result.error
            wanted.release()
            yield result
            del result
    finally:
        stopped.set()
        wanted.release()
        thread.join()

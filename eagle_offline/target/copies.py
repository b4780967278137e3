"""Tensors to a device and back without waiting: through pinned memory, and down on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Copies:
    """Copies beside the device's work, with CUDA; on a CPU nothing is copied.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: torch.cuda.Event | None = None

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a host's tensor on the device; work that is given to the device afterwards finds it there."""
        return (tensor if self._stream is None else tensor.pin_memory()).to(self._device, non_blocking=True)

    def to_host(self, *groups: dict[str, Tensor]) -> Callable[[], tuple[dict[str, Tensor], ...]]:
        """Begin to bring tensors of the device down, by name; return what waits for them, on any thread.

        No more than two calls' tensors are on the way at a time: a call first waits for those of the one before.
        """
        if self._stream is None:
            down = tuple({name: tensor.cpu() for name, tensor in group.items()} for group in groups)
            return lambda: down
        if self._last is not None:
            self._last.synchronize()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            down = tuple({name: self._down(tensor, self._stream) for name, tensor in group.items()} for group in groups)
            arrival = self._stream.record_event()
        self._last = arrival

        def arrived() -> tuple[dict[str, Tensor], ...]:
            arrival.synchronize()
            return down

        return arrived

    def _down(self, tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # Its memory is not given to other work before this copy is done.
        tensor.record_stream(stream)
        return host.copy_(tensor, non_blocking=True)

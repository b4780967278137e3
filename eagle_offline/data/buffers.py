"""Host memory for packs, used again when the pack that lay in it is gone.

A pack is hundreds of megabytes. Fresh memory of that size costs more time to be mapped, page by page, than a pack's
bytes take to be decompressed into it.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

# Below this an allocator keeps freed memory itself.
_SMALLEST = 1 << 20


class HostBuffers:
    """Memory that comes back: for any number of threads.

    Args:
        pinned: page-locked, so that a GPU copies from it on its own. Torch keeps such memory for the next request, and
            no longer than until the copies from it are done.
    """

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, num_bytes: int) -> Tensor:
        """Return uint8 ``[num_bytes]`` of any content; the memory is used again once no tensor views it."""
        if self._pinned:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        if num_bytes < _SMALLEST:
            return torch.empty(num_bytes, dtype=torch.uint8)
        # Untouched pages cost nothing, so that sizes may be few.
        size = 1 << (num_bytes - 1).bit_length()
        with self._lock:
            free = self._free.setdefault(size, [])
            memory = free.pop() if free else np.empty(size, np.uint8)
        # A tensor's storage holds on to the array it was made of, and so do all views of the tensor.
        lease = memory[:num_bytes]
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease)

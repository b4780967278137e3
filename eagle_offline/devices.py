"""Which torch device a stage runs on."""

from __future__ import annotations

import torch

from eagle_offline.errors import UsageError, one_line


def resolve_device(device: str | None) -> str:
    """Return ``device``, or cuda if there is one, else cpu.

    Raises:
        UsageError: not a device that this machine has.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {one_line(error)}") from error
    return device

"""Which torch device a stage runs on."""

from __future__ import annotations

import os

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
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {one_line(error)}") from error
    return device


def use_fixed_order() -> None:
    """Make CUDA kernels add up in a fixed order, at some cost; to be called before the first of them runs."""
    # cuBLAS reads its workspace's size when it starts; with this one its sums have a fixed order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Every tensor is written before it is read here: nothing is gained by filling it first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

"""A target that is larger than one GPU in a single process: spread over devices, as accelerate places its parts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from eagle_offline.errors import UsageError
from eagle_offline.target.ends import bring_ends_back
from eagle_offline.target.load import TargetSource, load_model


def load_spread(
    source: TargetSource, device: str, compute_dtype: str | None, *, device_map: str | dict[str, Any], **more: Any
) -> nn.Module:
    """Load a target over the devices of this machine; what does not fit its GPUs goes to its memory, then its disk.

    Args:
        source, device, compute_dtype: as for `load_model`.
        device_map: a strategy such as ``auto``, or the device of each part by its name.
        more: what transformers takes beside it.

    Raises:
        UsageError: accelerate is not there. As for `load_model`.
    """
    if find_spec("accelerate") is None:
        raise UsageError("--device-map needs accelerate: pip install 'eagle-offline[device-map]'")
    model = load_model(source, device, compute_dtype, device_map=device_map, **more)
    bring_ends_back(model)
    return model

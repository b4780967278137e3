"""Whether what stands right of a row's end stays out of the row: what capture without a mask rests on."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_offline.errors import MismatchError
from eagle_offline.target.hooks import HFEagle3TargetModel

# How much of a row's states padding may seem to change, as a share of their norm. Another width moves last bits, and
# in half precision an expert now and then; a row that its padding reaches is another row.
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.2


def check_padding(target: HFEagle3TargetModel, input_ids: Tensor) -> None:
    """Check that a row captured beside its padding is the row captured alone.

    Args:
        target: the frozen target.
        input_ids: int64 ``[1, T]``; its first half is the row.

    Raises:
        MismatchError: it is not, or the final state is of another width than those between layers.
    """
    name = type(target.model).__name__
    length = (input_ids.shape[1] + 1) // 2
    padded = torch.zeros_like(input_ids)
    padded[:, :length] = input_ids[:, :length]
    layers, last = target.capture(input_ids[:, :length])
    if last.shape != layers[0].shape:
        raise MismatchError(
            f"{name}: final states are {last.shape[-1]} wide and those of its layers {layers[0].shape[-1]}; "
            "one width is expected"
        )
    padded_layers, padded_last = target.capture(padded, [length])
    for alone, beside in zip([*layers, last], [*padded_layers, padded_last], strict=True):
        if not alone.isfinite().all():
            return  # the capture of this sample reports it, with the sample's number
        change = (alone.float() - beside[:, :length].float()).norm() / alone.float().norm().clamp_min(1e-30)
        if not change <= _TOLERANCE.get(last.dtype, _HALF_TOLERANCE):
            raise MismatchError(
                f"{name}: what follows a token changes its state; a draft needs a target that reads from left to right"
            )

"""Runs the target itself over a few rows, to see whether a dump's states are of it and of their layers."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from eagle_offline.errors import EagleOfflineError, MismatchError
from eagle_offline.importing.equals import MAX_ERROR
from eagle_offline.importing.plan import ImportPlan, depends_on_length
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.load import load_model

# The start of a row shows as much as all of it.
_MAX_TOKENS = 512


def check_samples(plan: ImportPlan, count: int) -> None:
    """Compare the first matched rows with what the target computes for them; say how far apart they are.

    Rows whose states are not finite are passed over: what becomes of them is ``--on-nonfinite``'s to say.

    Args:
        count: of rows; with 0 nothing is loaded, and an import that begins says so.

    Raises:
        MismatchError: a layer's states are nearer to another's, or far from all. DataError: states cannot be read.
        EagleOfflineError: the target does not fit the device.
    """
    if not count:
        if plan.origin.settings.check_samples == 0:
            sys.stderr.write(
                f"warning: with --check-samples 0 nothing shows whether {plan.index.dump.directory} is of this target "
                f"and of the layers {' '.join(map(str, plan.identity.capture.aux_layer_ids))}\n"
            )
        return
    try:
        _compare(plan, count)
    except torch.OutOfMemoryError as error:
        raise EagleOfflineError(
            f"{plan.device}: out of memory with the whole target, which --check-samples runs: give --device cpu, or "
            "leave the check out with --check-samples 0"
        ) from error


def _compare(plan: ImportPlan, count: int) -> None:
    """See `check_samples`."""
    model = load_model(plan.source, plan.device, None)
    num_layers = plan.identity.target.num_layers
    target = HFEagle3TargetModel(model, list(range(num_layers)))
    places = dict(zip(plan.identity.capture.aux_layer_ids, plan.origin.aux_places, strict=True))
    checked = [*places, *([num_layers - 1] if plan.origin.selected_token_ids is None else [])]
    lost = torch.zeros(len(checked), num_layers, dtype=torch.float64)
    total = torch.zeros(num_layers, dtype=torch.float64)
    num_checked = 0
    for row in (plan.matching.place >= 0).nonzero()[0].tolist():
        ids = plan.table[row].input_ids
        ids = ids if depends_on_length(plan.config) else ids[:_MAX_TOKENS]
        sample = plan.index.read(int(plan.matching.place[row]), len(ids), torch.arange(len(ids)))
        dumped: list[Tensor] = [sample.aux_hidden_states[place] for place in places.values()]
        dumped += [] if sample.last_hidden_state is None else [sample.last_hidden_state]
        if not all(bool(states.isfinite().all()) for states in dumped):
            continue
        own = [states[0].float().cpu() for states in target.capture(torch.tensor(ids, dtype=torch.int64)[None])[0]]
        for layer, states in enumerate(own):
            total[layer] += states.square().sum(dtype=torch.float64)
            for number, found in enumerate(dumped):
                lost[number, layer] += (found.float() - states).square().sum(dtype=torch.float64)
        num_checked += 1
        if num_checked == count:
            break
    if not num_checked:
        sys.stderr.write("warning: no row has finite states in the dump: none was checked against the target\n")
        return
    errors = (lost / total).sqrt()
    for number, layer in enumerate(checked):
        _refuse(plan, layer, errors[number])
    worst = max(float(errors[number, layer]) for number, layer in enumerate(checked))
    rows = "1 row" if num_checked == 1 else f"{num_checked} rows"
    sys.stderr.write(f"checked {rows} against the target: states differ by {worst:.2%} at most\n")


def _refuse(plan: ImportPlan, layer: int, errors: Tensor) -> None:
    """Refuse states that are not of a layer.

    Args:
        layer: said to be theirs; errors: float64 ``[L]``, how far they are from each layer's own, of its size.
    """
    directory, nearest, error = plan.index.dump.directory, int(errors.argmin()), float(errors[layer])
    if nearest != layer and float(errors[nearest]) <= MAX_ERROR:
        raise MismatchError(
            f"{directory}: its states of layer {layer} are those of layer {nearest} ({float(errors[nearest]):.1%} off, "
            f"from layer {layer} {error:.0%}); give --aux-layer-ids as 0-based outputs, vLLM's numbers less one"
        )
    if not error <= MAX_ERROR:
        raise MismatchError(
            f"{directory}: its states of layer {layer} are {error:.0%} off what --target-model computes: they are of "
            "another target, revision or adapter"
        )

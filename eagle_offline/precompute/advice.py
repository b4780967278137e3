"""How to go on after an estimate: the best choice that fits, as a command, or the way out where none does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from eagle_offline.amounts import size
from eagle_offline.capture_settings import EstimateSettings, PrecomputeSettings
from eagle_offline.precompute.estimate_record import Cost


def advise(
    settings: EstimateSettings, costs: Sequence[Cost], fixed: int, room: int, directory: Path
) -> tuple[str | None, str]:
    """Return how to go on, and why so."""
    elsewhere = "--output-dir" if settings.store_url is None else "--staging-dir"
    fitting = [cost for cost in costs if cost.fits]
    exact = [cost for cost in fitting if not cost.losses]
    if exact:
        best = min(exact, key=lambda cost: cost.num_bytes)
        return _command(settings, best), f"go on with {best.name}, the smallest that loses nothing and fits:"
    if fitting:
        best = fitting[0]
        exact_bytes = min(cost.disk_bytes for cost in costs if not cost.losses)
        return _command(settings, best), (
            f"nothing exact fits: {size(exact_bytes)} needed, {size(room)} free at {directory}; free some space, "
            f"choose another {elsewhere}, or accept a loss ({', '.join(best.losses)}):"
        )
    smallest = min(costs, key=lambda cost: cost.num_bytes)
    share = max(0, int(100 * (room - fixed) / max(smallest.epoch_bytes, 1)))
    fewer = f"take fewer conversations (--split: about {share}% of them fit), " if share else ""
    if settings.store_url is not None:
        fewer = "make smaller shards (--shard-size), "
    return None, (
        f"nothing fits: the smallest, {smallest.name}, needs {size(smallest.disk_bytes)}, {size(room)} free at "
        f"{directory}; free some space, choose another {elsewhere}, {fewer}or store fewer --aux-layer-ids"
    )


def command_as_asked(settings: EstimateSettings, costs: Sequence[Cost]) -> str | None:
    """Return the command line that goes on with what the settings say, None where it does not fit."""
    return next((_command(settings, cost) for cost in costs if cost.chosen and cost.fits), None)


def _command(settings: EstimateSettings, cost: Cost) -> str:
    """Return the command line that goes on with a choice."""
    chosen = {
        "state_encoding": cost.state_encoding,
        "mantissa_bits": cost.mantissa_bits,
        "target_encoding": cost.target_encoding,
        "top_k": settings.top_k if cost.target_encoding == "topk" else None,
        "output_dir": settings.store_url or settings.output_dir or "C",
        # It follows from --output-dir and is no flag.
        "store_url": None,
        "resume": True,
        "dry_run": False,
    }
    words = ["eagle-offline", "precompute"]
    for name, info in PrecomputeSettings.model_fields.items():
        value = chosen.get(name, getattr(settings, name))
        if value == info.default:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)

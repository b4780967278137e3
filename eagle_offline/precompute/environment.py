"""Where shards are made, and what it means to go on elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from eagle_offline.cache.manifest import BatchPlan
from eagle_offline.capture_settings import PrecomputeSettings
from eagle_offline.errors import MismatchError
from eagle_offline.provenance import describe_environment


def shard_environment(settings: PrecomputeSettings, device: str) -> dict[str, Any]:
    """Return what a shard's record says of where it was made: the same bytes come out where all of it is the same."""
    return {**describe_environment(device), "tensor_parallel_size": settings.tensor_parallel_size}


def refuse_other_environment(directory: Path, recorded: BatchPlan, found: BatchPlan) -> None:
    """Refuse another kind of device, or another number of processes that share a copy of the target.

    Raises:
        MismatchError: names both, and the way out.
    """
    names = ("device_kind", "tensor_parallel_size")
    differing = [name for name in names if getattr(recorded, name) != getattr(found, name)]
    if differing:
        said = "; ".join(
            f"batch_plan.{name}: recorded {getattr(recorded, name)}, now {getattr(found, name)}" for name in differing
        )
        raise MismatchError(
            f"{directory} was begun in another environment and is left as it is: {said}. Give the recorded ones again, "
            "or add --accept-environment: shards then agree within a tolerance, not byte for byte"
        )


def say_other_environment(recorded: dict[str, Any], environment: dict[str, Any]) -> None:
    """Write one line to stderr if a cache was begun elsewhere.

    Args:
        recorded: the manifest's environment.
        environment: of this process.
    """
    before, now = _flat(recorded), _flat(environment)
    differing = [
        f"{name} was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]
    ]
    if differing:
        sys.stderr.write(
            f"note: begun in another environment ({'; '.join(differing)}): shards made here agree with those made "
            "there within a tolerance, not byte for byte\n"
        )


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    packages = environment.get("packages")
    return {**environment, "packages": None, **(packages if isinstance(packages, dict) else {})}

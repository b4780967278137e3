"""The settings that a cache is made from: saved in it as ``config.json``, and as the command that makes the rest."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from eagle_offline.cache.layout import CONFIG_FILE, EXACT_MANTISSA_BITS
from eagle_offline.cache.manifest import Manifest, read_json_object
from eagle_offline.capture_settings import ImportSettings, PrecomputeSettings
from eagle_offline.config import ConvertSettings, Settings, build
from eagle_offline.durable import create_exclusively
from eagle_offline.errors import DataError, UsageError

MAX_CONFIG_BYTES = 1 << 20

# Of each command that makes a cache, its settings and those of them that name what it reads.
_SETTINGS: dict[str, tuple[type[Settings], set[str]]] = {
    "precompute": (PrecomputeSettings, {"target_model", "input_data"}),
    "import": (ImportSettings, {"target_model", "input_data", "states_dir"}),
    "convert": (ConvertSettings, {"cache"}),
}


def maker(manifest: Manifest) -> str:
    """Return the command that makes such a cache."""
    identity = manifest.identity
    if identity.converted_from is not None:
        return "convert"
    return "precompute" if identity.imported_from is None else "import"


def saved_settings(directory: Path, manifest: Manifest) -> dict[str, Any] | None:
    """Return what ``config.json`` says, None where the manifest does not name all of it."""
    inputs = manifest.environment.get("inputs")
    if not isinstance(inputs, dict):
        return None
    settings = {**inputs, "output_dir": str(directory.absolute())}
    kind, needed = _SETTINGS[maker(manifest)]
    try:
        build(kind, settings)
    except UsageError:  # of a program whose settings were other ones
        return None
    return settings if inputs.keys() > needed else None


def config_bytes(settings: dict[str, Any]) -> bytes:
    """Return the content of ``config.json``."""
    return (json.dumps(settings, indent=2) + "\n").encode()


def write_config(directory: Path, manifest: Manifest) -> None:
    """Write the settings that a cache is made from as ``config.json``, unless it is there; it is never changed."""
    settings = saved_settings(directory, manifest)
    if settings is not None and not (directory / CONFIG_FILE).exists():
        create_exclusively(directory / CONFIG_FILE, config_bytes(settings))


def making_command(path: Path, manifest: Manifest) -> str:
    """Return the command that makes again what is missing."""
    config = path / CONFIG_FILE
    try:
        read_json_object(config, MAX_CONFIG_BYTES)
    except DataError:  # as it is named in the manifest, then
        given = [*_recorded_flags(manifest), "--output-dir", str(path)]
    else:
        given = ["--config", str(config)]
    return shlex.join(["eagle-offline", maker(manifest), *given, "--resume"])


def _recorded_flags(manifest: Manifest) -> list[str]:
    """Return the inputs and settings that the manifest records, as flags."""
    inputs = manifest.environment.get("inputs")
    inputs = inputs if isinstance(inputs, dict) else {}
    if manifest.identity.converted_from is not None:
        return [str(inputs.get("cache", "CACHE"))]
    identity, capture = manifest.identity, manifest.identity.capture
    splits = {source.split for source in identity.dataset.sources}
    bits = min(layout.mantissa_bits for layout in capture.fields)
    values = {
        "target_model": inputs.get("target_model", identity.target.id),
        "revision": identity.target.revision,
        "input_data": inputs.get("input_data", "DATA"),
        "split": splits.pop() if len(splits) == 1 else None,
        "seq_length": identity.text.seq_length,
        "draft_vocab": inputs.get("draft_vocab"),
        "draft_vocab_size": None if inputs.get("draft_vocab") else manifest.defaults.draft_vocabulary.size,
        "batch_size": identity.batch_plan.batch_size,
        "max_batch_tokens": identity.batch_plan.max_batch_tokens,
        "shard_size": capture.shard_size,
        "dtype": capture.dtype,
        "compute_dtype": None if capture.compute_dtype in ("checkpoint", "unknown") else capture.compute_dtype,
        "aux_layer_ids": ",".join(map(str, capture.aux_layer_ids)),
        "state_encoding": capture.state_encoding,
        "mantissa_bits": None if bits == EXACT_MANTISSA_BITS else bits,
        "target_encoding": capture.target_encoding,
        "top_k": capture.fields[-1].top_k,
        "format": capture.format,
        "compressor": capture.compressor,
        "shuffle_seed": identity.dataset.shuffle_seed,
        "device": identity.batch_plan.device_kind,
    }
    read: list[str] = []
    if identity.imported_from is not None:
        read = [str(inputs.get("states_dir", "STATES_DIR"))]
        values |= {"tool": identity.imported_from.tool}
        values |= {name: inputs.get(name) for name in ("loss_masks", "on_mismatch")}
    given = [(f"--{name.replace('_', '-')}", value) for name, value in values.items() if value is not None]
    several = ((flag, *map(str, value if isinstance(value, list) else [value])) for flag, value in given)
    return [*read, *(text for texts in several for text in texts)]

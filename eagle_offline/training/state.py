"""Checkpoints: the draft as a model directory, the training state beside it, nothing pickled, `latest` written last."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle_offline.config import TrainSettings
from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.files import MODEL_FILE, write_draft
from eagle_offline.draft.origin import DraftOrigin
from eagle_offline.durable import (
    explained_os_errors,
    fsync_directory,
    fsync_file,
    make_directory,
    temporary_sibling,
    write_bytes,
)
from eagle_offline.errors import DataError, MismatchError

LATEST_FILE = "latest"
CHECKPOINTS_DIRECTORY = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"

_NAME = re.compile(r"step-\d{8}")

# Settings that may differ on resume: where things are, how often something is written, when to stop.
_FREE_SETTINGS = frozenset(
    {
        "cache", "heldout_cache", "output_dir", "device", "eval_every", "checkpoint_every", "keep_checkpoints",
        "log_every", "verify", "resume",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Position:
    """Where training stands: optimizer steps done, and the next pack of the epoch at hand."""

    step: int
    epoch: int
    next_pack: int


def fingerprint(settings: TrainSettings, identity_digest: str, vocab_digest: str, num_samples: int) -> dict[str, Any]:
    """Return what a checkpoint and its resumption must share, as JSON values by field."""
    chosen = settings.model_dump(mode="json", exclude=set(_FREE_SETTINGS))
    return {**chosen, "cache_identity": identity_digest, "draft_vocab": vocab_digest, "num_samples": num_samples}


def save_checkpoint(
    directory: Path,
    model: Eagle3DraftModel,
    optimizer: torch.optim.Optimizer,
    selected_token_ids: torch.Tensor,
    origin: DraftOrigin,
    position: Position,
    expected: dict[str, Any],
    unlogged: dict[str, list[float]],
) -> Path:
    """Write a checkpoint beside, make it durable, put it in place, then point ``latest`` at it; return its path.

    ``unlogged`` are the sums of the steps since the last metrics line, which the next line will include.
    """
    parent = directory / CHECKPOINTS_DIRECTORY
    make_directory(parent)
    final = parent / f"step-{position.step:08d}"
    sibling = temporary_sibling(final)
    with explained_os_errors(final):
        sibling.mkdir()
        try:
            write_draft(sibling, model, selected_token_ids, origin)
            save_file(_flatten_optimizer(model, optimizer), sibling / OPTIMIZER_FILE)
            state = {"position": asdict(position), "fingerprint": expected, "unlogged": unlogged}
            (sibling / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
            for path in sibling.iterdir():
                fsync_file(path)
            fsync_directory(sibling)
            if final.exists():  # the same step again, after a resume
                shutil.rmtree(final)
            os.rename(sibling, final)
        finally:
            shutil.rmtree(sibling, ignore_errors=True)
        fsync_directory(parent)
    write_bytes(directory / LATEST_FILE, (final.name + "\n").encode())
    return final


def remove_old_checkpoints(directory: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints; the one that ``latest`` names always stays."""
    latest = latest_checkpoint(directory)
    finished = sorted(p for p in (directory / CHECKPOINTS_DIRECTORY).iterdir() if _NAME.fullmatch(p.name))
    for path in finished[:-keep]:
        if path != latest:
            shutil.rmtree(path)


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names, None before the first.

    Raises:
        DataError: ``latest`` names none that is there.
    """
    try:
        name = (directory / LATEST_FILE).read_text().strip()
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError(f"{directory / LATEST_FILE}: not the name of a checkpoint: {error}") from error
    path = directory / CHECKPOINTS_DIRECTORY / name
    if not _NAME.fullmatch(name) or not path.is_dir():
        raise DataError(
            f"{directory / LATEST_FILE}: names {name!r}, which is not there; write the name of a directory below "
            f"{directory / CHECKPOINTS_DIRECTORY} into it, or start in another --output-dir"
        )
    return path


def load_checkpoint(
    path: Path, model: Eagle3DraftModel, optimizer: torch.optim.Optimizer, expected: dict[str, Any]
) -> tuple[Position, dict[str, list[float]]]:
    """Restore model and optimizer in place; return where training stood and the sums not logged yet.

    Raises:
        MismatchError: the checkpoint belongs to another cache or other settings, each named.
        DataError: missing or damaged files.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text())
        recorded, position, unlogged = state["fingerprint"], Position(**state["position"]), state["unlogged"]
        weights, moments = load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{path}: the checkpoint cannot be read: {error}") from error
    differing = [
        f"{name}: recorded {recorded.get(name)!r}, now {expected.get(name)!r}"
        for name in sorted(recorded.keys() | expected.keys())
        if recorded.get(name) != expected.get(name)
    ]
    if differing:
        raise MismatchError(
            f"{path} belongs to other settings and is left as it is: {'; '.join(differing)}. "
            "Give the recorded settings again, or choose another --output-dir"
        )
    model.load_state_dict(weights)
    _restore_optimizer(model, optimizer, moments)
    return position, unlogged


def _names(model: Eagle3DraftModel) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _flatten_optimizer(model: Eagle3DraftModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return every state tensor of the optimizer as ``<parameter>/<state>``, in its own dtype."""
    names = _names(model)
    return {
        f"{names[parameter]}/{key}": value.detach().clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _restore_optimizer(
    model: Eagle3DraftModel, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    parameters = {name: parameter for parameter, name in _names(model).items()}
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        parameter = parameters[name]
        # Adam's step count lives on the CPU unless the optimizer is fused.
        fused = bool(optimizer.param_groups[0].get("fused"))
        device = torch.device("cpu") if state == "step" and not fused else parameter.device
        optimizer.state[parameter][state] = value.to(device)

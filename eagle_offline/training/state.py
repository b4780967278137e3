"""Checkpoints: the draft as a model directory, the training state beside it, nothing pickled, pointers written last."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle_offline.data.mixture import CacheMixture
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
from eagle_offline.errors import DataError, MismatchError, UsageError
from eagle_offline.provenance import digest_file
from eagle_offline.train_settings import TrainSettings

LATEST_FILE = "latest"
BEST_FILE = "best"
CHECKPOINTS_DIRECTORY = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"

_NAME = re.compile(r"step-\d{8}")

_WAY_OUT = "write the name of another checkpoint into the run's `latest` and go on with --resume"

# Settings that may differ on resume: where things are, how often something is written, when to stop.
_FREE_SETTINGS = frozenset(
    {
        "cache", "heldout_cache", "output_dir", "device", "eval_every", "early_stopping", "checkpoint_every",
        "checkpoint_minutes", "checkpoint_epochs", "keep_checkpoints", "log_every", "report_to", "profile", "verify",
        "num_workers", "recompute", "deterministic", "on_nonfinite", "draft_vocab", "resume", "accept_drift",
        "local_cache", "local_cache_size", "sequence_partitions",
    }
)  # fmt: skip

# Settings that a run may go on with when asked to: the order of samples, the caches and the draft stay what they are.
_ACCEPTABLE_DRIFT = frozenset(
    {
        "learning_rate", "min_learning_rate_ratio", "warmup_ratio", "weight_decay", "beta1", "beta2", "max_grad_norm",
        "num_epochs", "max_steps", "global_batch", "step_decay", "supervision_gate", "lk_loss_type", "lk_kl_scale",
        "lk_kl_decay", "depth_weights", "depth_mean", "down_sample_ratio", "down_sample_ratio_min",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Position:
    """Where training stands: optimizer steps done, and the next pack of the epoch at hand."""

    step: int
    epoch: int
    next_pack: int

    @property
    def epoch_before(self) -> int:
        """The epoch of the packs that were trained on last."""
        return self.epoch - (self.next_pack == 0)


@dataclass(frozen=True)
class Standing:
    """What a run has come to, beside its weights.

    Attributes:
        position: where it stands.
        best_length, best_step: the longest walked accept length of a validation, and when that was.
        num_without_gain: validations since then.
        validation_due: stopped before a validation that belongs to this step.
        ended: training is over, before its last step too.
    """

    position: Position
    best_length: float | None = None
    best_step: int | None = None
    num_without_gain: int = 0
    validation_due: bool = False
    ended: bool = False


def fingerprint(
    settings: TrainSettings,
    samples: CacheMixture,
    heldout: CacheMixture | None,
    vocab_digest: str,
    mask_token_id: int | None,
) -> dict[str, Any]:
    """Return what a checkpoint and its resumption must share, as JSON values by field.

    Args:
        settings: of the run.
        samples: what it trains on.
        heldout: what it validates on, when that is no share of ``samples``: then all of them are trained on.
        vocab_digest: of the draft vocabulary.
        mask_token_id: of a draft that drafts in parallel.
    """
    chosen = settings.model_dump(mode="json", exclude=set(_FREE_SETTINGS))
    return {
        **chosen,
        "cache_identity": _identities(samples),
        "heldout_cache": None if heldout is None else _identities(heldout),
        "draft_vocab_digest": vocab_digest,
        "mask_token_id": mask_token_id,
        "num_samples": [len(cache) for cache in samples.caches],
    }


def _identities(mixture: CacheMixture) -> list[str]:
    return [cache.manifest.identity.digest for cache in mixture.caches]


def acceptable_drift(names: Sequence[str]) -> frozenset[str]:
    """Return the settings named by ``--accept-drift``.

    Raises:
        UsageError: one that cannot differ without making another run of it.
    """
    accepted = frozenset(name.lstrip("-").replace("-", "_") for name in names)
    refused = sorted(accepted - _ACCEPTABLE_DRIFT)
    if refused:
        raise UsageError(
            f"--accept-drift {refused[0]}: a run cannot go on with another; these can differ: "
            f"{', '.join(sorted(_ACCEPTABLE_DRIFT))}"
        )
    return accepted


def save_checkpoint(
    directory: Path,
    model: Eagle3DraftModel,
    optimizer: torch.optim.Optimizer,
    selected_token_ids: torch.Tensor,
    origin: DraftOrigin,
    standing: Standing,
    expected: dict[str, Any],
    unlogged: dict[str, list[float]],
) -> Path:
    """Write a checkpoint beside, make it durable, put it in place, then point ``latest`` at it; return its path.

    ``best`` is pointed at it too when it is. ``unlogged`` are the sums of the steps since the last metrics line,
    which the next line will include.
    """
    parent = directory / CHECKPOINTS_DIRECTORY
    make_directory(parent)
    final = parent / _name(standing.position.step)
    content = {"standing": asdict(standing), "fingerprint": expected, "unlogged": unlogged}
    if final == latest_checkpoint(directory):
        # The step that the run went on from, so the weights are the same; what `latest` names is never taken away.
        digests = json.loads((final / STATE_FILE).read_text())["digests"]
        write_bytes(final / STATE_FILE, _state_bytes(content, digests))
    else:
        _put_in_place(final, model, optimizer, selected_token_ids, origin, content)
    if standing.best_step == standing.position.step:
        write_bytes(directory / BEST_FILE, (final.name + "\n").encode())
    write_bytes(directory / LATEST_FILE, (final.name + "\n").encode())
    return final


def _state_bytes(content: dict[str, Any], digests: dict[str, str]) -> bytes:
    return (json.dumps({**content, "digests": digests}, indent=2) + "\n").encode()


def _put_in_place(
    final: Path,
    model: Eagle3DraftModel,
    optimizer: torch.optim.Optimizer,
    selected_token_ids: torch.Tensor,
    origin: DraftOrigin,
    content: dict[str, Any],
) -> None:
    """Write a checkpoint's files beside, make them durable, and rename their directory to ``final``."""
    sibling = temporary_sibling(final)
    with explained_os_errors(final):
        sibling.mkdir()
        try:
            write_draft(sibling, model, selected_token_ids, origin)
            save_file(_flatten_optimizer(model, optimizer), sibling / OPTIMIZER_FILE)
            digests = {path.name: digest_file(path) for path in sorted(sibling.iterdir())}
            (sibling / STATE_FILE).write_bytes(_state_bytes(content, digests))
            for path in sibling.iterdir():
                fsync_file(path)
            fsync_directory(sibling)
            if final.exists():  # the same step again, after a resume from an earlier one
                shutil.rmtree(final)
            os.rename(sibling, final)
        finally:
            shutil.rmtree(sibling, ignore_errors=True)
        fsync_directory(final.parent)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def remove_old_checkpoints(directory: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints; those that ``latest`` and ``best`` name always stay."""
    named = {pointed_checkpoint(directory, LATEST_FILE), pointed_checkpoint(directory, BEST_FILE)}
    for path in _finished(directory)[:-keep]:
        if path not in named:
            shutil.rmtree(path)


def point_at_best(directory: Path, standing: Standing) -> None:
    """Let ``best`` name the best checkpoint of a run as it stands: it may go on from before a later one."""
    best = None if standing.best_step is None else directory / CHECKPOINTS_DIRECTORY / _name(standing.best_step)
    pointer = directory / BEST_FILE
    if best is not None and best.is_dir():
        write_bytes(pointer, (best.name + "\n").encode())
    elif pointer.exists():
        with explained_os_errors(pointer):
            pointer.unlink()


def check_files(checkpoint: Path) -> None:
    """See that a checkpoint's files are those that were written.

    Raises:
        DataError: one is missing, was changed, or cannot be read.
    """
    try:
        digests = json.loads((checkpoint / STATE_FILE).read_text())["digests"]
        changed = [name for name, digest in digests.items() if digest_file(checkpoint / name) != digest]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{checkpoint}: the checkpoint cannot be read: {error}; {_WAY_OUT}") from error
    if changed:
        raise DataError(f"{checkpoint / changed[0]}: was changed after it was written; {_WAY_OUT}")


def restore_latest(directory: Path) -> str | None:
    """Let ``latest`` name the newest checkpoint where it is missing: the run was killed in between, or it was removed.

    Returns:
        The name, None where nothing was to be done.
    """
    finished = _finished(directory)
    if (directory / LATEST_FILE).exists() or not finished:
        return None
    write_bytes(directory / LATEST_FILE, (finished[-1].name + "\n").encode())
    return finished[-1].name


def _finished(directory: Path) -> list[Path]:
    """Return the checkpoints that are there, in order."""
    parent = directory / CHECKPOINTS_DIRECTORY
    return sorted(path for path in parent.iterdir() if _NAME.fullmatch(path.name)) if parent.is_dir() else []


def holds_a_run(directory: Path) -> bool:
    """Return whether a run has left something to go on from."""
    return latest_checkpoint(directory) is not None or bool(_finished(directory))


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names, None before the first; see `pointed_checkpoint`."""
    return pointed_checkpoint(directory, LATEST_FILE)


def best_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint that ``best`` names, else the latest, None before the first; see `pointed_checkpoint`."""
    return pointed_checkpoint(directory, BEST_FILE) or latest_checkpoint(directory)


def pointed_checkpoint(directory: Path, pointer: str) -> Path | None:
    """Return the checkpoint that a pointer file names, None without the file.

    Raises:
        DataError: it names none that is there.
    """
    try:
        name = (directory / pointer).read_text().strip()
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError(f"{directory / pointer}: not the name of a checkpoint: {error}") from error
    path = directory / CHECKPOINTS_DIRECTORY / name
    if not _NAME.fullmatch(name) or not path.is_dir():
        raise DataError(
            f"{directory / pointer}: names {name!r}, which is not there; write the name of a directory below "
            f"{directory / CHECKPOINTS_DIRECTORY} into it, or start in another --output-dir"
        )
    return path


def load_checkpoint(
    path: Path,
    model: Eagle3DraftModel,
    optimizer: torch.optim.Optimizer,
    expected: dict[str, Any],
    accepted: frozenset[str] = frozenset(),
) -> tuple[Standing, dict[str, list[float]]]:
    """Restore model and optimizer in place; return how the run stood and the sums not logged yet.

    Args:
        path: the checkpoint.
        model, optimizer: of the same shape as those that were saved.
        expected: the fingerprint of the run that goes on.
        accepted: its fields that may differ; see `acceptable_drift`.

    Raises:
        MismatchError: the checkpoint belongs to another cache or other settings, each named.
        DataError: missing or damaged files.
    """
    check_files(path)
    try:
        state = json.loads((path / STATE_FILE).read_text())
        recorded, unlogged, stood = state["fingerprint"], state["unlogged"], dict(state["standing"])
        standing = Standing(position=Position(**stood.pop("position")), **stood)
        weights, moments = load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{path}: the checkpoint cannot be read: {error}; {_WAY_OUT}") from error
    differing = [
        f"{name}: recorded {recorded.get(name)!r}, now {expected.get(name)!r}"
        for name in sorted(recorded.keys() | expected.keys())
        if recorded.get(name) != expected.get(name) and name not in accepted
    ]
    if differing:
        refused = {line.partition(":")[0] for line in differing}
        names = " ".join(sorted(refused | accepted))
        way_out = f", or go on with --accept-drift {names}" if refused <= _ACCEPTABLE_DRIFT else ""
        raise MismatchError(
            f"{path} belongs to other settings and is left as it is: {'; '.join(differing)}. "
            f"Give the recorded settings again, or choose another --output-dir{way_out}"
        )
    model.load_state_dict(weights)
    _restore_optimizer(model, optimizer, moments)
    return standing, unlogged


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
        optimizer.state[parameter][state] = value.to(parameter.device)

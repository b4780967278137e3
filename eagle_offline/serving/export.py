"""A trained draft as a directory that a serving engine reads, put in place whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.draft.files import MODEL_FILE
from eagle_offline.draft.origin import ORIGIN_FILE
from eagle_offline.durable import (
    TEMPORARY_MARK,
    explained_os_errors,
    fsync_directory,
    fsync_file,
    is_alive,
    require_writable,
    temporary_sibling,
)
from eagle_offline.errors import MismatchError, UsageError, one_line
from eagle_offline.serving.check import check_draft
from eagle_offline.serving.drafts import ServedDraft
from eagle_offline.serving.layouts import DTYPES, ExportLayout, flat_layout, speculators_layout
from eagle_offline.serving.model_card import CARD_FILE, CardFacts, model_card
from eagle_offline.serving.report import CheckReport
from eagle_offline.serving.tensor_files import CONFIG_FILE

# What the weights' metadata says, by which a later export knows that it may take the directory's place.
_METADATA = {"format": "pt", "exported_by": "eagle-offline"}


def export_draft(
    draft: ServedDraft,
    layout: ExportLayout,
    output_dir: Path,
    *,
    target_name: str,
    target_architectures: Sequence[str],
    num_draft_tokens: int,
    dtype: str = "bf16",
) -> dict[str, Any]:
    """Write a draft in a layout that engines serve; a former export in the same place is replaced.

    Args:
        draft: what to export.
        layout: ``flat`` (vLLM, SGLang, the original EAGLE code) or ``speculators`` (vLLM, speculators).
        output_dir: where ``config.json``, ``model.safetensors``, ``origin.json`` and ``README.md`` go.
        target_name: hub id or path under which the target is found.
        target_architectures: class names from the target's config.
        num_draft_tokens: ``K``, tokens drafted a round, for the speculators config and the commands in the README.
        dtype: of the weights: bf16, fp16 or fp32.

    Returns:
        JSON values: ``output_dir``, ``layout``, ``dtype``, ``num_bytes``, ``embeddings`` (whether they are in the file)
        and ``engines``: by engine, ``claimed``, ``clean`` and the problems found.

    Raises:
        UsageError: an unknown layout or dtype, no tokens to draft, or a directory that cannot be made.
        MismatchError: the directory holds something else, or the layout cannot hold this draft.
        SpaceError: no room left.
    """
    _check_request(draft, layout, output_dir, dtype, num_draft_tokens)
    include_embeddings = carries_embeddings(draft, layout)
    assert draft.aux_layer_ids is not None
    if layout == "flat":
        config, tensors = flat_layout(
            draft.model,
            draft.selected_token_ids,
            draft.aux_layer_ids,
            include_embeddings=include_embeddings,
            dtype=dtype,
        )
    else:
        config, tensors = speculators_layout(
            draft.model,
            draft.selected_token_ids,
            draft.aux_layer_ids,
            include_embeddings=include_embeddings,
            target_name=target_name,
            target_architectures=target_architectures,
            num_draft_tokens=num_draft_tokens,
            dtype=dtype,
        )
    _check_values(tensors, dtype)
    card = CardFacts(draft, layout, dtype, target_name, num_draft_tokens, output_dir.name, include_embeddings)
    report = _put_in_place(output_dir, config, tensors, card)
    return {
        "output_dir": str(output_dir),
        "layout": layout,
        "dtype": dtype,
        "num_bytes": sum(path.stat().st_size for path in output_dir.iterdir()),
        "embeddings": include_embeddings,
        "engines": report.to_json()["engines"],
    }


def carries_embeddings(draft: ServedDraft, layout: ExportLayout) -> bool:
    """Return whether an export holds the draft's embeddings.

    Engines share the target's where they are the same; speculators leaves absent ones unset (`embeddings-written`).
    """
    if layout == "speculators" and draft.has_embeddings:
        return True
    if draft.model.config.target_hidden_size != draft.model.config.hidden_size:
        return True
    return draft.has_embeddings if draft.origin is None else draft.origin.embeddings_trained


def reason_against_speculators(config: Eagle3DraftConfig) -> str | None:
    """Return why a draft cannot be exported in the speculators layout, None when it can."""
    if config.target_hidden_size != config.hidden_size:
        return f"its config has no place for another width ({config.hidden_size}) than the target's"
    if config.parallel_drafting and config.fc_norm:
        return "its peagle config drops fc_norm"
    return None


def _check_request(
    draft: ServedDraft, layout: ExportLayout, output_dir: Path, dtype: str, num_draft_tokens: int
) -> None:
    if layout not in ("flat", "speculators"):
        raise UsageError(f"layout {layout!r}: expected flat or speculators")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if num_draft_tokens < 1:
        raise UsageError(f"{num_draft_tokens} draft tokens: expected at least 1")
    if draft.aux_layer_ids is None:
        raise MismatchError("this draft does not say which target layers it reads: engines would guess")
    reason = reason_against_speculators(draft.model.config)
    if reason is not None and layout == "speculators":
        raise MismatchError(f"this draft fits no speculators directory: {reason}: export it with --to flat")
    if carries_embeddings(draft, layout) and not draft.has_embeddings:
        raise MismatchError("this draft trained its own embeddings, and they are not in its directory")
    try:
        _check_place(output_dir)
        require_writable(output_dir.parent, "--output-dir")
    except OSError as error:
        raise _no_place(output_dir, error) from error


def _check_place(output_dir: Path) -> None:
    if output_dir.is_symlink() or (output_dir.exists() and not output_dir.is_dir()):
        raise UsageError(f"{output_dir}: something other than a directory is there: choose another --output-dir")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not _is_former_export(output_dir):
        raise MismatchError(
            f"{output_dir}: not empty and not a former export: nothing there is changed, choose another --output-dir"
        )


def _no_place(output_dir: Path, error: OSError) -> UsageError:
    reason = error.strerror or one_line(error)
    return UsageError(f"{output_dir}: no directory can be made there: {reason}: choose another --output-dir")


def _is_former_export(directory: Path) -> bool:
    try:
        if not {path.name for path in directory.iterdir()} <= {CONFIG_FILE, MODEL_FILE, ORIGIN_FILE, CARD_FILE}:
            return False
        with safe_open(directory / MODEL_FILE, framework="pt") as opened:
            return opened.metadata() == _METADATA
    except (OSError, SafetensorError):
        return False


def _check_values(tensors: dict[str, torch.Tensor], dtype: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise MismatchError(
                f"{name} holds NaN or infinity as {dtype}: the draft is damaged, or its values need another --dtype"
            )


def _put_in_place(
    output_dir: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], card: CardFacts
) -> CheckReport:
    """Write beside, make durable, check, and take the directory's place; return what the check found."""
    sibling, former = temporary_sibling(output_dir), temporary_sibling(output_dir)
    _remove_abandoned(output_dir)
    with explained_os_errors(output_dir):
        try:
            sibling.mkdir()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # the sibling's name is the longer one
                raise _no_place(output_dir, error) from error
            raise
        try:
            (sibling / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            save_file(tensors, sibling / MODEL_FILE, metadata=_METADATA)
            if card.draft.origin is not None:
                (sibling / ORIGIN_FILE).write_text(card.draft.origin.to_json(), encoding="utf-8")
            report = check_draft(sibling)
            (sibling / CARD_FILE).write_text(model_card(card, report), encoding="utf-8")
            for path in sibling.iterdir():
                fsync_file(path)
            fsync_directory(sibling)
            if output_dir.exists():
                os.rename(output_dir, former)
            os.rename(sibling, output_dir)
            fsync_directory(output_dir.parent)
        finally:
            if former.exists() and not output_dir.exists():
                os.rename(former, output_dir)
            for path in (sibling, former):
                shutil.rmtree(path, ignore_errors=True)
    _remove_abandoned(output_dir)
    return report


def _remove_abandoned(output_dir: Path) -> None:
    """Remove what exports to the same place left beside it when they were killed on this host.

    Killed between its two renames, an export leaves nothing in place and both directories, the former and the one that
    was to follow, beside it. As long as no whole export is in place they may be all that there is, and stay.
    """
    if not _is_former_export(output_dir):
        return
    prefix = f".{output_dir.name}{TEMPORARY_MARK}{socket.gethostname()}-"
    with suppress(OSError):
        for path in list(output_dir.parent.iterdir()):
            process_id = path.name.removeprefix(prefix).partition("-")[0]
            if path.name.startswith(prefix) and process_id.isdigit() and not is_alive(int(process_id)):
                shutil.rmtree(path, ignore_errors=True)

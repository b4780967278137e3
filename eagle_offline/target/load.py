"""The target from a directory or a hub: resolved once to local files, loaded in the dtype asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle_offline.errors import DataError, MismatchError, UsageError, one_line

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


_CONFIG_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.py")


@dataclass(frozen=True)
class TargetSource:
    """Where a target's files are.

    Attributes:
        id: hub id, or the directory's name.
        directory: local files.
        revision: the resolved commit of a hub model; None for a directory.
        trust_remote_code: whether code among the files may run.
    """

    id: str
    directory: Path
    revision: str | None
    trust_remote_code: bool


def resolve_target(
    name: str, revision: str | None = None, trust_remote_code: bool = False, flag: str = "--target-model"
) -> TargetSource:
    """Find a model's files, fetching them from the hub when ``name`` is no directory; ``flag`` is where it was given.

    Raises:
        UsageError: neither a directory nor a hub id that can be reached.
        DataError: a directory without ``config.json``.
    """
    directory = Path(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise DataError(f"{name}: no config.json in this directory; expected a saved transformers model")
        return TargetSource(directory.resolve().name, directory, None, trust_remote_code)
    if directory.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"{flag} {name}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=[*_CONFIG_FILES, "*.safetensors"]))
        if not any(snapshot.glob("*.safetensors")):
            snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=[*_CONFIG_FILES, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UsageError(
            f"{flag} {name}{at}: no such directory, and the hub does not give it; check the id, the network "
            f"and access (HF_TOKEN), or pass a local directory: {one_line(error)}"
        ) from error
    return TargetSource(name, snapshot, snapshot.name, trust_remote_code)


def load_config(source: TargetSource) -> Any:
    """Load a target's config.

    Raises:
        DataError: not readable, or of an architecture that transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{source.directory}: its config cannot be loaded: {one_line(error)}") from error


def load_tokenizer(source: TargetSource, chat_template: Path | None = None) -> Any:
    """Load a target's tokenizer, with ``chat_template`` (a Jinja file) in place of its own when given.

    Raises:
        DataError: the files hold no tokenizer. UsageError: the template file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.directory}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat-template {chat_template}: cannot be read: {one_line(error)}") from error
    return tokenizer


def attention_implementation(config: Any) -> str:
    """Return ``sdpa`` where the architecture has it, else ``eager`` (Gemma 2 caps its attention scores)."""
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"


def load_model(source: TargetSource, device: str, compute_dtype: str | None) -> torch.nn.Module:
    """Load a target for inference.

    Args:
        source: its files.
        device: torch device.
        compute_dtype: ``bf16``, ``fp16``, ``fp32``; None for the checkpoint's own, fp32 on a CPU.

    Raises:
        DataError: weights missing or not readable. MismatchError: not a causal LM.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    dtype: torch.dtype | str = "auto"
    if compute_dtype is not None or torch.device(device).type == "cpu":
        dtype = DTYPES[compute_dtype or "fp32"]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.directory,
            dtype=dtype,
            attn_implementation=attention_implementation(load_config(source)),
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(f"{source.directory}: its weights cannot be loaded: {one_line(error)}") from error
    except ValueError as error:
        raise MismatchError(f"{source.directory}: not a causal LM that can be loaded: {one_line(error)}") from error
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise DataError(f"{source.directory}: {len(missing)} weights are missing from the files (first: {missing[0]})")
    return model.to(device).eval()

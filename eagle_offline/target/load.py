"""The target from a directory or a hub: resolved once to local files, loaded in the dtype asked for."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from eagle_offline.errors import DataError, MismatchError, UsageError, one_line
from eagle_offline.provenance import digest_checkpoint, digest_merged
from eagle_offline.target.adapters import AdapterSource, adapted_vocab_size, merge_adapter, resolve_adapter
from eagle_offline.target.architectures import auto_class, implementations
from eagle_offline.target.hub import CONFIG_FILES, WEIGHT_FILES, fetch
from eagle_offline.target.layout import find_decoder, input_embeddings, is_plain

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class TargetSource:
    """Where a target's files are.

    Attributes:
        id: hub id, or the directory's name.
        directory: local files.
        revision: the resolved commit of a hub model; None for a directory.
        trust_remote_code: whether code among the files may run.
        adapter: what is to be merged into it, if anything.
    """

    id: str
    directory: Path
    revision: str | None
    trust_remote_code: bool
    adapter: AdapterSource | None = None

    @property
    def text_directory(self) -> Path:
        """Where the tokenizer is: an adapter that adds tokens comes with its own."""
        if self.adapter is not None and (self.adapter.directory / "tokenizer_config.json").is_file():
            return self.adapter.directory
        return self.directory


def resolve_target(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    flag: str = "--target-model",
    *,
    weights: bool = True,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> TargetSource:
    """Find a model's files, fetching them from the hub when ``name`` is no directory.

    Args:
        name: directory or hub id.
        revision: of a hub model.
        trust_remote_code: whether code among the files may run.
        flag: where ``name`` was given.
        weights: they are needed; without them only configs, tokenizer and code are fetched.
        adapter, adapter_revision: directory or hub id of an adapter to be merged into the model.

    Raises:
        UsageError: neither a directory nor a hub id that can be reached.
        DataError: a directory without ``config.json``.
    """
    found = None if adapter is None else resolve_adapter(adapter, adapter_revision)
    directory = Path(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            gguf = "; GGUF files are not read: pass the checkpoint they were made from" if _has_gguf(directory) else ""
            raise DataError(f"{name}: no config.json in this directory; expected a saved transformers model{gguf}")
        return TargetSource(directory.resolve().name, directory, None, trust_remote_code, found)
    snapshot = fetch(name, revision, CONFIG_FILES, flag)
    if weights:
        snapshot = fetch(name, snapshot.name, WEIGHT_FILES[0], flag)
        if not any(snapshot.glob("*.safetensors")):
            snapshot = fetch(name, snapshot.name, WEIGHT_FILES[1], flag)
    return TargetSource(name, snapshot, snapshot.name, trust_remote_code, found)


def target_digest(source: TargetSource, *, rehash: bool = False) -> str:
    """Return the digest of the weights that run.

    Raises:
        DataError: there are none.
    """
    adapter = None if source.adapter is None else source.adapter.digest()
    return digest_merged(digest_checkpoint(source.directory, rehash=rehash), adapter)


def load_config(source: TargetSource) -> Any:
    """Load a target's config, with the vocabulary that its adapter gives it.

    Raises:
        UsageError: the checkpoint comes with code that was not allowed to run.
        DataError: not readable, or of an architecture that transformers does not know.
    """
    from transformers import AutoConfig, __version__

    path = source.directory / "config.json"
    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        stated = _stated(path)
        if stated.get("auto_map") and not source.trust_remote_code:
            raise UsageError(
                f"{path}: this architecture comes with code of its own, which is not run unasked; read it, then pass "
                "--trust-remote-code"
            ) from error
        if "model_type" in stated and stated["model_type"] not in _known_model_types():
            raise DataError(
                f"{path}: model type {stated['model_type']!r} is not known to transformers {__version__}; "
                "a later one may know it"
            ) from error
        raise DataError(f"{source.directory}: its config cannot be loaded: {one_line(error)}") from error
    if source.adapter is not None:
        text_config = config.get_text_config()
        text_config.vocab_size = adapted_vocab_size(source.adapter) or text_config.vocab_size
    return config


def _stated(config_file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(config_file.read_bytes())
    except (OSError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _known_model_types() -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING


def load_tokenizer(source: TargetSource, chat_template: Path | None = None) -> Any:
    """Load a target's tokenizer, with ``chat_template`` (a Jinja file) in place of its own when given.

    Raises:
        DataError: the files hold no tokenizer. UsageError: the template file cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.text_directory, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.text_directory}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat-template {chat_template}: cannot be read: {one_line(error)}") from error
    return tokenizer


def run_dtype(config: Any, device: str, compute_dtype: str | None) -> torch.dtype | None:
    """Return what a target runs in; None for what its weights are found in, where its config does not say.

    A quantised checkpoint keeps the dtype that its scales were made for on a CPU too.
    """
    if compute_dtype is not None:
        return DTYPES[compute_dtype]
    if torch.device(device).type == "cpu" and not is_quantised(config):
        return torch.float32
    return config.dtype or config.get_text_config().dtype


def is_quantised(config: Any) -> bool:
    """Return whether a checkpoint's weights are stored in another form than the one they are multiplied in."""
    return getattr(config, "quantization_config", None) is not None


def load_model(
    source: TargetSource,
    device: str,
    compute_dtype: str | None,
    config: Any | None = None,
    **placement: Any,
) -> torch.nn.Module:
    """Load a target for inference.

    Args:
        source: its files.
        device: torch device.
        compute_dtype: ``bf16``, ``fp16``, ``fp32``; None for the checkpoint's own, fp32 on a CPU.
        config: in place of its own.
        placement: ``from_pretrained``'s arguments that put the weights where they belong; without any, all of them go
            to ``device``.

    Raises:
        DataError: weights missing or not readable. MismatchError: not a causal LM.
        UsageError: a package is missing, or ``compute_dtype`` is none that this checkpoint can run in.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    config = config or load_config(replace(source, adapter=None))
    auto = auto_class(config, source.trust_remote_code)
    _require_weights(source.directory)
    dtype = run_dtype(config, device, compute_dtype)
    chosen = implementations(config, device, dtype or torch.float32)
    try:
        loaded: Any = auto.from_pretrained(
            source.directory,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=_of_text(config, chosen.attention),
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            **placement,
        )
    except ImportError as error:
        raise UsageError(f"{source.directory}: a package is missing to load it: {one_line(error)}") from error
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(f"{source.directory}: its weights cannot be loaded: {one_line(error)}") from error
    except ValueError as error:
        raise MismatchError(f"{source.directory}: not a causal LM that can be loaded: {one_line(error)}") from error
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise DataError(f"{source.directory}: {len(missing)} weights are missing from the files (first: {missing[0]})")
    model = model if placement else model.to(device)
    if is_quantised(config):
        model = _unpacked(model, dtype, source)
        if compute_dtype is not None and model.dtype != dtype:
            raise UsageError(
                f"--compute-dtype {compute_dtype}: this quantised checkpoint runs in {model.dtype}; leave the flag out"
            )
    if chosen.experts is not None:
        cast(Any, find_decoder(model)[0]).set_experts_implementation(chosen.experts)
    if source.adapter is not None:
        model = merge_adapter(model, source.adapter)
    return model.eval()


def _unpacked(model: Any, dtype: torch.dtype | None, source: TargetSource) -> Any:
    """Return a quantised model ready to run part by part, in the dtype asked for where its weights allow for it."""
    model = _in_dtype(model, dtype)
    token = torch.zeros(1, 1, dtype=torch.int64, device=input_embeddings(model).weight.device)
    try:
        # Some packages unpack their weights in the first forward of the whole model, and only there.
        with torch.no_grad():
            model(input_ids=token, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        raise MismatchError(
            f"{source.directory}: quantised in a way that does not run on {token.device.type}: {one_line(error)}"
        ) from error
    return _in_dtype(model, dtype)


def _in_dtype(model: Any, dtype: torch.dtype | None) -> Any:
    """Return a model whose weights were multiplied out in one dtype: those beside them have come in the file's."""
    multiplied_out = all(is_plain(weight) for weight in model.parameters())
    return model.to(dtype) if dtype is not None and model.dtype != dtype and multiplied_out else model


def _of_text(config: Any, implementation: str) -> str | dict[str, str]:
    """Return an implementation for the part of a model that text goes through; the others keep their own."""
    text_config = config.get_text_config()
    parts = [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is text_config]
    return {parts[0]: implementation} if parts else implementation


def _require_weights(directory: Path) -> None:
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        return
    gguf = "; its GGUF files are not read: pass the checkpoint they were made from" if _has_gguf(directory) else ""
    raise DataError(f"{directory}: no weights here, expected *.safetensors or *.bin{gguf}")


def _has_gguf(directory: Path) -> bool:
    return any(directory.glob("*.gguf"))

"""A LoRA adapter: found, digested, and merged into the target that it was made for."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from eagle_offline.errors import DataError, MismatchError, UsageError, one_line
from eagle_offline.provenance import digest_file, digest_json
from eagle_offline.target.hub import fetch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_FLAG = "--adapter"

# Modules whose rows are tokens, under the names that architectures give them.
_TOKEN_ROWS = (
    "embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight",
    "word_embeddings.weight",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter's files are: its hub id or directory's name, the commit of a hub one, and the local files."""

    id: str
    revision: str | None
    directory: Path

    def digest(self) -> str:
        """Return the digest of its settings and weights.

        Raises:
            DataError: they cannot be read.
        """
        try:
            return digest_json({name: digest_file(self.directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)})
        except OSError as error:
            raise DataError(f"{_FLAG} {self.directory}: cannot be read: {one_line(error)}") from error


def resolve_adapter(name: str, revision: str | None = None) -> AdapterSource:
    """Find an adapter's files, fetching them from the hub when ``name`` is no directory.

    Raises:
        UsageError: neither a directory nor a hub id that can be reached. DataError: not an adapter.
    """
    directory = Path(name)
    if directory.is_dir():
        source = AdapterSource(directory.resolve().name, None, directory)
    else:
        snapshot = fetch(name, revision, (CONFIG_FILE, WEIGHTS_FILE), _FLAG)
        source = AdapterSource(name, snapshot.name, snapshot)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (source.directory / file).is_file():
            raise DataError(f"{_FLAG} {name}: no {file} there; expected an adapter as peft's save_pretrained writes it")
    return source


def adapted_vocab_size(source: AdapterSource) -> int | None:
    """Return how many tokens a model has once the adapter is merged, None when the adapter does not change it.

    Raises:
        DataError: its weights cannot be read.
    """
    return max((rows for name, rows in _tensors(source).items() if name.endswith(_TOKEN_ROWS)), default=None)


def _tensors(source: AdapterSource) -> dict[str, int]:
    """Return the length of every tensor of the adapter, by name.

    Raises:
        DataError: they cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = source.directory / WEIGHTS_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: int(file.get_slice(name).get_shape()[0]) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def merge_adapter(model: nn.Module, source: AdapterSource) -> nn.Module:
    """Return the model with an adapter's weights added to its own.

    Raises:
        UsageError: ``peft`` is not installed.
        MismatchError: the adapter was made for another model, or is of a kind that cannot be merged.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise UsageError(
            f"{_FLAG} {source.id}: the package peft is missing; pip install 'eagle-offline[lora]' ({one_line(error)})"
        ) from error
    try:
        config = PeftConfig.from_pretrained(str(source.directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{source.directory / CONFIG_FILE}: cannot be read: {one_line(error)}") from error
    if config.is_prompt_learning:
        raise MismatchError(f"{_FLAG} {source.id}: {config.peft_type.value} adds prompts, it cannot be merged")
    _warn_of_another_base(model, config, source)
    causal_lm = cast(Any, model)
    _untie_if_needed(causal_lm, config, source)
    rows = adapted_vocab_size(source)
    if rows is not None and rows != causal_lm.get_input_embeddings().weight.shape[0]:
        causal_lm.resize_token_embeddings(rows, mean_resizing=False)
    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = get_peft_model(causal_lm, config)
            result = adapted.load_adapter(str(source.directory), adapter_name="default")
            lost = [name for name in (*result.missing_keys, *result.unexpected_keys) if not _is_a_copy(name)]
            if lost:
                raise ValueError(f"{len(lost)} tensors do not fit (first: {lost[0]})")
            return adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, TypeError) as error:
        raise MismatchError(
            f"{_FLAG} {source.id} was made for another model than {type(model).__name__} of this shape, or cannot be "
            f"merged into it: {one_line(error)}"
        ) from error


def _is_a_copy(name: str) -> bool:
    """Return whether a tensor is in the file a second time, as when embeddings were saved on top of being adapted."""
    return ".original_module." in name or ".modules_to_save.weight" in name


def _untie_if_needed(causal_lm: Any, config: Any, source: AdapterSource) -> None:
    """Give a head that is tied to the embeddings weights of its own where only one of the two is adapted."""
    embeddings, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight or getattr(config, "ensure_weight_tying", False):
        return
    names = [name.split(".")[-1] for name, module in causal_lm.named_modules() if module in (embeddings, head)]
    if any(f".{name}.lora_" in tensor for name in names for tensor in _tensors(source)):
        head.weight = nn.Parameter(embeddings.weight.detach().clone())
        causal_lm.config.get_text_config().tie_word_embeddings = False
        causal_lm.config.tie_word_embeddings = False


def _warn_of_another_base(model: nn.Module, config: Any, source: AdapterSource) -> None:
    made_for = str(config.base_model_name_or_path or "")
    name = str(getattr(model, "name_or_path", ""))
    if made_for and made_for.rstrip("/").split("/")[-1] != _short_name(name):
        sys.stderr.write(f"{_FLAG} {source.id}: made for {made_for}; merged into {name} all the same\n")


def _short_name(name: str) -> str:
    """Return a model's name without its owner; a snapshot of the hub's stands below the repository's folder."""
    path = Path(name)
    folder = path.parent.parent.name if path.parent.name == "snapshots" else path.name
    return folder.split("--")[-1]

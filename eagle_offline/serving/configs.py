"""What a draft directory's config says, whichever layout it is in, read once and checked for type."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.draft.layers import LAYER_STYLES, LayerStyle
from eagle_offline.errors import DataError, MismatchError
from eagle_offline.serving.layouts import AUX_IDS_FIELD, MASK_TENSOR, outputs_of
from eagle_offline.serving.tensor_files import CONFIG_FILE, read_json

DraftLayout = Literal["native", "flat", "speculators"]

# What vLLM builds with Qwen3's layers.
QWEN3_ARCHITECTURES: Final = ("Eagle3Qwen3ForCausalLM", "PeagleQwen3ForCausalLM", "Qwen3ForCausalLM")

# Where a P-EAGLE draft's mask token is found, the first that is not null; a speculators config has one place for it.
_MASK_ID_FIELDS: Final = ("mask_token_id", "pard_token", "ptd_token_id")

# More rows than any vocabulary has, by far; a larger number is damage, and would ask for as much memory.
MAX_VOCAB_SIZE = 1 << 24


@dataclass(frozen=True)
class ConfigFile:
    """A draft's ``config.json``.

    Attributes:
        directory: where it lies.
        layout: which of the three it is.
        content: all of it.
        fields: those of its layers, as Llama or Qwen3 name them: the content itself, or the nested
            ``transformer_layer_config``.
    """

    directory: Path
    layout: DraftLayout
    content: dict[str, Any]
    fields: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.directory / CONFIG_FILE

    def integer(self, name: str, default: int | None = None, *, nested: bool = True) -> int:
        """Return a positive integer of the layers' fields, or of the top level.

        Raises:
            DataError: missing without a default, or not a positive integer.
        """
        value = (self.fields if nested else self.content).get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{self.path}: {name}: expected a positive integer, found {value!r}")
        return value

    def flag(self, name: str) -> bool:
        """Return whether a switch is on, at top level or under ``eagle_config``."""
        return bool(self.eagle_config.get(name, self.content.get(name, False)))

    @property
    def eagle_config(self) -> dict[str, Any]:
        """The ``eagle_config`` object; empty when there is none."""
        value = self.content.get("eagle_config")
        return value if isinstance(value, dict) else {}

    @property
    def layer_style(self) -> LayerStyle:
        """Whose layers engines build, and training built: of a flat directory its ``architectures`` say so.

        Raises:
            DataError: a checkpoint of ours that names another.
        """
        if self.layout == "native":
            written = self.content.get("layer_style", "llama")
            if written not in LAYER_STYLES:
                raise DataError(
                    f"{self.path}: layer_style: expected one of {', '.join(LAYER_STYLES)}, found {written!r}"
                )
            return "qwen3" if written == "qwen3" else "llama"
        names = self.content.get("architectures")
        by_name = isinstance(names, list) and any(name in QWEN3_ARCHITECTURES for name in names)
        by_type = self.fields.get("model_type") == "qwen3"
        return "qwen3" if (by_name if self.layout == "flat" else by_type) else "llama"

    def layer_ids(self, *, nested: bool) -> list[int] | None:
        """Return the aux layer ids as written: layers executed at top level, 0-based outputs in ``eagle_config``.

        Raises:
            DataError: not a list of integers.
        """
        value = (self.eagle_config if nested else self.content).get(AUX_IDS_FIELD)
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(type(layer_id) is int for layer_id in value):
            raise DataError(f"{self.path}: {AUX_IDS_FIELD}: expected a list of integers, found {value!r}")
        return value

    def refuse_unknown_rope_type(self) -> None:
        """Raise unless every RoPE type written is one that can be computed here.

        Raises:
            MismatchError: another one.
        """
        known = ["default", *sorted(ROPE_INIT_FUNCTIONS)]
        for name in ("rope_parameters", "rope_scaling"):
            written = self.fields.get(name)
            if not isinstance(written, dict):
                continue
            key = next((key for key in ("rope_type", "type") if key in written), None)
            if key is not None and written[key] not in known:
                raise MismatchError(
                    f"{self.path}: {name}.{key}: expected one of {', '.join(known)}, found {written[key]!r}"
                )

    def is_parallel(self, tensor_names: Container[str]) -> bool:
        """Return whether this is a P-EAGLE draft: its config says so in one of several ways, or a tensor does."""
        names = self.content.get("architectures")
        return bool(
            self.content.get("parallel_drafting")
            or self.content.get("speculators_model_type") == "peagle"
            or (isinstance(names, list) and any("peagle" in str(name).lower() for name in names))
            or MASK_TENSOR in tensor_names
        )

    @property
    def mask_id_fields(self) -> tuple[str, ...]:
        """Names under which the mask token is looked up, in this order."""
        return _MASK_ID_FIELDS if self.layout == "flat" else _MASK_ID_FIELDS[:1]

    def mask_token_id(self) -> int:
        """Return the token that stands for one not known yet.

        Raises:
            DataError: none is written, or what is written is no token of the vocabulary.
        """
        written = [name for name in self.mask_id_fields if self.content.get(name) is not None]
        name = written[0] if written else None
        if name is None:
            raise DataError(
                f"{self.path}: a P-EAGLE draft, and no mask token id under {', '.join(self.mask_id_fields)}"
            )
        found = self.content[name]
        if type(found) is not int or not 0 <= found < self.vocab_size:
            raise DataError(
                f"{self.path}: {name}: expected an id in a vocabulary of {self.vocab_size} tokens, found {found!r}"
            )
        for other in written:
            if type(self.content[other]) is not int or self.content[other] != found:
                raise DataError(
                    f"{self.path}: {name} is {found} and {other} is {self.content[other]!r}: readers would disagree"
                )
        return found

    @property
    def vocab_size(self) -> int:
        """``V``.

        Raises:
            DataError: no integer, or absurd.
        """
        size = self.integer("vocab_size")
        if size > MAX_VOCAB_SIZE:
            raise DataError(f"{self.path}: vocab_size {size} is not the size of a vocabulary")
        return size

    @property
    def target_hidden_size(self) -> int:
        """Width of the target's states, the draft's own when the config does not say."""
        return self.integer("target_hidden_size", self.integer("hidden_size"), nested=False)


def read_config(directory: Path) -> ConfigFile:
    """Read a draft's config and tell its layout.

    Raises:
        DataError: no config, or one that is not a draft's.
    """
    content = read_json(directory / CONFIG_FILE)
    path = directory / CONFIG_FILE
    if content.get("model_type") == Eagle3DraftConfig.model_type:
        return ConfigFile(directory, "native", content, content)
    if "speculators_model_type" in content:
        nested = content.get("transformer_layer_config")
        if not isinstance(nested, dict):
            raise DataError(f"{path}: transformer_layer_config is missing or not an object")
        return ConfigFile(directory, "speculators", content, nested)
    architectures = content.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if "draft_vocab_size" in content or "eagle_config" in content or any("eagle3" in str(n).lower() for n in names):
        return ConfigFile(directory, "flat", content, content)
    raise DataError(
        f"{path}: not a draft's config: expected model_type {Eagle3DraftConfig.model_type}, speculators_model_type, "
        f"or draft_vocab_size; found model_type {content.get('model_type')!r}"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from logging what it thinks of a config: what is wrong is said in an error or a finding."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def aux_layer_ids_of(config: ConfigFile) -> list[int] | None:
    """Return the aux layer ids as 0-based outputs, None when the config does not say.

    Raises:
        DataError: not lists of integers.
        MismatchError: the two conventions disagree.
    """
    executed, outputs = config.layer_ids(nested=False), config.layer_ids(nested=True)
    if executed is not None and outputs is not None and outputs_of(executed) != outputs:
        raise MismatchError(
            f"{config.path}: {AUX_IDS_FIELD} {executed} (layers executed) means outputs {outputs_of(executed)}, but "
            f"eagle_config says {outputs}: correct the one that is wrong"
        )
    return outputs if executed is None else outputs_of(executed)

"""The facts that rules are held against: a draft's config, headers, ids and origin, and its target where given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.draft.from_target import read_target_config
from eagle_offline.draft.origin import DraftOrigin, read_origin
from eagle_offline.errors import DataError, MismatchError
from eagle_offline.serving.configs import ConfigFile, read_config
from eagle_offline.serving.drafts import model_config
from eagle_offline.serving.layouts import MEMBERS_TENSOR, OFFSETS_TENSOR, expected_shapes, ids_of, parameter_name
from eagle_offline.serving.tensor_files import CONFIG_FILE, DTYPES, Header, TensorFiles, open_tensors
from eagle_offline.target.adapters import AdapterSource, adapted_vocab_size


@dataclass(frozen=True)
class Subject:
    """A draft directory under examination.

    Attributes:
        config: its config.
        files: its tensors, headers read.
        origin: what it was trained for, if it says.
        target: the text part of the target's config, if one was given.
        target_directory: where that lies.
        adapter: what is to be merged into it, if anything.
    """

    config: ConfigFile
    files: TensorFiles
    origin: DraftOrigin | None
    target: Mapping[str, Any] | None
    target_directory: Path | None
    adapter: AdapterSource | None = None

    @property
    def is_flat(self) -> bool:
        return self.config.layout == "flat"

    @cached_property
    def stored(self) -> dict[str, str]:
        """Stored tensor name by ours."""
        return {parameter_name(name): name for name in self.files.headers}

    def header(self, name: str) -> Header | None:
        """Return the header of a tensor by our name, None when it is absent."""
        return self.files.headers.get(self.stored.get(name, ""))

    @cached_property
    def model(self) -> Eagle3DraftConfig:
        """Our config, as far as the draft is of our kind; flags as written, not as tensors say.

        Raises:
            DataError, MismatchError: sizes that are missing or that nothing can be made of.
        """
        # Which token is masked changes no shape; whether one is named at all has a rule of its own.
        return model_config(self.config, self.num_aux_in_fc or 3, 0 if self.is_parallel else None)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Expected shape of every parameter by our name."""
        if self.model.num_hidden_layers > len(self.files.headers):
            raise DataError(f"{self.config.path}: num_hidden_layers {self.model.num_hidden_layers}: too few tensors")
        return expected_shapes(self.model)

    @cached_property
    def num_aux_in_fc(self) -> int | None:
        """How many aux states ``fc`` reads, None when that is no whole number."""
        header = self.files.headers.get("fc.weight")
        width = self.config.target_hidden_size
        if header is None or len(header.shape) != 2 or not header.shape[1] or header.shape[1] % width:
            return None
        return header.shape[1] // width

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def draft_vocab_size(self) -> int:
        """Rows of the head, or what the config says where there is no head."""
        head = self.files.headers.get("lm_head.weight")
        if head is not None and head.shape:
            return head.shape[0]
        return self.config.integer("draft_vocab_size", self.vocab_size, nested=False)

    @property
    def is_parallel(self) -> bool:
        """Whether this is a P-EAGLE draft."""
        return self.config.is_parallel(self.files.headers)

    @property
    def is_qwen3(self) -> bool:
        """Whether vLLM builds Qwen3 layers for it."""
        return self.config.layer_style == "qwen3"

    @cached_property
    def ids(self) -> torch.Tensor | None:
        """The target's ids of the draft vocabulary, None when ``d2t`` is absent or no list of integers."""
        header = self.files.headers.get(OFFSETS_TENSOR)
        if header is None or len(header.shape) != 1 or not header.shape[0]:
            return None
        if DTYPES.get(header.dtype) not in (torch.int64, torch.int32):
            return None
        return ids_of(self.files.read(OFFSETS_TENSOR))

    @cached_property
    def members(self) -> torch.Tensor | None:
        """``t2d`` as stored, None when absent."""
        return self.files.read(MEMBERS_TENSOR) if MEMBERS_TENSOR in self.files.headers else None

    @cached_property
    def executed(self) -> list[int] | None:
        """Top-level aux ids: layers executed."""
        return self.config.layer_ids(nested=False)

    @cached_property
    def outputs(self) -> list[int] | None:
        """Aux ids of ``eagle_config``: 0-based outputs."""
        return self.config.layer_ids(nested=True)

    @property
    def num_target_layers(self) -> int | None:
        """``L``, from the target or else from the origin."""
        found = None if self.target is None else self.target.get("num_hidden_layers")
        if isinstance(found, int):
            return found
        return None if self.origin is None else self.origin.target_num_layers

    @property
    def default_outputs(self) -> list[int] | None:
        """The aux ids that engines take by themselves, None when the target's depth is unknown."""
        depth = self.num_target_layers
        return None if depth is None else [1, depth // 2 - 1, depth - 4]


def read_subject(directory: Path, target: Path | None, adapter: AdapterSource | None = None) -> Subject:
    """Read config, headers and origin of a draft, and its target's config, with the vocabulary that an adapter gives.

    Raises:
        DataError: not a draft directory, or files that cannot be read.
        MismatchError: a checkpoint of ours, which no engine reads.
    """
    config = read_config(directory)
    if config.layout == "native":
        raise MismatchError(f"{directory}: a training checkpoint, which no engine reads: export it first")
    target_config = None if target is None else read_target_config(target / CONFIG_FILE)
    if target_config is not None and adapter is not None:
        rows = adapted_vocab_size(adapter)
        target_config |= {} if rows is None else {"vocab_size": rows}
    return Subject(config, open_tensors(directory), read_origin(directory), target_config, target, adapter)

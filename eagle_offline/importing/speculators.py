"""Dumps of vLLM's ``extract_hidden_states``, as speculators keeps them: one safetensors file a sample.

``hidden_states [T, A + 1, H]`` are the outputs of ``A`` decoder layers and, last, of the final layer **before** the
final norm; ``token_ids [T]``. Loss masks are in an Arrow dataset beside it, by the number in the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load

from eagle_offline.errors import DataError, UsageError
from eagle_offline.importing.dumps import (
    UNREADABLE,
    DumpedSample,
    FileScan,
    Tool,
    digest_values,
    explained,
    listed,
    refuse_pickles,
    token_ids,
)
from eagle_offline.provenance import plain_size

HIDDEN_STATES, TOKEN_IDS = "hidden_states", "token_ids"

_NUMBERED = re.compile(r"hs_(\d{1,12})\.safetensors")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class SpeculatorsDump:
    """A directory of such files; see `eagle_offline.importing.dumps.Dump`.

    Args:
        directory: where they are.
        num_layers: ``A``.
        hidden_size: ``H`` of the target.

    Raises:
        UsageError: there are none. DataError: the first one cannot be read.
    """

    tool: Tool = "speculators"
    first_position = 0

    def __init__(self, directory: Path, num_layers: int, hidden_size: int):
        self.directory = directory
        names = listed(directory, lambda name: name.endswith(".safetensors"))
        if not names:
            refuse_pickles(directory, listed(directory, lambda _: True))
            raise UsageError(f"{directory}: holds no hs_*.safetensors; give the directory that vLLM's states are in")
        self.files: Sequence[Path] = [directory / name for name in sorted(names, key=_place)]
        self._shape = (num_layers + 1, hidden_size)
        self._dtype: torch.dtype | None = None
        states, _ = self._tensors(self.files[0], self._content(self.files[0]))
        self._dtype = states.dtype
        self.dtype = _DTYPES[states.dtype]

    def number_of(self, file: Path) -> int | None:
        """Return the row of the dataset of loss masks that a file belongs to, None if its name does not say."""
        match = _NUMBERED.fullmatch(file.name)
        return int(match[1]) if match else None

    def scan(self, file: Path, seq_length: int) -> FileScan:
        content = self._content(file)
        _, ids = self._tensors(file, content)
        return FileScan(
            digest=xxhash.xxh3_128_hexdigest(content),
            num_tokens=np.array([len(ids)], np.int32),
            ids=np.array([digest_values(ids[:seq_length])], np.uint64),
            masks=None,
        )

    def read(self, file: Path, row: int, num_tokens: int, positions: torch.Tensor, digest: str) -> DumpedSample:
        content = self._content(file)
        if xxhash.xxh3_128_hexdigest(content) != digest:
            raise DataError(f"{file}: was changed after it was matched with the corpus; run the same command again")
        states, ids = self._tensors(file, content)
        states = states[:num_tokens]
        return DumpedSample(
            input_ids=ids[:num_tokens],
            loss_mask=None,
            aux_hidden_states=[states[:, layer] for layer in range(states.shape[1] - 1)],
            last_hidden_state=states[positions, -1],
        )

    def name_of(self, file: Path, row: int) -> str:
        return file.name

    def _content(self, file: Path) -> bytes:
        # As bytes and not as a memory map: what is digested is what is imported, and a file that is cut off meanwhile
        # is an error and not a signal.
        try:
            plain_size(file)
            return file.read_bytes()
        except (OSError, MemoryError) as error:
            raise explained(file, error) from error

    def _tensors(self, file: Path, content: bytes) -> tuple[torch.Tensor, np.ndarray]:
        """Return the states ``[T, A + 1, H]`` and int32 ``[T]`` ids of a file.

        Raises:
            DataError: it holds something else.
        """
        try:
            tensors = load(content)
        except UNREADABLE as error:
            failure = explained(file, error)
            if isinstance(failure, DataError):
                raise DataError(
                    f"{failure}; dump it again, or delete it and leave its row out with --on-mismatch drop"
                ) from error
            raise failure from error
        if tensors.keys() != {HIDDEN_STATES, TOKEN_IDS}:
            found = ", ".join(sorted(tensors)[:6]) or "nothing"
            raise DataError(f"{file}: holds {found}, expected {HIDDEN_STATES} and {TOKEN_IDS}")
        states, ids = tensors[HIDDEN_STATES], tensors[TOKEN_IDS]
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DataError(f"{file}: {TOKEN_IDS} is {ids.dtype} {list(ids.shape)}, expected integers [T]")
        if states.shape[1:] != self._shape or states.ndim != 3 or len(states) != len(ids):
            raise DataError(
                f"{file}: {HIDDEN_STATES} is {list(states.shape)}, expected [{len(ids)}, {self._shape[0]}, "
                f"{self._shape[1]}]: tokens, the layers of --aux-layer-ids and the last one, the target's width"
            )
        if states.dtype not in _DTYPES or self._dtype not in (None, states.dtype):
            expected = "bf16, fp16 or fp32" if self._dtype is None else f"{self._dtype} as in {self.files[0].name}"
            raise DataError(f"{file}: {HIDDEN_STATES} is {states.dtype}, expected {expected}")
        return states, token_ids(file, ids.numpy())


def _place(name: str) -> tuple[int, str]:
    match = _NUMBERED.fullmatch(name)
    return (int(match[1]) if match else 1 << 62), name

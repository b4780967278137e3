"""What a dump of another tool's states is to an import, and which tool made one.

A sample of a dump is known by digests of its token ids and of its loss mask: they say which row of the corpus it may
be. That it is that row is checked by its values once more, when its states are read.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError

from eagle_offline.errors import DataError, EagleOfflineError, UsageError, unreadable

Tool = Literal["speculators", "nemo"]

# What safetensors says of files that are none, or not whole.
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError)

_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class FileScan:
    """What is known of one file of a dump.

    Attributes:
        digest: of its bytes.
        num_tokens: int32 ``[n]``, of each sample in it.
        ids: uint64 ``[n]``: digest of its first ``seq_length`` token ids, from the dump's first known position on.
        masks: uint64 ``[n]``: digest of its loss mask there, None where the file has none.
    """

    digest: str
    num_tokens: np.ndarray
    ids: np.ndarray
    masks: np.ndarray | None


@dataclass(frozen=True)
class DumpedSample:
    """One sample as a dump has it, cut to the tokens asked for.

    Attributes:
        input_ids: int32, from the dump's first known position on.
        loss_mask: uint8, alike; None where the dump has none.
        aux_hidden_states: one ``[T, H]`` a layer that the dump has, in its order.
        last_hidden_state: ``[P, H]`` before the final norm, at the positions asked for; None where there are
            probabilities.
        target_probs: ``[P, Vd]`` there, over ascending token ids, with ``position_mask`` bool ``[P]``; of a position
            that the dump does not know, 0 and False; None where there are final states.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray | None
    aux_hidden_states: Sequence[torch.Tensor]
    last_hidden_state: torch.Tensor | None = None
    target_probs: torch.Tensor | None = None
    position_mask: torch.Tensor | None = None


class Dump(Protocol):
    """A directory of states in the layout of one tool.

    Attributes:
        tool: which one.
        directory: where it is.
        files: those that hold samples, in order.
        first_position: of a sample, whose token id and loss mask the dump has.
        dtype: of its states, such as ``bf16``.
    """

    tool: Tool
    directory: Path
    files: Sequence[Path]
    first_position: int
    dtype: str

    def scan(self, file: Path, seq_length: int) -> FileScan:
        """Read a file through and return what it holds.

        Raises:
            DataError: it is not in the tool's layout; names it.
        """

    def read(self, file: Path, row: int, num_tokens: int, positions: torch.Tensor, digest: str) -> DumpedSample:
        """Return the first ``num_tokens`` positions of a sample.

        Args:
            positions: int64 ``[P]``, ascending: those whose target is wanted.
            digest: what the file's bytes were when they were scanned.

        Raises:
            DataError: it cannot be read, or is not what it was.
        """

    def name_of(self, file: Path, row: int) -> str:
        """Return what a user may look for."""


def digest_values(values: np.ndarray) -> int:
    """Return xxh3_64 over the values as little-endian int32."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(values, "<i4").tobytes())


def token_ids(file: object, values: np.ndarray) -> np.ndarray:
    """Return token ids as int32.

    Raises:
        DataError: some cannot be any.
    """
    if values.size and not 0 <= values.min() <= values.max() < 1 << 31:
        raise DataError(f"{file}: its token ids go from {values.min()} to {values.max()}, expected none below 0")
    return values.astype(np.int32)


def masks(file: object, name: str, values: np.ndarray) -> np.ndarray:
    """Return a mask as uint8.

    Raises:
        DataError: it holds something else than 0 and 1.
    """
    if values.size and not np.isin(values, (0, 1)).all():
        raise DataError(f"{file}: {name} holds something else than 0 and 1")
    return values.astype(np.uint8)


def explained(file: Path, error: Exception) -> EagleOfflineError:
    """Return what to raise for a file that safetensors cannot read."""
    return unreadable(file, "not a readable safetensors file", error)


def detect_tool(directory: Path) -> Tool:
    """Return which tool made a dump.

    Raises:
        UsageError: no such directory, or none of the layouts that are known.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: {os.strerror(errno.ENOTDIR if directory.exists() else errno.ENOENT)}")
    names = sorted(os.listdir(directory))
    shards = any(name.startswith("shard-") and name.endswith(".safetensors") for name in names)
    if "manifest.json" in names and shards:
        return "nemo"
    if shards and all(name.startswith("shard-") for name in names if name.endswith(".safetensors")):
        raise UsageError(
            f"{directory}: holds shards of NeMo AutoModel without their manifest.json; let NeMo finish the dump, or "
            "bring that file as well"
        )
    if any(name.endswith(".safetensors") for name in names):
        return "speculators"
    refuse_pickles(directory, names)
    raise UsageError(
        f"{directory}: holds no states; expected hs_*.safetensors (speculators, vLLM), or manifest.json and "
        "shard-*.safetensors (NeMo AutoModel)"
    )


def refuse_pickles(directory: Path, names: Sequence[str]) -> None:
    """Refuse files that would run code when they are loaded.

    Raises:
        UsageError: there are some.
    """
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise UsageError(
            f"{directory}: {pickles[0]} is a pickle, which may run code when it is loaded and is never read here "
            "(dumps of SpecForge and DeepSpec are such); dump again as safetensors, or use eagle-offline precompute"
        )


def say_pickles(directory: Path) -> None:
    """Write one line to stderr if there are files beside the states that would run code when they are loaded."""
    if pickles := listed(directory, lambda name: name.endswith(_PICKLES)):
        sys.stderr.write(
            f"warning: {directory}: pickles are not read: {len(pickles)} (first: {pickles[0]}); rows that only they "
            "have states of are without any\n"
        )


def listed(directory: Path, belongs: Callable[[str], bool]) -> list[str]:
    """Return the names in a directory that belong to a dump, sorted."""
    try:
        return sorted(name for name in os.listdir(directory) if belongs(name) and not name.startswith("."))
    except OSError as error:
        raise unreadable(directory, "cannot be listed", error) from error

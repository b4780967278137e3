"""The weights of a draft directory: headers first, values when asked for, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from eagle_offline.draft.files import MODEL_FILE
from eagle_offline.errors import DataError, one_line

CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_FILE: Final = "pytorch_model.bin"

# As safetensors headers name them.
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_PIECE_VALUES = 1 << 24
_READ_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError)

_CONVERT = (
    "it is a pickle and may run code on load: convert it with "
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors')\""
)


@dataclass(frozen=True)
class Header:
    """What a file says about a tensor before its values are read; ``dtype`` as safetensors names it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorFiles:
    """Every tensor of a directory by name."""

    directory: Path
    headers: dict[str, Header]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in its stored dtype.

        Raises:
            DataError: its file is damaged.
        """
        file = self.headers[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except _READ_ERRORS as error:
            raise DataError(f"{file}: {name} cannot be read: {one_line(error)}") from error

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor in pieces of rows of at most `_PIECE_VALUES` values, however large it is.

        Raises:
            DataError: its file is damaged.
        """
        header = self.headers[name]
        row = max(1, prod(header.shape[1:]))
        if prod(header.shape) <= _PIECE_VALUES:
            yield self.read(name)
            return
        rows = max(1, _PIECE_VALUES // row)
        try:
            with safe_open(header.file, framework="pt") as opened:
                part = opened.get_slice(name)
                for start in range(0, header.shape[0], rows):
                    yield part[start : start + rows]
        except _READ_ERRORS as error:
            raise DataError(f"{header.file}: {name} cannot be read: {one_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path.parent}: not a draft directory: no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def open_tensors(directory: Path) -> TensorFiles:
    """Read the headers of a directory's weights: one file, or several with an index.

    Raises:
        DataError: no weights, weights in a pickle, or a torn or missing file.
    """
    index = directory / INDEX_FILE
    if index.exists():
        return TensorFiles(directory, _indexed_headers(directory, index))
    single = directory / MODEL_FILE
    if single.exists():
        return TensorFiles(directory, _headers(single))
    pickle = directory / PICKLE_FILE
    if pickle.exists():
        raise DataError(f"{pickle}: not read, {_CONVERT}")
    raise DataError(f"{directory}: no weights: expected {MODEL_FILE} or {INDEX_FILE}")


def _indexed_headers(directory: Path, index: Path) -> dict[str, Header]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise DataError(f"{index}: no weight_map from tensor names to files")
    found: dict[str, Header] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise DataError(f"{index}: {name!r} is not the name of a file beside it")
        found |= _headers(directory / name)
    missing = sorted(places.keys() - found.keys())
    if missing:
        raise DataError(f"{index}: {missing[0]} is not in {places[missing[0]]}")
    return found


def _headers(file: Path) -> dict[str, Header]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: Header(file, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{file}: not a whole safetensors file: {one_line(error)}") from error

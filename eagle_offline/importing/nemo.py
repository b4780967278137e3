"""Dumps of NeMo AutoModel's ``precompute_eagle3``: a manifest, and safetensors shards of padded samples.

A shard holds, for ``n`` samples of ``S`` slots: ``input_ids``, ``attention_mask`` and ``loss_mask`` int64 ``[n, S]``,
``aux_hidden_states [n, S, A·H]``, ``position_mask`` bool ``[n, S, 1]`` and either ``target_probs [n, S, Vd]`` or the
largest of them, ``target_probs_values [n, S, k]`` with their columns ``target_probs_indices`` int32. Columns stand in
the order of the manifest's ``selected_token_ids``, which is not sorted. All but ``attention_mask`` and
``aux_hidden_states`` are shifted left by one: slot ``t`` holds position ``t + 1``, so nothing is known of position 0
but its states.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open

from eagle_offline.cache.manifest import first_problem, read_json_object
from eagle_offline.errors import DataError, MismatchError
from eagle_offline.importing.dumps import (
    UNREADABLE,
    DumpedSample,
    FileScan,
    Tool,
    digest_values,
    explained,
    listed,
    masks,
    token_ids,
)
from eagle_offline.provenance import digest_file

MANIFEST_FILE = "manifest.json"
EMBEDDINGS_FILE = "target_embeddings.safetensors"

_MAX_MANIFEST_BYTES = 256 << 20
_SHARD = re.compile(r"shard-(\d{6})\.safetensors")
_TOKENS = ("input_ids", "attention_mask", "loss_mask")
_TOP_K = ("target_probs_values", "target_probs_indices")
_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}

# How far probabilities may be from a sum of 1: rounded to bf16 each is off by 2^-9 of itself at most.
_SUM_TOLERANCE = 1e-2

_Count = Annotated[int, Field(gt=0, lt=1 << 31)]


class NemoManifest(BaseModel, frozen=True, extra="ignore", strict=True):
    """What ``manifest.json`` says; what else stands there is of no matter."""

    format_version: Literal[1, 2]
    target_vocab_size: _Count
    draft_vocab_size: _Count
    num_samples: _Count
    shard_size: _Count
    target_probs_topk: int | None = None
    aux_hidden_dim: _Count
    aux_layer_ids: list[Annotated[int, Field(ge=0, lt=1 << 16)]] = Field(min_length=1)
    selected_token_ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)

    @property
    def top_k(self) -> int | None:
        """How many probabilities are kept of a row, None for all."""
        k = self.target_probs_topk or 0
        return k if 0 < k < self.draft_vocab_size else None


def read_nemo_manifest(directory: Path) -> NemoManifest:
    """Read a dump's manifest.

    Raises:
        DataError: it cannot be read, or contradicts itself.
    """
    path = directory / MANIFEST_FILE
    raw = read_json_object(path, _MAX_MANIFEST_BYTES)
    try:
        manifest = NemoManifest.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: not a manifest of NeMo's precompute_eagle3: {first_problem(error)}") from error
    ids, layers = manifest.selected_token_ids, manifest.aux_layer_ids
    if len(ids) != manifest.draft_vocab_size or len(set(ids)) != len(ids) or max(ids) >= manifest.target_vocab_size:
        raise DataError(
            f"{path}: selected_token_ids are {len(ids)} ids up to {max(ids)}, expected {manifest.draft_vocab_size} "
            f"different ones below {manifest.target_vocab_size}"
        )
    if len(set(layers)) != len(layers) or manifest.aux_hidden_dim % len(layers):
        raise DataError(f"{path}: aux_layer_ids {layers} do not share an aux_hidden_dim of {manifest.aux_hidden_dim}")
    return manifest


class NemoDump:
    """A directory with such a manifest and its shards; see `eagle_offline.importing.dumps.Dump`.

    Raises:
        DataError: shards are missing, or the first one cannot be read.
        MismatchError: it is of another target.
    """

    tool: Tool = "nemo"
    first_position = 1

    def __init__(self, directory: Path, hidden_size: int, vocab_size: int):
        self.directory = directory
        self.manifest = read_nemo_manifest(directory)
        self._check_target(hidden_size, vocab_size)
        count = -(-self.manifest.num_samples // self.manifest.shard_size)
        expected = [f"shard-{number:06d}.safetensors" for number in range(count)]
        present = listed(directory, lambda name: _SHARD.fullmatch(name) is not None)
        missing = sorted(set(expected) - set(present))
        if missing:
            raise DataError(
                f"{directory}: {len(missing)} of {count} shards are missing (first: {missing[0]}); finish the dump "
                "with NeMo's own --resume first"
            )
        if foreign := sorted(set(present) - set(expected)):
            raise DataError(f"{directory}: {foreign[0]} is beyond the {count} shards that its manifest calls for")
        self.files: Sequence[Path] = [directory / name for name in expected]
        # Of all ids ascending, the column that NeMo has each in; and of each column, its place among ascending ids.
        self._columns = torch.tensor(self.manifest.selected_token_ids).argsort()
        self._ranks = self._columns.argsort()
        self.dtype = ""
        with self._opened(self.files[0]) as shard:
            self.dtype = _FLOATS[shard.get_slice("aux_hidden_states").get_dtype()]

    def check_embeddings(self, weight: torch.Tensor) -> None:
        """Refuse a target that has other embeddings than the one whose states were dumped; a dump may have none.

        Args:
            weight: the target's input embeddings ``[V, H]``, in whichever dtype it is loaded in.

        Raises:
            MismatchError: says so. DataError: the dump's cannot be read.
        """
        path = self.directory / EMBEDDINGS_FILE
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                dumped = file.get_tensor("weight")
        except UNREADABLE as error:
            raise explained(path, error) from error
        own = weight.detach().cpu()
        # NeMo loads a target in bf16 on a GPU, whatever its checkpoint is in.
        if not any(torch.equal(own.to(dtype).float(), dumped.float()) for dtype in (own.dtype, torch.bfloat16)):
            raise MismatchError(f"{path}: not the embeddings of --target-model: its states are of another target")

    def _check_target(self, hidden_size: int, vocab_size: int) -> None:
        manifest = self.manifest
        found = manifest.aux_hidden_dim // len(manifest.aux_layer_ids), manifest.target_vocab_size
        if found != (hidden_size, vocab_size):
            raise MismatchError(
                f"{self.directory}: states of a target of width {found[0]} and {found[1]} tokens, --target-model has "
                f"{hidden_size} and {vocab_size}"
            )

    @property
    def selected_token_ids(self) -> np.ndarray:
        """The draft vocabulary, int64 ``[Vd]``, ascending."""
        return np.sort(np.array(self.manifest.selected_token_ids, np.int64))

    def scan(self, file: Path, seq_length: int) -> FileScan:
        with self._opened(file) as shard:
            ids, attention, loss = (shard.get_tensor(name).numpy() for name in _TOKENS)
            digest = digest_file(file)
        ids, loss = token_ids(file, ids), masks(file, "loss_mask", loss)
        lengths = self._lengths(file, attention)
        stops = [max(min(length, seq_length) - 1, 0) for length in lengths]
        return FileScan(
            digest=digest,
            num_tokens=lengths,
            ids=np.array([digest_values(row[:stop]) for row, stop in zip(ids, stops, strict=True)], np.uint64),
            masks=np.array([digest_values(row[:stop]) for row, stop in zip(loss, stops, strict=True)], np.uint64),
        )

    def _lengths(self, file: Path, attention: np.ndarray) -> np.ndarray:
        """Return int32 ``[n]``: the tokens of each sample before its padding."""
        attention = masks(file, "attention_mask", attention)
        lengths = attention.sum(axis=1).astype(np.int32)
        padded = np.arange(attention.shape[1]) < lengths[:, None]
        if not np.array_equal(attention.astype(bool), padded):
            row = int(np.flatnonzero((attention.astype(bool) != padded).any(axis=1))[0])
            raise DataError(f"{self.name_of(file, row)}: padded elsewhere than on its right, which no row here is")
        return lengths

    def read(self, file: Path, row: int, num_tokens: int, positions: torch.Tensor, digest: str) -> DumpedSample:
        known = max(num_tokens - 1, 0)
        with self._opened(file) as shard:

            def rows(name: str, stop: int) -> torch.Tensor:
                return shard.get_slice(name)[row : row + 1, :stop][0]

            aux = rows("aux_hidden_states", num_tokens)
            ids, loss = rows("input_ids", known).numpy(), rows("loss_mask", known).numpy()
            gate = rows("position_mask", known)[:, 0]
            slots = positions[positions >= 1] - 1
            stored = [rows(name, known)[slots] for name in self._probability_fields()]
        name = self.name_of(file, row)
        loss_mask = masks(name, "loss_mask", loss)
        if bool((gate & ~torch.from_numpy(loss_mask).bool()).any()):
            raise DataError(f"{name}: position_mask is set where loss_mask is not")
        # Position 0 has no slot.
        probs, position_mask = self._probabilities(name, *stored), gate[slots]
        if len(slots) < len(positions):
            probs = torch.cat([probs.new_zeros(1, probs.shape[1]), probs])
            position_mask = torch.cat([position_mask.new_zeros(1), position_mask])
        return DumpedSample(
            input_ids=token_ids(name, ids),
            loss_mask=loss_mask,
            aux_hidden_states=aux.chunk(len(self.manifest.aux_layer_ids), dim=-1),
            target_probs=probs,
            position_mask=position_mask,
        )

    def _probabilities(self, name: str, values: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Return probabilities ``[n, Vd]`` over ascending ids; of those that were left out, 0."""
        if columns is None:
            probs = values[:, self._columns]
        else:
            places = columns.long()
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < len(self._ranks):
                raise DataError(f"{name}: {_TOP_K[1]} go from {int(places.min())} to {int(places.max())}")
            if (places.sort(dim=-1).values.diff(dim=-1) == 0).any():
                raise DataError(f"{name}: {_TOP_K[1]} name a column twice")
            probs = values.new_zeros(len(values), len(self._ranks)).scatter_(1, self._ranks[places], values)
        totals = values.float().sum(dim=-1)
        # What is not finite is told apart by whoever stores it.
        off = (totals - 1).abs()[totals.isfinite()] > _SUM_TOLERANCE
        if bool((values < 0).any()) or bool(off.any()):
            raise DataError(f"{name}: its target probabilities are none: some are negative or do not sum to 1")
        return probs

    def name_of(self, file: Path, row: int) -> str:
        return f"{file.name} sample {row}"

    def _probability_fields(self) -> tuple[str, ...]:
        return ("target_probs",) if self.manifest.top_k is None else _TOP_K

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """Open a shard whose tensors are those that the manifest calls for.

        Raises:
            DataError: they are not.
        """
        try:
            with safe_open(file, framework="pt") as shard:
                self._check_layout(file, shard)
                yield shard
        except UNREADABLE as error:
            raise explained(file, error) from error

    def _check_layout(self, file: Path, shard: Any) -> None:
        manifest, number = self.manifest, int(file.stem.removeprefix("shard-"))
        fields = self._probability_fields()
        keys = {*_TOKENS, "aux_hidden_states", "position_mask", *fields}
        if set(shard.keys()) != keys:
            missing, extra = sorted(keys - set(shard.keys())), sorted(set(shard.keys()) - keys)
            raise DataError(
                f"{file}: lacks {', '.join(missing) or 'nothing'}, has beyond {', '.join(extra) or 'nothing'}"
            )
        slices = {name: shard.get_slice(name) for name in keys}
        shape = slices["input_ids"].get_shape()
        count = min(manifest.shard_size, manifest.num_samples - number * manifest.shard_size)
        if len(shape) != 2 or shape[0] != count or not shape[1]:
            raise DataError(f"{file}: input_ids is {shape}, expected {count} samples of some slots")
        width = manifest.draft_vocab_size if manifest.top_k is None else manifest.top_k
        shapes: dict[str, tuple[list[int], tuple[str, ...]]] = {name: ([*shape], ("I64",)) for name in _TOKENS}
        shapes["aux_hidden_states"] = [*shape, manifest.aux_hidden_dim], tuple(_FLOATS)
        shapes["position_mask"] = [*shape, 1], ("BOOL",)
        shapes[fields[0]] = [*shape, width], tuple(_FLOATS)
        shapes |= {name: ([*shape, width], ("I32",)) for name in fields[1:]}
        for name, (expected, dtypes) in shapes.items():
            found, dtype = slices[name].get_shape(), slices[name].get_dtype()
            if found != expected or dtype not in dtypes:
                raise DataError(f"{file}: {name} is {dtype} {found}, expected {' or '.join(dtypes)} {expected}")
        if self.dtype and _FLOATS[slices["aux_hidden_states"].get_dtype()] != self.dtype:
            raise DataError(f"{file}: aux_hidden_states are not {self.dtype}, as those of {self.files[0].name} are")

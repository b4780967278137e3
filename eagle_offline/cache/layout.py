"""The format: names of files and columns, and what a commit record says. `schemas/README.md` is its prose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT_NAME: Final = "eagle-offline-cache"
FORMAT_VERSION: Final = 3

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
HEAD_FILE = "head.safetensors"
EMBEDDINGS_FILE = "embeddings.safetensors"
TARGET_DIRECTORY = "target"
TOKENS_DIRECTORY = "tokens"
VOCAB_DIRECTORY = "vocab"
STATUS_FILE = "status.json"
ASIDE_DIRECTORY = "aside"

LAST_HIDDEN_STATE = "last_hidden_state"
TARGET_PROBS = "target_probs"

# Small samples share a record batch up to about this size: a batch's own header is about a kilobyte.
MERGED_BATCH_BYTES = 1 << 20

# Of bf16.
EXACT_MANTISSA_BITS: Final = 7

STORED_DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}

_RECORD_NAME = re.compile(r"commit-([0-9]{6,10})\.json")
_SHARD_NAME = re.compile(r"shard-(\d{6,})-[0-9a-f]{32}\.(arrow|zarr)")


def aux_field(layer_id: int) -> str:
    """Return the field that holds decoder layer ``layer_id``'s output."""
    return f"aux_{layer_id}"


def record_file(shard: int) -> str:
    """Return the name of a shard's commit record."""
    return f"commit-{shard:06d}.json"


def shard_of_record(name: str) -> int | None:
    """Return the shard number of a commit record's file name, None for any other name."""
    match = _RECORD_NAME.fullmatch(name)
    # One name a shard: with more zeros than it needs a record would count twice.
    return int(match[1]) if match and name == record_file(int(match[1])) else None


def shard_file(shard: int, digest: str, format_: str) -> str:
    """Return the name of a shard with the given content digest, a file (``arrow``) or a directory (``zarr``)."""
    return f"shard-{shard:06d}-{digest}.{format_}"


def shard_of_file(name: str) -> int | None:
    """Return the shard number in a shard's name, None for any other name."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match else None


def runs_of(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of ascending numbers: first and last of each.

    Example:
        >>> list(runs_of([1, 2, 3, 7]))
        [(1, 3), (7, 7)]
    """
    first = last = None
    for number in numbers:
        if first is None or last is None or number != last + 1:
            if first is not None and last is not None:
                yield first, last
            first = number
        last = number
    if first is not None and last is not None:
        yield first, last


def repair_way_out(cache: object) -> str:
    """Return the way out of damage that a cache's own inputs make good; ``cache`` is its directory or URL."""
    if "://" in str(cache):
        return "delete it in the store (of a shard its commit record) and run precompute --resume to make it again"
    return f"eagle-offline repair {cache} sets it aside and says how it is made again"


class Frozen(BaseModel):
    """A record that is validated when it enters and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# What fits every place it goes to: Arrow's record batch numbers are int32.
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
ShardFile = Annotated[str, Field(pattern=r"^shard-[0-9]{6,10}-[0-9a-f]{32}\.(arrow|zarr)$")]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
ByteCount = Annotated[int, Field(ge=0, lt=1 << 62)]


class FieldLayout(Frozen):
    """One float matrix per sample and how its values are stored.

    Attributes:
        name: column name, or the stem of its columns.
        width: values a row.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        encoding: see `eagle_offline.cache.encodings`.
        rows: one row a token, or one a supervised position (``m_t ∨ m_{t+1}``).
        mantissa_bits: of ``planes``, what is kept of bf16's 7.
        top_k: of ``topk``, how many probabilities are kept.
        losses: what the values had lost before they came into this encoding, in order.
    """

    name: str = Field(pattern=r"^[a-z_0-9]+$", max_length=64)
    width: int = Field(gt=0, le=1 << 24)
    dtype: Literal["bf16", "fp16", "fp32"]
    encoding: Literal["planes", "raw", "fp8", "topk"]
    rows: Literal["tokens", "supervised_positions"]
    mantissa_bits: int = Field(EXACT_MANTISSA_BITS, ge=1, le=EXACT_MANTISSA_BITS)
    top_k: int | None = Field(None, gt=0)
    losses: tuple[str, ...] = Field((), max_length=64)

    @model_validator(mode="after")
    def _check_encoding(self) -> FieldLayout:
        if self.encoding == "planes" and self.dtype != "bf16":
            raise ValueError(f"planes hold bf16, not {self.dtype}")
        if self.encoding != "planes" and self.mantissa_bits != EXACT_MANTISSA_BITS:
            raise ValueError(f"{self.encoding} has no mantissa bits to choose")
        if (self.encoding == "topk") != (self.top_k is not None) or (self.top_k or 0) > self.width:
            raise ValueError(f"top_k {self.top_k} does not fit {self.encoding} of width {self.width}")
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before encoding."""
        return self.width * STORED_DTYPES[self.dtype]


class LostSample(Frozen):
    """A sample of the shard that capture could not store, and why."""

    sample_id: Count
    reason: str


class SampleTable(Frozen):
    """One entry a stored sample, in the order they stand in the shard.

    Attributes:
        sample_id: row of the token table.
        num_tokens, num_supervised, num_target_positions: ``T``, ``Σ m_t`` and stored supervision positions.
        num_in_vocab, vocab_mass: of the supervised positions, how many have their argmax in the cache's default draft
            vocabulary, and how much of the target's probability lies inside it, summed.
        record_batch, row: where in the Arrow file; in Zarr 0 and the place along the first axis.
        digest: xxh3_64 of the sample's stored values, hexadecimal.
    """

    sample_id: list[Count]
    num_tokens: list[Count]
    num_supervised: list[Count]
    num_target_positions: list[Count]
    num_in_vocab: list[Count]
    vocab_mass: list[Annotated[float, Field(ge=0, le=1 << 31, allow_inf_nan=False)]]
    record_batch: list[Count]
    row: list[Count]
    digest: list[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]

    def __len__(self) -> int:
        return len(self.sample_id)


class EncodingError(Frozen):
    """How far a lossy field is from what was encoded: ``Σ (x̂ − x)²`` and ``Σ x²`` over the shard."""

    squared_error: float = Field(ge=0, allow_inf_nan=False)
    squared_values: float = Field(ge=0, allow_inf_nan=False)


class CommitRecord(Frozen):
    """What makes a shard exist: created only if absent, once the shard is durable.

    Attributes:
        identity_digest: of the manifest that the shard was made under.
        file, file_bytes, digest: the shard's name, size and xxh3_128; of a directory, see `schemas/README.md`.
        column_bytes: stored bytes a column.
        encoding_errors: of every lossy field, by name.
        finite: every stored value was checked to be finite.
        environment: where it was made; same bytes are promised in the same environment only.
    """

    format: Literal["eagle-offline-cache"]
    version: Literal[3]
    identity_digest: Digest
    shard: Count
    file: ShardFile
    file_bytes: ByteCount
    digest: Digest
    samples: SampleTable
    lost: list[LostSample]
    column_bytes: dict[str, ByteCount]
    encoding_errors: dict[str, EncodingError]
    finite: Literal[True]
    environment: dict[str, Any]

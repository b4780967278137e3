"""The format: names of files and columns, and what a commit record says. `schemas/README.md` is its prose."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_NAME: Final = "eagle-offline-cache"
FORMAT_VERSION: Final = 1

MANIFEST_FILE = "manifest.json"
HEAD_FILE = "head.safetensors"
EMBEDDINGS_FILE = "embeddings.safetensors"
TARGET_DIRECTORY = "target"
TOKENS_DIRECTORY = "tokens"
VOCAB_DIRECTORY = "vocab"
STATUS_FILE = "status.json"

LAST_HIDDEN_STATE = "last_hidden_state"
TARGET_PROBS = "target_probs"

# Small samples share a record batch up to about this size: a batch's own header is about a kilobyte.
MERGED_BATCH_BYTES = 1 << 20

STORED_DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}

_RECORD_NAME = re.compile(r"commit-(\d{6,})\.json")


def aux_field(layer_id: int) -> str:
    """Return the field that holds decoder layer ``layer_id``'s output."""
    return f"aux_{layer_id}"


def record_file(shard: int) -> str:
    """Return the name of a shard's commit record."""
    return f"commit-{shard:06d}.json"


def shard_of_record(name: str) -> int | None:
    """Return the shard number of a commit record's file name, None for any other name."""
    match = _RECORD_NAME.fullmatch(name)
    return int(match[1]) if match else None


def shard_file(shard: int, digest: str) -> str:
    """Return the name of a shard with the given content digest."""
    return f"shard-{shard:06d}-{digest}.arrow"


class Frozen(BaseModel):
    """A record that is validated when it enters and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# What fits every place it goes to: Arrow's record batch numbers are int32.
Count = Annotated[int, Field(ge=0, lt=1 << 31)]


class FieldLayout(Frozen):
    """One float matrix per sample and how its values are stored.

    Attributes:
        name: column name, or the stem of its columns.
        width: values a row.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        encoding: ``planes`` or ``raw``.
        rows: one row a token, or one a supervised position (``m_t ∨ m_{t+1}``).
    """

    name: str = Field(pattern=r"^[a-z_0-9]+$")
    width: int = Field(gt=0, le=1 << 24)
    dtype: Literal["bf16", "fp16", "fp32"]
    encoding: Literal["planes", "raw"]
    rows: Literal["tokens", "supervised_positions"]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before encoding."""
        return self.width * STORED_DTYPES[self.dtype]


class LostSample(Frozen):
    """A sample of the shard that capture could not store, and why."""

    sample_id: int
    reason: str


class SampleTable(Frozen):
    """One entry a stored sample, in the order they stand in the shard.

    Attributes:
        sample_id: row of the token table.
        num_tokens, num_supervised, num_target_positions: ``T``, ``Σ m_t`` and stored supervision positions.
        record_batch, row: where in the Arrow file.
        digest: xxh3_64 of the sample's stored values, hexadecimal.
    """

    sample_id: list[Count]
    num_tokens: list[Count]
    num_supervised: list[Count]
    num_target_positions: list[Count]
    record_batch: list[Count]
    row: list[Count]
    digest: list[str]

    def __len__(self) -> int:
        return len(self.sample_id)


class CommitRecord(Frozen):
    """What makes a shard exist: created only if absent, once the shard is durable.

    Attributes:
        identity_digest: of the manifest that the shard was made under.
        file, file_bytes, digest: the shard's name, size and xxh3_128.
        column_bytes: stored bytes a column.
        finite: every stored value was checked to be finite.
        environment: where it was made; same bytes are promised in the same environment only.
    """

    format: Literal["eagle-offline-cache"]
    version: Literal[1]
    identity_digest: str
    shard: int = Field(ge=0)
    file: str = Field(pattern=r"^shard-\d{6,}-[0-9a-f]{32}\.arrow$")
    file_bytes: int = Field(ge=0)
    digest: str = Field(pattern=r"^[0-9a-f]{32}$")
    samples: SampleTable
    lost: list[LostSample]
    column_bytes: dict[str, int]
    finite: Literal[True]
    environment: dict[str, Any]

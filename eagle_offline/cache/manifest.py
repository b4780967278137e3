"""The manifest: what a cache is. Written once, before any shard; whoever comes later must agree with it."""

from __future__ import annotations

import json
import stat
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from eagle_offline.cache.choices import Compressor, ShardFormat, StateEncoding, TargetEncoding
from eagle_offline.cache.layout import (
    FORMAT_NAME,
    FORMAT_VERSION,
    LAST_HIDDEN_STATE,
    MANIFEST_FILE,
    TARGET_PROBS,
    ByteCount,
    Digest,
    FieldLayout,
    Frozen,
    aux_field,
)
from eagle_offline.durable import create_exclusively
from eagle_offline.errors import DataError, MismatchError, one_line, printable, unreadable
from eagle_offline.provenance import digest_json, digest_merged

# A manifest larger than this is not one of ours; nothing larger is ever parsed.
_MAX_MANIFEST_BYTES = 64 << 20

# Far more shards than a directory takes well; what lists the missing ones stays small.
_MAX_SHARDS = 1 << 20

# A path that stays inside the cache: no leading slash, no part that begins with a dot.
_INSIDE = r"^[^/.\x00-\x1f\x7f][^/\x00-\x1f\x7f]*(/[^/.\x00-\x1f\x7f][^/\x00-\x1f\x7f]*)*$"

# What a number may be: what it counts fits int32, widths and vocabularies fit a row of a field.
_Number = Annotated[int, Field(gt=0, lt=1 << 31)]
_Width = Annotated[int, Field(gt=0, le=1 << 24)]

SEAL = "self_digest"

# A stranger's key may be of any length.
_MAX_PROBLEM = 500

# How long the fields that differ, and a value among them, may be in a refusal.
_MAX_DRIFT, _MAX_VALUE = 300, 100

# Lists of the identity whose entries have names.
_NAMED_LISTS = ("capture.fields", "dataset.sources")


class AdapterIdentity(Frozen):
    """A LoRA adapter that was merged into the target: hub id or directory name, resolved revision, files' digest."""

    id: str
    revision: str | None
    digest: str


class TargetIdentity(Frozen):
    """The frozen target.

    Attributes:
        id: hub id or directory name; revision: the commit of a hub model; checkpoint_digest: of weights and config.
        adapter: what was merged into it, if anything.
        architecture: its class; num_layers, hidden_size, vocab_size: its shape.
    """

    id: str
    revision: str | None
    checkpoint_digest: str
    adapter: AdapterIdentity | None
    architecture: str
    num_layers: int = Field(gt=0, le=1 << 16)
    hidden_size: _Width
    vocab_size: _Width

    @property
    def digest(self) -> str:
        """Of the weights that ran."""
        return digest_merged(self.checkpoint_digest, None if self.adapter is None else self.adapter.digest)


class SourceIdentity(Frozen):
    """One input: its name, content digest and size, or a hub dataset's id and revision; and what was taken of it."""

    name: str
    digest: str
    num_bytes: ByteCount | None
    revision: str | None
    split: str | None


class DatasetIdentity(Frozen):
    """The corpus: inputs, and a digest of the tokenised rows in order."""

    sources: list[SourceIdentity]
    shuffle_seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None
    num_samples: int = Field(ge=0, le=1 << 31)
    rows_digest: str


class TextIdentity(Frozen):
    """How text became tokens."""

    tokenizer_digest: str
    template_digest: str
    seq_length: _Number


class BatchPlan(Frozen):
    """How the samples of a shard were put through the target; it moves last bits, so it is identity.

    Attributes:
        batch_size: samples at once; None where tokens are counted.
        max_batch_tokens: tokens at once, padding included; None where samples are counted, or nothing was run.
        order: the longest first.
        attention_implementation, experts_implementation: of transformers; no experts in a dense model.
        tensor_parallel_size: processes that share one copy of the target.
        device_kind: such as ``cuda``.
    """

    batch_size: _Number | None
    max_batch_tokens: _Number | None
    order: Literal["length"]
    attention_implementation: str
    experts_implementation: str | None
    tensor_parallel_size: _Number
    device_kind: str


class CaptureIdentity(Frozen):
    """What was stored and how.

    Attributes:
        aux_layer_ids: 0-based decoder layers, strictly increasing.
        state_encoding, target_encoding: as asked for; ``fields`` say how each column is stored.
        target_statistics: ``full``, or ``in_vocabulary``: the argmax is known where it lies in the draft vocabulary
            and -1 elsewhere, and the log-normaliser is not known (0).
        draft_vocab_digest: under ``dense`` and ``topk`` only: the probabilities are over this vocabulary.
        format: of the shards; compressor: what Zarr compresses with, None for Arrow.
        fields: the float columns.
    """

    aux_layer_ids: list[Annotated[int, Field(ge=0, lt=1 << 16)]] = Field(min_length=1)
    dtype: str
    compute_dtype: str
    state_encoding: StateEncoding
    target_encoding: TargetEncoding
    target_statistics: Literal["full", "in_vocabulary"]
    draft_vocab_digest: str | None
    shard_size: int = Field(gt=0, lt=1 << 62)
    format: ShardFormat
    compressor: Compressor | None
    fields: list[FieldLayout] = Field(min_length=1)


class Conversion(Frozen):
    """The cache that this one was made from.

    Attributes:
        identity_digest: of that cache.
        samples: which of its samples, ``first:last`` in cache order; None for all.
        earlier: what that cache was made from, if it was converted itself.
    """

    identity_digest: Digest
    samples: str | None
    earlier: Conversion | None = None


class ImportedStates(Frozen):
    """States that another tool had dumped: which tool, and a digest of all its files."""

    tool: Literal["speculators", "nemo"]
    digest: Digest


class Identity(Frozen):
    """Everything that shapes the cache's bytes.

    Attributes:
        imported_from: the states that this cache was made from, if it was not made by running the target.
        converted_from: the cache that it was made from, if it was.
    """

    target: TargetIdentity
    text: TextIdentity
    dataset: DatasetIdentity
    capture: CaptureIdentity
    batch_plan: BatchPlan
    imported_from: ImportedStates | None = None
    converted_from: Conversion | None = None

    @model_validator(mode="after")
    def _check_num_shards(self) -> Identity:
        if self.num_shards > _MAX_SHARDS:
            raise ValueError(f"{self.num_shards} shards, expected at most {_MAX_SHARDS}: choose a larger --shard-size")
        return self

    @property
    def digest(self) -> str:
        """Return the digest that ties shards and records to this manifest."""
        return digest_json(self.model_dump(mode="json"))

    @property
    def num_shards(self) -> int:
        return -(-self.dataset.num_samples // self.capture.shard_size)

    def shard_samples(self, shard: int) -> int:
        """Return how many samples a shard accounts for, those lost in capture included."""
        size = self.capture.shard_size
        return min(size, self.dataset.num_samples - shard * size)


class DraftVocabulary(Frozen):
    """The draft vocabulary to train with unless told otherwise; its ids stand in ``vocab/<digest>.safetensors``.

    Attributes:
        size: ``Vd``.
        digest: of the ids.
        coverage: share of the corpus's supervised tokens that are in it.
    """

    size: _Width
    digest: Digest
    coverage: float = Field(ge=0, le=1)


class CompanionFile(Frozen):
    """Size and xxh3_128 of a file that the cache brings along."""

    num_bytes: ByteCount
    digest: Digest


class Defaults(Frozen):
    """What may be replaced later without touching a shard."""

    draft_vocabulary: DraftVocabulary


class Manifest(Frozen):
    """The whole of ``manifest.json``.

    Attributes:
        identity: shapes bytes; compared on resume.
        defaults: choices for training that can be made again later.
        files: size and digest of the files that the cache brings along, by path inside it.
        environment: where it was begun, and under which names its inputs were given.
    """

    format: Literal["eagle-offline-cache"] = FORMAT_NAME
    version: Literal[3] = FORMAT_VERSION
    identity: Identity
    defaults: Defaults
    files: dict[Annotated[str, Field(pattern=_INSIDE)], CompanionFile]
    environment: dict[str, Any]


def write_manifest(directory: Path, manifest: Manifest) -> bool:
    """Create the manifest unless there is one; return whether this call did."""
    content = json.dumps(sealed(manifest.model_dump(mode="json")), indent=2, ensure_ascii=False) + "\n"
    return create_exclusively(directory / MANIFEST_FILE, content.encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and validate a cache's manifest.

    Raises:
        DataError: missing, not JSON, or not following the schema.
        MismatchError: of another format or version.
    """
    path = Path(directory) / MANIFEST_FILE
    raw = read_json_object(path, _MAX_MANIFEST_BYTES)
    if raw.get("format") != FORMAT_NAME:
        raise MismatchError(f"{path}: not an {FORMAT_NAME} manifest (format is {raw.get('format')!r})")
    if raw.get("version") != FORMAT_VERSION:
        raise MismatchError(
            f"{path}: cache version {raw.get('version')!r}, this program reads version {FORMAT_VERSION}: "
            "use the release that wrote it"
        )
    seal = raw.pop(SEAL, None)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}") from error
    check_seal(path, raw, seal, "restore it from a copy")
    _check_columns(path, manifest)
    return manifest


def _check_columns(path: Path, manifest: Manifest) -> None:
    """Refuse float columns that are not those of the layers and of the target encoding, in order.

    Raises:
        DataError: says so.
    """
    identity, vocabulary = manifest.identity, manifest.defaults.draft_vocabulary
    capture, hidden_size = identity.capture, identity.target.hidden_size
    layer_ids = capture.aux_layer_ids
    columns: list[tuple[str, int, str]] = [(aux_field(layer_id), hidden_size, "tokens") for layer_id in layer_ids]
    if capture.target_encoding == "factored":
        columns.append((LAST_HIDDEN_STATE, hidden_size, "supervised_positions"))
    else:
        columns.append((TARGET_PROBS, vocabulary.size, "supervised_positions"))
    if (
        [(field.name, field.width, field.rows) for field in capture.fields] != columns
        or any(low >= high for low, high in pairwise([*layer_ids, identity.target.num_layers]))
        or (capture.target_encoding == "topk") != (capture.fields[-1].encoding == "topk")
        or capture.draft_vocab_digest != (None if capture.target_encoding == "factored" else vocabulary.digest)
        or (capture.format == "zarr") != (capture.compressor is not None)
    ):
        raise DataError(f"{path}: its fields are not those of its layers, target encoding and draft vocabulary")


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of everything in it under ``self_digest``."""
    return {**value, SEAL: digest_json(value)}


def check_seal(path: Path, value: dict[str, Any], seal: Any, way_out: str) -> None:
    """Refuse a JSON object that is not what it was when it was sealed.

    Raises:
        DataError: says so.
    """
    try:
        unchanged = seal == digest_json(value)
    except RecursionError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not unchanged:
        raise DataError(f"{path}: was changed after it was written: its {SEAL} differs; {way_out}")


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        DataError: missing, too large, or not a JSON object.
    """
    try:
        status = path.stat()
        # Neither a pipe, which would be waited for, nor a device, which never ends.
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a plain file")
        if status.st_size > max_bytes:
            raise DataError(f"{path}: {status.st_size} bytes, expected at most {max_bytes}")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; is this the directory of a cache?") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    except OSError as error:
        raise unreadable(path, "cannot be read", error) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def first_problem(error: ValidationError) -> str:
    """Return a validation error's first problem as one line: where, and what."""
    problem = error.errors()[0]
    where = printable(".".join(map(str, problem["loc"])) or "value")
    return one_line(f"{where}: {problem['msg']}", _MAX_PROBLEM)


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _leaves(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def differing_fields(recorded: Identity, found: Identity) -> dict[str, tuple[Any, Any]]:
    """Return each identity field that differs, with the recorded and the new value; those of lists by name, last.

    What differs alike in all entries of a list stands there once: ``capture.fields.*.mantissa_bits``. Of lists with
    unlike entries it is their names that differ.
    """
    before, after = _leaves(recorded.model_dump(mode="json")), _leaves(found.model_dump(mode="json"))
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    plain: dict[str, tuple[Any, Any]] = {}
    listed: dict[str, tuple[Any, Any]] = {}
    for name in names:
        if name in _NAMED_LISTS:
            listed |= _differing_entries(name, before[name], after[name])
        else:
            plain[name] = before.get(name), after.get(name)
    return {**plain, **listed}


def _differing_entries(
    name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two lists of entries that have names."""
    entries = [entry["name"] for entry in before]
    if entries != (others := [entry["name"] for entry in after]):
        return {name: (entries, others)}
    differing: dict[str, tuple[Any, Any]] = {}
    for key in before[0]:
        values = [(one[key], two[key]) for one, two in zip(before, after, strict=True)]
        if len(entries) > 1 and values[0][0] != values[0][1] and all(pair == values[0] for pair in values):
            differing[f"{name}.*.{key}"] = values[0]
        else:
            pairs = zip(entries, values, strict=True)
            differing |= {f"{name}.{entry}.{key}": pair for entry, pair in pairs if pair[0] != pair[1]}
    return differing


def refuse_drift(directory: Path, recorded: Identity, found: Identity) -> None:
    """Refuse to go on with a cache that was begun with other settings or inputs.

    Raises:
        MismatchError: names the differing fields, as many as fit a line, the recorded and the new value, and the way
            out.
    """
    if differing := differing_fields(recorded, found):
        raise MismatchError(
            f"{directory} was begun with other settings and is left as it is: {_in_a_line(differing)}. "
            "Give the recorded settings again, or choose another --output-dir"
        )


def _in_a_line(differing: dict[str, tuple[Any, Any]]) -> str:
    """Return differing fields up to a length, one at least, and how many more there are."""
    said = [
        f"{name}: recorded {one_line(repr(old), _MAX_VALUE)}, now {one_line(repr(new), _MAX_VALUE)}"
        for name, (old, new) in differing.items()
    ]
    count = 1
    while count < len(said) and len("; ".join(said[: count + 1])) <= _MAX_DRIFT:
        count += 1
    more = len(said) - count
    return "; ".join(said[:count]) + (f"; and {more} more" if more else "")

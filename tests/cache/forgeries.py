"""Caches as an attacker would make them: a change anywhere, and every digest that leads there made true again.

Nothing here is taken from the code under test but what an attacker would copy from it: the normal form of an identity
and the documents of a Zarr shard.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
import zstandard

from tests.cache.mutations import WEIRD_VALUES, Mutation, Odd, damage_bytes

Json = dict[str, Any]

# Written into a document in the place of a value, as they stand.
RAW_VALUES = [
    "1" + "0" * 400,
    "-1" + "0" * 400,
    "1" + "0" * 5000,
    "1e400",
    "-1e400",
    "NaN",
    "-Infinity",
    "1.0",
    "-0",
    "1E2",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "4294967295",
    "2147483647",
    "16777216",
    "16777217",
    "1e308",
    "5e-324",
    '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J\\u001b]0;x\\u0007"',
    '"\\u202e\\u2066"',
    '"a\\nb\\rc"',
    '"' + "a" * 100_000 + '"',
    '"' + "../" * 60 + 'etc/passwd"',
    '"/dev/zero"',
    '"\\u0661\\u0662"',
    '"ﬁle.arrow"',
    '"shard"',
    "[" * 200 + "]" * 200,
    "[" * 400 + "]" * 400,
    '{"a":' * 990 + "1" + "}" * 990,
    "[" * 100_000 + "]" * 100_000,
    "[" + "0," * 20_000 + "0]",
    '{"a":1,"a":2}',
    "true",
    "null",
    "{}",
    "[]",
    '""',
    "0",
    "-1",
    "1",
    "2",
    "7",
    "8",
    "64",
    "65",
]
_MARK = "@@raw value@@"


def digest_of(value: Any) -> str:
    """The digest of a JSON value, from the prose."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode(errors="replace"))


def digest_of_tree(files: dict[str, bytes]) -> str:
    """The digest of a Zarr shard's files by their path in it, from the prose."""
    digest = xxhash.xxh3_128()
    for name in sorted(files):
        digest.update(name.encode() + struct.pack("<Q", len(files[name])) + files[name])
    return digest.hexdigest()


def sample_digest(values: list[bytes]) -> str:
    """The digest of a sample's values, from the prose."""
    return xxhash.xxh3_64_hexdigest(b"".join(struct.pack("<Q", len(value)) + value for value in values))


PLAIN = (
    ("sample_id", "<i8"),
    ("input_ids", "<i4"),
    ("loss_mask", "u1"),
    ("target_argmax", "<i4"),
    ("target_log_normalizer", "<f4"),
)


def arrow_sample_digest(row: Json, columns: list[str]) -> str:
    parts = [np.atleast_1d(np.array(row[name], dtype)).tobytes() for name, dtype in PLAIN]
    return sample_digest([*parts, *(row[name] for name in columns)])


INDEX_COLUMNS = {
    "sample_id": "i4",
    "num_tokens": "i4",
    "num_supervised": "i4",
    "num_target_positions": "i4",
    "num_in_vocab": "i4",
    "vocab_mass": "f4",
    "record_batch": "i4",
    "row": "i4",
    "digest": "u8",
}


def index_file(records: list[Json], identity_digest: str) -> tuple[str, bytes]:
    """Name and bytes of an index, from the prose."""
    shards = [
        {
            **{name: record[name] for name in ("shard", "file", "file_bytes", "digest")},
            "num_samples": len(record["samples"]["sample_id"]),
            **{name: record[name] for name in ("lost", "column_bytes", "encoding_errors")},
        }
        for record in records
    ]
    columns = {}
    for name, dtype in INDEX_COLUMNS.items():
        values = [value for record in records for value in record["samples"][name]]
        numbers = [int(value, 16) for value in values] if name == "digest" else values
        columns[name] = pa.array(np.array(numbers, dtype))
    metadata = {"identity_digest": identity_digest, "shards": json.dumps(shards, separators=(",", ":"))}
    return _index_of(pa.record_batch(columns).replace_schema_metadata(metadata))


def _index_of(batch: pa.RecordBatch) -> tuple[str, bytes]:
    content = ipc_file(batch.schema, [batch])
    return f"index-{xxhash.xxh3_128_hexdigest(content)}.arrow", content


def ipc_file(schema: pa.Schema, batches: list[pa.RecordBatch], compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


@dataclass
class Forged:
    """A cache in memory, to be changed and then `settle`d.

    Attributes:
        files: by path, without manifest, records and indexes.
        manifest: its document; records: theirs, by name.
        odd: what is put in the place of a file.
    """

    files: dict[str, bytes]
    manifest: Json
    records: dict[str, Json]
    odd: dict[str, Odd] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: dict[str, bytes]) -> Forged:
        documents = {n: json.loads(c) for n, c in tree.items() if n == "manifest.json" or n.startswith("commit-")}
        rest = {n: c for n, c in tree.items() if n not in documents and not n.startswith("index-")}
        return cls(rest, documents.pop("manifest.json"), dict(sorted(documents.items())))

    @property
    def format(self) -> str:
        return "zarr" if any(".zarr/" in name for name in self.files) else "arrow"

    def shard_parts(self, name: str) -> dict[str, bytes]:
        """A shard's files by their path in it; an Arrow shard's only one has none."""
        below = {n[len(name) + 1 :]: c for n, c in self.files.items() if n.startswith(name + "/")}
        return below or ({"": self.files[name]} if name in self.files else {})

    def replace_shard(self, record: Json, parts: dict[str, bytes]) -> None:
        """Put other bytes in a shard's place, and make size, digest and name true."""
        name, files = record["file"], {path.rstrip("/"): content for path, content in parts.items()}
        for path in self.shard_parts(name):
            del self.files[f"{name}/{path}" if path else name]
        digest = digest_of_tree(files) if "" not in files else xxhash.xxh3_128_hexdigest(files[""])
        record["digest"], record["file_bytes"] = digest, sum(map(len, files.values()))
        record["file"] = f"shard-{record['shard']:06d}-{digest}.{name.rpartition('.')[2]}"
        for path, content in files.items():
            self.files[f"{record['file']}/{path}" if path else record["file"]] = content

    def settle(self, rng: random.Random, raw: str | None = None, *, seal: bool = True) -> dict[str, bytes]:
        """The cache's files with every digest true again.

        Args:
            raw: stands for the value that is marked in a document.
            seal: of documents and what they say of one another; else they keep what they said.
        """
        for name in set(self.manifest.get("files", {})) & set(self.files) if seal else ():
            with contextlib.suppress(TypeError, AttributeError, KeyError):
                said, content = self.manifest["files"][name], self.files[name]
                if said["num_bytes"] == len(content):
                    said["digest"] = xxhash.xxh3_128_hexdigest(content)
                elif not isinstance(said["num_bytes"], str):
                    said.update(num_bytes=len(content), digest=xxhash.xxh3_128_hexdigest(content))
        manifest, manifest_text = self._document(self.manifest, raw, seal)
        identity_digest = self._adopt(manifest) if seal else None
        files = dict(self.files)
        records = []
        for name, record in self.records.items():
            if identity_digest is not None and isinstance(record.get("identity_digest"), str):
                record["identity_digest"] = identity_digest
            document, files[name] = self._document(record, raw, seal)
            records.append(document)
        files["manifest.json"] = manifest_text
        if rng.random() < 0.4:
            with contextlib.suppress(Exception):  # what does not fit an index has none
                name, content = index_file(records, records[0]["identity_digest"])
                files[name] = content
        return files

    def _document(self, document: Json, raw: str | None, seal: bool) -> tuple[Json, bytes]:
        text = json.dumps(document)
        if raw is not None:
            text = text.replace(json.dumps(_MARK), raw)
        if not seal:
            return document, text.encode()
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(text)
            parsed.pop("self_digest", None)
            closing = text.rindex(', "self_digest"') if ', "self_digest"' in text else None
            if closing is not None and parsed:
                return parsed, f'{text[:closing]}, "self_digest": "{digest_of(parsed)}"}}'.encode()
        return document, text.encode()

    def _adopt(self, manifest: Json) -> str | None:
        """Make every shard one of this manifest; return the identity's digest, None when it has none."""
        from eagle_offline.cache.manifest import Identity

        try:
            identity = Identity.model_validate(manifest["identity"])
            digest = digest_of(identity.model_dump(mode="json"))
        except Exception:  # refused before any shard is looked at
            return None
        if all(record.get("identity_digest") == digest for record in self.records.values()):
            return digest
        for record in self.records.values():
            with contextlib.suppress(Exception):  # a shard that fits no longer stays as it is
                parts = self.shard_parts(record["file"])
                if "" in parts:
                    table = pa.ipc.open_file(parts[""])
                    fields = json.dumps([item.model_dump() for item in identity.capture.fields])
                    said = {**table.schema.metadata, b"identity_digest": digest.encode(), b"fields": fields.encode()}
                    batches = [table.get_batch(i) for i in range(table.num_record_batches)]
                    parts = {"": ipc_file(table.schema.with_metadata(said), batches)}
                else:
                    from eagle_offline.cache.zarr_shards import zarr_layout

                    parts |= zarr_layout(identity, record["shard"]).documents(record["shard"], digest)
                self.replace_shard(record, parts)
        return digest


def _places(document: Any) -> list[tuple[Any, Any, str]]:
    found: list[tuple[Any, Any, str]] = []

    def walk(node: Any, path: str) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in pairs:
            if key != "self_digest":
                found.append((node, key, f"{path}.{key}"))
                walk(value, f"{path}.{key}")

    walk(document, "")
    return found


def spoil(document: Any, rng: random.Random) -> tuple[str, str | None]:
    """Change one value of a document in place; return what was done, and the raw text that takes a value's place."""
    node, key, path = rng.choice(_places(document))
    kind = rng.choice(["raw"] * 4 + ["weird"] * 3 + ["near"] * 3 + ["delete", "add", "key", "repeat"])
    value = node[key]
    if kind == "near" and isinstance(value, int) and not isinstance(value, bool):
        node[key] = rng.choice([value + 1, value - 1, -value, 2 * value, value * 10**6, 2**31 - 1, 2**31, 2**62])
        return f"{path} = {node[key]}", None
    if kind == "near" and isinstance(value, list):
        node[key] = rng.choice([value[:-1], value + value, value[::-1], []])
        return f"{path} of length {len(node[key])}", None
    if kind == "near" and isinstance(value, str) and value:
        twisted = [
            value[:-1],
            value + "\n",
            value.upper(),
            "../" + value,
            "/" + value,
            value + "\0",
            value[::-1],
            f"{value}/..",
        ]
        node[key] = rng.choice(twisted)
        return f"{path} = {node[key][:60]!r}", None
    if kind == "delete":
        del node[key]
        return f"{path} deleted", None
    if kind == "add" and isinstance(node, dict):
        node[rng.choice(["more", "", "__class__", "a" * 500, "\x1b[2J", "\0", "../x", "é"])] = copy.deepcopy(value)
        return f"{path} added beside", None
    if kind == "key" and isinstance(node, dict):
        twisted = [
            "../" + key,
            "/etc/passwd",
            key + "/",
            key + "\0",
            key.upper(),
            "./" + key,
            key + "\n",
            "a/../" + key,
            "．．/x",
        ]
        node[rng.choice(twisted)] = node.pop(key)
        return f"{path} renamed", None
    if kind == "repeat" and isinstance(node, list):
        node += [copy.deepcopy(value)] * rng.choice([1, 3, 5000])
        return f"{path} repeated", None
    if kind == "weird":
        node[key] = copy.deepcopy(rng.choice(WEIRD_VALUES))
        return f"{path} = {str(node[key])[:40]!r}", None
    raw = rng.choice(RAW_VALUES)
    node[key] = _MARK
    return f"{path} = raw {raw[:40]}", raw


def spoil_manifest(cache: Forged, rng: random.Random) -> tuple[str, str | None]:
    part = rng.choice(
        ["identity", "identity", "identity", "capture", "capture", "defaults", "files", "environment", "all"]
    )
    documents = {"all": cache.manifest, "capture": cache.manifest["identity"]["capture"]}
    what, raw = spoil(documents.get(part, cache.manifest.get(part)), rng)
    return f"manifest {part}{what}", raw


def spoil_record(cache: Forged, rng: random.Random) -> tuple[str, str | None]:
    record = rng.choice(list(cache.records.values()))
    what, raw = spoil(rng.choice([record, record["samples"]]), rng)
    return f"record {record.get('shard')}{what}", raw


def spoil_companion(cache: Forged, rng: random.Random) -> tuple[str, str | None]:
    name = rng.choice(sorted(set(cache.manifest["files"]) & set(cache.files)))
    content = cache.files[name]
    if name.endswith(".safetensors") and rng.random() < 0.6:
        changed, what = spoil_safetensors(content, rng)
    elif name.endswith(".json") and rng.random() < 0.7:
        document = json.loads(content)
        what, raw = spoil(document, rng)
        changed = json.dumps(document).replace(json.dumps(_MARK), raw or "").encode()
    else:
        changed, what = damage_bytes(content or b"\n", rng)
    cache.files[name] = changed
    return f"{name}: {what}", None


def spoil_safetensors(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = rng.choice(["size", "json", "json", "json", "shape", "shape", "dtype", "metadata"])
    if kind == "size":
        claimed = rng.choice([0, 1, size - 1, size + 1, 100_000_000, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", claimed) + content[8:], f"a header of {claimed}"
    raw: str | None = None
    tensors = [name for name in header if name != "__metadata__"]
    if kind == "metadata" and "__metadata__" in header:
        said = json.loads(header["__metadata__"]["head"])
        what, raw = spoil(said, rng)
        header["__metadata__"]["head"] = json.dumps(said).replace(json.dumps(_MARK), raw or "")
        raw = None
    elif kind == "shape" and tensors:
        tensor = header[rng.choice(tensors)]
        flat = int(np.prod(tensor["shape"]))
        tensor["shape"] = rng.choice(
            [[flat], [1, flat], [flat, 1], tensor["shape"][::-1], [*tensor["shape"], 1], [flat // 2, 2]]
        )
        what = f"shape {tensor['shape']}"
    elif kind == "dtype" and tensors:
        tensor = header[rng.choice(tensors)]
        tensor["dtype"], width = rng.choice(
            [("I32", 4), ("I64", 8), ("BOOL", 1), ("F64", 8), ("BF16", 2), ("F16", 2), ("F8_E4M3", 1), ("F32", 4)]
        )
        start, stop = tensor["data_offsets"]
        tensor["shape"] = [(stop - start) // width]
        what = f"dtype {tensor['dtype']}"
    else:
        what, raw = spoil(header, rng)
    text = json.dumps(header).replace(json.dumps(_MARK), raw or "").encode()
    return struct.pack("<Q", len(text)) + text + body, f"header {what}"


def _bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(size))


def spoil_arrow(cache: Forged, rng: random.Random) -> tuple[str, str | None]:
    """Change the values or the structure of an Arrow shard, digests of samples included."""
    record = rng.choice(list(cache.records.values()))
    content = cache.files[record["file"]]
    if rng.random() < 0.35:
        changed, what = damage_bytes(content, rng)
        cache.replace_shard(record, {"": changed})
        return f"shard {record['shard']}: {what}, digest true", None
    reader = pa.ipc.open_file(content)
    schema, rows = reader.schema, reader.read_all().to_pylist()
    compression, what = None, ""
    kind = rng.choice(["value"] * 8 + ["schema", "schema", "metadata", "rows", "batches", "compressed"])
    row = rng.choice(rows)
    if kind == "value":
        name = rng.choice(schema.names)
        row[name], what = _other_value(row[name], rng)
        what = f"{name} {what}"
    elif kind == "rows":
        rows = rng.choice([[], rows[::-1], rows + rows, rows[:1]])
        what = f"{len(rows)} rows"
    elif kind == "compressed":
        compression = rng.choice(["zstd", "lz4"])
        what = f"body in {compression}"
    elif kind == "metadata":
        key = rng.choice(list(schema.metadata))
        value = rng.choice([b"", b"\xff", b"0", b"2", b"1" * 5000, b"[" * 2000, schema.metadata[key] + b" "])
        schema = schema.with_metadata({**schema.metadata, key: value})
        what = f"metadata {key!r}"
    try:
        arrays = [pa.array([item[f.name] for item in rows], f.type) for f in schema]
    except (pa.ArrowException, OverflowError, ValueError):
        return spoil_arrow(cache, rng)
    if kind == "schema":
        place = rng.randrange(len(schema))
        column = schema.field(place)
        other = rng.choice(
            [
                pa.binary(),
                pa.string(),
                pa.list_(pa.int64()),
                pa.int32(),
                pa.null(),
                pa.large_list(pa.int32()),
                pa.float64(),
                pa.dictionary(pa.int32(), column.type),
                pa.list_(column.type),
            ]
        )
        with contextlib.suppress(pa.ArrowException, ValueError):
            arrays[place] = pa.nulls(len(rows), other)
            schema = schema.set(place, pa.field(column.name, other, nullable=rng.random() < 0.5))
        what = f"{column.name} as {other}"
    if kind == "value" and rng.random() < 0.1:
        arrays[3] = pa.nulls(len(rows), schema.field(3).type)
        what = "nulls"
    if kind != "schema":
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            columns = schema.names[len(PLAIN) :]
            table = record["samples"]
            table["digest"] = [arrow_sample_digest(item, columns) for item in rows]
            table["sample_id"] = [item["sample_id"] for item in rows]
            table["num_tokens"] = [len(item["input_ids"]) for item in rows]
            table["num_supervised"] = [sum(item["loss_mask"]) for item in rows]
            table["num_target_positions"] = [len(item["target_argmax"]) for item in rows]
    try:
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        batches = [batch] if kind != "batches" else [batch.slice(0, 0), batch, batch.slice(1), batch.slice(0, 1)]
        written = ipc_file(schema, batches, compression)
    except (pa.ArrowException, ValueError):
        return spoil_arrow(cache, rng)
    if kind == "batches":
        record["samples"]["record_batch"] = [rng.choice([0, 1, 2, 3, 4]) for _ in rows]
        what = "other record batches"
    cache.replace_shard(record, {"": written})
    return f"shard {record['shard']}: {what}", None


def _other_value(value: Any, rng: random.Random) -> tuple[Any, str]:
    if isinstance(value, bytes):
        size = max(1, len(value))
        at = rng.randrange(size)
        kind, changed = rng.choice(
            [
                ("cut", value[:at]),
                ("doubled", value + value),
                ("empty", b""),
                ("noise", rng.randbytes(size)),
                ("ones", b"\xff" * size),
                ("zeros", bytes(size)),
                ("bomb", _bomb(1 << 28)),
                ("one more", value + b"\0"),
                ("frame of another size", _bomb(size + 1)),
                ("byte", value[:at] + b"\x7f" + value[at + 1 :]),
                ("skippable frame", b"\x50\x2a\x4d\x18\x01\0\0\0x" + value),
                ("header", value[:4] + rng.randbytes(9) + value[13:]),
            ]
        )
        return changed, kind
    if isinstance(value, list):
        least, most = (0, 255) if all(isinstance(v, int) and 0 <= v < 2 for v in value) else (-(2**31), 2**31 - 1)
        edge = rng.choice([least, most, 0, 1])
        if value and isinstance(value[0], float):
            edge = rng.choice([float("nan"), float("inf"), -1e38])
        at = rng.randrange(max(1, len(value)))
        kind, changed = rng.choice(
            [
                ("cut", value[:at]),
                ("doubled", value + value),
                ("empty", []),
                ("turned", value[::-1]),
                ("edge", [*value[:at], edge, *value[at + 1 :]]),
                ("all edge", [edge] * len(value)),
                ("long", [edge] * 5000),
            ]
        )
        return changed, f"{kind} {edge}"
    changed = rng.choice([-1, 0, 1, 2**31, 2**63 - 1, -(2**63)])
    return changed, str(changed)


def spoil_zarr(cache: Forged, rng: random.Random) -> tuple[str, str | None]:
    """Change a Zarr shard, its checksums and digests true."""
    record = rng.choice(list(cache.records.values()))
    parts = cache.shard_parts(record["file"])
    name = rng.choice(sorted(parts))
    kind = rng.choice(["bytes", "document", "document", "values", "values", "values", "missing", "more", "exchange"])
    what = f"{name} {kind}"
    if kind == "document":
        name = rng.choice([n for n in parts if n.endswith("zarr.json")])
        document = json.loads(parts[name])
        said, raw = spoil(document, rng)
        parts[name] = json.dumps(document).replace(json.dumps(_MARK), raw or "").encode()
        what = f"{name} {said}"
    elif kind == "values":
        parts, what = _other_zarr_values(parts, rng)
        _true_samples(parts, record)
    elif kind == "missing":
        del parts[name]
    elif kind == "more":
        parts[rng.choice(["more", "input_ids/c.9.0", "other/zarr.json", "é/x", "input_ids/.hidden"])] = b"x"
    elif kind == "exchange":
        other = rng.choice(sorted(parts))
        parts[name], parts[other] = parts[other], parts[name]
    else:
        parts[name], said = damage_bytes(parts[name], rng)
        what = f"{name} {said}"
    cache.replace_shard(record, parts)
    return f"shard {record['shard']}: {what}", None


def _other_zarr_values(parts: dict[str, bytes], rng: random.Random) -> tuple[dict[str, bytes], str]:
    group = _zarr_group(parts)
    name = rng.choice(["num_tokens", "num_target_positions", "sample_id", *sorted(group.array_keys())])
    array = group[name]
    whole = array[...]
    place = tuple(rng.randrange(min(size, 3)) for size in whole.shape)
    limits = np.iinfo(whole.dtype) if whole.dtype.kind in "iu" else None
    edges = (
        [limits.min, limits.max, 0, 1, 97 if limits.max > 97 else 2] if limits else [float("nan"), float("inf"), -1e30]
    )
    if rng.random() < 0.5:
        whole[place] = rng.choice(edges)
    else:
        whole[place[0]] = rng.choice(edges)
    with np.errstate(all="ignore"):
        array[...] = whole
    written = dict(group.store._store_dict)
    return {key: value.to_bytes() for key, value in written.items()}, f"{name} at {place}"


def _zarr_group(parts: dict[str, bytes]) -> Any:
    import zarr
    from zarr.core.buffer import default_buffer_prototype

    make = default_buffer_prototype().buffer.from_bytes
    return zarr.open_group(zarr.storage.MemoryStore({k: make(v) for k, v in parts.items()}), mode="r+")


def _true_samples(parts: dict[str, bytes], record: Json) -> None:
    """Make the record say what the shard's values are."""
    group = _zarr_group(parts)
    table = record["samples"]
    fields = group.attrs["fields"]
    with contextlib.suppress(IndexError, ValueError, OverflowError, TypeError):
        for place, row in enumerate(table["row"]):
            values = zarr_sample(group, fields, row)
            table["digest"][place] = sample_digest(values)
            table["sample_id"][place] = int(group["sample_id"][row])
            table["num_tokens"][place] = int(group["num_tokens"][row])
            table["num_target_positions"][place] = int(group["num_target_positions"][row])
            table["num_supervised"][place] = int(np.frombuffer(values[2], np.uint8).sum())


def zarr_sample(group: Any, fields: list[Json], row: int) -> list[bytes]:
    """A sample's values in column order, read by zarr-python."""
    tokens, positions = int(group["num_tokens"][row]), int(group["num_target_positions"][row])
    values = [group["sample_id"][row].astype("<i8").tobytes()]
    for name, count in (
        ("input_ids", tokens),
        ("loss_mask", tokens),
        ("target_argmax", positions),
        ("target_log_normalizer", positions),
    ):
        values.append(group[name][row, :count].tobytes())
    suffixes = {
        "raw": [""],
        "planes": [".exponent", ".mantissa"],
        "fp8": [".fp8", ".scale"],
        "topk": [".probs", ".ids", ".tail"],
    }
    for item in fields:
        count = tokens if item["rows"] == "tokens" else positions
        values += [group[item["name"] + suffix][row, :count].tobytes() for suffix in suffixes[item["encoding"]]]
    return values


def spoil_tokens(cache: Forged, rng: random.Random) -> tuple[str, str | None]:
    """Change the token table, its digests in `tokens.json` and in the manifest true."""
    kind = rng.choice(["table", "meta", "meta", "quarantine"])
    name = {"table": "tokens/tokens.arrow", "meta": "tokens/tokens.json", "quarantine": "tokens/quarantine.jsonl"}[kind]
    meta = json.loads(cache.files["tokens/tokens.json"])
    raw = None
    if kind == "quarantine":
        row = {"file": "chat.jsonl", "row": 1, "reason": "empty", "detail": "x"}
        what, raw = spoil(row, rng)
        cache.files[name] = (json.dumps(row).replace(json.dumps(_MARK), raw or "") + "\n").encode() * rng.choice(
            [1, 3, 2000]
        )
        raw = None
    elif kind == "table":
        cache.files[name], what = damage_bytes(cache.files[name], rng)
    else:
        what, raw = spoil(meta, rng)
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        for base, said in meta["files"].items():
            content = cache.files[f"tokens/{base}"]
            said.update(num_bytes=len(content), digest=xxhash.xxh3_128_hexdigest(content))
    cache.files["tokens/tokens.json"] = json.dumps(meta).replace(json.dumps(_MARK), raw or "").encode()
    return f"{name}: {what}", None


def spoil_config(cache: Forged, rng: random.Random) -> tuple[str, str | None]:
    """Change settings, in the manifest and in `config.json` alike, or a status."""
    if rng.random() < 0.3:
        status = {"state": "done", "exit_code": 0, "why": None}
        what, raw = spoil(status, rng)
        name = rng.choice(["status.json", "status-0001.json"])
        cache.files[name] = json.dumps(status).replace(json.dumps(_MARK), raw or "").encode()
        return f"{name}: {what}", None
    inputs = cache.manifest["environment"]["inputs"]
    settings = json.loads(cache.files["config.json"])
    both = rng.random() < 0.6
    chosen = inputs if both else settings
    what, raw = spoil(chosen, rng)
    if both:
        settings = {**inputs, "output_dir": settings["output_dir"]}
        if rng.random() < 0.3:
            settings["output_dir"] = rng.choice(
                ["\0", "/" * 5000, "a" * 5000, "\x1b[2J", 7, None, "../..", "\ud800", [1], "a\nb"]
            )
            what += f", output_dir {str(settings['output_dir'])[:20]!r}"
    with contextlib.suppress(ValueError, RecursionError):
        text = json.dumps(settings, indent=2).replace(json.dumps(_MARK), raw or "") + "\n"
        cache.files["config.json"] = text.encode()
        if raw is not None and both:
            cache.files["config.json"] = (json.dumps(json.loads(text), indent=2) + "\n").encode()
    return f"settings{what}", raw if both else None


def spoil_index(cache: Forged, rng: random.Random, files: dict[str, bytes]) -> str:
    """Write an index that says something else than the records, its own name true."""
    records = list(copy.deepcopy(cache.records).values())
    name, content = index_file(records, records[0]["identity_digest"])
    kind = rng.choice(["bytes", "shards", "shards", "shards", "column", "column", "column", "schema", "nulls"])
    reader = pa.ipc.open_file(content)
    batch = reader.get_batch(0)
    what = kind
    if kind == "shards":
        shards = json.loads(batch.schema.metadata[b"shards"])
        said, raw = spoil(shards, rng)
        text = json.dumps(shards).replace(json.dumps(_MARK), raw or "")
        batch = batch.replace_schema_metadata({**batch.schema.metadata, b"shards": text.encode(errors="replace")})
        what = f"shards{said}"
    elif kind == "column":
        place = rng.randrange(batch.num_columns)
        values = batch.column(place).to_numpy(zero_copy_only=False).copy()
        limits = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
        values[rng.randrange(len(values))] = rng.choice(
            [limits.min, limits.max, 0, 1, 2, 3] if limits else [np.nan, np.inf, -1.0, 1e38]
        )
        what = f"{batch.schema.names[place]} = {values.tolist()}"
        batch = batch.set_column(place, batch.schema.field(place), pa.array(values))
    elif kind == "schema":
        place = rng.randrange(batch.num_columns)
        other = rng.choice([pa.int64(), pa.float32(), pa.string(), pa.null(), pa.list_(pa.int32())])
        batch = batch.set_column(place, batch.schema.names[place], pa.nulls(batch.num_rows, other))
        what = f"{batch.schema.names[place]} as {other}"
    elif kind == "nulls":
        place = rng.randrange(batch.num_columns)
        batch = batch.set_column(
            place, batch.schema.field(place), pa.nulls(batch.num_rows, batch.schema.field(place).type)
        )
    name, content = _index_of(batch)
    if kind == "bytes":
        content, said = damage_bytes(content, rng)
        name = f"index-{xxhash.xxh3_128_hexdigest(content)}.arrow"
        what = said
    files[name] = content
    return f"index: {what}"


def forgery(tree: dict[str, bytes], rng: random.Random) -> Mutation:
    """Draw one change of a cache."""
    cache = Forged.of(tree)
    shard = spoil_zarr if cache.format == "zarr" else spoil_arrow
    ways: list[tuple[Callable[[Forged, random.Random], tuple[str, str | None]] | None, int]] = [
        (spoil_manifest, 30),
        (spoil_record, 20),
        (shard, 25),
        (spoil_companion, 12),
        (spoil_tokens, 6),
        (spoil_config, 5),
        (None, 8),
    ]
    (way,) = rng.choices([way for way, _ in ways], [weight for _, weight in ways])
    if rng.random() < 0.15:
        file = rng.choice([name for name, content in tree.items() if content])
        changed, what = damage_bytes(tree[file], rng)
        return Mutation(file, changed, f"{file}: {what}")
    if way is None:
        files = {name: content for name, content in tree.items() if not name.startswith("index-")}
        what = spoil_index(cache, rng, files)
    else:
        what, raw = way(cache, rng)
        files = cache.settle(rng, raw, seal=rng.random() < 0.9)
    changes: dict[str, bytes | Odd | None] = {name: None for name in tree if name not in files}
    changes |= {name: content for name, content in files.items() if tree.get(name) != content}
    return Mutation.of(changes, what)

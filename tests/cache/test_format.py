"""The bytes of a cache, read by a stranger who has pyarrow, numpy, xxhash and the prose, and none of our code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import zarr
from safetensors.numpy import load_file

import eagle_offline
from eagle_offline import open_cache
from tests import builders
from tests.cache import forgeries

STRANGER = """
import json, sys
import numpy as np
import pyarrow as pa

record = json.load(open(sys.argv[1] + "/commit-000000.json"))
table = pa.ipc.open_file(pa.memory_map(sys.argv[1] + "/" + record["file"])).read_all()
fields = json.loads(table.schema.metadata[b"fields"])
sums = []
for row in table.to_pylist():
    for field in fields:
        rows = len(row["input_ids"]) if field["rows"] == "tokens" else len(row["target_argmax"])
        size = rows * field["width"]
        exponent = np.frombuffer(pa.decompress(row[field["name"] + ".exponent"], size, codec="zstd"), np.uint8)
        mantissa = np.frombuffer(row[field["name"] + ".mantissa"], np.uint8)
        rotated = exponent.astype(np.uint32) << 8 | mantissa
        words = (rotated >> 1 | rotated << 15) & 0xFFFF
        values = (words << 16).view(np.float32)
        sums.append([row["sample_id"], field["name"], rows, float(values.astype(np.float64).sum())])
assert "eagle_offline" not in sys.modules and "torch" not in sys.modules
print(json.dumps(sums))
"""


def tables(cache: Path) -> list[tuple[dict[str, Any], pa.Table]]:
    records = [json.loads(path.read_bytes()) for path in sorted(cache.glob("commit-*.json"))]
    return [(record, pa.ipc.open_file(cache / record["file"]).read_all()) for record in records]


def test_a_stranger_reads_a_shard_with_pyarrow_alone(whole: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(whole)], capture_output=True, text=True, check=True, cwd="/"
    )
    read = {(sample_id, name): (rows, total) for sample_id, name, rows, total in json.loads(done.stdout)}
    cache = open_cache(whole)
    for index in range(int((cache.shards == 0).sum())):
        sample = cache[index]
        for place, layer in enumerate(builders.DEFAULT_AUX_LAYER_IDS):
            width = builders.HIDDEN_SIZE
            values = sample.aux_hidden_states[:, place * width : (place + 1) * width]
            rows, total = read[sample.sample_id, f"aux_{layer}"]
            assert (rows, total) == (len(values), pytest.approx(float(values.double().sum()), rel=1e-9, abs=1e-9))
        last = sample.supervision.last_hidden_state
        assert read[sample.sample_id, "last_hidden_state"] == (
            len(last),
            pytest.approx(float(last.double().sum()), rel=1e-9, abs=1e-9),
        )
    assert len(read) == 4 * int((cache.shards == 0).sum())


def test_shards_are_named_and_recorded_by_the_digest_of_their_bytes(whole: Path) -> None:
    for number, (record, table) in enumerate(tables(whole)):
        content = (whole / record["file"]).read_bytes()
        digest = xxhash.xxh3_128_hexdigest(content)
        assert record["file"] == f"shard-{number:06d}-{digest}.arrow"
        assert (record["digest"], record["file_bytes"], record["shard"]) == (digest, len(content), number)
        assert table.schema.metadata[b"shard"] == str(number).encode()
        assert table.schema.metadata[b"identity_digest"] == record["identity_digest"].encode()
        assert table.column("sample_id").to_pylist() == record["samples"]["sample_id"]


def test_the_identity_digest_is_that_of_the_identity_as_canonical_json(whole: Path) -> None:
    identity = json.loads((whole / "manifest.json").read_bytes())["identity"]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    assert {record["identity_digest"] for record, _ in tables(whole)} == {digest}


def test_records_say_of_every_sample_what_the_shard_holds(whole: Path) -> None:
    for record, table in tables(whole):
        samples = record["samples"]
        for row, content in enumerate(table.to_pylist()):
            mask = content["loss_mask"]
            assert samples["num_tokens"][row] == len(content["input_ids"]) == len(mask)
            assert samples["num_supervised"][row] == sum(mask)
            following = [*mask[1:], 0]
            assert samples["num_target_positions"][row] == sum(a or b for a, b in zip(mask, following, strict=True))
            digest = xxhash.xxh3_64()
            parts = [
                int(content["sample_id"]).to_bytes(8, "little"),
                np.array(content["input_ids"], "<i4").tobytes(),
                np.array(mask, "u1").tobytes(),
                np.array(content["target_argmax"], "<i4").tobytes(),
                np.array(content["target_log_normalizer"], "<f4").tobytes(),
                *(content[name] for name in table.schema.names[5:]),
            ]
            for part in parts:
                digest.update(len(part).to_bytes(8, "little") + part)
            assert samples["digest"][row] == digest.hexdigest()


def test_no_padding_is_stored(whole: Path) -> None:
    for _, table in tables(whole):
        lengths = {len(ids) for ids in table.column("input_ids").to_pylist()}
        assert len(lengths) > 1 or table.num_rows == 1
        for row in table.to_pylist():
            assert len(row["aux_1.mantissa"]) == len(row["input_ids"]) * builders.HIDDEN_SIZE


def test_a_shard_streams_its_samples_in_batches_of_about_a_megabyte(tmp_path: Path) -> None:
    target = builders.shared_target("Llama", changes=(("hidden_size", 256),))
    cache = builders.make_cache(
        tmp_path / "cache", target, builders.shared_chat(16), state_encoding="raw", dtype="fp32", shard_size=16
    )
    record = json.loads((cache / "commit-000000.json").read_bytes())
    reader = pa.ipc.open_file(cache / record["file"])
    sizes = [reader.get_batch(index).nbytes for index in range(reader.num_record_batches)]
    assert len(sizes) > 2
    assert max(sizes) < 2 << 20
    assert sorted(set(record["samples"]["record_batch"])) == list(range(len(sizes)))
    assert len(open_cache(cache)[15].input_ids)


def test_head_vocabulary_and_embeddings_are_plain_safetensors(whole: Path) -> None:
    assert load_file(whole / "vocab" / next((whole / "vocab").iterdir()).name)["selected_token_ids"].shape == (64,)
    assert load_file(whole / "embeddings.safetensors")["weight"].shape == (builders.VOCAB_SIZE, builders.HIDDEN_SIZE)
    manifest = json.loads((whole / "manifest.json").read_bytes())
    for name, said in manifest["files"].items():
        content = (whole / name).read_bytes()
        assert (len(content), xxhash.xxh3_128_hexdigest(content)) == (said["num_bytes"], said["digest"])


def test_files_beside_the_shards_come_out_the_same_every_time(whole: Path, tmp_path: Path) -> None:
    for attempt in range(3):
        again = builders.make_cache(tmp_path / f"again-{attempt}")
        for name in json.loads((whole / "manifest.json").read_bytes())["files"]:
            assert (again / name).read_bytes() == (whole / name).read_bytes(), name


def test_nothing_in_a_cache_can_run_code_when_it_is_read(whole: Path) -> None:
    for path in whole.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".arrow", ".safetensors", ".jinja"), path
            assert not path.read_bytes().startswith(b"\x80"), "a pickle"


def test_negative_and_too_large_sample_numbers_are_index_errors(whole: Path) -> None:
    cache = open_cache(whole)
    for index in (-1, len(cache), 10**9):
        with pytest.raises(IndexError):
            cache[index]


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def samples_of(cache: Path, record: dict[str, Any]) -> list[list[bytes]]:
    """Every sample's values in column order, in the order of the record, as any library reads them."""
    names = ("sample_id", "input_ids", "loss_mask", "target_argmax", "target_log_normalizer")
    dtypes = ("<i8", "<i4", "u1", "<i4", "<f4")
    table = record["samples"]
    if record["file"].endswith(".zarr"):
        group = zarr.open_group(cache / record["file"], mode="r")
        return [forgeries.zarr_sample(group, group.attrs["fields"], row) for row in table["row"]]
    reader = pa.ipc.open_file(cache / record["file"])
    found = []
    for batch, row in zip(table["record_batch"], table["row"], strict=True):
        values = reader.get_batch(batch).slice(row, 1).to_pylist()[0]
        plain = [np.atleast_1d(np.array(values[n], d)).tobytes() for n, d in zip(names, dtypes, strict=True)]
        found.append([*plain, *(values[name] for name in reader.schema.names[len(names) :])])
    return found


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"mantissa_bits": 3, "target_encoding": "topk", "top_k": 5},
        {"state_encoding": "fp8", "target_encoding": "dense"},
        {"format": "zarr"},
        {"format": "zarr", "compressor": "blosc", "state_encoding": "fp8", "target_encoding": "topk", "top_k": 5},
        {"format": "zarr", "state_encoding": "raw", "dtype": "fp32"},
    ],
    ids=str,
)
def test_every_digest_is_what_the_prose_says(tmp_path: Path, flags: dict[str, Any]) -> None:
    cache = builders.make_cache(tmp_path / "cache", data=builders.shared_chat(6), **flags)
    manifest = json.loads((cache / "manifest.json").read_bytes())
    identity_digest = xxhash.xxh3_128_hexdigest(canonical(manifest["identity"]))
    seal = manifest.pop("self_digest")
    assert seal == xxhash.xxh3_128_hexdigest(canonical(manifest))
    records = []
    for path in sorted(cache.glob("commit-*.json")):
        record = json.loads(path.read_bytes())
        seal = record.pop("self_digest")
        assert seal == xxhash.xxh3_128_hexdigest(canonical(record))
        assert record["identity_digest"] == identity_digest
        shard = cache / record["file"]
        if shard.is_dir():
            digest, size = xxhash.xxh3_128(), 0
            below = {p.relative_to(shard).as_posix(): p for p in shard.rglob("*") if p.is_file()}
            for name in sorted(below):
                content = below[name].read_bytes()
                digest.update(name.encode())
                digest.update(len(content).to_bytes(8, "little"))
                digest.update(content)
                size += len(content)
        else:
            digest, size = xxhash.xxh3_128(shard.read_bytes()), shard.stat().st_size
        assert (record["digest"], record["file_bytes"]) == (digest.hexdigest(), size)
        assert record["file"] == f"shard-{record['shard']:06d}-{record['digest']}{shard.suffix}"
        for place, values in enumerate(samples_of(cache, record)):
            digest = xxhash.xxh3_64()
            for value in values:
                digest.update(len(value).to_bytes(8, "little") + value)
            assert record["samples"]["digest"][place] == digest.hexdigest()
        records.append(record)
    for name, said in manifest["files"].items():
        content = (cache / name).read_bytes()
        assert said == {"num_bytes": len(content), "digest": xxhash.xxh3_128_hexdigest(content)}
    ids = load_file(next((cache / "vocab").iterdir()))["selected_token_ids"]
    vocabulary = manifest["defaults"]["draft_vocabulary"]["digest"]
    assert xxhash.xxh3_128_hexdigest(ids.astype("<i8").tobytes()) == vocabulary
    assert (cache / "vocab" / f"{vocabulary}.safetensors").is_file()
    rows = xxhash.xxh3_128()
    for row in pa.ipc.open_file(cache / "tokens/tokens.arrow").read_all().to_pylist():
        rows.update(np.array(len(row["input_ids"]), "<i8").tobytes() + np.array(row["input_ids"], "<i4").tobytes())
        rows.update(bytes(row["loss_mask"]))
    tokens = json.loads((cache / "tokens/tokens.json").read_bytes())
    assert manifest["identity"]["dataset"]["rows_digest"] == tokens["rows_digest"] == rows.hexdigest()
    (index,) = cache.glob("index-*.arrow")
    assert index.name == f"index-{xxhash.xxh3_128_hexdigest(index.read_bytes())}.arrow"
    table = pa.ipc.open_file(index).read_all()
    assert table.schema.metadata[b"identity_digest"] == identity_digest.encode()
    written = [
        {**entry, "samples": record["samples"]}
        for entry, record in zip(json.loads(table.schema.metadata[b"shards"]), records, strict=True)
    ]
    for entry, record in zip(written, records, strict=True):
        assert entry.pop("num_samples") == len(record["samples"]["sample_id"])
        assert entry == {name: record[name] for name in entry}
    name, content = forgeries.index_file(records, identity_digest)
    ours = pa.ipc.open_file(content).read_all()
    assert {n: str(t) for n, t in zip(table.schema.names, table.schema.types, strict=True)} == {
        n: str(t) for n, t in zip(ours.schema.names, ours.schema.types, strict=True)
    }
    assert table.to_pydict() == ours.to_pydict()


CHUNK, OBJECT = 512 << 10, 64 << 20


def grid(num_samples: int, num_tokens: int, row_bytes: int, *, is_flat: bool) -> tuple[int, int, int]:
    """Rows a chunk, rows and samples an object, from the prose."""
    rows = num_samples if is_flat else num_tokens
    block = 1
    while 2 * block * row_bytes <= CHUNK:
        block *= 2
    block = min(block, rows)
    blocks = min(-(-rows // block), max(1, OBJECT // (block * row_bytes)))
    samples = 1
    if not is_flat and block * blocks >= rows:
        samples = max(1, min(num_samples, min(OBJECT // (block * row_bytes), 8192) // blocks))
    return block, block * blocks, samples


@pytest.mark.parametrize(
    "sizes", [(2, 96, 8), (256, 2048, 4096), (256, 8192, 16384), (1, 1, 1), (5, 100_000, 7168), (3, 4096, 1 << 24)]
)
def test_zarr_arrays_are_cut_as_the_prose_says(sizes: tuple[int, int, int]) -> None:
    from eagle_offline.cache.zarr_shards import ArrayLayout

    num_samples, num_tokens, width = sizes
    for dtype in ("uint8", "uint16", "float32"):
        for shape in ((num_samples,), (num_samples, num_tokens), (num_samples, num_tokens, width)):
            row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape[2:], dtype=np.int64))
            is_flat = len(shape) == 1
            block, rows, samples = grid(num_samples, num_tokens, row_bytes, is_flat=is_flat)
            document = ArrayLayout("a", dtype, shape, "zstd").document()
            outer = [rows] if is_flat else [samples, rows, *shape[2:]]
            inner = [block] if is_flat else [1, block, *shape[2:]]
            assert list(document["chunk_grid"]["configuration"]["chunk_shape"]) == outer
            sharding = document["codecs"][0]["configuration"]
            assert list(sharding["chunk_shape"]) == inner
            assert [codec["name"] for codec in sharding["codecs"]] == ["bytes", "zstd", "crc32c"]


def test_chunks_without_rows_are_absent_and_rows_beyond_a_sample_are_zero(tmp_path: Path) -> None:
    cache = builders.make_cache(tmp_path / "cache", format="zarr", shard_size=16)
    record = json.loads((cache / "commit-000000.json").read_bytes())
    group = zarr.open_group(cache / record["file"], mode="r")
    samples = record["samples"]
    stored = len(samples["sample_id"])
    assert group["num_tokens"].shape == (10,)
    for name, array in group.arrays():
        if array.ndim == 1:
            continue
        by_row = samples[
            "num_tokens" if (array.ndim == 2 and name[:6] != "target") or name[:3] == "aux" else "num_target_positions"
        ]
        for row, count in zip(samples["row"], by_row, strict=True):
            assert not array[row, count:].any(), name
        (content,) = [path.read_bytes() for path in (cache / record["file"] / name).glob("c.*")]
        index = np.frombuffer(content[-4 - 16 * 10 : -4], "<u8").reshape(10, 2)
        assert [bool((entry != (1 << 64) - 1).all()) for entry in index] == [True] * stored + [False] * (10 - stored)


CODE = Path(eagle_offline.__file__).parent
LOADERS = {"load", "unpickle", "loads", "Unpickler", "read_pickle", "load_from_disk"}


def unpickling(tree: ast.AST) -> list[str]:
    """What in a module unpickles, or may."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(node.arg)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            owner = ast.unparse(node.func.value)
            if owner not in ("json", "yaml"):
                found.append(f"{owner}.{node.func.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "__import__", "marshal.loads"):
            found.append(ast.unparse(node.func))
    return found


UNPICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pickletools")


# What goes through pipes between a process and those that it started; and Arrow files, which `datasets` keeps as such.
HARMLESS = {
    "tokenize_pool.py": {"pickle", "pickle.load"},
    "tokenize_worker.py": {"pickle", "pickle.load", "pickle.loads"},
    "loss_masks.py": {"datasets.load_from_disk"},
}


def test_no_module_unpickles_what_somebody_else_wrote() -> None:
    modules = sorted(CODE.rglob("*.py"))
    assert len(modules) > 100
    found = {module.name: set(said) for module in modules if (said := unpickling(ast.parse(module.read_text())))}
    assert found == HARMLESS


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "f(x, allow_pickle=a)",
        "eval(x)",
        "import _pickle as p",
        "pickle.Unpickler(x)",
        "torch.load(x, weights_only=True)",
    ],
)
def test_what_unpickles_is_recognized(code: str) -> None:
    assert unpickling(ast.parse(code))


GUARD = """
import sys
banned = {"pickle.find_class"}
def audit(event, arguments):
    if event in banned:
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(audit)
import torch, numpy as np
def refuse(*_, **__):
    raise SystemExit("something is loaded")
torch.load = np.load = refuse
from eagle_offline.cli import main
from eagle_offline import open_cache
cache = open_cache(sys.argv[1])
for index in range(len(cache)):
    cache.target_probs(cache[index])
cache.embeddings
for command in ("inspect-manifest", "verify"):
    try:
        main([command, sys.argv[1]])
    except SystemExit as stop:
        assert not stop.code, stop.code
print("done")
"""


@pytest.mark.parametrize("flags", [{}, {"format": "zarr"}], ids=["arrow", "zarr"])
def test_nothing_is_unpickled_while_a_cache_is_read(tmp_path: Path, flags: dict[str, Any]) -> None:
    cache = builders.make_cache(tmp_path / "cache", **flags)
    done = subprocess.run([sys.executable, "-c", GUARD, str(cache)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")

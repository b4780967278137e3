"""The bytes of a cache, read by a stranger who has pyarrow, numpy, xxhash and the prose, and none of our code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from safetensors.numpy import load_file

from eagle_offline import open_cache
from tests import builders

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
            len(last), pytest.approx(float(last.double().sum()), rel=1e-9, abs=1e-9),
        )  # fmt: skip
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

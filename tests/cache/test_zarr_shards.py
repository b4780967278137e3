"""Shards as Zarr groups: zarr-python reads what was written, and nothing that a stranger did to one gets past."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xxhash
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc, zstd

from eagle_offline.cache import codec, zarr_shards
from eagle_offline.cache.layout import FieldLayout, SampleTable
from eagle_offline.cache.manifest import (
    BatchPlan,
    CaptureIdentity,
    DatasetIdentity,
    Identity,
    TargetIdentity,
    TextIdentity,
)
from eagle_offline.cache.samples import StoredSample, decode_fields
from eagle_offline.cache.zarr_shards import ArrayLayout, ZarrLayout, ZarrShardReader, ZarrShardWriter, digest_tree
from eagle_offline.cache.zarr_shards import zarr_layout as layout_of
from eagle_offline.errors import DataError
from tests.cache.mutations import Mutation, damage_bytes, survey

SEQ_LENGTH = 37
COMPRESSORS = ("zstd", "blosc")

# Written from the format's definition: each column's dtype and values a row.
FIELDS: list[tuple[FieldLayout, list[tuple[str, str, int]]]] = [
    (
        FieldLayout(name="raw_bf16", width=24, dtype="bf16", encoding="raw", rows="tokens"),
        [("raw_bf16", "uint16", 24)],
    ),
    (
        FieldLayout(name="raw_fp16", width=24, dtype="fp16", encoding="raw", rows="tokens"),
        [("raw_fp16", "float16", 24)],
    ),
    (
        FieldLayout(name="raw_fp32", width=5, dtype="fp32", encoding="raw", rows="supervised_positions"),
        [("raw_fp32", "float32", 5)],
    ),
    (
        FieldLayout(name="exact", width=24, dtype="bf16", encoding="planes", rows="tokens"),
        [("exact.exponent", "uint8", 24), ("exact.mantissa", "uint8", 24)],
    ),
    (
        FieldLayout(name="rounded", width=24, dtype="bf16", encoding="planes", rows="tokens", mantissa_bits=4),
        [("rounded.exponent", "uint8", 24), ("rounded.mantissa", "uint8", 15)],
    ),
    (
        FieldLayout(name="eight", width=24, dtype="bf16", encoding="fp8", rows="supervised_positions"),
        [("eight.fp8", "uint8", 24), ("eight.scale", "float32", 1)],
    ),
    (
        FieldLayout(name="narrow", width=100, dtype="bf16", encoding="topk", top_k=5, rows="supervised_positions"),
        [("narrow.probs", "uint16", 5), ("narrow.ids", "uint16", 5), ("narrow.tail", "float32", 1)],
    ),
    (
        FieldLayout(name="wide", width=70000, dtype="fp32", encoding="topk", top_k=3, rows="supervised_positions"),
        [("wide.probs", "float32", 3), ("wide.ids", "int32", 3), ("wide.tail", "float32", 1)],
    ),
]
ALL_FIELDS = [field for field, _ in FIELDS]

# Sample: tokens, supervised positions; one token, all tokens, none supervised, ends of blocks.
RAGGED = [(1, 0), (SEQ_LENGTH, SEQ_LENGTH), (5, 0), (16, 4), (17, 16), (36, 1), (1, 1)]


def identity(
    fields: Sequence[FieldLayout], compressor: str = "zstd", num_samples: int = 9, seq_length: int = SEQ_LENGTH
) -> Identity:
    return Identity(
        target=TargetIdentity(
            id="t", revision=None, checkpoint_digest="0", adapter=None, architecture="L", num_layers=2, hidden_size=8,
            vocab_size=9,
        ),
        text=TextIdentity(tokenizer_digest="0", template_digest="0", seq_length=seq_length),
        dataset=DatasetIdentity(sources=[], shuffle_seed=None, num_samples=num_samples, rows_digest="0"),
        capture=CaptureIdentity.model_validate(
            {
                "aux_layer_ids": [0], "dtype": "bf16", "compute_dtype": "bf16", "state_encoding": "raw",
                "target_encoding": "factored", "target_statistics": "full", "draft_vocab_digest": None,
                "shard_size": num_samples, "format": "zarr", "compressor": compressor, "fields": list(fields),
            }
        ),
        batch_plan=BatchPlan(
            batch_size=1, max_batch_tokens=None, order="length", attention_implementation="eager",
            experts_implementation=None, tensor_parallel_size=1, device_kind="cpu",
        ),
    )  # fmt: skip


def make_sample(
    fields: Sequence[FieldLayout], sample_id: int, num_tokens: int, num_positions: int
) -> tuple[StoredSample, dict[str, np.ndarray]]:
    """Draw a sample; return it as it is stored, and its values by column."""
    rng = np.random.default_rng(sample_id)
    values: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 1 << 17, num_tokens, np.int32),
        "loss_mask": rng.integers(0, 2, num_tokens, np.uint8),
        "target_argmax": rng.integers(0, 1 << 17, num_positions, np.int32),
        "target_log_normalizer": rng.normal(size=num_positions).astype(np.float32),
    }
    values["loss_mask"][0:1] = 1
    columns = []
    for field, described in FIELDS:
        if field not in fields:
            continue
        for name, dtype, width in described:
            shape = (num_tokens if field.rows == "tokens" else num_positions, width)
            values[name] = rng.integers(0, 256, (shape[0], width * np.dtype(dtype).itemsize), np.uint8)
            if dtype.startswith("float"):
                values[name] = rng.normal(size=shape).astype(dtype)
            values[name] = values[name].view(dtype)
            columns.append(values[name].tobytes())
    return StoredSample(sample_id, *list(values.values())[:4], columns=columns, framed=False), values


def make_samples(fields: Sequence[FieldLayout] = ALL_FIELDS) -> list[tuple[StoredSample, dict[str, np.ndarray]]]:
    return [make_sample(fields, 100 + i, *lengths) for i, lengths in enumerate(RAGGED)]


def write(path: Path, layout: ZarrLayout, samples: Sequence[StoredSample]) -> tuple[SampleTable, str, int]:
    writer = ZarrShardWriter(path, layout, 0, "d" * 32)
    for sample in samples:
        writer.append(sample)
    return writer.close()


def reader(path: Path, layout: ZarrLayout) -> ZarrShardReader:
    return ZarrShardReader(path, layout, 0, "d" * 32)


def check_same(found: StoredSample, expected: StoredSample) -> None:
    assert found.sample_id == expected.sample_id
    for name in ("input_ids", "loss_mask", "target_argmax", "target_log_normalizer"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes()
    assert [bytes(column) for column in found.columns] == [bytes(column) for column in expected.columns]
    assert not found.framed
    assert found.digest() == expected.digest()


def files_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(params=["one object a column", "many objects", "objects of a part of a sample"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chunks and objects so small that a few samples fill many, or as they are."""
    chunk, whole = {"one object a column": (512 << 10, 64 << 20), "many objects": (200, 6000)}.get(
        request.param, (100, 400)
    )
    monkeypatch.setattr(zarr_shards, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(zarr_shards, "OBJECT_BYTES", whole)
    return request.param


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_encoding_comes_back_byte_for_byte(tmp_path: Path, sizes: str, compressor: str) -> None:
    layout, made = layout_of(identity(ALL_FIELDS, compressor), 0), make_samples()
    table, _, num_bytes = write(tmp_path / "s", layout, [sample for sample, _ in made])
    assert table.sample_id == [sample.sample_id for sample, _ in made]
    assert (table.num_tokens, table.num_target_positions) == tuple(map(list, zip(*RAGGED, strict=True)))
    assert table.num_supervised == [int(sample.loss_mask.sum()) for sample, _ in made]
    assert (table.record_batch, table.row) == ([0] * len(made), list(range(len(made))))
    assert table.digest == [sample.digest() for sample, _ in made]
    assert num_bytes == sum(map(len, files_of(tmp_path / "s").values()))
    shard = reader(tmp_path / "s", layout)
    for row, (sample, _) in enumerate(made):
        check_same(shard.read(0, row), sample)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_zarr_python_reads_the_same_values(tmp_path: Path, sizes: str, compressor: str) -> None:
    layout, made = layout_of(identity(ALL_FIELDS, compressor), 0), make_samples()
    write(tmp_path / "s", layout, [sample for sample, _ in made])
    group = zarr.open_group(tmp_path / "s", mode="r")
    lost = layout.num_samples - len(made)
    assert group["sample_id"][:].tolist() == [sample.sample_id for sample, _ in made] + [0] * lost
    assert group["num_tokens"][:].tolist() == [t for t, _ in RAGGED] + [0] * lost
    assert group["num_target_positions"][:].tolist() == [p for _, p in RAGGED] + [0] * lost
    described = {name: (dtype, width) for _, columns in FIELDS for name, dtype, width in columns}
    for name in made[0][1]:
        array = group[name]
        if name in described:
            assert (str(array.dtype), array.shape[2]) == described[name]
        everything = array[:]
        for row, (_, values) in enumerate(made):
            count = len(values[name])
            assert everything[row, :count].tobytes() == values[name].tobytes(), (name, row)
            assert not everything[row, count:].any()
        assert not everything[len(made) :].any()


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_what_zarr_python_writes_is_read_here(tmp_path: Path, sizes: str, compressor: str) -> None:
    layout, made = layout_of(identity(ALL_FIELDS, compressor), 0), make_samples()
    path = tmp_path / "s"
    for name, content in layout.documents(0, "d" * 32).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    group = zarr.open_group(path, mode="r+")
    numbers = {
        "sample_id": [sample.sample_id for sample, _ in made],
        "num_tokens": [t for t, _ in RAGGED],
        "num_target_positions": [p for _, p in RAGGED],
    }
    for name, listed in numbers.items():
        group[name][: len(made)] = listed
    for name in made[0][1]:
        padded = np.zeros(group[name].shape, group[name].dtype)
        for row, (_, values) in enumerate(made):
            padded[row, : len(values[name])] = values[name]
        group[name][:] = padded
    assert files_of(path).items() >= layout.documents(0, "d" * 32).items()
    shard = reader(path, layout)
    for row, (sample, _) in enumerate(made):
        check_same(shard.read(0, row), sample)


def test_metadata_says_whose_it_is(tmp_path: Path) -> None:
    layout = layout_of(identity(ALL_FIELDS), 0)
    write(tmp_path / "s", layout, [])
    attributes = zarr.open_group(tmp_path / "s", mode="r").attrs
    assert (attributes["format"], attributes["version"], attributes["shard"]) == ("eagle-offline-cache", 3, 0)
    assert attributes["identity_digest"] == "d" * 32
    assert [FieldLayout.model_validate(field) for field in attributes["fields"]] == ALL_FIELDS  # type: ignore[union-attr]


def test_no_member_but_the_columns(tmp_path: Path) -> None:
    layout = layout_of(identity(ALL_FIELDS), 0)
    write(tmp_path / "s", layout, [])
    members = dict(zarr.open_group(tmp_path / "s", mode="r").members())
    expected = {"sample_id", "num_tokens", "num_target_positions", "input_ids", "loss_mask", "target_argmax"}
    expected |= {"target_log_normalizer"} | {name for _, columns in FIELDS for name, _, _ in columns}
    assert set(members) == expected


def test_decoded_values_are_those_that_were_encoded(tmp_path: Path) -> None:
    import torch

    fields = [
        FieldLayout(name=f"f_{n}", width=24, dtype="bf16", encoding="planes", rows="tokens", mantissa_bits=n)
        for n in range(1, 8)
    ]
    values = torch.randn(SEQ_LENGTH, 24).bfloat16()
    columns = [column for field in fields for column in codec.encode(field, values, framed=False)]
    plain, _ = make_sample([], 1, SEQ_LENGTH, 3)
    layout = layout_of(identity(fields), 0)
    write(tmp_path / "s", layout, [replace(plain, columns=columns)])
    decoded = decode_fields(fields, reader(tmp_path / "s", layout).read(0, 0))
    for field in fields:
        framed = codec.unpack(field, [memoryview(c) for c in codec.encode(field, values)], SEQ_LENGTH)
        assert torch.equal(decoded[field.name], codec.merge(field, [torch.from_numpy(p.copy()) for p in framed]))
    assert torch.equal(decoded["f_7"], values)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_the_same_samples_give_the_same_tree_from_any_thread(tmp_path: Path, sizes: str, compressor: str) -> None:
    layout, samples = layout_of(identity(ALL_FIELDS, compressor), 0), [sample for sample, _ in make_samples()]
    first = write(tmp_path / "a", layout, samples)
    second: list[Any] = []
    thread = threading.Thread(target=lambda: second.append(write(tmp_path / "b", layout, samples)))
    thread.start()
    thread.join()
    assert first == second[0]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_metadata_bytes_are_the_recorded_ones() -> None:
    """They are compared byte for byte: a change makes every shard ever written unreadable."""
    field = FieldLayout(name="aux_2", width=4096, dtype="bf16", encoding="raw", rows="tokens")
    array = layout_of(identity([field], "blosc", seq_length=2048), 0).documents(3, "ab")["aux_2/zarr.json"]
    assert array == (
        b'{"attributes":{},"chunk_grid":{"configuration":{"chunk_shape":[4,2048,4096]},"name":"regular"},'
        b'"chunk_key_encoding":{"configuration":{"separator":"."},"name":"default"},"codecs":[{"configuration":'
        b'{"chunk_shape":[1,64,4096],"codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"configuration":'
        b'{"blocksize":524288,"clevel":1,"cname":"zstd","shuffle":"shuffle","typesize":2},"name":"blosc"},'
        b'{"name":"crc32c"}],"index_codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"name":"crc32c"}],'
        b'"index_location":"end"},"name":"sharding_indexed"}],"data_type":"uint16",'
        b'"dimension_names":["sample","token","value"],"fill_value":0,"node_type":"array","shape":[9,2048,4096],'
        b'"zarr_format":3}'
    )


def test_the_digest_is_over_paths_sizes_and_contents(tmp_path: Path) -> None:
    layout = layout_of(identity(ALL_FIELDS), 0)
    _, digest, num_bytes = write(tmp_path / "s", layout, [sample for sample, _ in make_samples()])
    expected = xxhash.xxh3_128()
    for name in sorted(files_of(tmp_path / "s")):
        content = (tmp_path / "s" / name).read_bytes()
        expected.update(name.encode() + len(content).to_bytes(8, "little") + content)
    assert (digest, num_bytes) == (expected.hexdigest(), sum(map(len, files_of(tmp_path / "s").values())))


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_sample_of_zeros_is_stored_and_told_from_none(tmp_path: Path, sizes: str, compressor: str) -> None:
    layout = layout_of(identity(ALL_FIELDS, compressor), 0)
    drawn, values = make_sample(ALL_FIELDS, 0, 20, 10)
    zeros = [np.zeros_like(value) for value in list(values.values())[:4]]
    sample = StoredSample(0, *zeros, columns=[bytes(len(column)) for column in drawn.columns], framed=False)
    write(tmp_path / "s", layout, [sample])
    check_same(reader(tmp_path / "s", layout).read(0, 0), sample)
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert not any(group[name][:].any() for name in values)
    (tmp_path / "s" / "loss_mask" / "c.0.0").unlink()
    with pytest.raises(DataError):
        reader(tmp_path / "s", layout).read(0, 0)


# Sizes: of objects and of what is held in memory.


@settings(max_examples=300, deadline=None)
@given(
    num_samples=st.integers(1, 1 << 32),
    num_tokens=st.integers(1, 1 << 40),
    width=st.integers(1, 1 << 24),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
)
def test_objects_hold_whole_samples_up_to_64_mib(num_samples: int, num_tokens: int, width: int, dtype: str) -> None:
    array = ArrayLayout("a", dtype, (num_samples, num_tokens, width), "zstd")
    document = array.document()
    chunk = document["codecs"][0]["configuration"]["chunk_shape"]
    whole = document["chunk_grid"]["configuration"]["chunk_shape"]
    itemsize = np.dtype(dtype).itemsize
    assert all(big % small == 0 for big, small in zip(whole, chunk, strict=True))
    assert (chunk[0], chunk[2], whole[2]) == (1, width, width)
    assert chunk[1] == 1 or chunk[1] * width * itemsize <= 512 << 10
    assert chunk[1] & (chunk[1] - 1) == 0 or chunk[1] == num_tokens
    assert int(np.prod(whole, dtype=object)) * itemsize <= 64 << 20
    assert whole[0] == 1 or whole[1] >= num_tokens
    assert array.num_slots == whole[0] * whole[1] // chunk[1] <= 8192
    last = next(array.pieces(num_samples - 1, num_tokens - 1, 1))
    assert last.slot < array.num_slots
    group, part = (num_samples - 1) // whole[0], (num_tokens - 1) // whole[1]
    assert (last.file_name, last.start) == (f"c.{group}.{part}.0", (num_tokens - 1) % chunk[1])


def test_a_full_sample_of_a_large_model_is_cut_into_objects_of_whole_samples() -> None:
    field = FieldLayout(name="aux_2", width=4096, dtype="bf16", encoding="raw", rows="tokens")
    for seq_length, samples_an_object, tokens_an_object in ((2048, 4, 2048), (8192, 1, 8192), (20000, 1, 8192)):
        array = layout_of(identity([field], seq_length=seq_length), 0).arrays[-1]
        whole = array.document()["chunk_grid"]["configuration"]["chunk_shape"]
        assert whole[:2] == (samples_an_object, tokens_an_object)


def test_what_is_beyond_a_sample_is_not_stored(tmp_path: Path) -> None:
    field = FieldLayout(name="aux_2", width=512, dtype="fp32", encoding="raw", rows="tokens")
    layout = layout_of(identity([field], num_samples=4, seq_length=4096), 0)
    sample, _ = make_sample([], 1, 10, 2)
    content = np.random.default_rng(0).bytes(10 * 2048)
    write(tmp_path / "s", layout, [replace(sample, columns=[content])])
    files = files_of(tmp_path / "s")
    assert [name for name in files if name.startswith("aux_2/")] == ["aux_2/c.0.0.0", "aux_2/zarr.json"]
    assert len(files["aux_2/c.0.0.0"]) < len(content) + 4096


def test_writing_and_reading_hold_a_chunk_and_a_sample_in_memory(tmp_path: Path) -> None:
    field = FieldLayout(name="aux_2", width=1024, dtype="fp32", encoding="raw", rows="tokens")
    layout = layout_of(identity([field], num_samples=12, seq_length=1024), 0)
    sample, _ = make_sample([], 1, 1024, 0)
    content = np.random.default_rng(0).bytes(4 << 20)
    writer = ZarrShardWriter(tmp_path / "s", layout, 0, "d" * 32)
    tracemalloc.start()
    try:
        for number in range(12):
            writer.append(replace(sample, sample_id=number, columns=[content]))
        _, _, num_bytes = writer.close()
        written = tracemalloc.get_traced_memory()[1]
        shard = reader(tmp_path / "s", layout)
        tracemalloc.reset_peak()
        for number in range(12):
            shard.read(0, number)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes > 40 << 20
    assert written < 10 << 20
    assert read < 12 << 20


# Edges.


def test_an_empty_shard_reads_as_empty_everywhere(tmp_path: Path) -> None:
    layout = layout_of(identity(ALL_FIELDS), 0)
    table, digest, _ = write(tmp_path / "s", layout, [])
    assert len(table) == 0
    assert digest == digest_tree(tmp_path / "s")[0]
    assert all(name.endswith("zarr.json") for name in files_of(tmp_path / "s"))
    assert not zarr.open_group(tmp_path / "s", mode="r")["num_tokens"][:].any()
    with pytest.raises(DataError):
        reader(tmp_path / "s", layout).read(0, 0)


def test_rows_that_hold_no_sample_are_refused(tmp_path: Path) -> None:
    layout = layout_of(identity(ALL_FIELDS), 0)
    write(tmp_path / "s", layout, [sample for sample, _ in make_samples()])
    shard = reader(tmp_path / "s", layout)
    for record_batch, row in ((0, -1), (0, len(RAGGED)), (0, layout.num_samples), (1, 0), (-1, 0), (0, 1 << 40)):
        with pytest.raises(DataError, match="row"):
            shard.read(record_batch, row)


def test_the_last_shard_has_room_for_what_is_left() -> None:
    whole = identity(ALL_FIELDS, num_samples=9)
    capture = whole.capture.model_copy(update={"shard_size": 4})
    cut = whole.model_copy(update={"capture": capture})
    assert [layout_of(cut, shard).num_samples for shard in range(3)] == [4, 4, 1]
    with pytest.raises(DataError):
        layout_of(cut, 3)


def test_columns_of_one_name_are_refused() -> None:
    field = FieldLayout(name="input_ids", width=2, dtype="bf16", encoding="raw", rows="tokens")
    with pytest.raises(DataError, match="alike"):
        layout_of(identity([field]), 0)


def test_samples_that_do_not_fit_are_the_callers_defect(tmp_path: Path) -> None:
    fields = ALL_FIELDS[:1]
    layout = layout_of(identity(fields, num_samples=1), 0)
    sample, _ = make_sample(fields, 1, 5, 2)
    writer = ZarrShardWriter(tmp_path / "s", layout, 0, "d" * 32)
    for wrong in (
        replace(sample, framed=True),
        replace(sample, columns=[sample.columns[0][:-1]]),
        replace(sample, columns=[]),
        make_sample(fields, 1, SEQ_LENGTH + 1, 0)[0],
        make_sample(fields, 1, 0, 0)[0],
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            writer.append(wrong)
    writer.append(sample)
    with pytest.raises(ValueError, match="room"):
        writer.append(sample)
    writer.close()
    check_same(reader(tmp_path / "s", layout).read(0, 0), sample)


def test_a_taken_name_and_a_full_disk_are_the_systems_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, samples = layout_of(identity(ALL_FIELDS), 0), [sample for sample, _ in make_samples()]
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError):
        ZarrShardWriter(tmp_path / "taken", layout, 0, "d" * 32)
    writer = ZarrShardWriter(tmp_path / "s", layout, 0, "d" * 32)
    writer.append(samples[0])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.close()
    writer.abort()


def test_every_file_and_directory_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[str, int] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[path] = os.fstat(descriptor).st_size
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    layout = layout_of(identity(ALL_FIELDS), 0)
    write(tmp_path / "s", layout, [sample for sample, _ in make_samples()])
    everything = [tmp_path / "s", *(tmp_path / "s").rglob("*")]
    assert set(synced) == {str(path) for path in everything}
    assert all(synced[str(path)] == path.stat().st_size for path in everything if path.is_file())


def test_column_bytes_are_the_sizes_of_the_objects(tmp_path: Path) -> None:
    layout = layout_of(identity(ALL_FIELDS), 0)
    writer = ZarrShardWriter(tmp_path / "s", layout, 0, "d" * 32)
    for sample, _ in make_samples():
        writer.append(sample)
    writer.close()
    assert set(writer.column_bytes) == {array.name for array in layout.arrays}
    for name, num_bytes in writer.column_bytes.items():
        assert num_bytes == sum(path.stat().st_size for path in (tmp_path / "s" / name).glob("c.*")) > 0


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_threads_read_together(tmp_path: Path, sizes: str, compressor: str) -> None:
    layout, samples = layout_of(identity(ALL_FIELDS, compressor), 0), [sample for sample, _ in make_samples()]
    write(tmp_path / "s", layout, samples)
    shard, wrong = reader(tmp_path / "s", layout), []

    def read(seed: int) -> None:
        rows = list(range(len(samples))) * 5
        random.Random(seed).shuffle(rows)
        try:
            wrong.extend(row for row in rows if shard.read(0, row).digest() != samples[row].digest())
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [name for name in os.listdir("/proc/self/fd") if str(tmp_path) in _target(name)]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


# Damage and malice.

FEW = [ALL_FIELDS[0], ALL_FIELDS[3], ALL_FIELDS[5]]


@pytest.fixture(params=COMPRESSORS)
def whole(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ZarrLayout]:
    """A shard of a few small objects, and its layout."""
    monkeypatch.setattr(zarr_shards, "CHUNK_BYTES", 400)
    monkeypatch.setattr(zarr_shards, "OBJECT_BYTES", 4000)
    layout = layout_of(identity(FEW, request.param), 0)
    write(tmp_path / "whole", layout, [sample for sample, _ in make_samples(FEW)])
    return tmp_path / "whole", layout


def look(path: Path, layout: ZarrLayout) -> str:
    """Read everything of a shard: `refused`, `noticed` by a digest, `same`, or what went wrong."""
    samples, outcomes = [sample for sample, _ in make_samples(FEW)], {"same"}
    try:
        shard = reader(path, layout)
    except DataError as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else f"says {error}"
    for row, sample in enumerate(samples):
        try:
            outcomes.add("same" if shard.read(0, row).digest() == sample.digest() else "noticed")
        except DataError as error:
            outcomes.add("refused" if str(path) in str(error) and "\n" not in str(error) else f"says {error}")
        except BaseException as error:
            outcomes.add(f"{type(error).__name__}: {error}")
    return max(outcomes, key=lambda outcome: {"same": 0, "refused": 1, "noticed": 2}.get(outcome, 3))


def check_refused(path: Path, layout: ZarrLayout) -> None:
    assert look(path, layout) == "refused"


def with_crc(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


def entries(content: bytes, num_slots: int) -> np.ndarray:
    return np.frombuffer(content[-4 - 16 * num_slots : -4], "<u8").reshape(-1, 2).copy()


def with_chunk(content: bytes, num_slots: int, slot: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return an object with one chunk's stored content changed, every checksum and the index made true again."""
    index = entries(content, num_slots)
    offset, length = map(int, index[slot])
    chunk = with_crc(change(content[offset : offset + length - 4]))
    body = content[: -4 - 16 * num_slots]
    index[slot] = len(body), len(chunk)
    return body + chunk + with_crc(index.tobytes())


def with_entry(content: bytes, num_slots: int, slot: int, offset: int, length: int) -> bytes:
    index = entries(content, num_slots)
    index[slot] = offset, length
    return content[: -4 - 16 * num_slots] + with_crc(index.tobytes())


def objects(path: Path, layout: ZarrLayout) -> list[tuple[str, int]]:
    """Every object's path in the shard and how many slots it has."""
    slots = {array.name: array.num_slots for array in layout.arrays}
    return [(name, slots[name.split("/")[0]]) for name in files_of(path) if not name.endswith("zarr.json")]


def crafted(path: Path, layout: ZarrLayout, count: int, seed: int) -> list[Mutation]:
    """Damage whose checksums are all true."""
    rng, drawn = random.Random(seed), []
    places = objects(path, layout)
    weird = [0, 1, 3, 4, 5, 15, 16, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1]
    while len(drawn) < count:
        name, num_slots = rng.choice(places)
        content = (path / name).read_bytes()
        index = entries(content, num_slots)
        slot = rng.choice([i for i in range(num_slots) if index[i, 0] != (1 << 64) - 1])
        kind = rng.choice(["entry", "entry", "body", "body", "body", "head", "swap", "other"])
        offset, length = map(int, index[slot])
        if kind == "entry":
            offset = rng.choice([offset, offset + rng.randrange(-9, 9), *weird]) % (1 << 64)
            length = rng.choice([length, length + rng.randrange(-9, 9), len(content), *weird]) % (1 << 64)
            changed = with_entry(content, num_slots, slot, offset, length)
        elif kind == "swap":
            changed = with_entry(content, num_slots, slot, *map(int, index[rng.randrange(num_slots)]))
        elif kind == "other":
            changed = (path / rng.choice(places)[0]).read_bytes()
        else:

            def change(chunk: bytes, kind: str = kind) -> bytes:
                at = rng.randrange(min(len(chunk), 24)) if kind == "head" else rng.randrange(len(chunk))
                return rng.choice(
                    [
                        lambda: chunk[:at] + rng.randbytes(1) + chunk[at + 1 :],
                        lambda: chunk[:at] + rng.choice([b"\xff", b"\0", b"\x7f"]) * 4 + chunk[at + 4 :],
                        lambda: damage_bytes(chunk, rng)[0],
                        lambda: chunk[:at],
                        lambda: chunk + chunk,
                    ]
                )()

            changed = with_chunk(content, num_slots, slot, change)
        if changed != content:
            drawn.append(Mutation(name, changed, f"{name}: {kind} of slot {slot}"))
    return drawn


def test_no_damage_ever_passes_for_data(whole: tuple[Path, ZarrLayout], tmp_path: Path) -> None:
    path, layout = whole
    digest = digest_tree(path)[0]
    rng = random.Random(5)
    names = list(files_of(path))
    blind = []
    for _ in range(300):
        name = rng.choice(names)
        content = (path / name).read_bytes()
        changed, what = damage_bytes(content, rng)
        if changed != content:
            blind.append(Mutation(name, changed, f"{name}: {what}"))
    drawn = blind + crafted(path, layout, 500, seed=6)
    found = survey(path, tmp_path, drawn, lambda copy: {"read": look(copy, layout), "tree": digest_tree(copy)[0]})
    outcomes = [(mutation.what, result) for mutation, result in zip(drawn, found, strict=True)]
    assert not [(what, result) for what, result in outcomes if result.get("read") not in ("refused", "noticed", "same")]
    assert not [what for what, result in outcomes if result["tree"] == digest]
    # Blind damage never even reaches a digest: everything stored is behind a checksum or compared.
    assert not [what for what, result in outcomes[: len(blind)] if result["read"] == "noticed"]
    counted = {key: sum(result["read"] == key for _, result in outcomes) for key in ("refused", "noticed", "same")}
    assert counted["refused"] > len(drawn) / 2
    assert counted["noticed"] > 10


def test_every_missing_file_is_refused(whole: tuple[Path, ZarrLayout]) -> None:
    path, layout = whole
    for name, content in files_of(path).items():
        (path / name).unlink()
        check_refused(path, layout)
        (path / name).write_bytes(content)
    assert look(path, layout) == "same"


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "far link"])
def test_nothing_but_plain_files_is_read(whole: tuple[Path, ZarrLayout], tmp_path: Path, kind: str) -> None:
    path, layout = whole
    for name in ("zarr.json", "input_ids/zarr.json", "input_ids/c.0.0"):
        (path / name).rename(tmp_path / "away")
        if kind == "link":
            (path / name).symlink_to(tmp_path / "away")
        elif kind == "far link":
            (path / name).symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path / name)
        else:
            (path / name).mkdir()
        check_refused(path, layout)
        if kind != "directory":
            with pytest.raises(DataError, match="plain"):
                digest_tree(path)
        (path / name).rmdir() if kind == "directory" else (path / name).unlink()
        (tmp_path / "away").rename(path / name)
    assert look(path, layout) == "same"


def test_a_directory_that_is_a_link_is_refused(whole: tuple[Path, ZarrLayout], tmp_path: Path) -> None:
    path, layout = whole
    (path / "input_ids").rename(tmp_path / "away")
    (path / "input_ids").symlink_to(tmp_path / "away")
    check_refused(path, layout)
    with pytest.raises(DataError):
        digest_tree(path)
    (tmp_path / "other").symlink_to(path)
    with pytest.raises(DataError):
        digest_tree(tmp_path / "other")
    with pytest.raises(DataError):
        reader(tmp_path / "other", layout)
    with pytest.raises(DataError):
        digest_tree(tmp_path / "nothing")
    with pytest.raises(DataError):
        reader(tmp_path / "nothing", layout)


def test_a_shard_of_another_place_or_cache_is_refused(whole: tuple[Path, ZarrLayout]) -> None:
    path, layout = whole
    with pytest.raises(DataError, match="another cache"):
        ZarrShardReader(path, layout, 1, "d" * 32)
    with pytest.raises(DataError, match="another cache"):
        ZarrShardReader(path, layout, 0, "e" * 32)
    compressor = {"zstd": "blosc", "blosc": "zstd"}[layout.arrays[0].compressor]
    with pytest.raises(DataError, match="another cache"):
        reader(path, layout_of(identity(FEW, compressor), 0))
    with pytest.raises(DataError, match="another cache"):
        reader(path, layout_of(identity(FEW, layout.arrays[0].compressor, num_samples=10), 0))


def test_bombs_are_refused_before_they_unfold(whole: tuple[Path, ZarrLayout], tmp_path: Path) -> None:
    path, layout = whole
    array = next(array for array in layout.arrays if array.name == "input_ids")
    content = (path / "input_ids/c.0.0").read_bytes()
    honest = zstd.compress(bytes(array.chunk_bytes), 1)
    far = zstd.compress(bytes(1 << 30), 1)
    # A frame that declares the expected size and unfolds to a gigabyte.
    lying = honest[:4] + b"\x20" + bytes([array.chunk_bytes]) + far[far_header(far) :]
    nothing_declared = honest[:4] + b"\x00\x58" + far[far_header(far) :]
    packed = bytearray(blosc.compress(bytes(1 << 30), b"zstd", 1, blosc.SHUFFLE))
    shrunk = bytearray(packed)
    shrunk[4:8] = shrunk[8:12] = array.chunk_bytes.to_bytes(4, "little")
    bombs = [far, lying, nothing_declared, bytes(packed), bytes(shrunk), b"", b"\0", far[:9], bytes(packed[:16])]
    # Within what a chunk may take, so that the compressor itself is reached.
    bombs += [bomb[: array.chunk_bytes + 512] for bomb in bombs]
    drawn = [
        Mutation("input_ids/c.0.0", with_chunk(content, array.num_slots, 0, lambda _, b=bomb: b), f"bomb {i}")  # type: ignore[misc]
        for i, bomb in enumerate(bombs)
    ]
    found = survey(path, tmp_path, drawn, lambda copy: {"read": look(copy, layout)})
    assert [result.get("read", result) for result in found] == ["refused"] * len(drawn)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_only_chunks_of_the_expected_size_are_decompressed(compressor: str) -> None:
    coder = zarr_shards._COMPRESSORS[compressor]
    for size in (1, 100, 5000, zarr_shards.CHUNK_BYTES):
        for chunk in (np.arange(size, dtype=np.uint8), np.zeros(size, np.uint8)):
            stored = np.frombuffer(coder.compress(chunk), np.uint8)
            found = coder.decompress(stored, size)
            assert found is not None
            assert found.tobytes() == chunk.tobytes()
            for wrong in (size - 1, size + 1, 2 * size, 1 << 40):
                assert coder.decompress(stored, wrong) is None
            for cut in (0, 1, 5, 15, 16, len(stored) - 1):
                assert coder.decompress(stored[: min(cut, len(stored) - 1)], size) is None


def test_a_chunk_that_is_absent_or_too_long_is_said_to_be(whole: tuple[Path, ZarrLayout]) -> None:
    path, layout = whole
    array = next(array for array in layout.arrays if array.name == "input_ids")
    content = (path / "input_ids/c.0.0").read_bytes()
    for offset, length, message in (
        ((1 << 64) - 1, (1 << 64) - 1, "not there"),
        (0, 1 << 40, "claims to be stored"),
        (0, 4, "claims to be stored"),
        (len(content) - 9, 10, "are called for"),
        (0, 20, "checksum"),
    ):
        (path / "input_ids/c.0.0").write_bytes(with_entry(content, array.num_slots, 0, offset, length))
        with pytest.raises(DataError, match=message):
            reader(path, layout).read(0, 0)


def test_files_of_terabytes_are_not_read(whole: tuple[Path, ZarrLayout]) -> None:
    path, layout = whole
    for name in ("zarr.json", "input_ids/zarr.json", "input_ids/c.0.0", "num_tokens/c.0"):
        content = (path / name).read_bytes()
        os.truncate(path / name, 1 << 40)
        check_refused(path, layout)
        (path / name).write_bytes(content)
    assert look(path, layout) == "same"


def far_header(frame: bytes) -> int:
    """Return where a frame of a gigabyte's first block is: after a descriptor and, unless single, a window."""
    assert frame[4] >> 6 == 2
    return 5 + (0 if frame[4] >> 5 & 1 else 1) + 4


def test_numbers_that_no_sample_has_are_refused(whole: tuple[Path, ZarrLayout]) -> None:
    path, layout = whole
    slots = {array.name: array.num_slots for array in layout.arrays}
    compressor = zarr_shards._COMPRESSORS[layout.arrays[0].compressor]
    for name, dtype, values in (
        ("num_tokens", "<i4", (-1, 0, SEQ_LENGTH + 1, (1 << 31) - 1, -(1 << 31))),
        ("num_target_positions", "<i4", (-1, 2, SEQ_LENGTH + 1, (1 << 31) - 1)),
        ("sample_id", "<i8", (-1, -(1 << 63))),
    ):
        content = (path / name / "c.0").read_bytes()
        numbers = zarr.open_group(path, mode="r")[name][:].astype(dtype)
        for value in values:
            numbers[0] = value
            changed = with_chunk(content, slots[name], 0, lambda _, n=numbers: compressor.compress(n))  # type: ignore[misc]
            (path / name / "c.0").write_bytes(changed)
            with pytest.raises(DataError, match="claims"):
                reader(path, layout).read(0, 0)
        (path / name / "c.0").write_bytes(content)
    assert look(path, layout) == "same"


def test_a_manifest_that_promises_terabytes_costs_nothing(tmp_path: Path) -> None:
    """A sample claims two billion tokens, its chunks are missing: refused, neither believed nor filled with zeros."""
    field = FieldLayout(name="aux_2", width=1 << 20, dtype="fp32", encoding="raw", rows="tokens")
    layout = layout_of(identity([field], num_samples=1, seq_length=(1 << 31) - 1), 0)
    sample, _ = make_sample([], 1, 1, 0)
    write(tmp_path / "s", layout, [replace(sample, columns=[bytes(4 << 20)])])
    content = (tmp_path / "s/num_tokens/c.0").read_bytes()
    numbers = np.array([(1 << 31) - 1], "<i4")
    changed = with_chunk(content, 1, 0, lambda _: zstd.compress(numbers, 1))
    (tmp_path / "s/num_tokens/c.0").write_bytes(changed)
    with pytest.raises(DataError):
        reader(tmp_path / "s", layout).read(0, 0)


def test_files_exchanged_or_added_are_seen_in_the_tree(whole: tuple[Path, ZarrLayout]) -> None:
    path, layout = whole
    before = digest_tree(path)
    names = list(files_of(path))
    for one, other in itertools.islice(itertools.combinations(names, 2), 40):
        first, second = (path / one).read_bytes(), (path / other).read_bytes()
        if first == second:
            continue
        (path / one).write_bytes(second)
        (path / other).write_bytes(first)
        assert digest_tree(path) != before
        assert look(path, layout) in ("refused", "noticed"), (one, other)
        (path / one).write_bytes(first)
        (path / other).write_bytes(second)
    (path / "input_ids" / "more").write_bytes(b"")
    assert digest_tree(path) != before
    shutil.rmtree(path / "input_ids")
    assert digest_tree(path) != before

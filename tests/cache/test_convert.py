"""A converted cache is what the codec makes of the source's values, no more and no less; and it is a cache."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eagle_offline import open_cache
from eagle_offline.cache import arrow, filling
from eagle_offline.cache.changes import SampleConverter
from eagle_offline.cache.codec import losses_of
from eagle_offline.cache.layout import LAST_HIDDEN_STATE, FieldLayout
from eagle_offline.cache.manifest import differing_fields, read_manifest
from eagle_offline.cache.reader import Cache, Sample
from tests import builders
from tests.faults.driver import Driver, request
from tests.test_precompute import poisoned
from tests.training import caches

NUM_SAMPLES = 7
TOP_K = 9

SOURCES: dict[str, dict[str, Any]] = {
    "planes": {},
    "planes 4": {"mantissa_bits": 4},
    "raw fp32": {"state_encoding": "raw", "dtype": "fp32"},
    "raw fp16": {"state_encoding": "raw", "dtype": "fp16"},
    "fp8": {"state_encoding": "fp8"},
    "dense": {"target_encoding": "dense"},
    "topk": {"target_encoding": "topk", "top_k": TOP_K},
}


def source(kind: str = "planes") -> Path:
    """A whole cache of seven samples in three shards that no test changes."""
    return _made(kind)


@cache
def _made(kind: str) -> Path:
    place = builders.SCRATCH / f"convert-{kind.replace(' ', '-')}"
    return builders.make_cache(place, data=builders.shared_chat(NUM_SAMPLES), shard_size=3, **SOURCES[kind])


def arguments(cache: Path, output_dir: Path, **flags: Any) -> list[str]:
    """The command line of a conversion."""
    given = ["convert", str(cache), "--output-dir", str(output_dir)]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        given += [f"--{name.replace('_', '-')}", *map(str, values)]
    return given


def convert(cache: Path, output_dir: Path, *, verify: bool = True, **flags: Any) -> Path:
    """Convert in this process; the result is sound."""
    ended = builders.run_cli(*arguments(cache, output_dir, **flags))
    assert ended.code == 0, ended.err
    if verify:
        check_whole(output_dir)
    return output_dir


def check_whole(directory: Path) -> None:
    committed = {record["file"] for record in builders.record_contents(directory).values()}
    assert [name for name in builders.leftovers(directory) if name.split("/")[0] not in committed] == []
    inspected = builders.run_cli("inspect-manifest", directory, "--verify")
    assert inspected.code == 0, inspected.out + inspected.err


def refusal(code: int, cache: Path, output_dir: Path, **flags: Any) -> str:
    """The one line that a conversion is refused with."""
    ended = builders.run_cli(*arguments(cache, output_dir, **flags))
    lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert ended.code == code, ended.err
    assert len(lines) == 1
    assert "Traceback" not in ended.err
    return lines[0]


def layouts(cache: Path) -> dict[str, FieldLayout]:
    return {field.name: field for field in read_manifest(cache).identity.capture.fields}


def losses(cache: Path) -> dict[str, tuple[str, ...]]:
    return {name: field.losses for name, field in layouts(cache).items()}


def values(sample: Sample) -> torch.Tensor:
    """The states of a sample, those of all layers side by side, then the final ones or the probabilities."""
    supervision = sample.supervision
    return supervision.last_hidden_state if supervision.target_probs is None else supervision.target_probs


def check_plain(result: Cache, original: Cache) -> None:
    """Everything but the float fields is the source's."""
    assert len(result) == len(original)
    for ours, theirs in zip(result, original, strict=True):
        assert ours.sample_id == theirs.sample_id
        for name in ("input_ids", "loss_mask"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        for name in ("positions", "target_argmax", "target_log_normalizer"):
            assert torch.equal(getattr(ours.supervision, name), getattr(theirs.supervision, name))
    for name in ("num_in_vocab", "vocab_mass", "num_supervised"):
        assert np.array_equal(getattr(result.index, name), getattr(original.index, name)), name


# What becomes of values, by hand.


def as_bf16(exact: torch.Tensor) -> torch.Tensor:
    bits = exact.float().numpy().view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return torch.from_numpy(rounded.astype(np.uint32).view(np.float32)).bfloat16()


def as_fp16(exact: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(exact.float().numpy().astype(np.float16))


def with_mantissa(num_bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Significands rounded to so many bits behind the leading one, ties to even."""

    def rounded(exact: torch.Tensor) -> torch.Tensor:
        significand, exponent = np.frexp(as_bf16(exact).double().numpy())
        scale = 2.0 ** (num_bits + 1)
        return torch.from_numpy(np.ldexp(np.rint(significand * scale) / scale, exponent)).bfloat16()

    return rounded


def as_fp8(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def rounded(exact: torch.Tensor) -> torch.Tensor:
        wide = exact.float()
        scale = wide.abs().max(dim=1, keepdim=True).values / 448
        return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(dtype)

    return rounded


def check_top(found: torch.Tensor, exact: torch.Tensor, count: int) -> None:
    """The largest of a row are there as bf16, the mass of the others is spread over their places; ties are free."""
    probs = exact.float()
    kept = probs.sort(dim=1, descending=True).values[:, :count]
    tail = (probs.sum(dim=1, keepdim=True) - kept.sum(dim=1, keepdim=True)).clamp_min(0)
    spread = tail / (probs.shape[1] - count)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[probs > kept[:, -1:]], as_bf16(probs)[probs > kept[:, -1:]])
    wanted = torch.cat([kept, spread.expand(-1, probs.shape[1] - count)], dim=1)
    for ours, theirs in zip(found.float(), wanted, strict=True):
        # The tail is a sum, whose order is nobody's.
        assert torch.allclose(ours.sort().values, as_bf16(theirs.sort().values).float(), rtol=2**-7, atol=0)
        assert torch.equal(
            ours.sort(descending=True).values[:count], as_bf16(theirs).float().sort(descending=True).values[:count]
        )


STATES: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "planes": ({"state_encoding": "planes", "mantissa_bits": 7, "dtype": "bf16"}, as_bf16),
    "planes 5": ({"state_encoding": "planes", "mantissa_bits": 5, "dtype": "bf16"}, with_mantissa(5)),
    "raw bf16": ({"state_encoding": "raw", "dtype": "bf16"}, as_bf16),
    "raw fp16": ({"state_encoding": "raw", "dtype": "fp16"}, as_fp16),
    "raw fp32": ({"state_encoding": "raw", "dtype": "fp32"}, torch.Tensor.float),
    "fp8": ({"state_encoding": "fp8", "dtype": "bf16"}, as_fp8(torch.bfloat16)),
}

# What the values of a source have lost, and what its dtype is.
LOST = {"planes": (), "planes 4": ("4 mantissa bits",), "raw fp32": (), "raw fp16": (), "fp8": ("fp8",)}
ROUNDED = {
    **{(kind, "raw fp16"): ("fp16",) for kind in ("planes", "planes 4", "raw fp32", "fp8")},
    **{
        (kind, name): ("bf16",)
        for kind in ("raw fp32", "raw fp16")
        for name in STATES
        if name not in ("raw fp16", "raw fp32")
    },
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("kind", LOST)
def test_states_are_what_the_new_encoding_makes_of_the_old_ones(kind: str, name: str, tmp_path: Path) -> None:
    flags, expected = STATES[name]
    original = open_cache(source(kind))
    result = open_cache(convert(source(kind), tmp_path / "result", verify=kind == "planes", shard_size=100, **flags))
    check_plain(result, original)
    is_copy = kind == name
    for ours, theirs in zip(result, original, strict=True):
        for found, exact in ((ours.aux_hidden_states, theirs.aux_hidden_states), (values(ours), values(theirs))):
            wanted = exact if is_copy else expected_by_field(expected, exact)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    recorded = () if is_copy else (*LOST[kind], *ROUNDED.get((kind, name), ()))
    assert set(losses(result.path).values()) == {recorded}


def expected_by_field(change: Callable[[torch.Tensor], torch.Tensor], exact: torch.Tensor) -> torch.Tensor:
    """Fields one by one: a scale is a row's and a layer's."""
    return torch.cat([change(field) for field in exact.split(builders.HIDDEN_SIZE, dim=1)], dim=1)


def probabilities(cache: Cache, sample: Sample) -> torch.Tensor:
    """The softmax of final states times the head's rows of the draft vocabulary, in float32."""
    hidden = sample.supervision.last_hidden_state
    return (hidden.float() @ cache.head.weight[cache.selected_token_ids].float().T).softmax(dim=-1)


@pytest.mark.parametrize("kind", ["planes", "raw fp32", "fp8", "dense", "topk"])
@pytest.mark.parametrize("name", ["dense", "topk", "top 5"])
def test_targets_are_what_the_new_encoding_makes_of_the_old_ones(kind: str, name: str, tmp_path: Path) -> None:
    if (kind, name) == ("topk", "dense"):
        pytest.skip("what was left out cannot come back")
    flags = {"dense": {"target_encoding": "dense"}, "topk": {"target_encoding": "topk", "top_k": TOP_K}}
    flags["top 5"] = {"target_encoding": "topk", "top_k": 5}
    rounds = {"dtype": "bf16"} if kind == "raw fp32" else {}
    result = open_cache(convert(source(kind), tmp_path / "result", **flags[name], **rounds))
    original = open_cache(source(kind))
    check_plain(result, original)
    for ours, theirs in zip(result, original, strict=True):
        has_states = theirs.supervision.last_hidden_state is not None
        exact = probabilities(original, theirs) if has_states else theirs.supervision.target_probs
        if kind == name:
            assert torch.equal(values(ours), exact)
        elif name == "dense":
            assert torch.equal(values(ours), as_bf16(exact))
        else:
            check_top(values(ours), exact, TOP_K if name == "topk" else 5)
    capture = result.manifest.identity.capture
    assert capture.draft_vocab_digest == original.manifest.defaults.draft_vocabulary.digest
    before = {"raw fp32": ("bf16",), "fp8": ("fp8",), "topk": () if name == "topk" else (f"top {TOP_K}",)}
    assert losses(result.path)["target_probs"] == before.get(kind, ())


def test_a_projection_is_what_capture_would_have_stored(tmp_path: Path) -> None:
    result = open_cache(convert(source(), tmp_path / "result", target_encoding="dense"))
    captured = open_cache(source("dense"))
    assert [layout.model_dump() for layout in layouts(result.path).values()] == [
        layout.model_dump() for layout in layouts(captured.path).values()
    ]
    for ours, theirs in zip(result, captured, strict=True):
        # One product of several samples may add up in another order than the product of one.
        assert torch.allclose(values(ours).float(), values(theirs).float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("dense", {"target_encoding": "factored"}, "has dense only"),
        ("topk", {"target_encoding": "factored"}, "has topk only"),
        ("topk", {"target_encoding": "dense"}, "has topk only"),
        ("topk", {"top_k": TOP_K + 1}, f"kept {TOP_K} only"),
        ("planes", {"top_k": 3}, "--target-encoding topk"),
        ("planes", {"target_encoding": "topk", "top_k": 1000}, "--top-k 1000"),
        ("planes", {"mantissa_bits": 4, "state_encoding": "raw"}, "--mantissa-bits 4"),
        ("planes", {"mantissa_bits": 8}, "--mantissa-bits"),
        ("planes", {"dtype": "fp32"}, "--state-encoding raw"),
        ("raw fp32", {"state_encoding": "planes"}, "--dtype bf16"),
        ("planes", {"compressor": "blosc"}, "--format zarr"),
        ("planes", {"aux_layer_ids": [1, 2]}, "1 3 4"),
        ("planes", {"aux_layer_ids": [4, 1]}, "strictly increasing"),
        ("planes", {"samples": "3:3"}, "FIRST:LAST"),
        ("planes", {"samples": "0:8"}, "at most 7"),
        ("planes", {"samples": "four"}, "FIRST:LAST"),
        ("planes", {"process_index": 2, "process_count": 2}, "--process-count 2"),
        ("planes", {"shard_size": 0}, "--shard-size"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(kind: str, flags: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(2, source(kind), tmp_path / "result", **flags)
    assert not list((tmp_path / "result").glob("*.json"))


def test_a_result_inside_the_cache_or_around_it_is_refused(tmp_path: Path) -> None:
    place = Path(shutil.copytree(source(), tmp_path / "outer" / "cache"))
    before = builders.tree(tmp_path)
    for result in (place, place / "result", tmp_path / "outer", place / ".." / "cache" / "x" / ".."):
        assert "--output-dir" in refusal(2, place, result, resume=True)
    assert builders.tree(tmp_path) == before
    assert not (place / "result").exists()


def test_exact_planes_to_raw_and_back_are_the_same_shards(tmp_path: Path) -> None:
    raw = convert(source(), tmp_path / "raw", state_encoding="raw")
    back = convert(raw, tmp_path / "back", state_encoding="planes")
    digests = [read_manifest(cache).identity.digest.encode() for cache in (source(), back)]
    original, again = builders.shard_bytes(source()), builders.shard_bytes(back)
    assert [content.replace(*digests) for content in original.values()] == list(again.values())
    assert list(original) != list(again), "the identity is another one"


def test_a_conversion_without_flags_copies_what_is_stored(tmp_path: Path) -> None:
    for kind in SOURCES:
        result = convert(source(kind), tmp_path / kind)
        ours, theirs = builders.record_contents(result), builders.record_contents(source(kind))
        assert [record["samples"] for record in ours.values()] == [record["samples"] for record in theirs.values()]
        assert layouts(result) == layouts(source(kind))
        assert all(record["encoding_errors"] == {} for record in ours.values())


def test_encoding_errors_are_those_against_the_values_of_the_source(tmp_path: Path) -> None:
    result = convert(source("raw fp32"), tmp_path / "result", state_encoding="fp8", shard_size=NUM_SAMPLES)
    (record,) = builders.record_contents(result).values()
    squared = dict.fromkeys(layouts(result), (0.0, 0.0))
    for ours, theirs in zip(open_cache(result), open_cache(source("raw fp32")), strict=True):
        names = [name for name in squared if name != LAST_HIDDEN_STATE]
        found = [*ours.aux_hidden_states.split(builders.HIDDEN_SIZE, dim=1), values(ours)]
        exact = [*theirs.aux_hidden_states.split(builders.HIDDEN_SIZE, dim=1), values(theirs)]
        for name, x, y in zip([*names, LAST_HIDDEN_STATE], found, exact, strict=True):
            error, size = squared[name]
            squared[name] = (
                error + float((x.double() - y.double()).square().sum()),
                size + float(y.double().square().sum()),
            )
    for name, (error, size) in squared.items():
        recorded = record["encoding_errors"][name]
        assert error > 0
        assert recorded["squared_error"] == pytest.approx(error, rel=1e-4)
        assert recorded["squared_values"] == pytest.approx(size, rel=1e-4)


def test_values_beyond_fp16_are_refused_and_not_stored_as_infinite(tmp_path: Path) -> None:
    target = Path(shutil.copytree(builders.shared_target(), tmp_path / "target"))
    weights = target / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e6
    save_file(tensors, weights, metadata={"format": "pt"})
    large = builders.make_cache(tmp_path / "large", target)
    said = refusal(1, large, tmp_path / "result", dtype="fp16", state_encoding="raw")
    assert "fp16" in said
    assert "sample" in said
    assert not builders.shard_bytes(tmp_path / "result")


@pytest.mark.parametrize("shard_size", [1, 3, 100])
def test_samples_keep_their_order_whatever_the_size_of_shards(shard_size: int, tmp_path: Path) -> None:
    result = open_cache(convert(source(), tmp_path / "result", shard_size=shard_size))
    assert result.manifest.identity.num_shards == -(-NUM_SAMPLES // shard_size)
    check_plain(result, open_cache(source()))
    assert list(result.shards) == [number // shard_size for number in range(NUM_SAMPLES)]


@pytest.mark.parametrize(("asked", "taken", "recorded"), [
    ("2:6", range(2, 6), "2:6"), (":3", range(3), "0:3"), ("5:", range(5, 7), "5:7"), ("0:7", range(7), None),
])  # fmt: skip
def test_a_slice_is_those_samples_in_shards_counted_from_its_first(
    asked: str, taken: range, recorded: str | None, tmp_path: Path
) -> None:
    result = open_cache(convert(source(), tmp_path / "result", samples=asked))
    original = open_cache(source())
    assert list(result.sample_ids) == [original.sample_ids[number] for number in taken]
    assert [len(r["samples"]["row"]) for r in builders.record_contents(result.path).values()] == [
        min(3, len(taken) - start) for start in range(0, len(taken), 3)
    ]
    identity = result.manifest.identity
    assert identity.dataset.num_samples == len(taken)
    assert identity.converted_from is not None
    assert identity.converted_from.samples == recorded
    for ours, number in zip(result, taken, strict=True):
        assert torch.equal(ours.aux_hidden_states, original[number].aux_hidden_states)


def test_fewer_layers_are_those_layers_and_a_draft_trains_on_them(tmp_path: Path) -> None:
    result = convert(caches.shared_cache(), tmp_path / "result", aux_layer_ids=[1, 4], state_encoding="raw")
    original = open_cache(caches.shared_cache())
    width = builders.HIDDEN_SIZE
    for ours, theirs in zip(open_cache(result), original, strict=True):
        states = theirs.aux_hidden_states
        assert torch.equal(ours.aux_hidden_states, torch.cat([states[:, :width], states[:, 2 * width :]], dim=1))
    caches.train(caches.settings(tmp_path / "run", cache=(result,), num_epochs=1))
    weights = caches.checkpoint_tensors(tmp_path / "run")
    assert any(tensor.shape == (width, 2 * width) for tensor in weights.values()), "two layers go into the draft"


@pytest.mark.slow
def test_training_on_the_same_values_stored_otherwise_is_the_same_training(tmp_path: Path) -> None:
    """Raw and planes of the same values in the same shards give the same weights, bit for bit."""
    runs = []
    for encoding in ("raw", "planes"):
        result = convert(caches.shared_cache(), tmp_path / encoding, state_encoding=encoding)
        caches.train(caches.settings(tmp_path / f"run-{encoding}", cache=(result,), num_epochs=1))
        runs.append(caches.checkpoint_tensors(tmp_path / f"run-{encoding}"))
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_what_comes_along_is_copied_byte_for_byte(tmp_path: Path) -> None:
    result = convert(source(), tmp_path / "result", shard_size=2)
    names = read_manifest(source()).files
    assert read_manifest(result).files == names
    assert any(name.startswith("tokens/") for name in names)
    for name in names:
        assert (result / name).read_bytes() == (source() / name).read_bytes()
    saved = json.loads((result / "config.json").read_text())
    assert saved["shard_size"] == 2
    assert saved["state_encoding"] == "planes"
    assert saved["aux_layer_ids"] == builders.DEFAULT_AUX_LAYER_IDS
    assert json.loads((result / "status.json").read_text())["state"] == "done"
    shutil.rmtree(result)
    saved["output_dir"] = str(tmp_path / "again")
    (tmp_path / "again.json").write_text(json.dumps(saved))
    ended = builders.run_cli("convert", "--config", tmp_path / "again.json")
    assert ended.code == 0, ended.err
    assert read_manifest(tmp_path / "again").identity.capture.shard_size == 2


def test_a_conversion_of_a_conversion_says_where_it_comes_from(tmp_path: Path) -> None:
    first = convert(source(), tmp_path / "first", state_encoding="fp8", samples="1:6")
    second = convert(first, tmp_path / "second", state_encoding="planes", mantissa_bits=3, samples="0:4")
    history = read_manifest(second).identity.converted_from
    assert history is not None
    assert history.identity_digest == read_manifest(first).identity.digest
    assert history.samples == "0:4"
    assert history.earlier is not None
    assert history.earlier.identity_digest == read_manifest(source()).identity.digest
    assert history.earlier.samples == "1:6"
    assert history.earlier.earlier is None
    assert set(losses(second).values()) == {("fp8",)}
    assert list(open_cache(second).sample_ids) == list(open_cache(source()).sample_ids[1:5])
    third = convert(second, tmp_path / "third", state_encoding="raw", dtype="fp32")
    assert set(losses(third).values()) == {("fp8", "3 mantissa bits")}
    fourth = convert(second, tmp_path / "fourth", mantissa_bits=5)
    assert {losses_of(field) for field in layouts(fourth).values()} == {("fp8", "3 mantissa bits")}


@pytest.mark.parametrize("kind", ["fp8", "topk", "dense", "planes 4"])
def test_mantissa_bits_alone_ask_for_planes(kind: str, tmp_path: Path) -> None:
    alone = layouts(convert(source(kind), tmp_path / "alone", mantissa_bits=3))
    assert alone == layouts(convert(source(kind), tmp_path / "said", state_encoding="planes", mantissa_bits=3))
    assert alone["aux_1"].encoding == "planes"
    assert alone["aux_1"].mantissa_bits == 3


def test_mantissa_bits_of_what_is_not_bf16_say_how_to_get_there(tmp_path: Path) -> None:
    assert "--dtype bf16" in refusal(2, source("raw fp32"), tmp_path / "out", mantissa_bits=3)
    rounded = layouts(convert(source("raw fp32"), tmp_path / "bf16", mantissa_bits=3, dtype="bf16"))
    assert rounded["aux_1"].mantissa_bits == 3


@pytest.fixture(scope="module")
def gaps() -> Path:
    """Seven samples, three of them lost: two of the first shard, and the last."""
    directory = builders.SCRATCH / "convert-gaps"
    target = Path(shutil.copytree(builders.shared_target(), directory / "target"))
    poisoned(target, "of Z")
    rows = builders.conversations(NUM_SAMPLES)
    for row in (1, 2, 6):
        rows[row]["messages"] = [{"role": "user", "content": "Z"}, {"role": "assistant", "content": f"{row} two"}]
    chat = builders.write_jsonl(directory / "chat.jsonl", rows)
    return builders.make_cache(directory / "cache", target, chat, shard_size=3, on_nonfinite="drop")


@pytest.mark.parametrize("shard_size", [1, 2, 100])
@pytest.mark.parametrize("samples", ["0:7", "1:6"])
def test_lost_samples_keep_their_place_and_their_reason(
    gaps: Path, shard_size: int, samples: str, tmp_path: Path
) -> None:
    entries: list[int] = []
    for record in builders.record_contents(gaps).values():
        entries += [*record["samples"]["sample_id"], *(lost["sample_id"] for lost in record["lost"])]
    lost = {1, 2, 6}
    first, last = map(int, samples.split(":"))
    result = convert(gaps, tmp_path / "result", shard_size=shard_size, samples=samples)
    records = list(builders.record_contents(result).values())
    for shard, start in enumerate(range(first, last, shard_size)):
        own = entries[start : min(start + shard_size, last)]
        assert records[shard]["samples"]["sample_id"] == [entry for entry in own if entry not in lost]
        assert records[shard]["lost"] == [
            {"sample_id": entry, "reason": "non-finite states"} for entry in own if entry in lost
        ]
    assert sum(len(r["lost"]) + len(r["samples"]["row"]) for r in records) == last - first


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path: Path) -> None:
    ended = builders.run_cli(*arguments(source(), tmp_path / "result", dry_run=True, state_encoding="raw"))
    assert ended.code == 0, ended.err
    assert not (tmp_path / "result").exists()
    planned = json.loads(ended.out)
    made = convert(source(), tmp_path / "result", state_encoding="raw")
    stored = sum(len(content) for content in builders.shard_bytes(made).values())
    assert 0.5 < planned["estimated_bytes"] / stored < 2
    assert (planned["samples"], planned["shards"], planned["shards_committed"]) == (NUM_SAMPLES, 3, 0)
    before = builders.tree(made, without=())
    assert "state_encoding" in refusal(3, source(), made, dry_run=True, resume=True)
    assert builders.tree(made, without=()) == before


def test_top_k_costs_are_said_in_one_line(tmp_path: Path) -> None:
    ended = builders.run_cli(*arguments(source(), tmp_path / "topk", target_encoding="topk"))
    assert [line for line in ended.err.splitlines() if "sampling" in line] == [ended.err.splitlines()[0]]
    assert "sampling" not in builders.run_cli(*arguments(source(), tmp_path / "dense", target_encoding="dense")).err


def test_other_settings_and_another_source_are_refused_by_name_before_a_byte_changes(tmp_path: Path) -> None:
    result = convert(source(), tmp_path / "result", state_encoding="fp8")
    (result / "commit-000001.json").unlink()
    before = builders.tree(result, without=())
    for flags, names in (
        ({}, ["state_encoding", "encoding"]),
        ({"state_encoding": "fp8", "shard_size": 2}, ["capture.shard_size: recorded 3, now 2"]),
        ({"state_encoding": "fp8", "samples": "0:6"}, ["converted_from.samples: recorded None, now '0:6'"]),
        ({"state_encoding": "fp8", "aux_layer_ids": [1]}, ["aux_layer_ids"]),
    ):
        said = refusal(3, source(), result, resume=True, **flags)
        assert all(name in said for name in names)
    assert "identity_digest" in refusal(3, source("dense"), result, resume=True, state_encoding="fp8")
    assert "--resume" in refusal(2, source(), result, state_encoding="fp8")
    assert builders.tree(result, without=()) == before
    convert(source(), result, resume=True, state_encoding="fp8")


def test_a_property_that_differs_in_all_fields_is_named_once(tmp_path: Path) -> None:
    result = convert(source(), tmp_path / "result", verify=False, mantissa_bits=4)
    said = refusal(3, source(), result, resume=True, mantissa_bits=3).replace(str(result), "")
    assert "capture.fields.*.mantissa_bits: recorded 4, now 3. Give" in said
    said = refusal(3, source(), result, resume=True, target_encoding="dense").replace(str(result), "")
    assert len(said) <= 450
    assert "capture.target_encoding: recorded 'factored', now 'dense'" in said
    other = differing_fields(*(read_manifest(place).identity for place in (source(), result)))
    assert other["capture.fields.*.mantissa_bits"] == (7, 4)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(3, source(), tmp_path)
    shutil.copytree(source() / "tokens", tmp_path / "other" / "tokens")
    assert "tokens" in refusal(3, source(), tmp_path / "other", resume=True)


def test_a_source_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    place = Path(shutil.copytree(source(), tmp_path / "cache"))
    (place / "commit-000001.json").unlink()
    assert "1 of 3 shards" in refusal(4, place, tmp_path / "result")
    assert "missing" in refusal(4, tmp_path / "nowhere", tmp_path / "result", resume=True)
    assert not (tmp_path / "result" / "manifest.json").exists()


def test_a_damaged_source_is_refused_and_what_was_made_before_is_right(tmp_path: Path) -> None:
    place = Path(shutil.copytree(source(), tmp_path / "cache"))
    reference = convert(source(), tmp_path / "reference", state_encoding="raw", shard_size=2)
    damaged = place / builders.record_contents(place)["commit-000001.json"]["file"]
    content = damaged.read_bytes()
    middle = len(content) // 2
    damaged.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    result = tmp_path / "result"
    flags = {"state_encoding": "raw", "shard_size": 2}
    assert damaged.name in refusal(4, place, result, **flags)
    assert json.loads((result / "status.json").read_text())["exit_code"] == 4
    made, right = builders.shard_bytes(result), builders.shard_bytes(reference)
    assert 0 < len(made) < len(right)
    assert made.items() <= right.items()
    assert builders.leftovers(result) == []
    damaged.write_bytes(content)
    convert(place, result, resume=True, **flags)
    assert builders.shard_bytes(result) == right


@pytest.mark.parametrize("name", ["head.safetensors", "tokens/tokens.arrow"])
def test_a_damaged_companion_is_not_copied(name: str, tmp_path: Path) -> None:
    place = Path(shutil.copytree(source(), tmp_path / "cache"))
    content = (place / name).read_bytes()
    (place / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert name in refusal(4, place, tmp_path / "result")
    (place / name).unlink()
    assert name in refusal(4, place, tmp_path / "result", resume=True)
    assert not (tmp_path / "result" / name).exists()
    assert not builders.shard_bytes(tmp_path / "result")
    (place / name).write_bytes(content)
    convert(place, tmp_path / "result", resume=True)


def test_a_disk_too_small_is_refused_before_anything_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    said = refusal(6, source(), tmp_path / "result")
    assert "needed" in said
    assert "--samples" in said
    assert not (tmp_path / "result" / "manifest.json").exists()


def test_memory_stays_at_a_record_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "MERGED_BATCH_BYTES", 1)
    alive: list[weakref.ref] = []
    most = 0
    original = SampleConverter.convert

    def watched(converter: SampleConverter, *arguments: Any) -> Any:
        nonlocal most
        stored = original(converter, *arguments)
        alive.append(weakref.ref(stored))
        most = max(most, sum(reference() is not None for reference in alive))
        return stored

    monkeypatch.setattr(SampleConverter, "convert", watched)
    convert(source(), tmp_path / "result", state_encoding="raw", shard_size=100)
    assert len(alive) == NUM_SAMPLES
    assert most <= 2


# Accidents.

FLAGS = {"state_encoding": "fp8", "shard_size": 2}


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    running = Driver()
    yield running
    running.close()


@pytest.fixture(scope="module")
def reference(driver: Driver) -> tuple[Path, list[str]]:
    """A conversion that nothing happened to, and the steps it took."""
    place = builders.SCRATCH / "convert-reference"
    run = driver.run(arguments(source(), place, **FLAGS))
    assert run.code == 0, run.err
    return place, run.events


def check_same(directory: Path, reference: Path) -> None:
    check_whole(directory)
    ours, theirs = builders.tree(directory), builders.tree(reference)
    others = {name for name in ours if name.startswith("status-")} | {"config.json"}  # which names its directory
    assert {name: digest for name, (_, digest) in ours.items() if name not in others} == {
        name: digest for name, (_, digest) in theirs.items() if name not in others
    }


def moments(events: list[str], count: int) -> list[tuple[int, str]]:
    """Some of the steps of a run, evenly spread, and a half-written file among them."""
    every = [(number, when) for number in range(1, len(events) + 1) for when in ("before", "after")]
    halves = [(number, "half") for number, event in enumerate(events, start=1) if event.startswith("write_bytes")]
    return [*every[:: -(-len(every) // count)], *halves[:: -(-len(halves) // max(count // 4, 1))]]


@pytest.mark.parametrize("count", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_anywhere_then_resumed_by_any_number_of_processes_gives_the_same_bytes(
    driver: Driver, reference: tuple[Path, list[str]], tmp_path: Path, count: int
) -> None:
    place, events = reference
    for attempt, (event, when) in enumerate(moments(events, count)):
        result = tmp_path / str(attempt)
        run = driver.run(
            arguments(source(), result, resume=True, **FLAGS), {"event": event, "when": when, "kind": "kill"}
        )
        assert run.code == -9, run.err
        for record in builders.record_contents(result).values():
            assert (result / record["file"]).read_bytes() == (place / record["file"]).read_bytes()
        processes = attempt % 3 + 1
        again = driver.run_together(
            [
                request(arguments(source(), result, resume=True, process_index=n, process_count=processes, **FLAGS))
                for n in range(processes)
            ]
        )
        assert [run.code for run in again] == [0] * processes, again
        check_same(result, place)


def test_a_first_signal_finishes_the_shard_in_hand_or_drops_it(
    driver: Driver, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    place, events = reference
    first = next(number for number, event in enumerate(events, start=1) if event.startswith("write_batch"))
    last = max(number for number, event in enumerate(events, start=1) if event.startswith("write_batch"))
    begun = next(number for number, event in enumerate(events, start=1) if "manifest" in event)
    for event, grace_seconds, shards in ((first, 20, 1), (begun, 20, 0), (begun, 0, 0), (last, 20, 4)):
        result = tmp_path / f"{event}-{grace_seconds}"
        run = driver.run(
            arguments(source(), result, grace_seconds=grace_seconds, **FLAGS),
            {"event": event, "when": "before", "kind": "terminate"},
        )
        assert run.code == (0 if shards == 4 else 5), run.err
        assert len(builders.record_contents(result)) == shards
        assert builders.leftovers(result) == []
        status = json.loads((result / "status.json").read_text())
        assert status["state"] == ("done" if shards == 4 else "resumable")
        assert driver.run(arguments(source(), result, resume=True, **FLAGS)).code == 0
        check_same(result, place)


def test_a_full_disk_exits_6_and_resume_ends_well(
    driver: Driver, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    place, events = reference
    writing = [n for n, event in enumerate(events, start=1) if event.startswith(("write_batch", "link", "replace"))]
    writing = [n for n in writing if "status" not in events[n - 1]]
    for event in writing[:: max(1, len(writing) // 4)]:
        result = tmp_path / str(event)
        run = driver.run(arguments(source(), result, **FLAGS), {"event": event, "when": "before", "kind": "ENOSPC"})
        assert run.code == 6, f"{events[event - 1]}: {run.err}"
        assert len(run.errors) == 1
        # A shard that is whole and could not be committed is taken up again.
        assert [name for name in builders.leftovers(result) if not name.startswith("shard-")] == []
        assert driver.run(arguments(source(), result, resume=True, **FLAGS)).code == 0
        check_same(result, place)


def test_resuming_a_whole_result_changes_nothing_but_its_status(
    driver: Driver, reference: tuple[Path, list[str]]
) -> None:
    place, _ = reference
    before = builders.tree(place)
    run = driver.run(arguments(source(), place, resume=True, **FLAGS))
    assert run.code == 0, run.err
    assert builders.tree(place) == before
    assert not [event for event in run.events if "status" not in event and event != f"fsync {place}"]


def test_a_committed_shard_that_is_gone_is_reported(tmp_path: Path) -> None:
    result = convert(source(), tmp_path / "result", **FLAGS)
    gone = result / builders.record_contents(result)["commit-000001.json"]["file"]
    gone.unlink()
    assert gone.name in refusal(4, source(), result, resume=True, **FLAGS)


# Zarr.


@pytest.mark.parametrize(
    ("kind", "compressor"), [("planes", "zstd"), ("planes 4", "blosc"), ("fp8", "blosc"), ("topk", "zstd")]
)
def test_to_zarr_and_back_are_the_same_values(kind: str, compressor: str, tmp_path: Path) -> None:
    zarr = convert(source(kind), tmp_path / "zarr", format="zarr", compressor=compressor)
    assert layouts(zarr) == layouts(source(kind))
    check_plain(open_cache(zarr), open_cache(source(kind)))
    back = convert(zarr, tmp_path / "back", format="arrow")
    original, again = builders.record_contents(source(kind)), builders.record_contents(back)
    assert [record["samples"] for record in again.values()] == [record["samples"] for record in original.values()]
    (zarr / "commit-000001.json").unlink()
    convert(source(kind), zarr, format="zarr", compressor=compressor, resume=True)
